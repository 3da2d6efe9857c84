//! [`Stage`]: neighbouring layers of a model, and at its ends what comes before or after all of them (pipeline parallel;
//! Huang et al. 2019, "GPipe").
//!
//! A stage is a model of its own that takes the stream of rows from the stage before it and gives it to the one behind, and
//! takes and gives its gradient the other way (see [`crate::Keeper`]). The flat vectors of all stages, one behind the other,
//! are the model's: what is trained lies in one of them. Of an embedding that is the head as well the last stage has a copy,
//! which lies behind its flat vector; the first one trains it, from the gradients of both.

use std::ops::Range;

use crate::config::ConfigError;
use crate::{Config, ParamTable, Window};

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    layers: Range<usize>,
    n_layers: usize,
}

impl Stage {
    /// All of a model.
    pub fn whole(config: &Config) -> Stage {
        Stage { layers: 0..config.n_layers, n_layers: config.n_layers }
    }

    /// `n` stages of which the slowest is as fast as can be, by operations on rows of `t` tokens.
    ///
    /// # Errors
    /// If there are fewer layers than stages.
    pub fn divide(config: &Config, t: usize, n: usize) -> Result<Vec<Stage>, ConfigError> {
        let n_layers = config.n_layers;
        if n == 0 || n > n_layers {
            let why = format!("a stage of a pipeline has a layer at least, and it has {n_layers}");
            return Err(ConfigError::Indivisible { n, why });
        }
        // All layers take as long, so the last stage's number decides all. The more it has the fewer are kept long.
        let [layer, head] = config.flops_of_layer_and_head(t);
        let rest = |last: usize| (n_layers - last).div_ceil((n - 1).max(1)) as f64 * layer;
        let slowest = |last: &usize| (*last as f64 * layer + head).max(rest(*last));
        let lasts = if n == 1 { n_layers..=n_layers } else { 1..=n_layers - (n - 1) };
        let last = lasts.rev().min_by(|a, b| slowest(a).total_cmp(&slowest(b))).unwrap_or(n_layers);
        let before = n_layers - last;
        let border =
            |stage: usize| if stage == n { n_layers } else { (before * stage).div_ceil((n - 1).max(1)) };
        Ok((0..n).map(|stage| Stage { layers: border(stage)..border(stage + 1), n_layers }).collect())
    }

    pub fn is_first(&self) -> bool {
        self.layers.start == 0
    }

    pub fn is_last(&self) -> bool {
        self.layers.end == self.n_layers
    }

    /// Its layers among those of the model.
    pub fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    /// Where what it trains lies in the flat vector of the whole model.
    pub fn range(&self, whole: &ParamTable) -> Range<usize> {
        let units = whole.units();
        let first = if self.is_first() { 0 } else { self.layers.start + 1 };
        let last = if self.is_last() { self.n_layers + 1 } else { self.layers.end };
        units[first].start..units[last].end
    }

    /// The shape of its layers.
    pub(crate) fn config(&self, whole: &Config) -> Config {
        assert_eq!(whole.n_layers, self.n_layers, "a stage of another model");
        let window = whole
            .window
            .as_ref()
            .map(|window| Window { layers: window.layers[self.layers.clone()].to_vec(), ..window.clone() });
        Config { n_layers: self.layers.len(), window, ..whole.clone() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use tensor::{Pool, Precision};

    use super::*;
    use crate::config::tests::tiny;
    use crate::train::tests::{B, T, configs, params, plain, tokens};
    use crate::{Keeper, Kept, LossSum, Neighbor, ParamSpec, TrainModel, Trainable};

    fn layers(config: &Config, n: usize) -> Vec<usize> {
        Stage::divide(config, 64, n).unwrap().iter().map(|stage| stage.layers().len()).collect()
    }

    #[test]
    fn the_head_counts_as_the_layers_it_takes_as_long_as() {
        let deep = Config { n_layers: 16, vocab: 1, window: None, ..tiny() };
        assert_eq!(layers(&deep, 1), [16]);
        assert_eq!(layers(&deep, 4), [4, 4, 4, 4]);
        assert_eq!(layers(&deep, 16), [1; 16]);
        let [layer, head] = deep.flops_of_layer_and_head(64);
        // A head of some three layers.
        let headed = Config { vocab: (3.0 * layer / head) as usize, ..deep };
        assert_eq!(layers(&headed, 2), [9, 7]);
        assert_eq!(layers(&headed, 4), [5, 5, 4, 2]);
        let error = Stage::divide(&headed, 64, 17).unwrap_err().to_string();
        assert!(error.contains("17 parts") && error.contains("it has 16"), "{error}");
        assert!(Stage::divide(&headed, 64, 0).is_err());
    }

    #[test]
    fn vectors_of_stages_are_the_models() {
        for config in configs() {
            let whole = ParamTable::new(&config);
            let mut at = 0;
            for stage in Stage::divide(&config, 64, 2).unwrap() {
                let table = ParamTable::of_stage(&stage.config(&config), &stage);
                let range = stage.range(&whole);
                assert_eq!(range, at..at + table.n_params());
                let dims = |spec: &ParamSpec| spec.dims.clone();
                let inside = whole.specs().iter().filter(|spec| range.contains(&spec.range.start));
                assert!(inside.map(dims).eq(table.specs().iter().map(dims)));
                at = range.end;
            }
            assert_eq!(at, whole.n_params());
        }
    }

    /// To a neighbour, and from it.
    type Link = (Sender<Vec<f32>>, Receiver<Vec<f32>>);

    struct Piped {
        before: Option<Link>,
        behind: Option<Link>,
        /// The last stage sends the first what its copy of the embedding has.
        head: (Sender<Vec<f32>>, Option<Receiver<Vec<f32>>>),
        n_params: usize,
        dparams: Vec<f32>,
    }

    impl Piped {
        fn link(&self, neighbor: Neighbor) -> &Link {
            let link = match neighbor {
                Neighbor::Before => &self.before,
                Neighbor::Behind => &self.behind,
            };
            link.as_ref().expect("there is one")
        }
    }

    impl Keeper for Piped {
        fn need(&mut self, _unit: usize) -> Kept {
            unreachable!("all parameters are given")
        }
        fn release(&mut self, _unit: usize) {}
        fn grads(&mut self, range: Range<usize>) -> &mut [f32] {
            &mut self.dparams[range]
        }
        fn complete(&mut self, _unit: usize) {}
        fn receive(&mut self, from: Neighbor, values: &mut [f32]) {
            values.copy_from_slice(&self.link(from).1.recv().unwrap());
        }
        fn send(&mut self, to: Neighbor, values: &[f32]) {
            self.link(to).0.send(values.to_vec()).unwrap();
            if to == Neighbor::Before && self.dparams.len() > self.n_params {
                self.head.0.send(self.dparams[self.n_params..].to_vec()).unwrap();
            }
        }
        fn begin_with_head(&mut self, embedding: Range<usize>) {
            let head = self.head.1.as_ref().expect("the first stage has it").recv().unwrap();
            self.dparams[embedding].copy_from_slice(&head);
        }
    }

    fn links(n: usize) -> (Vec<Option<Link>>, Vec<Option<Link>>) {
        let (mut before, mut behind) = (vec![None], Vec::new());
        for _ in 1..n {
            let ((down, from_before), (up, from_behind)) = (channel(), channel());
            behind.push(Some((down, from_behind)));
            before.push(Some((up, from_before)));
        }
        behind.push(None);
        (before, behind)
    }

    /// Of two micro-batches what they lost and their gradients. Stages before the last begin the second before the first is
    /// finished.
    fn run(mut model: TrainModel, params: &[f32], mut keeper: Piped) -> Vec<(LossSum, Vec<f32>)> {
        let (pool, config, is_last) =
            (Pool::new(1), model.trainable().config().clone(), keeper.behind.is_none());
        let ids = [0, 3].map(|salt| [tokens(&config, salt), tokens(&config, salt + 5)]);
        let of = |i: usize| plain(&ids[i][0], &ids[i][1]);
        for i in (0..2).filter(|_| !is_last) {
            model.forward_to(&pool, params, (of(i).0, i), &mut keeper);
        }
        let mut back = |i: usize| {
            let loss = match is_last {
                true => model.loss_and_grads_to(&pool, Some(params), of(i), &mut keeper),
                false => {
                    model.backward_to(&pool, params, (of(i).0, i), &mut keeper);
                    LossSum::default()
                }
            };
            (loss, keeper.dparams.clone())
        };
        vec![back(0), back(1)]
    }

    #[test]
    fn stages_compute_the_bits_of_the_whole() {
        for (config, recompute) in
            configs().into_iter().flat_map(|config| [(config.clone(), false), (config, true)])
        {
            let config = deepened(config);
            let whole = Trainable::new(&config);
            let all = params(&whole);
            let [mut of_stages, mut of_whole] = [Vec::new(), Vec::new()];
            for (n, all_of) in [(1, &mut of_whole), (4, &mut of_stages)] {
                let stages = Stage::divide(&config, T, n).unwrap();
                let (before, behind) = links(n);
                let (head, mut heads) = (channel().0, None);
                let head = if n > 1 {
                    let (send, receive) = channel();
                    heads = Some(receive);
                    send
                } else {
                    head
                };
                std::thread::scope(|scope| {
                    let mut running = Vec::new();
                    for ((stage, before), behind) in stages.iter().zip(before).zip(behind) {
                        let trainable =
                            if n == 1 { whole.clone() } else { Trainable::of_stage(&config, stage) };
                        let mut own = all[stage.range(whole.params())].to_vec();
                        let n_params = own.len();
                        own.extend_from_slice(&all[..trainable.n_values() - n_params]);
                        let dparams = vec![f32::NAN; own.len()];
                        let keeper =
                            Piped { before, behind, head: (head.clone(), heads.take()), n_params, dparams };
                        let model = TrainModel::new(trainable, B, T, Precision::F32).with_flights(2);
                        let model = model.with_recompute(recompute);
                        running.push(scope.spawn(move || (n_params, run(model, &own, keeper))));
                    }
                    for i in 0..2 {
                        all_of.push((LossSum::default(), Vec::new()));
                        let _ = i;
                    }
                    for stage in running {
                        let (n_params, both) = stage.join().unwrap();
                        for (sum, (loss, dparams)) in all_of.iter_mut().zip(both) {
                            sum.0 = loss;
                            sum.1.extend_from_slice(&dparams[..n_params]);
                        }
                    }
                });
            }
            assert!(of_stages == of_whole, "{:?} {recompute}", config.architecture);
            assert!(of_whole[0].0.nats > 0.0 && of_whole[0] != of_whole[1]);
        }
    }

    /// With more layers than stages.
    fn deepened(config: Config) -> Config {
        let window =
            config.window.map(|window| Window { layers: (0..5).map(|l| l % 2 == 0).collect(), ..window });
        Config { n_layers: 5, window, ..config }
    }
}
