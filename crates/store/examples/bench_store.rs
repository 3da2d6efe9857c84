//! How fast a directory keeps objects, beside plain files on the same disk:
//! `cargo run --release -p store --example bench_store [DIRECTORY]`
//!
//! Every time is the best of some; what is read is compared with what was written first.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use store::{Local, ObjectName, Store};

const ROUNDS: usize = 7;

fn main() -> Result<(), Box<dyn Error>> {
    let parent = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    let dir = tempfile::tempdir_in(parent)?;
    let store = Local::open(&dir.path().join("store"))?;
    let object = ObjectName::parse("bench/object")?;
    let file = dir.path().join("file");
    println!("{:>10}  {:>22} {:>22} {:>22}", "", "put | file + fsync", "get | file", "file without fsync");
    for n_bytes in [4 << 10, 2 << 20, 64 << 20] {
        let bytes: Vec<u8> =
            (0..n_bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        store.put(&object, &bytes)?;
        fs::write(&file, &bytes)?;
        if store.get(&object)? != bytes || fs::read(&file)? != bytes {
            return Err("what was read is not what was written".into());
        }
        let put = best(|| Ok(store.put(&object, &bytes)?))?;
        let synced = best(|| write(&file, &bytes, true))?;
        let unsynced = best(|| write(&file, &bytes, false))?;
        let get = best(|| Ok(store.get(&object)?))?;
        let read = best(|| Ok(fs::read(&file)?))?;
        let rate = |seconds: f64| n_bytes as f64 / 1e6 / seconds;
        println!(
            "{:>6} KiB  {:>9.0} | {:>5.0} MB/s {:>10.0} | {:>5.0} MB/s {:>14.0} MB/s",
            n_bytes >> 10,
            rate(put),
            rate(synced),
            rate(get),
            rate(read),
            rate(unsynced),
        );
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8], sync: bool) -> Result<(), Box<dyn Error>> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    if sync {
        file.sync_all()?;
    }
    Ok(())
}

fn best<T>(mut work: impl FnMut() -> Result<T, Box<dyn Error>>) -> Result<f64, Box<dyn Error>> {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        std::hint::black_box(work()?);
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}
