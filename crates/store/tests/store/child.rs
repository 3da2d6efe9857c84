//! Work for a second process: this test binary, called again to run one of the tests below, which do nothing when they
//! are run as tests.

use std::path::Path;
use std::process::{Command, Stdio};

use store::{Error, Local, Store};

use crate::suite::{name, pattern};

const ROOT: &str = "STORE_TEST_CHILD_ROOT";

/// `exe --exact child::<work>` with the root of a store.
pub(crate) fn command(work: &str, root: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("child::{work}"), "--nocapture", "--test-threads=1"]);
    command.env(ROOT, root).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn root() -> Option<std::path::PathBuf> {
    std::env::var_os(ROOT).map(Into::into)
}

/// Bytes that say what they should be: number, length, pattern.
pub(crate) fn numbered(number: u64) -> Vec<u8> {
    let n_bytes = 1 + number.wrapping_mul(7919) % 300_000;
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.extend(n_bytes.to_le_bytes());
    bytes.extend(pattern(n_bytes as usize, number));
    bytes
}

/// The number of an object, if it is whole and right.
pub(crate) fn number_of(bytes: &[u8]) -> Option<u64> {
    let number = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    (bytes == numbered(number)).then_some(number)
}

/// Puts until killed, and says `put NAME NUMBER` on a line after each.
#[test]
fn put_until_killed() {
    let Some(root) = root() else { return };
    let store = Local::open(&root).unwrap();
    let first: u64 = std::env::var("STORE_TEST_CHILD_FIRST").unwrap().parse().unwrap();
    println!();
    for number in first.. {
        let object = name(&format!("replaced/{}/x", number % 5));
        store.put(&object, &numbered(number)).unwrap();
        println!("put {object} {number}");
        let object = name(&format!("new/{number}"));
        let _ = store.put_if_absent(&object, &numbered(number)).unwrap();
        println!("put {object} {number}");
    }
}

/// Puts an object that does not fit, and says what came of it.
#[test]
fn put_too_much() {
    let Some(root) = root() else { return };
    let store = Local::open(&root).unwrap();
    println!();
    match store.put(&name("big/object"), &pattern(4 << 20, 1)) {
        Err(Error::DiskFull { name, .. }) => println!("disk full: {name}"),
        Err(error) => {
            println!("error: {error}: {:?}", std::error::Error::source(&error).map(ToString::to_string))
        }
        Ok(()) => println!("it fit"),
    }
    store.put(&name("small"), b"goes on").unwrap();
}
