//! [`TrainModel`]: forward and backward of a whole model over rows of tokens, parameters and gradients flat.
//!
//! ```text
//! x₀ = embedding(tokens) (+ positions)
//! each layer:  x' = x + attention(norm(x)·Wqkvᵀ)·Woᵀ      x = x' + activation(norm(x')·Wupᵀ)·Wdᵀ
//! loss = objective(norm(x)·Wheadᵀ, targets)
//! ```
//! What a model has besides (biases, norms of heads, norms after sub-layers, windows) its [`crate::Block`] and [`Config`]
//! say, as they do for inference; no architecture is known by name.
//!
//! The streams x and x' before every norm are kept, and what each sub-layer's backward needs; normed rows and
//! activations are computed again. With [`TrainModel::with_recompute`] only the streams x are kept, and each layer is
//! computed again before its backward: the same bits, a third more operations, a fraction of the memory. Logits exist
//! for a chunk of tokens at a time.
//!
//! `matrices` multiplies (with the parameters, or with frozen ones and what LoRA adds to them), `layer` is the block,
//! `head` the logits, `objective` what is minimized.

mod batch;
mod budget;
mod division;
mod head;
mod keeper;
mod layer;
mod matrices;
mod memory;
mod norm;
mod objective;
mod stage;
mod teacher;

use tensor::embedding::{embedding_add, embedding_backward, embedding_forward};
use tensor::rope::RopeTable;
use tensor::rows::scale;
use tensor::{Pool, Precision};

pub use batch::MicroBatch;
pub use budget::ActivationBytes;
pub use division::Division;
use keeper::Flat;
pub use keeper::{Keeper, Kept, Neighbor};
use matrices::{Grads, Held, Matrices, MatrixScratch, Values};
use memory::{Layers, Scratch, Shape, Streams};
use norm::Norm;
pub use objective::{LossSum, Objective};
pub use stage::Stage;
pub use teacher::Teacher;

use crate::{Config, Trainable};

/// A model with the memory one micro-batch of b rows of t tokens needs. No call allocates after the first.
///
/// Results are the same bits for every number of threads.
pub struct TrainModel {
    trainable: Trainable,
    shape: Shape,
    /// Angles of layers without and with a window; `None` where positions are learned.
    ropes: [Option<RopeTable>; 2],
    /// Of every micro-batch whose backward pass is still to come: one, but in a pipeline.
    flights: Vec<Flight>,
    /// Layers are computed again in the backward pass.
    recompute: bool,
    scratch: Scratch,
    matrix_scratch: MatrixScratch,
    z_loss: f32,
    /// Whom it learns from, if anybody.
    teacher: Option<Box<Teacher>>,
}

/// What a micro-batch's backward pass reads.
struct Flight {
    layers: Layers,
    streams: Streams,
}

/// Which parameters a pass computes with.
#[derive(Clone, Copy)]
enum Params<'a> {
    /// Those that are trained; `None` where the keeper gives them unit by unit.
    Trained(Option<&'a [f32]>),
    /// Those the run started from.
    Start,
}

impl TrainModel {
    /// For micro-batches of `b` rows of `t` tokens. `precision` is that of the matrix products.
    ///
    /// # Panics
    /// If b or t is 0, or t is more than the model has learned positions.
    pub fn new(trainable: Trainable, b: usize, t: usize, precision: Precision) -> Self {
        let config = trainable.config();
        assert!(b > 0 && t > 0, "a micro-batch of {b} rows of {t} tokens");
        let block = config.block();
        assert!(block.rotary || t <= config.context_max, "{t} positions of {}", config.context_max);
        let shape = Shape::new(config, [b, t], precision).with_head(!trainable.table().head.is_empty());
        Self {
            shape,
            ropes: config.rope_tables(t),
            flights: vec![Flight::new(shape, config.n_layers, false)],
            recompute: false,
            scratch: Scratch::new(shape),
            matrix_scratch: MatrixScratch::default(),
            z_loss: 0.0,
            teacher: None,
            trainable,
        }
    }

    /// Gradients also keep logits from drifting, with this weight on the square of their logarithmic sum.
    pub fn with_z_loss(self, z_loss: f32) -> Self {
        Self { z_loss, ..self }
    }

    /// With one whom [`Objective::Distill`] learns from.
    ///
    /// # Panics
    /// If the teacher has another vocabulary, or was made for other rows.
    pub fn with_teacher(self, teacher: Teacher) -> Self {
        assert!(teacher.fits(&self), "a teacher of the same vocabulary, for the same rows");
        Self { teacher: Some(Box::new(teacher)), ..self }
    }

    /// Whether only the input of every layer is kept, and the layer computed again before its backward pass. To be said
    /// before the first pass; it changes no bit.
    pub fn with_recompute(self, recompute: bool) -> Self {
        let n_flights = self.flights.len();
        Self { recompute, ..self }.with_flights(n_flights)
    }

    /// Room for so many micro-batches between their forward and their backward pass, where this is a stage of a model. To be
    /// said before the first pass.
    ///
    /// # Panics
    /// If it is 0.
    pub fn with_flights(self, n_flights: usize) -> Self {
        assert!(n_flights > 0, "a micro-batch has room at least");
        let (shape, n_layers) = (self.shape, self.trainable.config().n_layers);
        let flight = |_| Flight::new(shape, n_layers, self.recompute);
        Self { flights: (0..n_flights).map(flight).collect(), ..self }
    }

    /// What is trained: the layout of `params` and `dparams`.
    pub fn trainable(&self) -> &Trainable {
        &self.trainable
    }

    /// The loss of a micro-batch and its gradient: that of the *sum* over what counts, in nats. `dparams` is overwritten.
    ///
    /// # Panics
    /// If a length differs from what [`TrainModel::new`] was told, a token or target is not below the vocabulary, or the
    /// objective compares with a start that the [`Trainable`] does not have.
    pub fn loss_and_grads(
        &mut self,
        pool: &Pool,
        params: &[f32],
        (batch, objective): (MicroBatch, Objective),
        dparams: &mut [f32],
    ) -> LossSum {
        assert_eq!(dparams.len(), self.trainable.n_values(), "gradients");
        self.loss_and_grads_to(pool, Some(params), (batch, objective), &mut Flat(dparams))
    }

    /// As [`TrainModel::loss_and_grads`]. Gradients go to the keeper; where `params` is `None` parameters come from it.
    ///
    /// # Panics
    /// As [`TrainModel::loss_and_grads`], and where LoRA's parameters are not given.
    pub fn loss_and_grads_to(
        &mut self,
        pool: &Pool,
        params: Option<&[f32]>,
        (batch, objective): (MicroBatch, Objective),
        keeper: &mut dyn Keeper,
    ) -> LossSum {
        objective::loss_and_grads(self, pool, params, (batch, objective), keeper)
    }

    /// Of a stage that others come behind: the first half of [`TrainModel::loss_and_grads_to`]. `flight` names the memory in
    /// which the backward pass finds what it needs.
    ///
    /// # Panics
    /// As [`TrainModel::loss_and_grads_to`], or if the stage is the last, or has no such memory.
    pub fn forward_to(
        &mut self,
        pool: &Pool,
        params: &[f32],
        (batch, flight): (MicroBatch, usize),
        keeper: &mut dyn Keeper,
    ) {
        let mut pass = self.pass_of((pool, flight), Params::Trained(Some(params)), batch, keeper);
        assert!(!pass.has_head(), "the last stage begins its backward pass at once");
        pass.forward();
    }

    /// The second half, of a micro-batch whose first was of the same flight.
    ///
    /// # Panics
    /// As [`TrainModel::forward_to`].
    pub fn backward_to(
        &mut self,
        pool: &Pool,
        params: &[f32],
        (batch, flight): (MicroBatch, usize),
        keeper: &mut dyn Keeper,
    ) {
        let mut pass = self.pass_of((pool, flight), Params::Trained(Some(params)), batch, keeper);
        assert!(!pass.has_head(), "the last stage has lost something");
        pass.backward();
    }

    /// The loss alone.
    ///
    /// # Panics
    /// As [`TrainModel::loss_and_grads`].
    pub fn loss(
        &mut self,
        pool: &Pool,
        params: &[f32],
        (batch, objective): (MicroBatch, Objective),
    ) -> LossSum {
        self.loss_of(pool, Some(params), (batch, objective), &mut Flat(&mut []))
    }

    /// As [`TrainModel::loss`]; where `params` is `None` they come from the keeper.
    ///
    /// # Panics
    /// As [`TrainModel::loss_and_grads_to`].
    pub fn loss_of(
        &mut self,
        pool: &Pool,
        params: Option<&[f32]>,
        (batch, objective): (MicroBatch, Objective),
        keeper: &mut dyn Keeper,
    ) -> LossSum {
        objective::loss(self, pool, params, (batch, objective), keeper)
    }

    fn pass<'a>(
        &'a mut self,
        pool: &'a Pool,
        params: Params<'a>,
        batch: MicroBatch<'a>,
        keeper: &'a mut dyn Keeper,
    ) -> Pass<'a> {
        self.pass_of((pool, 0), params, batch, keeper)
    }

    fn pass_of<'a>(
        &'a mut self,
        (pool, flight): (&'a Pool, usize),
        params: Params<'a>,
        batch: MicroBatch<'a>,
        keeper: &'a mut dyn Keeper,
    ) -> Pass<'a> {
        let Self { trainable, shape, ropes, flights, recompute, scratch, matrix_scratch, z_loss, .. } = self;
        let Flight { layers, streams } = &mut flights[flight];
        let values = trainable.values(params);
        let matrices = Matrices { pool, values, shape: *shape, scratch: matrix_scratch };
        let config = trainable.config();
        Pass {
            pool,
            config,
            shape: *shape,
            batch,
            ropes,
            matrices,
            grads: Grads { keeper, all: trainable.lora_table().is_none() },
            layers,
            streams,
            recompute: *recompute,
            scratch,
            z_loss: *z_loss,
        }
    }
}

impl Flight {
    fn new(shape: Shape, n_layers: usize, recompute: bool) -> Flight {
        Flight {
            layers: Layers::new(shape, n_layers, recompute),
            streams: Streams::new(shape, n_layers, recompute),
        }
    }
}

impl Trainable {
    fn values<'a>(&'a self, params: Params<'a>) -> Values<'a> {
        let values = |held, changes| Values { table: self.table(), held, changes };
        let of_start = |why| Held::All(self.start().expect(why));
        match (params, self.lora_table()) {
            (Params::Trained(None), None) => values(Held::Units(Vec::new()), None),
            (Params::Trained(None), Some(_)) => panic!("LoRA's parameters are given"),
            (Params::Trained(Some(params)), changes) => {
                assert_eq!(params.len(), self.n_values(), "parameters");
                match changes {
                    None => values(Held::All(params), None),
                    Some(lora) => values(of_start("LoRA has a base"), Some((lora, params))),
                }
            }
            (Params::Start, _) => {
                values(of_start("the objective compares with the model the run started from"), None)
            }
        }
    }
}

/// One micro-batch on its way through the model.
struct Pass<'a> {
    pool: &'a Pool,
    config: &'a Config,
    shape: Shape,
    batch: MicroBatch<'a>,
    ropes: &'a [Option<RopeTable>; 2],
    matrices: Matrices<'a>,
    grads: Grads<'a>,
    layers: &'a mut Layers,
    streams: &'a mut Streams,
    recompute: bool,
    scratch: &'a mut Scratch,
    z_loss: f32,
}

impl Pass<'_> {
    /// From now on a unit's parameters are there.
    fn hold(&mut self, unit: usize) {
        if let Held::Units(units) = &mut self.matrices.values.held
            && units.iter().all(|(held, _)| *held != unit)
        {
            units.push((unit, self.grads.keeper.need(unit)));
        }
    }

    fn release(&mut self, unit: usize) {
        if let Held::Units(units) = &mut self.matrices.values.held
            && let Some(at) = units.iter().position(|(held, _)| *held == unit)
        {
            units.swap_remove(at);
            self.grads.keeper.release(unit);
        }
    }

    /// The gradients of a unit are there.
    fn complete(&mut self, unit: usize) {
        if self.grads.all {
            self.grads.keeper.complete(unit);
        }
    }

    /// What comes after the layers.
    fn last_unit(&self) -> usize {
        self.config.n_layers + 1
    }

    /// Whether the layers end with the model's.
    fn has_head(&self) -> bool {
        !self.matrices.values.table.head.is_empty()
    }

    /// Fills the streams and the layers' memory; leaves the last normed rows in `scratch.normed_nc`, or gives the stream to
    /// the stage behind.
    fn forward(&mut self) {
        self.batch.check(self.shape.n);
        self.hold(0);
        match self.matrices.values.table.embedding.is_empty() {
            true => self.grads.keeper.receive(Neighbor::Before, &mut self.streams[0].x_nc),
            false => self.embed(),
        }
        self.release(0);
        self.hold(1);
        let (pool, values, first) = (self.pool, &self.matrices.values, &mut self.streams[0]);
        let norm = Norm::of(values, &values.table.layers[0].attention_norm, self.shape.norm_eps);
        norm.forward(pool, &mut self.scratch.normed_nc, first);
        for l in 0..self.config.n_layers {
            self.layer_forward(l);
        }
        if !self.has_head() {
            let last = 2 * self.config.n_layers;
            self.grads.keeper.send(Neighbor::Behind, &self.streams[last].x_nc);
        }
    }

    fn embed(&mut self) {
        let (pool, values, c) = (self.pool, &self.matrices.values, self.shape.c);
        let x_nc = &mut self.streams[0].x_nc;
        embedding_forward(pool, x_nc, self.batch.tokens_bt, values.of(&values.table.embedding), c);
        if self.shape.block.scaled_embedding {
            scale(pool, x_nc, (c as f32).sqrt());
        }
        if let Some(positions) = &values.table.positions {
            self.batch.positions(self.shape.t, &mut self.scratch.positions_bt);
            embedding_add(pool, x_nc, &self.scratch.positions_bt, values.of(positions), c);
        }
    }

    /// From the gradient of the last normed rows (in `scratch.delta_nc`), or what the stage behind gives, to that of all
    /// parameters.
    fn backward(&mut self) {
        match self.has_head() {
            true => self.final_norm_backward(),
            false => self.grads.keeper.receive(Neighbor::Behind, &mut self.scratch.dx_nc),
        }
        let n_layers = self.config.n_layers;
        for l in (0..n_layers).rev() {
            self.hold(l + 1);
            // The last one is still there from the forward pass.
            if self.recompute && l + 1 < n_layers {
                self.layer_again(l);
            }
            self.feed_forward_backward(l);
            self.attention_backward(l);
            self.release(l + 1);
            self.complete(l + 1);
        }
        match self.matrices.values.table.embedding.is_empty() {
            true => self.grads.keeper.send(Neighbor::Before, &self.scratch.dx_nc),
            false => self.embed_backward(),
        }
        self.grads.keeper.complete(0);
    }

    fn embed_backward(&mut self) {
        let Grads { keeper, all: true } = &mut self.grads else { return };
        let (pool, table, c) = (self.pool, self.matrices.values.table, self.shape.c);
        let Scratch { dx_nc, positions_bt, .. } = &mut *self.scratch;
        if let Some(positions) = &table.positions {
            let dpositions = keeper.grads(positions.clone());
            dpositions.fill(0.0);
            // Other micro-batches may have come since the forward pass.
            self.batch.positions(self.shape.t, positions_bt);
            embedding_backward(pool, dpositions, dx_nc, positions_bt, c);
        }
        if self.shape.block.scaled_embedding {
            scale(pool, dx_nc, (c as f32).sqrt());
        }
        match () {
            () if table.is_head_elsewhere => keeper.begin_with_head(table.embedding.clone()),
            () if table.head == table.embedding => {}
            () => keeper.grads(table.embedding.clone()).fill(0.0),
        }
        let dembedding = keeper.grads(table.embedding.clone());
        embedding_backward(pool, dembedding, dx_nc, self.batch.tokens_bt, c);
    }
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod golden_models;
#[cfg(test)]
mod tests;
