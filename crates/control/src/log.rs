//! A job's log: one file all attempts append to, cut when it grows too long, read from its end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Opens the log for appending and writes `header` as a line of its own.
pub(crate) fn open(path: &Path, header: &str) -> Result<File> {
    let opened = OpenOptions::new().append(true).create(true).open(path);
    opened
        .and_then(|mut file| {
            writeln!(file, "{header}")?;
            Ok(file)
        })
        .map_err(|source| failed(path, source))
}

/// Moves what was written to `PATH.1` and empties the log when it is longer than `bytes_max`, so that both together stay
/// bounded. The process keeps its file open for appending, so the file is emptied in place; what it writes in between is
/// lost, which a log may.
pub(crate) fn rotate(path: &Path, bytes_max: u64) -> Result<()> {
    let length = match fs::metadata(path) {
        Ok(found) => found.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(failed(path, source)),
    };
    if length <= bytes_max {
        return Ok(());
    }
    let kept = last_bytes(path, bytes_max).map_err(|source| failed(path, source))?;
    fs::write(older(path), kept)
        .and_then(|()| OpenOptions::new().write(true).open(path)?.set_len(0))
        .map_err(|source| failed(path, source))
}

/// The last `bytes_max` bytes of the log, older part included, from the start of a line.
pub(crate) fn tail(path: &Path, bytes_max: usize) -> Result<String> {
    let read = |path: &Path, n: usize| match last_bytes(path, n as u64 + 1) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|source| failed(path, source)),
    };
    let mut bytes = read(path, bytes_max)?;
    if bytes.len() < bytes_max {
        let mut all = read(&older(path), bytes_max - bytes.len())?;
        all.append(&mut bytes);
        bytes = all;
    }
    if bytes.len() > bytes_max {
        // One byte more was read than asked for: it tells whether the cut is at the start of a line.
        let cut = bytes.len() - bytes_max - 1;
        let start = bytes[cut..].iter().position(|byte| *byte == b'\n');
        bytes.drain(..start.map_or(cut + 1, |at| cut + at + 1));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Removes the log; it may be gone already.
pub(crate) fn remove(path: &Path) -> Result<()> {
    for path in [path, &older(path)] {
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(failed(path, source));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The log's bytes from `from` on, at most `n` of them, and where they end. Without `from`, or where the log is shorter,
/// because it was cut or begun anew: its end, from the start of a line.
pub(crate) fn from(path: &Path, from: Option<u64>, n: usize) -> Result<(Vec<u8>, u64)> {
    let read = || -> io::Result<(Vec<u8>, u64)> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let asked = from.filter(|from| *from <= length);
        let start = asked.unwrap_or(length.saturating_sub(n as u64));
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take((n as u64).min(length - start)).read_to_end(&mut bytes)?;
        let end = start + bytes.len() as u64;
        let line = bytes.iter().position(|byte| *byte == b'\n');
        if let (None, 1.., Some(at)) = (asked, start, line) {
            bytes.drain(..=at);
        }
        Ok((bytes, end))
    };
    match read() {
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok((Vec::new(), 0)),
        read => read.map_err(|source| failed(path, source)),
    }
}

fn last_bytes(path: &Path, n: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(n)))?;
    let mut bytes = Vec::new();
    file.take(n).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

fn failed(path: &Path, source: io::Error) -> Error {
    Error::JobLog { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_starts_at_a_line_and_reaches_into_the_older_part() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("job-1.log");
        assert_eq!(tail(&path, 100).unwrap(), "");
        fs::write(&path, "one\ntwo\nthree\n").unwrap();
        let check = |n, expected| assert_eq!(tail(&path, n).unwrap(), expected, "{n} bytes");
        check(100, "one\ntwo\nthree\n");
        check(14, "one\ntwo\nthree\n");
        check(13, "two\nthree\n");
        check(10, "two\nthree\n");
        check(9, "three\n");
        check(0, "");
        fs::write(older(&path), "zero\n").unwrap();
        check(100, "zero\none\ntwo\nthree\n");
        check(19, "zero\none\ntwo\nthree\n");
        check(18, "one\ntwo\nthree\n");
    }

    #[test]
    fn a_log_is_read_on_from_where_it_was_read_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("job-1.log");
        let check = |at, n, text: &str, next| {
            assert_eq!(from(&path, at, n).unwrap(), (text.as_bytes().to_vec(), next), "{at:?} {n}");
        };
        check(None, 10, "", 0);
        fs::write(&path, "one\ntwo\n").unwrap();
        check(None, 100, "one\ntwo\n", 8);
        check(None, 6, "two\n", 8);
        check(Some(2), 100, "e\ntwo\n", 8);
        check(Some(2), 3, "e\nt", 5);
        check(Some(8), 100, "", 8);
        // Begun anew.
        check(Some(9), 100, "one\ntwo\n", 8);
    }

    #[test]
    fn a_long_line_is_cut_rather_than_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("job-1.log");
        fs::write(&path, "x".repeat(1000)).unwrap();
        assert_eq!(tail(&path, 10).unwrap(), "x".repeat(10));
        fs::write(&path, [0xff, b'a', b'\n']).unwrap();
        assert_eq!(tail(&path, 10).unwrap(), "\u{fffd}a\n");
    }

    #[test]
    fn a_rotated_log_stays_bounded_while_a_writer_appends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("job-1.log");
        let mut writer = open(&path, "start").unwrap();
        for line in 0..1000 {
            writeln!(writer, "line {line}").unwrap();
            rotate(&path, 1000).unwrap();
            let total = fs::metadata(&path).unwrap().len()
                + fs::metadata(older(&path)).map_or(0, |found| found.len());
            assert!(total <= 2020, "{total}");
        }
        let text = tail(&path, 100).unwrap();
        assert!(text.ends_with("line 998\nline 999\n"), "{text:?}");
        remove(&path).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
