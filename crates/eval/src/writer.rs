//! What a model answers, the likeliest token after the other, many answers at a time.

use std::collections::VecDeque;

use model::{BLOCK_TOKENS, StepInput};
use tokenizer::{StreamDecoder, Tokenizer};

use crate::reader::Reader;
use crate::{Error, Result};

/// Answers in work at a time.
const STREAMS_MAX: usize = 16;
const STEP_TOKENS: usize = 512;

/// Answers questions with a [`Reader`]'s model and memory.
pub struct Writer<'r, 'a> {
    reader: &'r mut Reader<'a>,
    tokenizer: &'r Tokenizer,
    /// New tokens of an answer.
    pub max_tokens: usize,
    /// Texts that end an answer and are not part of it.
    pub stops: &'r [&'r str],
}

/// One answer in work.
struct Stream {
    index: usize,
    ids: Vec<u32>,
    n_computed: usize,
    n_prompt: usize,
    blocks: Vec<u32>,
    decoder: StreamDecoder,
    said: String,
}

impl<'r, 'a> Writer<'r, 'a> {
    pub fn new(reader: &'r mut Reader<'a>, tokenizer: &'r Tokenizer) -> Writer<'r, 'a> {
        Writer { reader, tokenizer, max_tokens: 256, stops: &[] }
    }

    /// Answers to all questions, in their order; `done` hears of each.
    ///
    /// # Errors
    /// If there is not even room for one answer, or the model fails.
    pub fn answer(&mut self, prompts: &[Vec<u32>], done: &mut dyn FnMut()) -> Result<Vec<String>> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + self.max_tokens;
        let blocks_each = longest.div_ceil(BLOCK_TOKENS);
        let n_streams = (self.reader.kv.n_blocks() / blocks_each.max(1)).min(STREAMS_MAX);
        if n_streams == 0 {
            let room = self.reader.kv.n_blocks() * BLOCK_TOKENS;
            return Err(Error::Room { need: longest, room });
        }
        let mut waiting: VecDeque<usize> = (0..prompts.len()).collect();
        let mut free: Vec<u32> = (0..n_streams as u32).collect();
        let mut streams: Vec<Stream> = Vec::new();
        let mut answers = vec![String::new(); prompts.len()];
        loop {
            while let Some(slot) = free.pop_if(|_| !waiting.is_empty()) {
                let index = waiting.pop_front().expect("somebody waits");
                let first = slot * blocks_each as u32;
                let blocks = (first..first + blocks_each as u32).collect();
                streams.push(self.begin(index, &prompts[index], blocks));
            }
            if streams.is_empty() {
                return Ok(answers);
            }
            self.step(&mut streams)?;
            for i in (0..streams.len()).rev().filter(|&i| self.has_ended(&streams[i])).collect::<Vec<_>>() {
                let stream = streams.remove(i);
                free.push(stream.blocks[0] / blocks_each as u32);
                let index = stream.index;
                answers[index] = self.cut(stream);
                done();
            }
        }
    }

    fn begin(&self, index: usize, prompt: &[u32], blocks: Vec<u32>) -> Stream {
        let (ids, decoder) = (prompt.to_vec(), self.tokenizer.decoder());
        Stream { index, n_prompt: ids.len(), ids, n_computed: 0, blocks, decoder, said: String::new() }
    }

    /// Computes what is known of the streams and not computed, and draws a token where nothing is left.
    fn step(&mut self, streams: &mut [Stream]) -> Result<()> {
        let vocab = self.reader.model.config().vocab;
        let mut step = StepInput::default();
        let mut drawing = Vec::new();
        // Those that already speak first: their steps are short.
        let mut order: Vec<usize> = (0..streams.len()).collect();
        order.sort_by_key(|&i| streams[i].ids.len() - streams[i].n_computed);
        for i in order {
            let stream = &mut streams[i];
            let left = stream.ids.len() - stream.n_computed;
            let n = left.min(STEP_TOKENS - step.tokens_n.len());
            if n == 0 {
                break;
            }
            let at = stream.n_computed;
            step.push_row(&stream.ids[at..at + n], at, &stream.blocks, usize::from(n == left));
            stream.n_computed += n;
            if n == left {
                drawing.push(i);
            }
        }
        let logits_rv = self.reader.forward(&step)?;
        for (i, logits_v) in drawing.into_iter().zip(logits_rv.chunks_exact(vocab)) {
            let best = crate::score::first_best(logits_v.iter().map(|&x| f64::from(x))) as u32;
            let stream = &mut streams[i];
            stream.ids.push(best);
            let piece = stream.decoder.push(best);
            stream.said.push_str(&piece);
        }
        Ok(())
    }

    fn has_ended(&self, stream: &Stream) -> bool {
        let n_said = stream.ids.len() - stream.n_prompt;
        let ends = stream
            .ids
            .last()
            .is_some_and(|&id| self.tokenizer.is_special(id) || self.tokenizer.eos() == Some(id));
        n_said > 0 && (ends || n_said >= self.max_tokens || self.stop_in(&stream.said).is_some())
    }

    fn stop_in(&self, said: &str) -> Option<usize> {
        self.stops.iter().filter_map(|stop| said.find(stop)).min()
    }

    fn cut(&self, mut stream: Stream) -> String {
        stream.said.push_str(&stream.decoder.finish());
        stream.said.truncate(self.stop_in(&stream.said).unwrap_or(stream.said.len()));
        stream.said
    }
}
