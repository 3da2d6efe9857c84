//! Checkpoints of DiLoCo: written where workers have met, so that one copy of the parameters is all of theirs. Every worker's
//! means of gradients are its own, and whoever runs it stores them: nothing of them crosses the link between ranks.

use super::*;

/// The outer step's momentum.
const OUTER: &str = "outer_m.f32";
/// The suffixes of a worker's files.
const OF_WORKER: [&str; 2] = ["adam_m.f32", "adam_v.f32"];

impl Checkpoints {
    /// Stores a rank's part, to be seen with [`Checkpoints::publish_round`]: the state of its workers, by their numbers, and
    /// on one rank the run's.
    pub(crate) fn store_round<'a>(
        &self,
        step: u64,
        run: Option<&State>,
        workers: impl Iterator<Item = (usize, &'a State)>,
    ) -> Result<Vec<FileEntry>> {
        let mut bundle = BundleWriter::new(&self.store, &self.prefix(step))?;
        let mut files = Vec::new();
        if let Some(run) = run {
            files.push(bundle.add(&file_name(VECTORS[0], 0, 1), &bytes(&run.params))?);
            files.push(bundle.add(OUTER, &bytes(&run.adam_m))?);
        }
        for (number, worker) in workers {
            for (suffix, vector) in OF_WORKER.iter().zip([&worker.adam_m, &worker.adam_v]) {
                files.push(bundle.add(&of_worker(number, suffix), &bytes(vector))?);
            }
        }
        Ok(files)
    }

    /// Makes what all ranks have stored visible. Returns its size in bytes.
    pub(crate) fn publish_round(
        &self,
        run: &State,
        files: Vec<FileEntry>,
        workers: Vec<Health>,
    ) -> Result<u64> {
        let mut bundle = BundleWriter::new(&self.store, &self.prefix(run.step))?;
        for file in &files {
            if !bundle.add_stored(file)? {
                let what = format!("{} is not in the store of the first rank", file.name);
                return Err(self.refused(run.step, what));
            }
        }
        let meta = Meta {
            run: self.run.clone(),
            plan_sha256: self.plan_sha256.clone(),
            step: run.step,
            tokens: run.tokens,
            elapsed_seconds: run.elapsed_seconds,
            n_params: self.n_params,
            health: run.health,
            parts: Vec::new(),
            workers,
        };
        let manifest = bundle.publish(KIND, serde_json::to_value(meta).map_err(Error::PlanJson)?)?;
        Ok(manifest.files.iter().map(|f| f.bytes).sum())
    }

    pub(super) fn load_round(
        &self,
        (step, bundle): (u64, &Bundle),
        meta: &Meta,
        reader: &Reader,
    ) -> Result<Loaded> {
        let whole = Stripes::whole(self.n_params);
        let of = |file: &str, vector: &str, sought: &Stripes| -> Result<Buf<f32>> {
            let (mut values, written) =
                (Buf::zeroed(sought.len()), self.written((bundle, file), vector, &whole));
            self.read((step, bundle, file), &written, (&Sought::new(sought), &mut values))?;
            Ok(values)
        };
        let vector = |file: &str| of(file, VECTORS[0], &whole);
        let squared = Stripes::of_ranges(&self.squared);
        let state = State {
            params: vector(&file_name(VECTORS[0], 0, 1))?,
            adam_m: vector(OUTER)?,
            adam_v: Buf::zeroed(0),
            step,
            tokens: meta.tokens,
            elapsed_seconds: meta.elapsed_seconds,
            health: meta.health,
            ..State::empty(reader.layout)
        };
        let worker = |number: usize| -> Result<State> {
            let [adam_m, adam_v] = OF_WORKER.map(|suffix| of_worker(number, suffix));
            let (adam_m, adam_v) = (vector(&adam_m)?, of(&adam_v, VECTORS[2], &squared)?);
            Ok(State { adam_m, adam_v, health: meta.workers[number], ..state.clone() })
        };
        let workers = reader.workers.clone().map(worker).collect::<Result<_>>()?;
        Ok(Loaded { state, workers })
    }
}

fn of_worker(number: usize, suffix: &str) -> String {
    format!("worker-{number:05}.{suffix}")
}

fn bytes(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|value| value.to_le_bytes()).collect()
}
