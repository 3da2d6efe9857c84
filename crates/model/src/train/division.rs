//! [`Division`]: a model of which several ranks compute a part each (tensor parallel; Shoeybi et al. 2019, "Megatron-LM:
//! Training Multi-Billion Parameter Language Models Using Model Parallelism").
//!
//! A part is a model of its own, as wide as the whole, with some of its heads and of its feed-forward columns:
//! ```text
//! rows      q, k, v, gate, up (and their biases)     columns   the projections back to the stream
//! whole     embeddings, norms, the head, biases of the projections back
//! ```
//! Each part computes its share of what a sub-layer adds to the stream; [`crate::Keeper::sum`] makes it the sum over parts, to
//! which biases are added once. In the backward pass it does so for the gradient of what goes into a sub-layer, and for that of
//! norms that heads share. What every part has whole then has the same gradient in each.

use std::ops::Range;

use crate::config::ConfigError;
use crate::transformer::Site;
use crate::{Config, ParamSpec, ParamTable, Stripe, Stripes};

/// How the flat vector of a model lies in those of its parts.
#[derive(Clone, Debug)]
pub struct Division {
    part: Config,
    n_parts: usize,
    /// In the order of the flat vectors.
    tensors: Vec<Tensor>,
}

/// A tensor of the whole, and what a part has of it.
#[derive(Clone, Debug)]
struct Tensor {
    whole: Range<usize>,
    part: Range<usize>,
    cut: Cut,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Cut {
    /// Every part has all of it.
    Not,
    Rows,
    /// Numbers of the queries, keys and values that lie behind each other: a part has some rows of each.
    Stacked([usize; 3]),
    /// Of so many columns a part has so many.
    Columns {
        whole: usize,
        part: usize,
    },
}

impl Config {
    /// The shape of each of `n` parts that compute this model together.
    ///
    /// # Errors
    /// If its heads or columns cannot be shared evenly.
    pub fn part_of(&self, n: usize) -> Result<Config, ConfigError> {
        let refuse = |why: String| Err(ConfigError::Indivisible { n, why });
        if n == 0 || !self.n_kv_heads.is_multiple_of(n) {
            return refuse(format!("its {} heads of keys and values are no multiple of it", self.n_kv_heads));
        }
        if !self.ff_width.is_multiple_of(n) {
            return refuse(format!("its feed-forward width of {} is no multiple of it", self.ff_width));
        }
        Ok(Config {
            n_heads: self.n_heads / n,
            n_kv_heads: self.n_kv_heads / n,
            ff_width: self.ff_width / n,
            ..self.clone()
        })
    }
}

impl Division {
    /// # Errors
    /// As [`Config::part_of`].
    pub fn new(config: &Config, n_parts: usize) -> Result<Division, ConfigError> {
        let part = config.part_of(n_parts)?;
        let [whole, of_part] = [config, &part].map(ParamTable::new);
        let stacked = stacked(config, &whole);
        let tensor = |(whole, part): (&ParamSpec, &ParamSpec)| Tensor::of(whole, part, &stacked);
        let tensors = whole.specs().iter().zip(of_part.specs()).map(tensor).collect();
        Ok(Division { n_parts, part, tensors })
    }

    pub fn n_parts(&self) -> usize {
        self.n_parts
    }

    /// The shape of a part.
    pub fn part(&self) -> &Config {
        &self.part
    }

    /// Where a part's vector lies in the whole's.
    pub fn stripes(&self, part: usize) -> Stripes {
        assert!(part < self.n_parts, "part {part} of {}", self.n_parts);
        let mut stripes = Stripes::default();
        for tensor in &self.tensors {
            let (at, len) = (tensor.whole.start, tensor.part.len());
            match tensor.cut {
                Cut::Not => stripes.push(Stripe::new(at, len, [1, 0])),
                Cut::Rows => stripes.push(Stripe::new(at + part * len, len, [1, 0])),
                Cut::Stacked(lens) => {
                    let mut first = at;
                    for len in lens {
                        let own = len / self.n_parts;
                        stripes.push(Stripe::new(first + part * own, own, [1, 0]));
                        first += len;
                    }
                }
                Cut::Columns { whole, part: n } => {
                    stripes.push(Stripe::new(at + part * n, n, [len / n, whole]));
                }
            }
        }
        stripes
    }

    /// What of a part's vector every part has alike.
    pub fn shared(&self) -> Vec<Range<usize>> {
        let shared = self.tensors.iter().filter(|tensor| tensor.cut == Cut::Not);
        shared.map(|tensor| tensor.part.clone()).collect()
    }
}

/// Tensors of queries, keys and values together, and how many numbers each of the three has.
fn stacked(config: &Config, table: &ParamTable) -> Vec<(Range<usize>, [usize; 3])> {
    if !config.block().fused_qkv {
        return Vec::new();
    }
    let (q, kv) = (config.q_width(), config.kv_width());
    let of_layer = table.layers.iter().flat_map(|layer| {
        let qkv = &layer.linears[Site::Qkv as usize];
        let lens = |width: usize| [q, kv, kv].map(|n| n * width);
        [Some((qkv.weight.clone(), lens(qkv.n_in))), qkv.bias.clone().map(|bias| (bias, lens(1)))]
    });
    of_layer.flatten().collect()
}

impl Tensor {
    fn of(whole: &ParamSpec, part: &ParamSpec, stacked: &[(Range<usize>, [usize; 3])]) -> Tensor {
        assert_eq!(whole.name, part.name, "a part has the tensors of the whole");
        let stacked = stacked.iter().find(|(range, _)| *range == whole.range);
        let cut = match (&whole.dims[..], &part.dims[..]) {
            (a, b) if a == b => Cut::Not,
            ([_, a], [_, b]) if a != b => Cut::Columns { whole: *a, part: *b },
            _ => stacked.map_or(Cut::Rows, |(_, lens)| Cut::Stacked(*lens)),
        };
        Tensor { whole: whole.range.clone(), part: part.range.clone(), cut }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, Mutex};

    use tensor::{Pool, Precision};

    use super::*;
    use crate::config::tests::tiny;
    use crate::train::tests::{B, T, params, plain, tokens};
    use crate::{Architecture, Keeper, Kept, LossSum, TrainModel, Trainable, Window};

    /// Sums in the order of parts.
    struct Summing<'a> {
        part: usize,
        meeting: &'a (Barrier, Mutex<Vec<Vec<f32>>>),
        dparams: Vec<f32>,
    }

    impl Keeper for Summing<'_> {
        fn need(&mut self, _unit: usize) -> Kept {
            unreachable!("all parameters are given")
        }
        fn release(&mut self, _unit: usize) {}
        fn grads(&mut self, range: Range<usize>) -> &mut [f32] {
            &mut self.dparams[range]
        }
        fn complete(&mut self, _unit: usize) {}
        fn sum(&mut self, values: &mut [f32]) {
            let (barrier, slots) = self.meeting;
            slots.lock().unwrap()[self.part] = values.to_vec();
            barrier.wait();
            values.fill(0.0);
            for slot in slots.lock().unwrap().iter() {
                values.iter_mut().zip(slot).for_each(|(sum, x)| *sum += x);
            }
            barrier.wait();
        }
    }

    /// Of every part what it lost, and its gradient.
    fn pass(config: &Config, n_parts: usize, recompute: bool) -> Vec<(LossSum, Vec<f32>)> {
        let division = Division::new(config, n_parts).unwrap();
        let whole = params(&Trainable::new(config));
        let (tokens, targets) = (tokens(config, 0), tokens(config, 5));
        let meeting = (Barrier::new(n_parts), Mutex::new(vec![Vec::new(); n_parts]));
        let run = |part: usize| {
            let pool = Pool::new(1);
            let model = TrainModel::new(Trainable::new(division.part()), B, T, Precision::F32);
            let mut params = vec![0.0; division.part().n_params()];
            division.stripes(part).take(&whole, &mut params);
            let dparams = vec![f32::NAN; params.len()];
            let mut keeper = Summing { part, meeting: &meeting, dparams };
            let of = plain(&tokens, &targets);
            let mut model = model.with_recompute(recompute);
            let loss = model.loss_and_grads_to(&pool, Some(&params), of, &mut keeper);
            let alone = model.loss_of(&pool, Some(&params), of, &mut keeper);
            assert!((alone.nats - loss.nats).abs() < 1e-6 * loss.nats, "{alone:?} {loss:?}");
            (loss, keeper.dparams)
        };
        std::thread::scope(|scope| {
            let parts: Vec<_> = (0..n_parts).map(|part| scope.spawn(move || run(part))).collect();
            parts.into_iter().map(|part| part.join().unwrap()).collect()
        })
    }

    fn config(architecture: Architecture, tied_embeddings: bool) -> Config {
        Config { architecture, n_heads: 8, n_kv_heads: 4, ff_width: 48, tied_embeddings, ..tiny() }
    }

    /// Gemma 3 with a window in its first layer.
    fn windowed(config: Config) -> Config {
        let window = Window { n_positions: 3, rope_theta: Some(100.0), layers: vec![true, false] };
        Config { window: Some(window), ..config }
    }

    #[test]
    fn parts_compute_what_the_whole_does() {
        for config in [
            config(Architecture::Llama, true),
            config(Architecture::Qwen2, false),
            Config { n_kv_heads: 8, ..config(Architecture::Gpt2, true) },
            config(Architecture::Qwen3, false),
            windowed(config(Architecture::Gemma3, true)),
        ] {
            for recompute in [false, true] {
                let [(loss, whole)] = &pass(&config, 1, recompute)[..] else { panic!("one part") };
                let norm = whole.iter().map(|x| x * x).sum::<f32>().sqrt();
                for n_parts in [2, 4] {
                    let parts = pass(&config, n_parts, recompute);
                    assert!(pass(&config, n_parts, recompute) == parts, "equal to itself");
                    let division = Division::new(&config, n_parts).unwrap();
                    let mut put = vec![f32::NAN; whole.len()];
                    for (part, (of_part, dparams)) in parts.iter().enumerate() {
                        assert_eq!(*of_part, parts[0].0, "parts lose alike");
                        assert!((of_part.nats - loss.nats).abs() < 1e-5 * loss.nats, "{of_part:?} {loss:?}");
                        for range in division.shared() {
                            assert!(dparams[range.clone()] == parts[0].1[range], "what all have is the same");
                        }
                        division.stripes(part).put(dparams, &mut put);
                    }
                    let apart = put.iter().zip(whole).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
                    assert!(apart < 1e-5 * norm, "{apart} of {norm}: {config:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_taken_apart_is_put_together() {
        for config in
            [config(Architecture::Qwen2, true), Config { n_kv_heads: 8, ..config(Architecture::Gpt2, true) }]
        {
            check_apart(&config);
        }
    }

    fn check_apart(config: &Config) {
        let whole: Vec<f32> = (0..config.n_params()).map(|i| i as f32).collect();
        for n_parts in [1, 2, 4] {
            let division = Division::new(config, n_parts).unwrap();
            let mut put = vec![f32::NAN; whole.len()];
            let mut n_own = 0;
            let n_shared: usize = division.shared().iter().map(Range::len).sum();
            for part in 0..n_parts {
                let stripes = division.stripes(part);
                let mut values = vec![0.0; stripes.len()];
                stripes.take(&whole, &mut values);
                n_own += values.len() - n_shared;
                stripes.put(&values, &mut put);
            }
            assert_eq!((put, n_own + n_shared), (whole.clone(), whole.len()));
        }
    }

    #[test]
    fn what_cannot_be_divided_is_refused_by_name() {
        let refused = |config: &Config, n: usize, words: &str| {
            let error = config.part_of(n).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        let config = config(Architecture::Llama, true);
        refused(&config, 3, "4 heads of keys and values are no multiple");
        refused(&Config { ff_width: 50, ..config }, 4, "width of 50");
    }
}
