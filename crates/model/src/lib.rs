//! Llama-type models: config, weights, forward, backward, cached forward; Hugging Face and GGUF formats.
