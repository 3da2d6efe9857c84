//! A model behind `/v1/embeddings`.

use std::sync::{Arc, Mutex, PoisonError};

use api::{Cause, Embedder};
use model::{Scratch, Transformer};
use tensor::Pool;
use tokenizer::{Tokenizer, WordPiece};

/// Shares its weights with the engine of the same model, if that generates too, and takes turns with it on the threads.
pub(crate) struct ModelEmbedder {
    pub(crate) model: Arc<Transformer>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) tokenizer: TextTokenizer,
    pub(crate) scratch: Mutex<Scratch>,
}

/// Encoders and the other models have tokenizers of their own kinds.
pub(crate) enum TextTokenizer {
    Pieces(WordPiece),
    Merges(Tokenizer),
}

impl Embedder for ModelEmbedder {
    fn width(&self) -> usize {
        self.model.config().width
    }

    fn context_max(&self) -> usize {
        self.model.context_max()
    }

    fn vocab(&self) -> usize {
        self.model.config().vocab
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        match &self.tokenizer {
            TextTokenizer::Pieces(tokenizer) => tokenizer.encode(text),
            TextTokenizer::Merges(tokenizer) => {
                let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
                bos.into_iter().chain(tokenizer.encode(text)).collect()
            }
        }
    }

    fn embed(&self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, Cause> {
        // A panic in an earlier call leaves nothing in the scratch that the next one reads.
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(self.model.embed(&self.pool, texts, &mut scratch)?)
    }
}
