//! Running commands in another pod of the same job, as ssh would between machines.
//!
//! Each pod listens on its own address with a key of its own, which lies in the store beside the run. Who connects gets a
//! number that is used once and shows that it has the key by a hash over both and the command: what was overheard once is
//! worth nothing again. The command's output is the pod's own; its exit code comes back. Whoever hangs up ends the command.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What each line begins with that a pod says.
const GREETING: &str = "loquat-pod-1";
const LINE_BYTES_MAX: u64 = 1 << 10;
const COMMAND_BYTES_MAX: usize = 64 << 10;
/// Commands, and those who want to give one, at once.
const CALLS_MAX: usize = 16;
/// So long a caller has for its words.
const WORDS_MAX: Duration = Duration::from_secs(10);
const CONNECT_MAX: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(100);

/// Where a pod is, and what it wants to be shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Place {
    pub(crate) address: SocketAddr,
    pub(crate) key: String,
}

/// Listens to the other pods.
pub(crate) struct Agent {
    pub(crate) place: Place,
    ended: Receiver<u8>,
}

impl Agent {
    /// Listens on this address only, at whatever port is free.
    pub(crate) fn start(address: std::net::IpAddr) -> Result<Agent> {
        let listener =
            TcpListener::bind((address, 0)).with_context(|| format!("cannot listen on {address}"))?;
        let place = Place { address: listener.local_addr()?, key: crate::random_hex(32)? };
        let (send, ended) = channel();
        let key = place.key.clone();
        let listen = move || listen(&listener, &key, &send);
        std::thread::Builder::new()
            .name("pod".into())
            .spawn(listen)
            .context("no thread for the other pods")?;
        Ok(Agent { place, ended })
    }

    /// What the job ended with, once the first pod has said so.
    pub(crate) fn ended(&self, wait: Duration) -> Option<u8> {
        self.ended.recv_timeout(wait).ok()
    }
}

fn listen(listener: &TcpListener, key: &str, ended: &Sender<u8>) {
    let n_calls = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // Out of descriptors, say: it passes.
            std::thread::sleep(TICK);
            continue;
        };
        if n_calls.load(Ordering::Relaxed) >= CALLS_MAX {
            continue;
        }
        n_calls.fetch_add(1, Ordering::Relaxed);
        let (key, ended, n_calls) = (key.to_owned(), ended.clone(), n_calls.clone());
        std::thread::spawn(move || {
            if let Err(error) = answer(&stream, &key, &ended) {
                eprintln!("a call of another pod: {error:#}");
            }
            n_calls.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn answer(stream: &TcpStream, key: &str, ended: &Sender<u8>) -> Result<()> {
    stream.set_read_timeout(Some(WORDS_MAX))?;
    stream.set_write_timeout(Some(WORDS_MAX))?;
    let nonce = crate::random_hex(32)?;
    let mut writer = stream;
    writer.write_all(format!("{GREETING} {nonce}\n").as_bytes())?;
    let mut reader = BufReader::new(stream);
    let head = line(&mut reader)?;
    let words: Vec<&str> = head.split(' ').collect();
    let [shown, verb, n_bytes] = words[..] else { bail!("it says nothing that is known here") };
    let n_bytes: usize =
        n_bytes.parse().ok().filter(|n| *n <= COMMAND_BYTES_MAX).context("it is too long")?;
    let mut body = vec![0; n_bytes];
    reader.read_exact(&mut body)?;
    ensure!(is_same(shown, &proof(key, &nonce, verb, &body)), "it does not have this pod's key");
    let code = match verb {
        "run" => run(&mut reader, &String::from_utf8(body)?)?,
        "end" => {
            let code: u8 = String::from_utf8(body)?.parse()?;
            // Before this process ends by it.
            writer.write_all(format!("{code}\n").as_bytes())?;
            // Nobody waits for it any more where this is the second time.
            let _ = ended.send(code);
            return Ok(());
        }
        _ => bail!("{verb:?} is nothing that is done here"),
    };
    writer.write_all(format!("{code}\n").as_bytes())?;
    Ok(())
}

/// Runs a line of the shell until it ends, or the caller is gone.
fn run(caller: &mut BufReader<&TcpStream>, command: &str) -> Result<u8> {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).stdin(Stdio::null()).process_group(0);
    let mut child = shell.spawn().context("cannot start the shell")?;
    caller.get_ref().set_read_timeout(Some(TICK))?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(255));
        }
        match caller.read(&mut [0; 16]) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            _ => {
                end(&mut child)?;
                bail!("the caller is gone, and {} is ended", command.chars().take(60).collect::<String>());
            }
        }
    }
}

fn end(child: &mut Child) -> Result<()> {
    let group = format!("-{}", child.id());
    // It leads a group of its own, which lasts until it is waited for below.
    let status = Command::new("kill").args(["-TERM", "--", &group]).status().context("cannot start kill")?;
    if !status.success() {
        eprintln!("kill -TERM {group}: {status}");
    }
    child.wait()?;
    Ok(())
}

/// Has a pod do something; returns the exit code.
pub(crate) fn call(place: &Place, verb: &str, body: &[u8]) -> Result<u8> {
    let stream = TcpStream::connect_timeout(&place.address, CONNECT_MAX);
    let stream = stream.with_context(|| format!("cannot reach the pod at {}", place.address))?;
    stream.set_read_timeout(Some(WORDS_MAX))?;
    let mut reader = BufReader::new(&stream);
    let greeting = line(&mut reader)?;
    let nonce = greeting.strip_prefix(GREETING).and_then(|rest| rest.strip_prefix(' '));
    let nonce = nonce.with_context(|| format!("there is no pod of ours at {}", place.address))?;
    let head = format!("{} {verb} {}\n", proof(&place.key, nonce, verb, body), body.len());
    (&stream).write_all(&[head.as_bytes(), body].concat())?;
    // Commands take as long as they take; the other end's death shows by TCP.
    stream.set_read_timeout(None)?;
    let code = line(&mut reader).with_context(|| format!("the pod at {} refused", place.address))?;
    code.trim().parse().with_context(|| format!("the pod at {} says no exit code", place.address))
}

fn line(reader: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    reader.take(LINE_BYTES_MAX).read_line(&mut line)?;
    ensure!(line.ends_with('\n'), "the connection ended within a line");
    line.pop();
    Ok(line)
}

/// Hashed twice, so that nobody can go on from one hash to that of a longer command.
fn proof(key: &str, nonce: &str, verb: &str, body: &[u8]) -> String {
    let inner = Sha256::new().chain_update(format!("{key} {nonce} {verb} ")).chain_update(body).finalize();
    hex::encode(Sha256::new().chain_update(key).chain_update(inner).finalize())
}

/// In a time that does not tell where they differ.
fn is_same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn agent() -> Agent {
        Agent::start("127.0.0.1".parse().unwrap()).unwrap()
    }

    #[test]
    fn commands_are_run_and_their_codes_come_back() {
        let (agent, dir) = (agent(), tempfile::tempdir().unwrap());
        let said = dir.path().join("said");
        let command = format!("printf '%s' \"it's here\" > {}; exit 7", said.display());
        assert_eq!(call(&agent.place, "run", command.as_bytes()).unwrap(), 7);
        assert_eq!(std::fs::read_to_string(&said).unwrap(), "it's here");
        assert_eq!(call(&agent.place, "run", b"true").unwrap(), 0);
        assert_eq!(agent.ended(Duration::ZERO), None);
        assert_eq!(call(&agent.place, "end", b"75").unwrap(), 75);
        assert_eq!(agent.ended(WORDS_MAX), Some(75));
    }

    #[test]
    fn who_has_not_the_key_or_repeats_another_runs_nothing() {
        let (agent, dir) = (agent(), tempfile::tempdir().unwrap());
        let file = dir.path().join("ran");
        let command = format!("echo x >> {}", file.display());
        let wrong = Place { key: "0".repeat(64), ..agent.place.clone() };
        assert!(call(&wrong, "run", command.as_bytes()).unwrap_err().to_string().contains("refused"));
        // What was right for one connection is sent on another.
        let greet = || {
            let stream = TcpStream::connect(agent.place.address).unwrap();
            stream.set_read_timeout(Some(WORDS_MAX)).unwrap();
            let greeting = line(&mut BufReader::new(&stream)).unwrap();
            (stream, greeting.split_once(' ').unwrap().1.to_owned())
        };
        let words = |nonce: &str| {
            let shown = proof(&agent.place.key, nonce, "run", command.as_bytes());
            format!("{shown} run {}\n{command}", command.len())
        };
        let code = |mut stream: TcpStream, words: &str| {
            stream.write_all(words.as_bytes()).unwrap();
            let mut answer = String::new();
            // A connection that is reset has given no answer either.
            let _ = stream.read_to_string(&mut answer);
            answer
        };
        let (first, nonce) = greet();
        let heard = words(&nonce);
        assert_eq!(code(first, &heard), "0\n");
        assert_eq!(code(greet().0, &heard), "", "a replayed message");
        let (altered, nonce) = greet();
        assert_eq!(code(altered, &words(&nonce).replace(">>", "> ")), "", "an altered message");
        for noise in ["\n", "a b c d\n", "x run 99999999999999999999\n", "x run 65537\n", &"y".repeat(5000)] {
            assert_eq!(code(greet().0, noise), "", "{noise:.20}");
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "x\n");
        assert_eq!(call(&agent.place, "run", b"exit 3").unwrap(), 3, "and the next one is served");
    }

    #[test]
    fn a_caller_that_is_gone_takes_its_command_with_it() {
        let (agent, dir) = (agent(), tempfile::tempdir().unwrap());
        let pid = dir.path().join("pid");
        let command = format!("echo $$ > {0}.new; mv {0}.new {0}; sleep 600", pid.display());
        let mut stream = TcpStream::connect(agent.place.address).unwrap();
        let greeting = line(&mut BufReader::new(&stream)).unwrap();
        let shown = proof(&agent.place.key, greeting.split_once(' ').unwrap().1, "run", command.as_bytes());
        stream.write_all(format!("{shown} run {}\n{command}", command.len()).as_bytes()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let wait = |what: &str, done: &dyn Fn() -> bool| {
            while !done() {
                assert!(Instant::now() < deadline, "waited too long for {what}");
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        wait("its start", &|| pid.exists());
        let own = std::fs::read_to_string(&pid).unwrap();
        drop(stream);
        wait("its end", &|| !std::path::Path::new(&format!("/proc/{}", own.trim())).exists());
    }
}
