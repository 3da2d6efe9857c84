use std::io::Write;
use std::path::Path;

use data::{BadRows, Document, Error, ReadOptions, documents};
use parquet::basic::{Compression, ZstdLevel};

use crate::{Inputs, parquet_file};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstandard(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn read(path: &Path, options: &ReadOptions) -> Result<Vec<Document>, Error> {
    documents(path, options)?.collect()
}

/// Text and index of every document.
fn rows(path: &Path) -> Vec<(String, u64)> {
    let documents = read(path, &ReadOptions::default()).unwrap();
    documents.into_iter().map(|document| (document.text, document.source.index)).collect()
}

/// The error must name the file and say `why`.
fn check_error(path: &Path, options: &ReadOptions, why: &str) {
    let error = read(path, options).expect_err(why).to_string();
    let file = path.file_name().unwrap().to_str().unwrap();
    assert!(error.contains(file) && error.contains(why), "{why:?} of {file} is not in: {error}");
}

#[test]
fn every_format_gives_the_same_documents() {
    let inputs = Inputs::new();
    let jsonl = concat!(
        "{\"text\": \"one \\u00e4\\n\", \"id\": 1}\n",
        "\n",
        "  {\"meta\": {\"text\": \"not this\", \"deep\": [1, {\"x\": null}]}, \"text\": \"two 日本\"}  \r\n",
        "{\"text\": \"   \"}\n",
        "\"three \\\"quoted\\\" ]}, \\\\\"",
    );
    let by_line = [("one ä\n", 1), ("two 日本", 3), ("three \"quoted\" ]}, \\", 5)];
    let by_line = by_line.map(|(text, line)| (text.to_string(), line));
    let files = [
        inputs.write("a.jsonl", jsonl),
        inputs.write("b.jsonl.gz", gzip(jsonl.as_bytes())),
        inputs.write("c.jsonl.zst", zstandard(jsonl.as_bytes())),
        inputs.write(
            "two-members.JSONL.gz",
            [gzip(&jsonl.as_bytes()[..50]), gzip(&jsonl.as_bytes()[50..])].concat(),
        ),
        inputs.write("mark.ndjson", ["\u{feff}", jsonl].concat()),
    ];
    for file in files {
        assert_eq!(rows(&file), by_line, "{}", file.display());
    }
    let rows_of_json = jsonl.lines().filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ,\n");
    let json = inputs.write("d.json", format!("\n [ {rows_of_json}\n] \n"));
    let by_row = [1, 2, 4].iter().zip(by_line).map(|(&row, (text, _))| (text, row)).collect::<Vec<_>>();
    assert_eq!(rows(&json), by_row);
    let parquet = inputs.path().join("e.parquet");
    let texts: Vec<Option<&str>> = by_row.iter().map(|(text, _)| Some(text.as_str())).collect();
    for compression in
        [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(ZstdLevel::default())]
    {
        parquet_file::write(&parquet, &[&[texts[0], texts[1], None], &texts[2..]], compression);
        assert_eq!(rows(&parquet), by_row);
    }
}

#[test]
fn a_text_file_is_a_document_or_several() {
    let inputs = Inputs::new();
    let text = "\u{feff}first\r\nline\n\nlast line without end";
    assert_eq!(rows(&inputs.write("a.txt", text)), [(text[3..].to_string(), 1)]);
    assert_eq!(rows(&inputs.write("b.md.gz", gzip(b"# x\n"))), [("# x\n".to_string(), 1)]);
    let stories = inputs.write("c.txt", "one\nmore\n<|endoftext|>\n\n<|endoftext|>  \ntwo\n<|endoftext|>\n");
    let options = ReadOptions { separator: Some("<|endoftext|>".to_string()), ..ReadOptions::default() };
    let found = read(&stories, &options).unwrap();
    let found: Vec<_> =
        found.iter().map(|document| (document.text.as_str(), document.source.index)).collect();
    assert_eq!(found, [("one\nmore\n", 1), ("two\n", 6)]);
}

#[test]
fn directories_are_read_in_order_with_provenance() {
    let inputs = Inputs::new();
    for name in ["b/2.txt", "b/10.txt", "a.jsonl", "b/c/x.md", "a.txt"] {
        let text = if name.ends_with("jsonl") { format!("\"{name}\"") } else { name.to_string() };
        inputs.write(&format!("corpus/{name}"), text);
    }
    inputs.write("corpus/.hidden.txt", "hidden");
    inputs.write("corpus/picture.png", [0, 1, 2]);
    let found = read(&inputs.path().join("corpus/"), &ReadOptions::default()).unwrap();
    let names: Vec<_> = found.iter().map(|document| document.text.as_str()).collect();
    assert_eq!(names, ["a.jsonl", "a.txt", "b/10.txt", "b/2.txt", "b/c/x.md"]);
    assert!(found.iter().all(|document| document.source.path == format!("corpus/{}", document.text)));
}

#[test]
fn bad_files_are_named() {
    let inputs = Inputs::new();
    let options = ReadOptions::default();
    let check = |file: &str, bytes: &[u8], why: &str| check_error(&inputs.write(file, bytes), &options, why);
    check_error(&inputs.path().join("absent.txt"), &options, "cannot open");
    check_error(&inputs.path().join("absent"), &options, "cannot open");
    check("empty.txt", b"", "holds no text");
    check("blank.txt", b" \n\t\n", "holds no text");
    check("empty.jsonl", b"\n\n", "holds no text");
    check("empty.json", b"[ ]", "holds no text");
    check("empty.parquet", b"", "holds no text");
    check("no-format", b"x", "cannot tell");
    check("archive.tar.gz", b"x", "cannot tell");
    check("latin1.txt", b"one\ntwo\nna\xefve\n", "line 3: not UTF-8");
    check("latin1.jsonl", b"\"one\"\n{\"text\": \"na\xefve\"}\n", "line 2: not UTF-8");
    check("latin1.json", b"[\"one\", \"na\xefve\"]", "row 2: not UTF-8");
    check("binary.txt", b"\x7fELF\n\0\0", "line 2: a zero byte");
    check("utf16.txt", b"\xff\xfeo\0n\0e\0", "a zero byte");
    let cut = gzip(&b"\"a line of text\"\n".repeat(1000));
    check("cut.jsonl.gz", &cut[..cut.len() - 20], "it is truncated");
    let mut flipped = cut.clone();
    let at = cut.len() - 6;
    flipped[at] ^= 1;
    check("flipped.jsonl.gz", &flipped, "cannot read");
    check("not.txt.gz", b"this is no gzip", "cannot read");
    let cut = zstandard(&b"\"a line of text\"\n".repeat(1000));
    check("cut.jsonl.zst", &cut[..cut.len() - 3], "cannot read");
    check("not.jsonl.zst", b"this is no zstd", "cannot read");
    check("cut.json", b"[\"one\", \"tw", "the array is truncated (after row 1)");
    check("after.json", b"[\"one\"] x", "something follows the end of the array");
    check("object.json", b"{\"text\": \"one\"}\n{\"text\": \"two\"}", "not a JSON array");
    check("commas.json", b"[\"one\",,\"two\"]", "row 2: ");
    check("comma.json", b"[\"one\",]", "row 2: ");
    let dir = inputs.path().join("nothing");
    std::fs::create_dir(&dir).unwrap();
    check_error(&dir, &options, "holds no text");
}

#[test]
fn bad_rows_are_named_or_skipped() {
    let inputs = Inputs::new();
    let nested = "[".repeat(100_000);
    let long = format!("\"{}\"", "x".repeat(300_000));
    let bad = [
        ("{\"text\": 1}", "invalid type: integer `1`, expected a string"),
        ("{\"text\": null}", "invalid type: null, expected a string"),
        ("{\"body\": \"x\"}", "no field \"text\""),
        ("{\"text\": \"a\", \"text\": \"b\"}", "two fields \"text\""),
        ("{\"text\": \"a\"", "EOF while parsing"),
        ("{\"text\": \"a\"} {}", "trailing characters"),
        ("{\"text\": \"\\ud800\"}", "hex escape"),
        ("{\"x\": 1e400, \"text\": \"a\" oops}", "column"),
        ("[1, 2]", "expected a string or an object with a string field \"text\""),
        ("12", "expected a string or an object"),
        (&nested, "expected a string or an object"),
        (&long, "longer than 200000 bytes"),
    ];
    let options = ReadOptions { document_bytes_max: 200_000, ..ReadOptions::default() };
    for (i, (row, why)) in bad.iter().enumerate() {
        let file = inputs.write(&format!("bad-{i}.jsonl"), format!("\"good\"\n\n{row}\n\"good\"\n"));
        check_error(&file, &options, why);
        check_error(&file, &options, "line 3: ");
        // Nothing comes after an error.
        let mut documents = documents(&file, &options).unwrap();
        assert!(documents.next().unwrap().is_ok() && documents.next().unwrap().is_err());
        assert!(documents.next().is_none());
    }
    let all: String = bad.iter().map(|(row, _)| format!("{row}\n\"good\"\n")).collect();
    let file = inputs.write("all.jsonl", all);
    let options = ReadOptions { bad_rows: BadRows::Skip, ..options };
    let mut documents = documents(&file, &options).unwrap();
    let found: Vec<_> = documents.by_ref().map(|document| document.unwrap().text).collect();
    assert_eq!(found, vec!["good"; bad.len()]);
    assert_eq!(documents.n_skipped(), bad.len() as u64);
}

#[test]
fn long_documents_are_refused_in_bounded_memory() {
    let inputs = Inputs::new();
    let options = ReadOptions { document_bytes_max: 1000, ..ReadOptions::default() };
    check_error(
        &inputs.write("lines.txt", "a line\n".repeat(200)),
        &options,
        "longer than 1000 bytes begins here",
    );
    check_error(&inputs.write("line.txt", "x".repeat(5000)), &options, "longer than 1000 bytes begins here");
    check_error(
        &inputs.write("long.json", format!("[\"{}\"]", "x".repeat(5000))),
        &options,
        "longer than 1000 bytes",
    );
    // Five gigabytes of zeros in five megabytes would be; a tenth of that is enough to see that it is not kept.
    let bomb = gzip(&vec![b'x'; 50 << 20]);
    assert!(bomb.len() < 1 << 20);
    check_error(&inputs.write("bomb.jsonl.gz", bomb), &options, "line 1: longer than 1000 bytes");
    let long = "x".repeat(1001);
    let parquet = inputs.path().join("long.parquet");
    parquet_file::write(&parquet, &[&[Some("short"), Some(&long)]], Compression::SNAPPY);
    check_error(&parquet, &options, "row 2: longer than 1000 bytes");
}

#[test]
fn parquet_without_such_a_column_is_refused() {
    let inputs = Inputs::new();
    let parquet = inputs.path().join("x.parquet");
    parquet_file::write(&parquet, &[&[Some("one")]], Compression::SNAPPY);
    let options = |field: &str| ReadOptions { text_field: field.to_string(), ..ReadOptions::default() };
    check_error(&parquet, &options("body"), "no column \"body\"; it has id, text");
    check_error(&parquet, &options("id"), "column \"id\" does not hold one string a row");
}

/// A Parquet file that is cut or has a flipped byte is an error, or reads as something: it never panics or hangs.
#[test]
fn damaged_parquet_does_no_harm() {
    let inputs = Inputs::new();
    let whole = inputs.path().join("whole.parquet");
    let rows: Vec<String> = (0..12).map(|i| format!("row {i} of the file")).collect();
    let rows: Vec<Option<&str>> = rows.iter().map(|row| Some(row.as_str())).collect();
    parquet_file::write(&whole, &[&rows[..6], &rows[6..]], Compression::SNAPPY);
    let bytes = std::fs::read(&whole).unwrap();
    let path = inputs.path().join("damaged.parquet");
    let mut n_errors = 0;
    // Where the reader itself panics, the panic is caught; a thousand of its messages would drown everything else.
    std::panic::set_hook(Box::new(|_| {}));
    for at in 0..bytes.len() {
        for damaged in [bytes[..at].to_vec(), flip(&bytes, at, 0xff), flip(&bytes, at, 1)] {
            std::fs::write(&path, damaged).unwrap();
            if let Err(error) = read(&path, &ReadOptions::default()) {
                assert!(error.to_string().contains("damaged.parquet"), "{error}");
                n_errors += 1;
            }
        }
    }
    drop(std::panic::take_hook());
    assert!(n_errors > bytes.len(), "only {n_errors} errors");
}

fn flip(bytes: &[u8], at: usize, bits: u8) -> Vec<u8> {
    let mut flipped = bytes.to_vec();
    flipped[at] ^= bits;
    flipped
}
