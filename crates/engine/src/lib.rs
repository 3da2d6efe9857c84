//! Continuous batching over paged KV blocks: ids in, ids out.
