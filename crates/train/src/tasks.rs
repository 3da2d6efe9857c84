//! The tasks that a run asks its model as it learns, by the code of `loquat eval tasks`.
//!
//! Their files lie in the run, so that resuming needs nothing else. Nothing that is trained depends on them.

use std::path::Path;
use std::sync::Arc;

use eval::{Options, Reader, Task};
use model::{BLOCK_TOKENS, KvType, Transformer, Weights};
use sha2::{Digest, Sha256};
use store::{Bundle, BundleWriter, Store};
use tensor::Pool;
use tokenizer::Tokenizer;

use crate::event::{Score, TaskScores};
use crate::plan::{TaskFile, Tasks};
use crate::{Error, Plan, Result};

const KIND: &str = "tasks";
/// Of the examples that are drawn: that of `loquat eval tasks`, so that the scores are the same.
const SEED: u64 = 1234;
/// Room for the keys and values of sequences that are computed together, in rows of the plan's context, and at least.
const ROWS: usize = 8;
const POSITIONS_MIN: usize = 8192;
/// See `tensor::packed`.
const CHUNK_BYTES: usize = 32 << 20;

impl Tasks {
    /// Reads the files of tasks, so that a wrong one is told before the run begins. Each is its name and what it holds.
    ///
    /// # Errors
    /// If one is no task: by file, line and field.
    pub fn new(
        every_steps: u64,
        shots: usize,
        items_max: usize,
        files: &[(String, Vec<u8>)],
    ) -> Result<Tasks> {
        let sha256 = |bytes: &[u8]| hex::encode(Sha256::digest(bytes));
        let file = |(name, bytes): &(String, Vec<u8>)| TaskFile { name: name.clone(), sha256: sha256(bytes) };
        let tasks = Tasks { every_steps, shots, items_max, files: files.iter().map(file).collect() };
        for (name, bytes) in files {
            tasks.read(name, bytes)?;
        }
        Ok(tasks)
    }

    fn read(&self, name: &str, bytes: &[u8]) -> Result<Task> {
        let options = Options { shots: self.shots, seed: SEED, limit: Some(self.items_max), delimiter: None };
        Ok(Task::read(Path::new(name), bytes, &options)?)
    }
}

impl Plan {
    /// Bytes of the copies of the model that write samples and are asked tasks, with keys and values: as tensors, and as the
    /// engine lays them out, for which it takes memory in large chunks.
    ///
    /// # Errors
    /// If the plan has no model.
    pub fn copy_bytes(&self) -> Result<u64> {
        let config = self.config()?;
        let n_blocks = if self.tasks.is_some() { n_positions(self).div_ceil(BLOCK_TOKENS) } else { 0 };
        let n_bytes = 4 * config.n_params();
        let laid_out = n_bytes.next_multiple_of(CHUNK_BYTES);
        Ok((n_bytes + laid_out + n_blocks * config.kv_block_bytes(KvType::F32)) as u64)
    }
}

fn n_positions(plan: &Plan) -> usize {
    (ROWS * plan.context).max(POSITIONS_MIN)
}

/// Puts the files of the plan's tasks into the run; to be done before it is created.
pub fn keep_tasks(store: &Arc<dyn Store>, run: &str, files: &[(String, Vec<u8>)]) -> Result<()> {
    let mut bundle = BundleWriter::new(store, &prefix(run))?;
    for (i, (_, bytes)) in files.iter().enumerate() {
        bundle.add(&i.to_string(), bytes)?;
    }
    bundle.publish(KIND, serde_json::Value::Null)?;
    Ok(())
}

/// Asks a model the tasks of a plan.
pub(crate) struct Asker {
    tasks: Vec<Task>,
    tokenizer: Tokenizer,
    n_positions: usize,
}

impl Asker {
    /// # Errors
    /// If the run does not have the files that its plan names.
    pub(crate) fn open(
        (store, run): (&Arc<dyn Store>, &str),
        plan: &Plan,
        tokenizer: Tokenizer,
    ) -> Result<Asker> {
        let mut asker = Asker { tasks: Vec::new(), tokenizer, n_positions: n_positions(plan) };
        let Some(planned) = &plan.tasks else { return Ok(asker) };
        let changed = |name: &str| Error::TaskChanged { run: run.to_owned(), name: name.to_owned() };
        let bundle = Bundle::open(store, &prefix(run))?.ok_or_else(|| changed(&planned.files[0].name))?;
        for (i, file) in planned.files.iter().enumerate() {
            let kept = bundle.manifest().files.iter().find(|kept| kept.name == i.to_string());
            kept.filter(|kept| kept.sha256 == file.sha256).ok_or_else(|| changed(&file.name))?;
            asker.tasks.push(planned.read(&file.name, &bundle.read(&i.to_string())?)?);
        }
        Ok(asker)
    }

    /// Scores of every task, or of those before the first that failed. A pure function of the weights.
    pub(crate) fn ask(&self, pool: &Pool, weights: Weights, told: &mut dyn FnMut(TaskScores)) -> Result<()> {
        let model = Transformer::new(weights, pool)?;
        let mut reader = Reader::new(&model, pool, KvType::F32, self.n_positions);
        for task in &self.tasks {
            let report = eval::run(task, &mut reader, &self.tokenizer, &mut |_| {})?;
            let score = |metric: &eval::Metric| Score {
                name: metric.name.to_owned(),
                value: metric.value,
                stderr: metric.stderr,
            };
            told(TaskScores {
                task: report.task,
                items: report.items,
                truncated: report.truncated,
                metrics: report.metrics.iter().map(score).collect(),
            });
        }
        Ok(())
    }
}

fn prefix(run: &str) -> String {
    format!("runs/{run}/tasks")
}
