//! Files as rows of text: one reader per format, all bounded in memory.

mod json;
mod jsonl;
mod lines;
mod parquet;
mod row;
mod text;

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use crate::error::Place;
use crate::{Content, Error, ReadOptions, Result};

const BUFFER_BYTES: usize = 1 << 20;

/// The rows of one file. After [`Error::Row`] it can go on with the next row; after any other error it is done.
pub(crate) trait Rows: Send {
    /// Index of the row (line or row number, from 1) and its text.
    fn next_row(&mut self) -> Option<Result<(u64, String)>>;
}

#[derive(Clone, Copy)]
enum Format {
    Text,
    Jsonl,
    Json,
    Parquet,
}

#[derive(Clone, Copy)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

pub(crate) fn is_known_format(path: &Path) -> bool {
    format(path).is_some()
}

pub(crate) fn open(path: &Path, options: &ReadOptions) -> Result<Box<dyn Rows>> {
    let (format, compression) =
        format(path).ok_or_else(|| Error::UnknownFormat { path: path.to_path_buf() })?;
    let file = File::open(path).map_err(|error| Error::open(path, error))?;
    if file.metadata().map_err(|error| Error::open(path, error))?.len() == 0 {
        return Err(Error::Empty { path: path.to_path_buf() });
    }
    let is_json = matches!(format, Format::Json | Format::Jsonl);
    if options.content != Content::Text && !is_json {
        let what = "of no format that chats are read from: those are .jsonl and .json";
        return Err(Error::NotReadable { path: path.to_path_buf(), what });
    }
    if let Format::Parquet = format {
        return Ok(Box::new(parquet::ParquetRows::new(path, file, options)?));
    }
    let reader = decompress(file, compression).map_err(|error| Error::read(path, error))?;
    let lines = lines::Lines::new(path, reader, options.document_bytes_max);
    Ok(match format {
        Format::Json => Box::new(json::JsonRows::new(lines, options)),
        Format::Jsonl => Box::new(jsonl::JsonlRows::new(lines, options)),
        Format::Text | Format::Parquet => Box::new(text::TextRows::new(lines, options)),
    })
}

/// What the index of a row counts in a file of this name.
pub(crate) fn row_of(path: &Path, index: u64) -> Place {
    match format(path) {
        Some((Format::Json | Format::Parquet, _)) => Place::Row(index),
        _ => Place::Line(index),
    }
}

fn decompress(file: File, compression: Compression) -> io::Result<Box<dyn BufRead + Send>> {
    Ok(match compression {
        Compression::None => Box::new(BufReader::with_capacity(BUFFER_BYTES, file)),
        // Multi: gzip files may be several streams one after another (as `cat a.gz b.gz` makes them).
        Compression::Gzip => {
            let decoder = flate2::read::MultiGzDecoder::new(BufReader::with_capacity(BUFFER_BYTES, file));
            Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder))
        }
        Compression::Zstd => {
            let decoder = zstd::Decoder::new(file)?;
            Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder))
        }
    })
}

fn format(path: &Path) -> Option<(Format, Compression)> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let (stem, compression) = if let Some(stem) = name.strip_suffix(".gz") {
        (stem, Compression::Gzip)
    } else if let Some(stem) = name.strip_suffix(".zst") {
        (stem, Compression::Zstd)
    } else {
        (name.as_str(), Compression::None)
    };
    let format = match stem.rsplit_once('.')?.1 {
        "txt" | "md" => Format::Text,
        "jsonl" | "ndjson" => Format::Jsonl,
        "json" => Format::Json,
        // Parquet compresses inside; a reader needs to seek in it.
        "parquet" if matches!(compression, Compression::None) => Format::Parquet,
        _ => return None,
    };
    Some((format, compression))
}
