//! Text to documents, token shards and batches.
