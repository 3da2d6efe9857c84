//! What a micro-batch takes of memory, without allocating it.

use super::TrainModel;
use super::memory::Shape;
use crate::{Config, Stage};
use tensor::Precision;

/// Bytes that [`TrainModel::new`] allocates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActivationBytes {
    /// What the backward pass reads of every layer, and the residual stream before every norm.
    pub layers: usize,
    /// What lives within one sub-layer.
    pub scratch: usize,
    /// Logits of a chunk of tokens.
    pub logits: usize,
}

impl ActivationBytes {
    pub fn total(&self) -> usize {
        self.layers + self.scratch + self.logits
    }
}

impl TrainModel {
    /// For micro-batches of `b` rows of `t` tokens; `recompute`: see [`TrainModel::with_recompute`].
    pub fn activation_bytes(config: &Config, rows: [usize; 2], recompute: bool) -> ActivationBytes {
        TrainModel::activation_bytes_of((config, &Stage::whole(config)), rows, (recompute, 1))
    }

    /// Of a stage of a model, with so many micro-batches in flight.
    pub fn activation_bytes_of(
        (config, stage): (&Config, &Stage),
        [b, t]: [usize; 2],
        (recompute, n_flights): (bool, usize),
    ) -> ActivationBytes {
        let config = &stage.config(config);
        let shape = Shape::new(config, [b, t], Precision::F32).with_head(stage.is_last());
        let Shape { n, c, f, block, attention, rope, .. } = shape;
        let when = |there: bool, floats: usize| if there { floats } else { 0 };
        let stream = c + when(!block.layer_norm, 1);
        let up = if block.activation.is_gated() { 2 * f } else { f };
        let layer = attention.qkv_width()
            + when(block.head_norms, rope.n_heads * attention.head_width)
            + attention.out_width()
            + attention.n_heads
            + up
            + when(block.post_norms, 2 * stream);
        let scratch = 3 * c
            + f
            + attention.qkv_width()
            + attention.out_width()
            + when(block.post_norms, c)
            + 1
            + when(!block.rotary, 1);
        let chunk = shape.chunk();
        let (n_layers, n_streams) = match recompute {
            true => (1, config.n_layers + 2),
            false => (config.n_layers, 2 * config.n_layers + 1),
        };
        ActivationBytes {
            layers: n_flights * 4 * n * (n_layers * layer + n_streams * stream),
            scratch: 4 * (n * scratch + 2 * c.max(attention.head_width)),
            logits: 4 * chunk * shape.v,
        }
    }
}

#[cfg(test)]
mod tests {
    use tensor::Buf;

    use super::*;
    use crate::Trainable;
    use crate::config::tests::tiny;
    use crate::train::memory::{LayerMemory, Scratch, Stream};

    fn stream(stream: &Stream) -> usize {
        stream.x_nc.len() + stream.rstd_n.len()
    }

    fn layer(layer: &LayerMemory) -> usize {
        let LayerMemory { qkv, heads_nk, out_nhd, lse_bht, up_no, post } = layer;
        let bufs =
            [qkv, heads_nk, out_nhd, lse_bht, up_no].iter().map(|buf: &&Buf<f32>| buf.len()).sum::<usize>();
        bufs + post.iter().flatten().map(stream).sum::<usize>()
    }

    fn check(config: &Config) {
        [false, true].into_iter().for_each(|recompute| check_memory(config, recompute));
        let [all, some] =
            [false, true].map(|recompute| TrainModel::activation_bytes(config, [3, 8], recompute));
        assert!(some.layers < all.layers);
    }

    fn check_memory(config: &Config, recompute: bool) {
        let (b, t) = (3, 8);
        let found = TrainModel::activation_bytes(config, [b, t], recompute);
        let model = TrainModel::new(Trainable::new(config), b, t, Precision::F32).with_recompute(recompute);
        let layers = model.flights[0].layers.iter().map(layer).sum::<usize>()
            + model.flights[0].streams.iter().map(stream).sum::<usize>();
        assert_eq!(found.layers, 4 * layers);
        let Scratch {
            normed_nc,
            delta_nc,
            act_nf,
            dqkv,
            dout_nhd,
            dx_nc,
            dpost_nc,
            logits,
            losses_n,
            positions_bt,
            sink,
            ..
        } = &model.scratch;
        let bufs = [normed_nc, delta_nc, act_nf, dqkv, dout_nhd, dx_nc, dpost_nc, losses_n, sink];
        let scratch = bufs.iter().map(|buf| buf.len()).sum::<usize>() + positions_bt.len();
        assert_eq!((found.scratch, found.logits), (4 * scratch, 4 * logits.len()));
    }

    #[test]
    fn it_is_what_a_model_allocates() {
        check(&tiny());
        for json in [
            r#"{"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 90, "n_positions": 16}"#,
            r#"{"model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "vocab_size": 90,
                "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "max_position_embeddings": 16}"#,
        ] {
            check(&Config::from_json(json.as_bytes()).unwrap());
        }
    }
}
