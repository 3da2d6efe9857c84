//! The controller's disk is full, and what listens where.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::support::{Running, loquat, output, succeed};

/// A file system of a few megabytes, gone with the test.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, said loudly, where none may be made.
    fn new(at: &Path, megabytes: u32) -> Option<SmallDisk> {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("size={megabytes}m");
        let made =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "loquat-test"]).arg(at).status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("SKIPPED: no file system can be mounted here");
            return None;
        }
        Some(SmallDisk(at.to_owned()))
    }

    /// Takes all room there is, in a file.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        // It ends with "no space left".
        drop(std::io::copy(&mut std::io::repeat(0), &mut std::fs::File::create(&path).unwrap()));
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(&self.0).status());
    }
}

#[test]
fn a_full_disk_refuses_changes_by_name_and_serving_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::new(&directory.path().join("disk"), 24) else { return };
    let home = disk.0.join("home");
    succeed(&home, &["key", "create", "k"]);
    let mut up = Running::start(loquat(&home).args(["up", "--port", "0", "--kv-mib", "8"]));
    let client = up.client();
    let submit = |name: &str| client.post("/v1/jobs", &json!({"name": name, "args": ["key", "list"]}));
    assert_eq!(submit("before").0, 200);

    let filler = disk.fill();
    let mut refused = (200, String::new());
    // What SQLite's log has room for is taken still.
    for n in 0..500 {
        refused = submit(&format!("full{n}"));
        if refused.0 != 200 {
            break;
        }
    }
    assert!(refused.0 == 503 && refused.1.contains("disk of the cluster's database is full"), "{refused:?}");
    let told = output(&home, &["key", "create", "k2"]);
    let text = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(!told.status.success() && text.contains("full") && text.contains("loquat.db"), "{text}");
    for _ in 0..20 {
        assert_eq!(client.get("/v1/models").0, 200, "who was known is known");
        assert_eq!(client.get("/v1/jobs").0, 200, "what is there can be seen");
        std::thread::sleep(Duration::from_millis(20));
    }

    std::fs::remove_file(filler).unwrap();
    let again = submit("after");
    assert_eq!(again.0, 200, "{}", again.1);
    assert!(client.get("/v1/jobs").1.contains("\"before\""), "what was acknowledged is there");
    assert_eq!(up.stop(), Some(0));
}

#[test]
fn ports_listen_where_they_are_told_and_nowhere_else() {
    let directory = tempfile::tempdir().unwrap();
    let mut up = Running::start(loquat(directory.path()).args(["up", "--port", "0", "--kv-mib", "8"]));
    let client = up.client();
    let address = client.base.strip_prefix("http://").unwrap();
    let (host, port) = address.split_once(':').unwrap();
    assert_eq!(host, "127.0.0.1", "without --host");
    assert!(TcpStream::connect((host, port.parse().unwrap())).is_ok());
    // Every address of 127/8 is this machine's: one who listens on all of them would be found here.
    assert!(TcpStream::connect(("127.0.0.2", port.parse::<u16>().unwrap())).is_err());
    assert_eq!(up.stop(), Some(0));
}
