//! llama2.c's checkpoints (version 0): a header of seven numbers, then f32 tensors in a fixed order.
//!
//! Layout: karpathy/llama2.c, `export.py` and `run.c`. The tables of RoPE's angles that old files carry are not read.

use std::collections::BTreeMap;

use crate::weights::Order;
use crate::{Architecture, Config, Error, Result, Rope, WeightTensor, Weights};
use tensor::packed::WeightKind;

const HEADER_NUMBERS: usize = 7;

/// Reads a checkpoint.
///
/// # Errors
/// If the header's shape is impossible or the file has another length than the shape needs.
pub fn read(bytes: &[u8]) -> Result<Weights> {
    let bad = |what: String| Error::Llama2c(what);
    let (header, rest) = bytes
        .split_at_checked(HEADER_NUMBERS * 4)
        .ok_or_else(|| bad(format!("{} bytes are too few for a header", bytes.len())))?;
    let mut numbers = [0i32; HEADER_NUMBERS];
    for (number, four) in numbers.iter_mut().zip(header.as_chunks::<4>().0) {
        *number = i32::from_le_bytes(*four);
    }
    let config = config(numbers)?;
    let mut file = Tensors { rest, tensors: BTreeMap::new() };
    let head_dims = [config.vocab, config.width];
    file.read(&["model.embed_tokens.weight".to_owned()], &head_dims)?;
    read_layers(&mut file, &config)?;
    file.read(&["model.norm.weight".to_owned()], &[config.width])?;
    file.skip(2 * config.context_max * config.head_width / 2)?;
    if !config.tied_embeddings {
        file.read(&["lm_head.weight".to_owned()], &head_dims)?;
    }
    if !file.rest.is_empty() {
        return Err(bad(format!("{} bytes are left over after the last tensor", file.rest.len())));
    }
    Ok(Weights { config, tensors: file.tensors })
}

fn config(numbers: [i32; HEADER_NUMBERS]) -> Result<Config> {
    let [width, ff_width, n_layers, n_heads, n_kv_heads, vocab, context] = numbers;
    // A negative vocabulary says that the output projection is a matrix of its own.
    let positive = |name: &str, number: i32| match usize::try_from(number) {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(Error::Llama2c(format!("{name} is {number}"))),
    };
    let (width, n_heads) = (positive("dim", width)?, positive("n_heads", n_heads)?);
    let config = Config {
        architecture: Architecture::Llama,
        n_layers: positive("n_layers", n_layers)?,
        width,
        n_heads,
        n_kv_heads: positive("n_kv_heads", n_kv_heads)?,
        head_width: width / n_heads,
        ff_width: positive("hidden_dim", ff_width)?,
        vocab: vocab.unsigned_abs() as usize,
        norm_eps: 1e-5,
        rope: Rope::plain(10_000.0),
        query_scalar: None,
        window: None,
        tied_embeddings: vocab > 0,
        context_max: positive("seq_len", context)?,
        bos: Some(1),
        eos: vec![2],
    };
    config.check()?;
    Ok(config)
}

/// Tensors of one kind stand together, layer after layer.
fn read_layers(file: &mut Tensors, config: &Config) -> Result<()> {
    let Config { width: c, ff_width: f, head_width, .. } = *config;
    let (q, kv) = (config.q_width(), config.kv_width());
    let names = |rest: &str| -> Vec<String> {
        (0..config.n_layers).map(|l| format!("model.layers.{l}.{rest}.weight")).collect()
    };
    file.read(&names("input_layernorm"), &[c])?;
    for (name, rows, order) in [
        ("q_proj", q, Order::Interleaved(head_width)),
        ("k_proj", kv, Order::Interleaved(head_width)),
        ("v_proj", kv, Order::AsStored),
    ] {
        file.read_ordered(&names(&format!("self_attn.{name}")), &[rows, c], order)?;
    }
    file.read(&names("self_attn.o_proj"), &[c, q])?;
    file.read(&names("post_attention_layernorm"), &[c])?;
    file.read(&names("mlp.gate_proj"), &[f, c])?;
    file.read(&names("mlp.down_proj"), &[c, f])?;
    file.read(&names("mlp.up_proj"), &[f, c])
}

struct Tensors<'a> {
    rest: &'a [u8],
    tensors: BTreeMap<String, WeightTensor>,
}

impl Tensors<'_> {
    /// Takes one tensor of this shape for each name.
    fn read(&mut self, names: &[String], dims: &[usize]) -> Result<()> {
        self.read_ordered(names, dims, Order::AsStored)
    }

    fn read_ordered(&mut self, names: &[String], dims: &[usize], order: Order) -> Result<()> {
        for name in names {
            let n_elems = dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
            let bytes = self.take(name, n_elems)?.to_vec();
            let bytes = order.apply(WeightKind::F32, dims, bytes);
            self.tensors.insert(name.clone(), WeightTensor::new(WeightKind::F32, dims.to_vec(), bytes));
        }
        Ok(())
    }

    fn skip(&mut self, n_elems: usize) -> Result<()> {
        self.take("the tables of RoPE", Some(n_elems)).map(drop)
    }

    fn take(&mut self, name: &str, n_elems: Option<usize>) -> Result<&[u8]> {
        let cut = |_: ()| Error::Llama2c(format!("it ends inside {name}"));
        let n_bytes = n_elems.and_then(|n| n.checked_mul(4)).ok_or(()).map_err(cut)?;
        let (taken, rest) = self.rest.split_at_checked(n_bytes).ok_or(()).map_err(cut)?;
        self.rest = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(numbers: [i32; 7], n_floats: usize) -> Vec<u8> {
        numbers.iter().flat_map(|n| n.to_le_bytes()).chain(std::iter::repeat_n(0, n_floats * 4)).collect()
    }

    fn check(numbers: [i32; 7], n_floats: usize, expected: &str) {
        let said = read(&file(numbers, n_floats)).map(|w| format!("{} layers", w.config.n_layers));
        let said = said.unwrap_or_else(|e| e.to_string());
        assert!(said.contains(expected), "{numbers:?} with {n_floats} numbers: {said}");
    }

    #[test]
    fn lies_are_refused() {
        // 8 wide, 4 inside, 1 layer, 2 heads, 1 kv head, 3 ids, 5 positions:
        // 24 + 8 + 64 + 32 + 32 + 64 + 8 + 3 * 32 + 8 + 5 * 4 = 356 numbers.
        let good = [8, 4, 1, 2, 1, 3, 5];
        check(good, 356, "1 layers");
        check(good, 355, "it ends inside the tables of RoPE");
        check(good, 100, "it ends inside");
        check(good, 357, "4 bytes are left over");
        check([8, 4, 1, 2, 1, -3, 5], 356, "it ends inside lm_head.weight");
        check([8, 4, 0, 2, 1, 3, 5], 356, "n_layers is 0");
        check([8, 4, 1, 2, 1, 3, -5], 356, "seq_len is -5");
        check([i32::MAX; 7], 10, "");
        assert!(read(&[1, 2, 3]).unwrap_err().to_string().contains("too few"));
    }
}
