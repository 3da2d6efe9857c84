//! The safetensors format (<https://github.com/huggingface/safetensors#format>): 8 bytes with the header's length, the
//! header (JSON: name → dtype, shape, first and last byte), the tensors' bytes one after another.
//!
//! Read by hand rather than with the crate, which wants the whole file in memory and does not say which tensor is bad;
//! the crate reads our files in the tests.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tensor::packed::WeightKind;

use crate::source::Source;
use crate::weights::unreadable;
use crate::{Error, Result, WeightTensor};

/// The format's own limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// The largest published models have some 60,000.
const N_TENSORS_MAX: usize = 1 << 18;
const N_DIMS_MAX: usize = 8;
const NAME_BYTES_MAX: usize = 512;
const METADATA: &str = "__metadata__";
/// Integers that old versions of transformers saved with BERT: 0, 1, 2, …
const POSITION_IDS: &str = ".position_ids";

/// One entry of the header.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// A tensor whose place in the file has been checked.
struct Placed {
    name: String,
    /// `None` for what is no weight, and is passed over.
    kind: Option<WeightKind>,
    dims: Vec<usize>,
    /// From the first byte after the header.
    start: u64,
    bytes: usize,
}

/// Finds all tensors of a file, whose numbers are read when they are wanted. `file` names it in errors. Every length is
/// checked against the file.
pub(super) fn read(source: &Source, file: &str) -> Result<BTreeMap<String, WeightTensor>> {
    let reader = &mut source.reader();
    let bad = |problem: String| Error::Safetensors { file: file.to_owned(), problem };
    let failed = |err: std::io::Error| bad(format!("cannot be read: {err}"));
    let file_bytes = reader.seek(SeekFrom::End(0)).map_err(failed)?;
    reader.seek(SeekFrom::Start(0)).map_err(failed)?;
    let mut length = [0; 8];
    reader
        .read_exact(&mut length)
        .map_err(|_| bad(format!("{file_bytes} bytes are too short for a header")))?;
    let header_bytes = u64::from_le_bytes(length);
    let room = (file_bytes - 8).min(HEADER_BYTES_MAX);
    if header_bytes > room {
        return Err(bad(format!("a header of {header_bytes} bytes, there is room for {room}")));
    }
    let mut header = vec![0; header_bytes as usize];
    reader.read_exact(&mut header).map_err(failed)?;
    let data_bytes = file_bytes - 8 - header_bytes;
    let placed = parse_header(&header, data_bytes).map_err(|err| match err {
        HeaderError::File(problem) => bad(problem),
        HeaderError::Tensor(name, problem) => {
            Error::Tensor { name, problem: format!("{problem} (in {file})") }
        }
    })?;
    let data_at = 8 + header_bytes;
    let tensors = placed.into_iter().filter_map(|Placed { name, kind, dims, start, .. }| {
        Some((name, WeightTensor::stored(kind?, dims, source.clone(), data_at + start)))
    });
    Ok(tensors.collect())
}

/// What is wrong with a header: as a whole, or with one tensor of it.
enum HeaderError {
    File(String),
    Tensor(String, String),
}

/// The tensors in the order of their bytes, which they must cover without gaps or overlaps.
fn parse_header(header: &[u8], data_bytes: u64) -> std::result::Result<Vec<Placed>, HeaderError> {
    let header: Map<String, Value> =
        serde_json::from_slice(header).map_err(|err| HeaderError::File(format!("header: {err}")))?;
    if header.len() > N_TENSORS_MAX {
        return Err(HeaderError::File(format!("{} tensors, allowed are {N_TENSORS_MAX}", header.len())));
    }
    let mut placed = Vec::with_capacity(header.len());
    for (name, value) in header {
        if name == METADATA {
            continue;
        }
        match place(&name, value, data_bytes) {
            Ok(tensor) => placed.push(tensor),
            Err(problem) => {
                return Err(HeaderError::Tensor(name.chars().take(NAME_BYTES_MAX).collect(), problem));
            }
        }
    }
    placed.sort_by_key(|tensor| (tensor.start, tensor.bytes));
    let mut at = 0;
    for tensor in &placed {
        if tensor.start != at {
            let what =
                if tensor.start < at { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(HeaderError::Tensor(
                tensor.name.clone(),
                format!("starts at byte {}, {what}", tensor.start),
            ));
        }
        at += tensor.bytes as u64;
    }
    if at != data_bytes {
        return Err(HeaderError::File(format!("tensors end at byte {at} of {data_bytes}")));
    }
    Ok(placed)
}

fn place(name: &str, value: Value, data_bytes: u64) -> std::result::Result<Placed, String> {
    if name.len() > NAME_BYTES_MAX {
        return Err(format!("a name of {} bytes", name.len()));
    }
    let entry: Entry = serde_json::from_value(value).map_err(|err| err.to_string())?;
    let kind = match entry.dtype.as_str() {
        "F32" => Some(WeightKind::F32),
        "F16" => Some(WeightKind::F16),
        "BF16" => Some(WeightKind::Bf16),
        "I64" if name.ends_with(POSITION_IDS) => None,
        other => {
            return Err(format!("dtype {:?} is not supported", other.chars().take(20).collect::<String>()));
        }
    };
    let [start, end] = entry.data_offsets;
    if start > end || end > data_bytes {
        return Err(format!("bytes {start}..{end} are outside the file's {data_bytes}"));
    }
    if entry.shape.len() > N_DIMS_MAX {
        return Err(format!("{} dimensions", entry.shape.len()));
    }
    let dims: Option<Vec<usize>> = entry.shape.iter().map(|dim| usize::try_from(*dim).ok()).collect();
    let n_elems =
        dims.as_deref().and_then(|dims| dims.iter().try_fold(1_usize, |n, dim| n.checked_mul(*dim)));
    let bytes_of = |n_elems: usize| kind.map_or(n_elems.checked_mul(8), |kind| kind.bytes(n_elems));
    let bytes = n_elems.and_then(bytes_of).filter(|bytes| *bytes as u64 == end - start);
    match (dims, bytes) {
        (Some(dims), Some(bytes)) => Ok(Placed { name: name.to_owned(), kind, dims, start, bytes }),
        _ => Err(format!(
            "{} bytes do not hold {} numbers of shape {:?}",
            end - start,
            entry.dtype,
            entry.shape
        )),
    }
}

/// The bytes of a file with these tensors, in the order of their names.
pub(super) fn write(tensors: &BTreeMap<String, WeightTensor>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    write_to(&mut bytes, tensors)?;
    Ok(bytes)
}

/// The same, one tensor after the other.
pub(super) fn write_to(out: &mut dyn Write, tensors: &BTreeMap<String, WeightTensor>) -> Result<()> {
    let failed = |source| Error::WriteTo { what: "the safetensors file".to_owned(), source };
    let mut header = Map::new();
    header.insert(METADATA.to_owned(), json!({"format": "pt"})); // transformers refuses a file that does not say so
    let mut at = 0;
    for (name, tensor) in tensors {
        let dtype = dtype(name, tensor)?;
        let end = at + tensor.n_bytes();
        header.insert(name.clone(), json!({"dtype": dtype, "shape": tensor.dims, "data_offsets": [at, end]}));
        at = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    out.write_all(&header).map_err(failed)?;
    for (name, tensor) in tensors {
        let bytes = tensor.bytes().map_err(|err| unreadable(name, &err))?;
        out.write_all(&bytes).map_err(failed)?;
    }
    out.flush().map_err(failed)
}

fn dtype(name: &str, tensor: &WeightTensor) -> Result<&'static str> {
    match tensor.kind {
        WeightKind::F32 => Ok("F32"),
        WeightKind::F16 => Ok("F16"),
        WeightKind::Bf16 => Ok("BF16"),
        other => {
            let problem = format!("safetensors has no place for weights of kind {}", other.name());
            Err(Error::Tensor { name: name.to_owned(), problem })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn read(bytes: &[u8], file: &str) -> Result<BTreeMap<String, WeightTensor>> {
        super::read(&Source::Memory(Arc::new(bytes.to_vec())), file)
    }

    #[track_caller]
    fn assert_same(found: &BTreeMap<String, WeightTensor>, expected: &BTreeMap<String, WeightTensor>) {
        assert!(found.keys().eq(expected.keys()));
        for (found, expected) in found.values().zip(expected.values()) {
            assert_eq!((found.kind, &found.dims), (expected.kind, &expected.dims));
            assert_eq!(found.bytes().unwrap(), expected.bytes().unwrap());
        }
    }

    fn file(header: &str, n_data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + n_data, 1);
        bytes
    }

    #[track_caller]
    fn check(bytes: &[u8], expected: &str) {
        let err = match read(bytes, "x.safetensors") {
            Ok(tensors) => panic!("accepted as {:?}", tensors.keys().collect::<Vec<_>>()),
            Err(err) => err.to_string(),
        };
        assert!(err.contains(expected) && err.contains("x.safetensors"), "{err}");
        assert!(err.len() < 1000, "{} bytes of error", err.len());
    }

    fn sample() -> BTreeMap<String, WeightTensor> {
        let values: Vec<f32> = (0..6).map(|i| i as f32 * 0.3 - 1.0).collect();
        let kinds = [("b", WeightKind::F32), ("a", WeightKind::Bf16), ("c", WeightKind::F16)];
        let tensor = |kind: WeightKind| WeightTensor::new(kind, vec![2, 3], kind.quantize(&values));
        kinds.map(|(name, kind)| (name.to_owned(), tensor(kind))).into()
    }

    #[test]
    fn reads_what_it_writes_and_so_does_the_reference_crate() {
        let tensors = sample();
        let bytes = write(&tensors).unwrap();
        assert_same(&read(&bytes, "x").unwrap(), &tensors);
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.len(), tensors.len());
        for (name, tensor) in &tensors {
            let view = theirs.tensor(name).unwrap();
            assert_eq!((view.shape(), view.data()), (&tensor.dims[..], &*tensor.bytes().unwrap()), "{name}");
        }
    }

    #[test]
    fn reads_what_the_reference_crate_writes() {
        use safetensors::tensor::{Dtype, TensorView};
        let tensors = sample();
        let views = tensors.iter().map(|(name, tensor)| {
            let dtype = match tensor.kind {
                WeightKind::F32 => Dtype::F32,
                WeightKind::F16 => Dtype::F16,
                _ => Dtype::BF16,
            };
            let bytes = tensor.bytes().unwrap().into_owned();
            (name.as_str(), dtype, tensor.dims.clone(), bytes)
        });
        let views: Vec<_> = views.collect();
        let views = views
            .iter()
            .map(|(name, dtype, dims, bytes)| (*name, TensorView::new(*dtype, dims.clone(), bytes).unwrap()));
        let bytes = safetensors::serialize(views, None).unwrap();
        assert_same(&read(&bytes, "x").unwrap(), &tensors);
    }

    #[test]
    fn quantized_weights_are_refused_by_name() {
        let kind = WeightKind::Q8_0;
        let tensor = WeightTensor::new(kind, vec![1, 32], kind.quantize(&[0.5; 32]));
        let err = write(&[("w".to_owned(), tensor)].into()).unwrap_err().to_string();
        assert!(err.contains("tensor w"), "{err}");
    }

    #[test]
    fn hostile_files_are_refused_by_name() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let two = |second: &str| {
            let first = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
            format!(r#"{{{first},"b":{{"dtype":"F32","shape":[1],"data_offsets":{second}}}}}"#)
        };
        check(b"", "too short");
        check(&[1, 2, 3], "too short");
        check(&u64::MAX.to_le_bytes(), "a header of 18446744073709551615 bytes");
        check(&(1_u64 << 63).to_le_bytes(), "room for 0");
        check(&[&100_000_000_u64.to_le_bytes()[..], &[b' '; 50]].concat(), "room for 50");
        check(&file("", 0), "header");
        check(&file("[]", 0), "header");
        check(&file("{\"w\":", 0), "header");
        check(&file(&"[".repeat(10_000), 0), "header");
        check(&file(&format!("{{\"w\":{}", "[".repeat(10_000)), 0), "header");
        check(&file(&one("F32", "[1]", "[0,4]"), 3), "bytes 0..4 are outside the file's 3");
        check(&file(&one("F32", "[1]", "[4,8]"), 8), "tensor w: starts at byte 4, leaves a gap");
        check(&file(&one("F32", "[1]", "[0,4]"), 8), "end at byte 4 of 8");
        check(&file(&one("F32", "[2]", "[0,4]"), 4), "tensor w: 4 bytes do not hold F32");
        check(&file(&one("F32", "[1]", "[8,4]"), 8), "tensor w: bytes 8..4");
        check(&file(&one("F32", "[1]", "[0,18446744073709551615]"), 8), "tensor w");
        check(&file(&one("F32", "[1]", "[-4,0]"), 8), "tensor w");
        check(&file(&one("F32", "[1]", "[0,4,8]"), 8), "tensor w");
        check(&file(&one("F32", "[4294967296,4294967296]", "[0,0]"), 0), "tensor w: 0 bytes");
        check(&file(&one("F32", "[9223372036854775808,2]", "[0,4]"), 4), "tensor w");
        check(&file(&one("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4), "tensor w: 9 dimensions");
        check(&file(&one("F8_E4M3", "[4]", "[0,4]"), 4), "tensor w: dtype \"F8_E4M3\"");
        check(&file(&one("I64", "[1]", "[0,8]"), 8), "tensor w: dtype \"I64\"");
        check(&file(r#"{"w":{"dtype":"F32","shape":[1]}}"#, 4), "tensor w: missing field");
        check(&file(r#"{"w":7}"#, 4), "tensor w");
        check(&file(&two("[4,8]"), 8), "tensor b: starts at byte 4, overlaps");
        check(&file(&two("[0,4]"), 8), "overlaps");
        check(&file(&two("[12,16]"), 16), "tensor b: starts at byte 12, leaves a gap");
        // The same name twice: the second hides the first, whose bytes are then nobody's.
        check(&file(&two("[8,12]").replace("\"b\"", "\"a\""), 12), "gap");
        check(
            &file(&one("F32", "[1]", "[0,4]").replace("\"w\"", &format!("\"{}\"", "w".repeat(600))), 4),
            "600 bytes",
        );
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = write(&sample()).unwrap();
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len], "x").is_err(), "{len} of {} bytes", bytes.len());
        }
    }
}
