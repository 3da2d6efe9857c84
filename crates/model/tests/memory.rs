//! Peak memory of loading. A binary of its own, so that its process does nothing else.

use std::path::Path;

use model::{Transformer, gguf};
use tensor::Pool;

/// The most memory this process ever had.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Tensors are packed as they are read: the file is never in memory beside the packed copy.
#[test]
fn loading_holds_little_more_than_the_file() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../var/cache/smollm2-135m-instruct-q4_1.gguf");
    if !file.exists() || !Path::new("/proc/self/status").exists() {
        eprintln!("SKIPPED: {} or /proc is missing", file.display());
        return;
    }
    let file_bytes = std::fs::metadata(&file).unwrap().len();
    let pool = Pool::new(2);
    let before = peak_bytes();
    let model = Transformer::new(gguf::read(&file).unwrap().weights, &pool).unwrap();
    let taken = peak_bytes() - before;
    eprintln!("{taken} bytes at the peak for a file of {file_bytes} and {} packed", model.weight_bytes());
    assert!(taken as f64 <= 1.15 * file_bytes as f64, "{taken} bytes for a file of {file_bytes}");
}
