//! Text to ids and back: BPE, streaming decode, chat templates.
