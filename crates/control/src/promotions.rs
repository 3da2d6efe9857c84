//! The table of promotions. People start and cancel them; what becomes of one is written under the deployer's lease, in one
//! transaction with what it does to jobs and deployments: a controller that dies at any instant leaves nothing half done
//! and nothing to be done twice.

use crate::clock::UnixMs;
use crate::database::{Control, Stop};
use crate::deployments::{self, Ask, Canary};
use crate::error::{Error, Result};
use crate::job::{JobId, JobSpec};
use crate::jobs;
use crate::leases::Lease;
use crate::promotion::{Effect, Happening, Move, Pipeline, Promotion, PromotionId, Seen, Stage};
use crate::sql::{Fault, Row, Transaction, values};

/// Promotions that are not over at once.
const UNFINISHED_MAX: usize = 100;

const COLUMNS: &str =
    "id, pipeline, candidate, stage, cancelled, job, scores, history, created_ms, changed_ms";

/// The stages that are not final.
const UNFINISHED: &str = "stage IN ('train', 'evaluate', 'gate', 'canary')";

impl Control {
    /// Declares a pipeline; whichever controller leads carries it out. One at a time for each model.
    pub fn start_promotion(&self, pipeline: &Pipeline) -> Result<Promotion> {
        pipeline.check()?;
        let now = self.now();
        self.write("start a promotion", |transaction| {
            let sql = format!("SELECT {COLUMNS} FROM promotions WHERE {UNFINISHED}");
            let unfinished: Vec<Promotion> =
                transaction.rows(&sql, &[])?.iter().map(promotion).collect::<Result<_, _>>()?;
            if unfinished.len() >= UNFINISHED_MAX {
                return Err(Error::TooMany { what: "unfinished promotions", max: UNFINISHED_MAX }.into());
            }
            if let Some(found) = unfinished.iter().find(|found| found.pipeline.model == pipeline.model) {
                let model = pipeline.model.clone();
                return Err(Error::PromotionConflict { model, id: found.id }.into());
            }
            insert(transaction, pipeline, now)
        })
    }

    pub fn get_promotion(&self, id: PromotionId) -> Result<Option<Promotion>> {
        self.read("read a promotion", |transaction| Ok(find(transaction, id)?))
    }

    /// The last `limit` promotions, newest first.
    pub fn list_promotions(&self, limit: usize) -> Result<Vec<Promotion>> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.read("list promotions", |transaction| {
            let sql = format!("SELECT {COLUMNS} FROM promotions ORDER BY id DESC LIMIT ?1");
            Ok(transaction.rows(&sql, values![limit])?.iter().map(promotion).collect::<Result<_, _>>()?)
        })
    }

    /// All that are not over, each with what there is to see of it in this database.
    pub fn survey_promotions(&self) -> Result<Vec<(Promotion, Seen)>> {
        self.read("survey promotions", |transaction| {
            let sql = format!("SELECT {COLUMNS} FROM promotions WHERE {UNFINISHED} ORDER BY id");
            let mut all = Vec::new();
            for row in &transaction.rows(&sql, &[])? {
                let promotion = promotion(row)?;
                let job = match promotion.job {
                    Some(id) => jobs::find(transaction, id)?,
                    None => None,
                };
                let job = job.map(|job| (job.state, job.message));
                let deployment = deployments::find(transaction, &promotion.pipeline.model)?;
                all.push((promotion, Seen { job, scores: None, deployment }));
            }
            Ok(all)
        })
    }

    /// Asks for a promotion to end. One that is over stays as it is.
    pub fn cancel_promotion(&self, id: PromotionId) -> Result<Promotion> {
        self.write("cancel a promotion", |transaction| {
            let sql = format!("UPDATE promotions SET cancelled = 1 WHERE id = ?1 AND {UNFINISHED}");
            transaction.execute(&sql, values![id.0])?;
            find(transaction, id)?.ok_or(Stop::Refused(Error::NoPromotion(id)))
        })
    }

    /// Does what was decided about `known`, and records it. `false`, and nothing is changed, when the world is not any
    /// more as the decision knew it. `spec` is the job of the stage, for [`Effect::RunJob`].
    pub fn record_move(
        &self,
        lease: &Lease,
        known: &Promotion,
        next: &Move,
        spec: Option<&JobSpec>,
    ) -> Result<bool> {
        let now = self.now();
        let moved = self.fenced(lease, "record a promotion's move", |transaction| {
            let Some(found) = find(transaction, known.id)? else { return Ok(false) };
            if (found.stage, found.job) != (known.stage, known.job) {
                return Ok(false);
            }
            let Some(job) = apply(transaction, &found, (next, spec), now)? else { return Ok(false) };
            put(transaction, &found, (next, job), now)?;
            Ok(true)
        })?;
        self.notify_jobs_changed();
        Ok(moved)
    }
}

/// Does what a move does besides being recorded. `None` when that cannot be done any more; else the job of the stage.
fn apply(
    transaction: &mut Transaction,
    found: &Promotion,
    (next, spec): (&Move, Option<&JobSpec>),
    now: UnixMs,
) -> Result<Option<Option<JobId>>, Stop> {
    let (model, candidate) = (found.pipeline.model.as_str(), found.candidate.as_str());
    let deployment = deployments::find(transaction, model)?;
    match &next.effect {
        Effect::Nothing | Effect::KeepScores(_) => {}
        Effect::RunJob => {
            let Some(spec) = spec else { return Ok(None) };
            return Ok(Some(Some(jobs::submit(transaction, spec, now)?.job.id)));
        }
        Effect::CancelJob => {
            if let Some(id) = found.job {
                jobs::cancel(transaction, id)?;
            }
        }
        Effect::Deploy => {
            if deployment.is_some() {
                return Ok(None);
            }
            let serve = &found.pipeline.serve;
            let (source, args) = (Some(candidate.to_owned()), Some(serve.args.clone()));
            let needs = Some(serve.needs);
            let ask = Ask { n_replicas: serve.replicas, source, args, needs, ..Ask::default() };
            deployments::deploy(transaction, model, &ask, now)?;
        }
        Effect::StartTrial => {
            if deployment.is_none_or(|found| found.canary.is_some() || found.live == candidate) {
                return Ok(None);
            }
            let canary = Canary { source: candidate.to_owned(), percent: found.pipeline.canary.percent };
            deployments::start_canary(transaction, model, canary, now)?;
        }
        Effect::EndTrial => {
            let message = format!("{candidate} was rolled back: {}", next.why);
            if !deployments::end_canary(transaction, model, candidate, (false, &message), now)? {
                return Ok(None);
            }
        }
    }
    Ok(Some(None))
}

fn insert(transaction: &mut Transaction, pipeline: &Pipeline, now: UnixMs) -> Result<Promotion, Stop> {
    let stage = pipeline.first_stage();
    let first = Happening { at_ms: now.0, stage, why: "declared".to_owned() };
    let id = transaction.number(
        "INSERT INTO promotions (model, pipeline, candidate, stage, history, created_ms, changed_ms)
         VALUES (?1, ?2, '', ?3, ?4, ?5, ?5) RETURNING id",
        values![&pipeline.model, &json(pipeline), stage.as_str(), &json(&[first]), now.0],
    )?;
    // A version that is trained is named after what it is for and the promotion that made it.
    let candidate = pipeline.source.clone().unwrap_or_else(|| format!("{}@{id}", pipeline.model));
    let sql = "UPDATE promotions SET candidate = ?2 WHERE id = ?1";
    transaction.execute(sql, values![id, &candidate])?;
    let id = PromotionId(id);
    find(transaction, id)?.ok_or(Stop::Refused(Error::NoPromotion(id)))
}

fn put(
    transaction: &mut Transaction,
    found: &Promotion,
    (next, job): (&Move, Option<JobId>),
    now: UnixMs,
) -> Result<(), Stop> {
    let mut history = found.history.clone();
    history.push(Happening { at_ms: now.0, stage: next.stage, why: next.why.clone() });
    let scores = match &next.effect {
        Effect::KeepScores(scores) => scores,
        _ => &found.scores,
    };
    transaction.execute(
        "UPDATE promotions SET stage = ?2, job = ?3, scores = ?4, history = ?5, changed_ms = ?6 WHERE id = ?1",
        values![
            found.id.0,
            next.stage.as_str(),
            job.map(|job| job.0),
            &json(scores),
            &json(&history),
            now.0
        ],
    )?;
    Ok(())
}

fn find(transaction: &mut Transaction, id: PromotionId) -> Result<Option<Promotion>, Fault> {
    let sql = format!("SELECT {COLUMNS} FROM promotions WHERE id = ?1");
    transaction.row(&sql, values![id.0])?.as_ref().map(promotion).transpose()
}

fn promotion(row: &Row) -> Result<Promotion, Fault> {
    let word = row.text(3)?;
    let stage = Stage::ALL.into_iter().find(|stage| stage.as_str() == word);
    Ok(Promotion {
        id: PromotionId(row.int(0)?),
        pipeline: parsed(row, 1)?,
        candidate: row.text(2)?.to_owned(),
        stage: stage.ok_or_else(|| Fault::unknown_word(3, word))?,
        cancelled: row.int(4)? == 1,
        job: row.int_or_null(5)?.map(JobId),
        scores: parsed(row, 6)?,
        history: parsed(row, 7)?,
        created_at: UnixMs(row.int(8)?),
        changed_at: UnixMs(row.int(9)?),
    })
}

fn parsed<T: serde::de::DeserializeOwned>(row: &Row, column: usize) -> Result<T, Fault> {
    serde_json::from_str(row.text(column)?).map_err(|error| Fault::row(column, error.to_string()))
}

fn json<T: serde::Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data has a JSON form")
}
