//! How well tokens were guessed ahead, with vLLM's names (vLLM, `vllm/v1/spec_decode/metrics.py`).

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::engine::{EngineLabels, plain};

/// Handles for one served model.
#[derive(Clone, Debug)]
pub(crate) struct SpeculationMetrics {
    drafts: Counter,
    draft_tokens: Counter,
    accepted_tokens: Counter,
    accepted_per_position: Family<PositionLabels, Counter>,
    labels: EngineLabels,
}

impl SpeculationMetrics {
    /// Of one draft of `n_draft` tokens the first `n_accepted` were right.
    pub(crate) fn drafted(&self, n_draft: usize, n_accepted: usize) {
        self.drafts.inc();
        self.draft_tokens.inc_by(n_draft as u64);
        self.accepted_tokens.inc_by(n_accepted as u64);
        for position in 0..n_accepted {
            let EngineLabels { model_name, engine } = self.labels.clone();
            let labels = PositionLabels { model_name, engine, position: position as u64 };
            self.accepted_per_position.get_or_create_owned(&labels).inc();
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PositionLabels {
    model_name: String,
    engine: &'static str,
    /// Of the token in its draft, from 0. The engine bounds the length of a draft.
    position: u64,
}

#[derive(Debug)]
pub(crate) struct SpeculationFamilies {
    drafts: Family<EngineLabels, Counter>,
    draft_tokens: Family<EngineLabels, Counter>,
    accepted_tokens: Family<EngineLabels, Counter>,
    accepted_per_position: Family<PositionLabels, Counter>,
}

impl SpeculationFamilies {
    pub(crate) fn register(r: &mut Registry) -> Self {
        Self {
            drafts: plain(r, "spec_decode_num_drafts", "Drafts of guessed tokens that were verified"),
            draft_tokens: plain(r, "spec_decode_num_draft_tokens", "Guessed tokens that were verified"),
            accepted_tokens: plain(r, "spec_decode_num_accepted_tokens", "Guessed tokens that were right"),
            accepted_per_position: plain(
                r,
                "spec_decode_num_accepted_tokens_per_pos",
                "Guessed tokens that were right, by their position in the draft",
            ),
        }
    }

    pub(crate) fn handles(&self, labels: &EngineLabels) -> SpeculationMetrics {
        SpeculationMetrics {
            drafts: self.drafts.get_or_create_owned(labels),
            draft_tokens: self.draft_tokens.get_or_create_owned(labels),
            accepted_tokens: self.accepted_tokens.get_or_create_owned(labels),
            accepted_per_position: self.accepted_per_position.clone(),
            labels: labels.clone(),
        }
    }
}
