//! The Hugging Face hub's API, as far as fetching files needs it (<https://huggingface.co/docs/hub/api>).
//!
//! A hub is another computer: names, lengths and checksums it gives are checked, the key goes to it alone and never along
//! a redirect to another host, and a file gets its name only when its checksum is right.

mod address;

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::{Response, StatusCode};

use self::address::{escape, range_start, redirect, retry_after, same_host, shown};

const CONNECT_TIME_MAX: Duration = Duration::from_secs(30);
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);
/// One request of a download lasts this long at most; the next goes on where it was. So one that stands still is
/// noticed, and one that is slow loses nothing.
const BODY_TIME_MAX: Duration = Duration::from_secs(120);
/// Attempts that bring no new byte before it is given up.
const ATTEMPTS_MAX: u32 = 4;
/// The wait after the first failure; each further one doubles it.
const PATIENCE: Duration = Duration::from_millis(500);
const REDIRECTS_MAX: usize = 5;
/// The list of a repository's files.
const LIST_BYTES_MAX: u64 = 32 << 20;
const FILES_MAX: usize = 10_000;
const NAME_BYTES_MAX: usize = 400;
/// The largest single files on the hub have 50 GB.
const FILE_BYTES_MAX: u64 = 1 << 40;
const CHUNK_BYTES: usize = 1 << 20;

/// A hub and how to talk to it.
pub(crate) struct Hub {
    endpoint: String,
    token: Option<String>,
    agent: ureq::Agent,
}

/// A revision of a repository, pinned: what is fetched comes from one commit.
#[derive(Debug)]
pub(crate) struct Repo {
    pub(crate) name: String,
    pub(crate) commit: String,
    pub(crate) files: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    checksum: Checksum,
}

/// What tells that a file is the one that the list spoke of.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Checksum {
    /// Of a large file.
    Sha256(String),
    /// Of a small file that lies in git: SHA-1 of a header with its length, and its bytes.
    GitBlob(String),
}

#[derive(Deserialize)]
struct ListBody {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl Hub {
    pub(crate) fn new(endpoint: &str, token: Option<String>) -> Hub {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // Followed by hand: the key must not go along.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIME_MAX))
            .timeout_recv_response(Some(ANSWER_TIME_MAX))
            .timeout_recv_body(Some(BODY_TIME_MAX))
            .user_agent(concat!("loquat/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Hub { endpoint, token, agent }
    }

    /// Lists a revision: a branch, a tag or a commit.
    pub(crate) fn repo(&self, name: &str, revision: &str) -> Result<Repo> {
        check_repo_name(name)?;
        let url = format!("{}/api/models/{name}/revision/{}?blobs=true", self.endpoint, escape(revision));
        let response = self.retried(|| self.get(&url, 0))?;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(self.refusal(status, &format!("the model {name} at {revision}")));
        }
        let mut json = Vec::new();
        response.into_body().into_reader().take(LIST_BYTES_MAX + 1).read_to_end(&mut json)?;
        if json.len() as u64 > LIST_BYTES_MAX {
            bail!("the list of {name} has more than {LIST_BYTES_MAX} bytes");
        }
        let body: ListBody = serde_json::from_slice(&json)
            .with_context(|| format!("{} gives no list of {name} that can be read", self.endpoint))?;
        Repo::from_list(name, body)
    }

    /// Brings a file to `path`, going on from what an earlier call left. `progress` hears how many bytes are there.
    pub(crate) fn fetch(
        &self,
        repo: &Repo,
        file: &RemoteFile,
        path: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        if file.checksum.is_of(path, file.bytes)? {
            progress(file.bytes);
            return Ok(());
        }
        let part = part_path(path);
        let path_segments: Vec<String> = file.name.split('/').map(escape).collect();
        let url =
            format!("{}/{}/resolve/{}/{}", self.endpoint, repo.name, repo.commit, path_segments.join("/"));
        let mut n_failed = 0;
        loop {
            let before = part_bytes(&part);
            let attempt = self.fetch_once(&url, file, &part, progress);
            let now = part_bytes(&part);
            n_failed = if now > before { 0 } else { n_failed + 1 };
            match attempt {
                Ok(()) => break,
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing { error, .. }) if n_failed >= ATTEMPTS_MAX => {
                    return Err(error.context(format!("{} could not be fetched", file.name)));
                }
                Err(Failure::Passing { wait, .. }) => {
                    std::thread::sleep(wait.unwrap_or(PATIENCE * 2u32.pow(n_failed)));
                }
            }
        }
        if !file.checksum.is_of(&part, file.bytes)? {
            std::fs::remove_file(&part).with_context(|| format!("cannot remove {}", part.display()))?;
            bail!("{} came with a wrong checksum; what came was thrown away", file.name);
        }
        std::fs::rename(&part, path).with_context(|| format!("cannot write {}", path.display()))
    }

    fn fetch_once(
        &self,
        url: &str,
        file: &RemoteFile,
        part: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Failure> {
        let mut have = part_bytes(part);
        if have > file.bytes {
            std::fs::remove_file(part).map_err(|e| Failure::disk(e, part))?;
            have = 0;
        }
        if have == file.bytes && have > 0 {
            return Ok(());
        }
        let response = self.get(url, have)?;
        match response.status() {
            StatusCode::OK => have = 0,
            StatusCode::PARTIAL_CONTENT if range_start(response.headers()) == Some(have) => {}
            StatusCode::PARTIAL_CONTENT => {
                return Err(Failure::passing(anyhow!(
                    "{}: the server sent another part than asked for",
                    file.name
                )));
            }
            status => return Err(Failure::Final(self.refusal(status, &file.name))),
        }
        let mut out = OpenOptions::new()
            .create(true)
            .append(have > 0)
            .truncate(have == 0)
            .write(true)
            .open(part)
            .map_err(|e| Failure::disk(e, part))?;
        let mut body = response.into_body().into_reader();
        let mut chunk = vec![0; CHUNK_BYTES];
        progress(have);
        loop {
            let n = body
                .read(&mut chunk)
                .map_err(|e| Failure::passing(anyhow!(e).context("the connection broke")))?;
            if n == 0 {
                break;
            }
            have += n as u64;
            if have > file.bytes {
                let too_long = anyhow!("{}: more came than the {} bytes of the list", file.name, file.bytes);
                return Err(Failure::Final(too_long));
            }
            out.write_all(&chunk[..n]).map_err(|e| Failure::disk(e, part))?;
            progress(have);
        }
        out.sync_all().map_err(|e| Failure::disk(e, part))?;
        if have < file.bytes {
            let short = anyhow!("{}: the connection ended at byte {have} of {}", file.name, file.bytes);
            return Err(Failure::passing(short));
        }
        Ok(())
    }

    /// A request from byte `from` on, redirects followed.
    fn get(&self, url: &str, from: u64) -> Result<Response<ureq::Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..=REDIRECTS_MAX {
            let mut request = self.agent.get(&url);
            if let Some(token) = self.token.as_ref().filter(|_| same_host(&url, &self.endpoint)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| match error {
                ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                    Failure::Final(anyhow!("{} is no URL that can be asked", shown(&url)))
                }
                error => Failure::passing(anyhow!(error).context(format!("cannot reach {}", shown(&url)))),
            })?;
            let status = response.status();
            if status.is_redirection() {
                url = redirect(&url, response.headers()).map_err(Failure::Final)?;
                continue;
            }
            if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
                let wait = retry_after(response.headers());
                return Err(Failure::Passing { error: self.refusal(status, &shown(&url)), wait });
            }
            return Ok(response);
        }
        Err(Failure::Final(anyhow!("more than {REDIRECTS_MAX} redirects, the last to {}", shown(&url))))
    }

    fn retried<T>(&self, work: impl Fn() -> Result<T, Failure>) -> Result<T> {
        let mut n_failed = 0;
        loop {
            match work() {
                Ok(done) => return Ok(done),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing { error, wait }) => {
                    n_failed += 1;
                    if n_failed >= ATTEMPTS_MAX {
                        return Err(error);
                    }
                    std::thread::sleep(wait.unwrap_or(PATIENCE * 2u32.pow(n_failed)));
                }
            }
        }
    }

    fn refusal(&self, status: StatusCode, what: &str) -> anyhow::Error {
        let hint = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                ": it does not exist, or needs a key (HF_TOKEN) whose owner has been let in"
            }
            StatusCode::NOT_FOUND => ": there is no such thing",
            StatusCode::TOO_MANY_REQUESTS => ": too many requests, try again later",
            _ => "",
        };
        anyhow!("{} answers {} for {what}{hint}", self.endpoint, status.as_u16())
    }
}

/// Why an attempt failed.
enum Failure {
    /// Trying again would not help.
    Final(anyhow::Error),
    Passing {
        error: anyhow::Error,
        wait: Option<Duration>,
    },
}

impl Failure {
    fn passing(error: anyhow::Error) -> Failure {
        Failure::Passing { error, wait: None }
    }

    fn disk(error: std::io::Error, path: &Path) -> Failure {
        let what = match error.kind() {
            ErrorKind::StorageFull => "the disk is full: cannot write",
            _ => "cannot write",
        };
        Failure::Final(anyhow!(error).context(format!("{what} {}", path.display())))
    }
}

impl Repo {
    fn from_list(name: &str, body: ListBody) -> Result<Repo> {
        let is_commit = body.sha.len() == 40 && body.sha.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_commit {
            bail!("the list of {name} names no commit");
        }
        if body.siblings.len() > FILES_MAX {
            bail!("{name} has {} files, at most {FILES_MAX} are read", body.siblings.len());
        }
        let files: Result<Vec<RemoteFile>> =
            body.siblings.into_iter().map(RemoteFile::from_sibling).collect();
        Ok(Repo { name: name.to_owned(), commit: body.sha, files: files? })
    }
}

impl RemoteFile {
    fn from_sibling(sibling: Sibling) -> Result<RemoteFile> {
        let name = sibling.rfilename;
        check_file_name(&name)?;
        let hex = |text: &str, len: usize| text.len() == len && text.bytes().all(|b| b.is_ascii_hexdigit());
        let (bytes, checksum) = match (sibling.lfs, sibling.blob_id, sibling.size) {
            (Some(lfs), ..) if hex(&lfs.sha256, 64) => {
                (lfs.size, Checksum::Sha256(lfs.sha256.to_lowercase()))
            }
            (None, Some(id), Some(size)) if hex(&id, 40) => (size, Checksum::GitBlob(id.to_lowercase())),
            _ => bail!("the list gives no checksum of {name}"),
        };
        if bytes > FILE_BYTES_MAX {
            bail!("{name} has {bytes} bytes by the list, at most {FILE_BYTES_MAX} are fetched");
        }
        Ok(RemoteFile { name, bytes, checksum })
    }
}

impl Checksum {
    /// Whether the file at `path` is there and the right one.
    fn is_of(&self, path: &Path, bytes: u64) -> Result<bool> {
        let failed = || format!("cannot read {}", path.display());
        match std::fs::metadata(path) {
            Ok(meta) if meta.len() == bytes => {}
            Ok(_) => return Ok(false),
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e).with_context(failed),
        }
        let mut file = File::open(path).with_context(failed)?;
        let found = match self {
            Checksum::Sha256(_) => hash_file(&mut file, Sha256::new()),
            Checksum::GitBlob(_) => hash_file(&mut file, Sha1::new().chain_update(format!("blob {bytes}\0"))),
        };
        let (Checksum::Sha256(wanted) | Checksum::GitBlob(wanted)) = self;
        Ok(found.with_context(failed)? == *wanted)
    }
}

fn hash_file(file: &mut File, mut hash: impl Digest) -> std::io::Result<String> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hex::encode(hash.finalize())),
            n => hash.update(&chunk[..n]),
        }
    }
}

fn part_path(path: &Path) -> std::path::PathBuf {
    let name = path.file_name().map_or_else(Default::default, |n| n.to_string_lossy().into_owned());
    path.with_file_name(format!("{name}.part"))
}

fn part_bytes(part: &Path) -> u64 {
    part.metadata().map_or(0, |meta| meta.len())
}

/// `owner/name`, or a name without an owner.
pub(crate) fn check_repo_name(name: &str) -> Result<()> {
    let parts: Vec<&str> = name.split('/').collect();
    let is_plain = |part: &&str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    if parts.len() > 2 || !parts.iter().all(is_plain) {
        bail!("{name:?} is not the name of a model: OWNER/NAME is");
    }
    Ok(())
}

/// A file's name becomes a path here, so it must not lead anywhere else.
fn check_file_name(name: &str) -> Result<()> {
    let is_plain = |part: &str| {
        !matches!(part, "" | "." | "..") && !part.chars().any(|c| c.is_control() || c == '\\' || c == ':')
    };
    if name.len() > NAME_BYTES_MAX || !name.split('/').all(is_plain) {
        bail!("the list names a file {:?}, which is refused", name.chars().take(100).collect::<String>());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for bad in
            ["", "..", "../x", "a/../b", "/etc/passwd", "a//b", "a\\b", "c:x", "a\nb", &"x".repeat(401)]
        {
            assert!(check_file_name(bad).is_err(), "{bad}");
        }
        for good in ["config.json", "onnx/model.onnx", "model-00001-of-00002.safetensors", "ü.txt"] {
            assert!(check_file_name(good).is_ok(), "{good}");
        }
        for bad in ["", "a/b/c", "../a", "a/..", "a/b?x", "a b", "a/"] {
            assert!(check_repo_name(bad).is_err(), "{bad}");
        }
        assert!(
            check_repo_name("HuggingFaceTB/SmolLM2-135M-Instruct").is_ok() && check_repo_name("gpt2").is_ok()
        );
    }

    #[test]
    fn a_full_disk_is_called_so() {
        let Failure::Final(error) = Failure::disk(ErrorKind::StorageFull.into(), Path::new("x.part")) else {
            panic!("trying again does not help");
        };
        assert!(error.to_string().contains("disk is full: cannot write x.part"), "{error}");
    }

    #[test]
    fn a_list_without_checksums_is_refused() {
        let sibling = |json: &str| RemoteFile::from_sibling(serde_json::from_str(json).unwrap());
        let sha256 = "a".repeat(64);
        let good = format!(r#"{{"rfilename":"m","size":3,"lfs":{{"sha256":"{sha256}","size":3}}}}"#);
        assert_eq!(sibling(&good).unwrap().bytes, 3);
        let huge = good.replace("\"size\":3}", "\"size\":18446744073709551615}");
        for bad in [r#"{"rfilename":"m"}"#, r#"{"rfilename":"m","size":1,"blobId":"xyz"}"#, &huge] {
            assert!(sibling(bad).is_err(), "{bad}");
        }
    }
}
