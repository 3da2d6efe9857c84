//! What each step held and took: wall time beside the processor time of the threads that compute it, the time these waited
//! for a processor, and the pages they touched first. Says whether a long step had much to do or was held up.

use std::fs::read_to_string;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use engine::{ModelRunner, Runner, RunnerError, RunnerShape, StepInput};
use tensor::Pool;

/// A runner whose steps are written down.
pub(crate) struct Recorded {
    runner: ModelRunner,
    start: Instant,
    steps: Steps,
    /// Where Linux tells the times of the threads that compute, once they are known.
    threads: Vec<String>,
}

/// The steps so far, shared with who prints them.
pub(crate) type Steps = Arc<Mutex<Vec<Step>>>;

/// One step. Times in ns.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Step {
    at: u64,
    wall: u64,
    /// Of all threads that compute, on a processor and waiting for one.
    busy: u64,
    waited: u64,
    /// Hundredths of a second that the host gave to others, of all processors.
    stolen: u64,
    n_faults: u64,
    n_decodes: usize,
    n_tokens: usize,
    n_read: usize,
    n_pairs: usize,
}

/// What has come together since the process started.
#[derive(Clone, Copy, Default)]
struct Totals {
    busy: u64,
    waited: u64,
    stolen: u64,
    n_faults: u64,
}

impl Recorded {
    pub(crate) fn new(runner: ModelRunner, start: Instant) -> (Recorded, Steps) {
        let steps = Steps::default();
        (Recorded { runner, start, steps: steps.clone(), threads: Vec::new() }, steps)
    }
}

impl Runner for Recorded {
    fn shape(&self) -> RunnerShape {
        self.runner.shape()
    }

    fn pool(&self) -> Option<Arc<Pool>> {
        self.runner.pool()
    }

    fn step(&mut self, input: &StepInput) -> Result<&[f32], RunnerError> {
        if self.threads.is_empty() {
            self.threads = computing_threads();
        }
        let before = totals(&self.threads);
        let started = Instant::now();
        let logits_rv = self.runner.step(input)?;
        let wall = started.elapsed().as_nanos() as u64;
        let after = totals(&self.threads);
        let at = (started - self.start).as_nanos() as u64;
        let step = Step { at, wall, ..Step::of(input) }.between(before, after);
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).push(step);
        Ok(logits_rv)
    }
}

impl Step {
    fn of(input: &StepInput) -> Step {
        let mut step = Step { n_tokens: input.tokens_n.len(), ..Step::default() };
        for row in &input.rows {
            let n = row.n_tokens;
            step.n_decodes += usize::from(n == 1 && row.n_logits == 1);
            step.n_read += row.n_context;
            step.n_pairs += n * (row.n_context - n) + n * (n + 1) / 2;
        }
        step
    }

    fn between(self, before: Totals, after: Totals) -> Step {
        Step {
            busy: after.busy - before.busy,
            waited: after.waited - before.waited,
            stolen: after.stolen - before.stolen,
            n_faults: after.n_faults - before.n_faults,
            ..self
        }
    }
}

/// A table for other programs, a line a step.
pub(crate) fn csv(steps: &Steps) -> String {
    let mut text =
        "at_ns,wall_ns,busy_ns,waited_ns,stolen,n_faults,n_decodes,n_tokens,n_read,n_pairs\n".to_owned();
    for step in steps.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let Step { at, wall, busy, waited, stolen, n_faults, n_decodes, n_tokens, n_read, n_pairs } = step;
        text += &format!(
            "{at},{wall},{busy},{waited},{stolen},{n_faults},{n_decodes},{n_tokens},{n_read},{n_pairs}\n"
        );
    }
    text
}

/// The engine's thread, which calls this, and those of the pool.
fn computing_threads() -> Vec<String> {
    let mut threads = vec!["/proc/thread-self".to_owned()];
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let paths = tasks.map(|task| task.path().display().to_string());
    threads.extend(
        paths.filter(|path| {
            read_to_string(format!("{path}/comm")).is_ok_and(|name| name.starts_with("tensor-"))
        }),
    );
    threads
}

/// Zero where a system does not tell.
fn totals(threads: &[String]) -> Totals {
    let mut totals = Totals::default();
    for thread in threads {
        let [busy, waited] = numbers(&format!("{thread}/schedstat"), [0, 1]);
        totals.busy += busy;
        totals.waited += waited;
        // proc(5): the tenth field is of minor faults; the name in the second has no spaces here.
        totals.n_faults += numbers(&format!("{thread}/stat"), [9])[0];
    }
    totals.stolen = numbers("/proc/stat", [8])[0];
    totals
}

fn numbers<const N: usize>(path: &str, fields: [usize; N]) -> [u64; N] {
    let text = read_to_string(path).unwrap_or_default();
    let first: Vec<&str> = text.lines().next().unwrap_or_default().split_ascii_whitespace().collect();
    fields.map(|field| first.get(field).and_then(|field| field.parse().ok()).unwrap_or(0))
}
