//! Just enough of GGUF (ggml, `docs/gguf.md`) to get a vocabulary out of a file: header, then key-value pairs. The real
//! reader is the model crate's, which the tokenizer must not know.

use std::collections::BTreeMap;
use std::io::{BufReader, Read};
use std::path::Path;

use serde_json::{Value, json};
use tokenizer::GgufVocab;

/// All metadata of a file, as JSON.
pub(crate) fn read(path: &Path) -> std::io::Result<BTreeMap<String, Value>> {
    let mut file = BufReader::new(std::fs::File::open(path)?);
    let mut header = [0; 24];
    file.read_exact(&mut header)?;
    assert_eq!(&header[..4], b"GGUF");
    let n_pairs = u64::from_le_bytes(header[16..].try_into().expect("8 bytes"));
    (0..n_pairs).map(|_| Ok((text(&mut file)?, value(&mut file)?))).collect()
}

pub(crate) fn vocab(metadata: &BTreeMap<String, Value>) -> GgufVocab {
    let field = |name: &str| metadata.get(&format!("tokenizer.ggml.{name}")).cloned().unwrap_or(Value::Null);
    let list = |name: &str| match field(name) {
        Value::Null => json!([]),
        list => list,
    };
    let id = |name: &str| field(name).as_u64().map(|id| id as u32);
    GgufVocab {
        model: field("model").as_str().unwrap_or_default().into(),
        pre: field("pre").as_str().map(str::to_owned),
        tokens: serde_json::from_value(list("tokens")).expect("texts"),
        scores: serde_json::from_value(list("scores")).expect("numbers"),
        token_types: serde_json::from_value(list("token_type")).expect("numbers"),
        merges: serde_json::from_value(list("merges")).expect("texts"),
        bos: id("bos_token_id"),
        eos: id("eos_token_id"),
        unk: id("unknown_token_id"),
        add_bos: field("add_bos_token").as_bool(),
        add_space_prefix: field("add_space_prefix").as_bool(),
    }
}

fn bytes<const N: usize>(file: &mut impl Read) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn text(file: &mut impl Read) -> std::io::Result<String> {
    let mut text = vec![0; u64::from_le_bytes(bytes(file)?) as usize];
    file.read_exact(&mut text)?;
    Ok(String::from_utf8(text).expect("GGUF strings are UTF-8"))
}

fn value(file: &mut impl Read) -> std::io::Result<Value> {
    let kind = u32::from_le_bytes(bytes(file)?);
    if kind != 9 {
        return scalar(kind, file);
    }
    let kind = u32::from_le_bytes(bytes(file)?);
    let n = u64::from_le_bytes(bytes(file)?);
    (0..n).map(|_| scalar(kind, file)).collect()
}

fn scalar(kind: u32, file: &mut impl Read) -> std::io::Result<Value> {
    Ok(match kind {
        0 => json!(u8::from_le_bytes(bytes(file)?)),
        1 => json!(i8::from_le_bytes(bytes(file)?)),
        2 => json!(u16::from_le_bytes(bytes(file)?)),
        3 => json!(i16::from_le_bytes(bytes(file)?)),
        4 => json!(u32::from_le_bytes(bytes(file)?)),
        5 => json!(i32::from_le_bytes(bytes(file)?)),
        6 => json!(f32::from_le_bytes(bytes(file)?)),
        7 => json!(bytes::<1>(file)?[0] != 0),
        8 => json!(text(file)?),
        10 => json!(u64::from_le_bytes(bytes(file)?)),
        11 => json!(i64::from_le_bytes(bytes(file)?)),
        12 => json!(f64::from_le_bytes(bytes(file)?)),
        other => panic!("unknown GGUF type {other}"),
    })
}
