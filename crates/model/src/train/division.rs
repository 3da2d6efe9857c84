//! [`Division`]: a model of which several ranks compute a part each (tensor parallel; Shoeybi et al. 2019, "Megatron-LM:
//! Training Multi-Billion Parameter Language Models Using Model Parallelism").
//!
//! A part is a model of its own, as wide as the whole, with some of its heads and of its feed-forward columns:
//! ```text
//! rows      q, k, v, gate, up (and their biases)     columns   the projections back to the stream
//! whole     embeddings, norms, the head
//! ```
//! Each part computes its share of what a sub-layer adds to the stream; [`crate::Keeper::sum`] makes it the sum over parts. In
//! the backward pass it does so for the gradient of what goes into a sub-layer. What every part has whole then has the same
//! gradient in each.

use std::ops::Range;

use tensor::Buf;

use crate::config::ConfigError;
use crate::{Config, ParamSpec, ParamTable};

/// How the flat vector of a model lies in those of its parts.
#[derive(Clone, Debug)]
pub struct Division {
    part: Config,
    n_parts: usize,
    n_whole: usize,
    n_part: usize,
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
    /// If its heads or columns cannot be shared evenly, or it has what is not divided here.
    pub fn part_of(&self, n: usize) -> Result<Config, ConfigError> {
        let refuse = |why: &str| Err(ConfigError::Indivisible { n, why: why.to_owned() });
        let block = self.block();
        if n == 0 || !self.n_kv_heads.is_multiple_of(n) {
            return refuse(&format!(
                "its {} heads of keys and values are no multiple of it",
                self.n_kv_heads
            ));
        }
        if !self.ff_width.is_multiple_of(n) {
            return refuse(&format!("its feed-forward width of {} is no multiple of it", self.ff_width));
        }
        if n > 1 && block.bias {
            return refuse("biases of output projections would be added by each");
        }
        if n > 1 && block.head_norms {
            return refuse("norms of heads are shared by heads of all parts");
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
        let tensors = whole.specs().iter().zip(of_part.specs()).map(|(whole, part)| Tensor::of(whole, part));
        let tensors = tensors.collect();
        Ok(Division { n_parts, n_whole: whole.n_params(), n_part: of_part.n_params(), part, tensors })
    }

    pub fn n_parts(&self) -> usize {
        self.n_parts
    }

    /// The shape of a part.
    pub fn part(&self) -> &Config {
        &self.part
    }

    /// What a part has of the whole.
    pub fn take(&self, part: usize, whole: &[f32]) -> Buf<f32> {
        assert_eq!(whole.len(), self.n_whole, "the whole");
        let mut values = Buf::zeroed(self.n_part);
        self.each_run(part, &mut |in_whole, in_part| values[in_part].copy_from_slice(&whole[in_whole]));
        values
    }

    /// Puts what a part has where it belongs in the whole.
    pub fn put(&self, part: usize, values: &[f32], whole: &mut [f32]) {
        assert_eq!((values.len(), whole.len()), (self.n_part, self.n_whole), "a part and the whole");
        self.each_run(part, &mut |in_whole, in_part| whole[in_whole].copy_from_slice(&values[in_part]));
    }

    /// What of a part's vector every part has alike.
    pub fn shared(&self) -> Vec<Range<usize>> {
        let shared = self.tensors.iter().filter(|tensor| tensor.cut == Cut::Not);
        shared.map(|tensor| tensor.part.clone()).collect()
    }

    /// Numbers that lie side by side in both: where in the whole, and where in the part.
    fn each_run(&self, part: usize, run: &mut dyn FnMut(Range<usize>, Range<usize>)) {
        assert!(part < self.n_parts, "part {part} of {}", self.n_parts);
        for tensor in &self.tensors {
            let (at, own) = (tensor.whole.start, tensor.part.clone());
            match tensor.cut {
                Cut::Not => run(tensor.whole.clone(), own),
                Cut::Rows => {
                    let first = at + part * own.len();
                    run(first..first + own.len(), own);
                }
                Cut::Columns { whole, part: n } => {
                    for row in 0..own.len() / n {
                        let (from, to) = (at + row * whole + part * n, own.start + row * n);
                        run(from..from + n, to..to + n);
                    }
                }
            }
        }
    }
}

impl Tensor {
    fn of(whole: &ParamSpec, part: &ParamSpec) -> Tensor {
        assert_eq!(whole.name, part.name, "a part has the tensors of the whole");
        let cut = match (&whole.dims[..], &part.dims[..]) {
            (a, b) if a == b => Cut::Not,
            ([_, a], [_, b]) if a != b => Cut::Columns { whole: *a, part: *b },
            _ => Cut::Rows,
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
    use crate::{Architecture, Keeper, Kept, LossSum, TrainModel, Trainable};

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
            let params = division.take(part, &whole);
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

    #[test]
    fn parts_compute_what_the_whole_does() {
        for config in [config(Architecture::Llama, true), config(Architecture::Qwen2, false)] {
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
                        division.put(part, dparams, &mut put);
                    }
                    let apart = put.iter().zip(whole).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
                    assert!(apart < 1e-5 * norm, "{apart} of {norm}: {config:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_taken_apart_is_put_together() {
        let config = config(Architecture::Qwen2, true);
        let whole: Vec<f32> = (0..config.n_params()).map(|i| i as f32).collect();
        for n_parts in [1, 2, 4] {
            let division = Division::new(&config, n_parts).unwrap();
            let mut put = vec![f32::NAN; whole.len()];
            let mut n_own = 0;
            let n_shared: usize = division.shared().iter().map(Range::len).sum();
            for part in 0..n_parts {
                let values = division.take(part, &whole);
                n_own += values.len() - n_shared;
                division.put(part, &values, &mut put);
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
        refused(&Config { ff_width: 50, ..config.clone() }, 4, "width of 50");
        refused(&Config { architecture: Architecture::Gpt2, n_kv_heads: 8, ..config.clone() }, 2, "biases");
        refused(&Config { architecture: Architecture::Qwen3, ..config }, 2, "norms of heads");
    }
}
