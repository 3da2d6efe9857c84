//! A labelled family whose members may differ in shape.

use std::sync::{Arc, PoisonError, RwLock};

use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// Metrics of one name, one per label set.
///
/// The library's own `Family` builds every member with one constructor; token histograms need buckets that depend on the
/// model's context length, so their members are built by the caller.
#[derive(Debug)]
pub(crate) struct Series<L, M>(Arc<RwLock<Vec<(L, M)>>>);

impl<L, M> Clone for Series<L, M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<L, M> Default for Series<L, M> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<L: PartialEq + Clone, M: Clone> Series<L, M> {
    /// The member with these labels, built by `make` when it is new.
    pub(crate) fn get_or_insert(&self, labels: &L, make: impl FnOnce() -> M) -> M {
        let mut members = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, member)) = members.iter().find(|(known, _)| known == labels) {
            return member.clone();
        }
        let member = make();
        members.push((labels.clone(), member.clone()));
        member
    }
}

impl<L, M> EncodeMetric for Series<L, M>
where
    L: EncodeLabelSet,
    M: EncodeMetric + TypedMetric,
{
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), std::fmt::Error> {
        let members = self.0.read().unwrap_or_else(PoisonError::into_inner);
        for (labels, member) in members.iter() {
            member.encode(encoder.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }

    fn is_empty(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}
