//! The run's metrics as TensorBoard reads them: `runs/<run>/tensorboard/events.out.tfevents.…`.
//!
//! A file is records (TFRecord: length, data, and a masked CRC-32C of each), a record is an `Event` in protocol-buffer
//! encoding; we write the few fields of `tensorflow/core/util/event.proto` and `framework/summary.proto` that scalars and
//! texts need. An object of the store is written whole, so every flush makes a new file: TensorBoard reads all files of a
//! directory as one. A run that goes on says so, and what was told of later steps is dropped.

use std::sync::Arc;

use store::{ObjectName, Store};

use crate::{Event, Result, Step};

/// What is not told yet is written after this time, and then in ever longer spans: a run of days makes hundreds of files.
const FLUSH_SECONDS_MIN: f64 = 30.0;
const FLUSH_SHARE: f64 = 0.01;

/// Writes the event files of one run.
pub(crate) struct TensorBoard {
    store: Arc<dyn Store>,
    run: String,
    /// Seconds since 1970 when this process began to count.
    started_unix: f64,
    /// Records that are in no file yet.
    records: Vec<u8>,
    first_step: u64,
    n_files: u64,
    /// Seconds since the start.
    flushed: f64,
}

impl TensorBoard {
    /// For a run that goes on after `step` finished steps.
    pub(crate) fn open(
        store: Arc<dyn Store>,
        run: &str,
        step: u64,
        started_unix: f64,
    ) -> Result<TensorBoard> {
        for object in store.list(&format!("runs/{run}/tensorboard"))? {
            if first_step(object.name.as_str()).is_some_and(|first| first > step) {
                store.delete(&object.name)?;
            }
        }
        let run = run.to_owned();
        let (records, first_step, n_files, flushed) = (Vec::new(), step, 0, 0.0);
        let mut board = TensorBoard { store, run, started_unix, records, first_step, n_files, flushed };
        board.record(0.0, |event| {
            event.varint(STEP, step + 1).message(SESSION_LOG, |log| _ = log.varint(1, SESSION_START))
        });
        Ok(board)
    }

    /// Takes an event that happened `seconds` after the start.
    pub(crate) fn push(&mut self, seconds: f64, event: &Event) -> Result<()> {
        let step = event.step();
        match event {
            Event::Step(s) => self.step(seconds, s),
            Event::Eval { nats_per_token, bits_per_byte, parts, .. } => {
                self.scalar(seconds, step, "validation/nats_per_token", *nats_per_token);
                self.scalar(seconds, step, "validation/bits_per_byte", *bits_per_byte);
                for part in parts {
                    self.scalar(
                        seconds,
                        step,
                        &format!("validation/{}/nats_per_token", part.dataset),
                        part.nats_per_token,
                    );
                    self.scalar(
                        seconds,
                        step,
                        &format!("validation/{}/bits_per_byte", part.dataset),
                        part.bits_per_byte,
                    );
                }
            }
            Event::Skipped { n_skipped, .. } => {
                self.scalar(seconds, step, "train/steps_skipped", *n_skipped as f64)
            }
            Event::Checkpoint { seconds: stalled, write_seconds, .. } => {
                self.scalar(seconds, step, "checkpoint/stalled_seconds", *stalled);
                self.scalar(seconds, step, "checkpoint/write_seconds", *write_seconds);
            }
            Event::Task { scores, .. } => {
                for metric in &scores.metrics {
                    let tag = format!("tasks/{}/{}", scores.task, metric.name);
                    self.scalar(seconds, step, &tag, metric.value);
                    self.scalar(seconds, step, &format!("{tag}_stderr"), metric.stderr);
                }
            }
            Event::Sample { text, .. } => self.text(seconds, step, "sample", text),
            _ => {}
        }
        if seconds - self.flushed > FLUSH_SECONDS_MIN.max(FLUSH_SHARE * seconds) {
            self.flush(seconds)?;
        }
        Ok(())
    }

    /// Writes what is not told yet.
    pub(crate) fn flush(&mut self, seconds: f64) -> Result<()> {
        self.flushed = seconds;
        if self.records.is_empty() {
            return Ok(());
        }
        let mut file = Vec::new();
        let version = Message::default()
            .double(WALL_TIME, self.started_unix + seconds)
            .bytes(FILE_VERSION, b"brain.Event:2")
            .take();
        write_record(&mut file, &version);
        file.extend_from_slice(&self.records);
        let (unix, n) = ((self.started_unix + seconds) as u64, self.n_files);
        let name = format!("events.out.tfevents.{unix:010}.{n:05}.{:08}.loquat", self.first_step);
        let name = ObjectName::parse(&format!("runs/{}/tensorboard/{name}", self.run))?;
        self.store.put(&name, &file)?;
        self.records.clear();
        self.n_files += 1;
        Ok(())
    }

    fn step(&mut self, seconds: f64, step: &Step) {
        let scalars = [
            ("train/loss", step.loss),
            ("train/learning_rate", f64::from(step.lr)),
            ("train/gradient_norm", step.grad_norm),
            ("speed/tokens_per_second", step.tokens_per_second),
            ("speed/data_wait_seconds", step.data_seconds),
        ];
        scalars.into_iter().for_each(|(tag, value)| self.scalar(seconds, step.step, tag, value));
    }

    fn scalar(&mut self, seconds: f64, step: u64, tag: &str, value: f64) {
        self.summary(seconds, step, tag, |v| _ = v.float(SIMPLE_VALUE, value as f32));
    }

    fn text(&mut self, seconds: f64, step: u64, tag: &str, text: &str) {
        self.summary(seconds, step, tag, |value| {
            let tensor =
                |tensor: &mut Message| _ = tensor.varint(DTYPE, DT_STRING).bytes(STRING_VAL, text.as_bytes());
            let metadata =
                |m: &mut Message| _ = m.message(PLUGIN_DATA, |p| _ = p.bytes(PLUGIN_NAME, b"text"));
            value.message(TENSOR, tensor).message(METADATA, metadata);
        });
    }

    fn summary(&mut self, seconds: f64, step: u64, tag: &str, fill: impl FnOnce(&mut Message)) {
        if self.records.is_empty() {
            self.first_step = step;
        }
        self.record(seconds, |event| {
            event.varint(STEP, step).message(SUMMARY, |summary| {
                summary.message(VALUE, |value| fill(value.bytes(TAG, tag.as_bytes())));
            })
        });
    }

    fn record(&mut self, seconds: f64, fill: impl FnOnce(&mut Message) -> &mut Message) {
        let mut event = Message::default();
        fill(event.double(WALL_TIME, self.started_unix + seconds));
        write_record(&mut self.records, &event.take());
    }
}

// Numbers of fields: of Event,
const WALL_TIME: u64 = 1;
const STEP: u64 = 2;
const FILE_VERSION: u64 = 3;
const SUMMARY: u64 = 5;
const SESSION_LOG: u64 = 7;
/// `SessionLog.status`: what was told of this step and later ones no longer holds.
const SESSION_START: u64 = 1;
// of Summary and its values,
const VALUE: u64 = 1;
const TAG: u64 = 1;
const SIMPLE_VALUE: u64 = 2;
const TENSOR: u64 = 8;
const METADATA: u64 = 9;
// of SummaryMetadata and its plugin data,
const PLUGIN_DATA: u64 = 1;
const PLUGIN_NAME: u64 = 1;
// and of TensorProto.
const DTYPE: u64 = 1;
const STRING_VAL: u64 = 8;
const DT_STRING: u64 = 7;

/// A message of protocol buffers as it grows.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) -> &mut Message {
        self.raw_varint(field << 3);
        self.raw_varint(value);
        self
    }

    fn double(&mut self, field: u64, value: f64) -> &mut Message {
        self.raw_varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn float(&mut self, field: u64, value: f32) -> &mut Message {
        self.raw_varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) -> &mut Message {
        self.raw_varint(field << 3 | 2);
        self.raw_varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
        self
    }

    fn message(&mut self, field: u64, fill: impl FnOnce(&mut Message)) -> &mut Message {
        let mut inner = Message::default();
        fill(&mut inner);
        self.bytes(field, &inner.0)
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}

fn write_record(file: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    file.extend(length);
    file.extend(masked_crc32c(&length).to_le_bytes());
    file.extend_from_slice(data);
    file.extend(masked_crc32c(data).to_le_bytes());
}

/// TFRecord's mask, so that a checksum of data that holds checksums is no fixed point.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32 with Castagnoli's polynomial (RFC 3720, appendix B.4), reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc: u32, byte| crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize])
}

/// The first step that a file tells of, from its name.
fn first_step(name: &str) -> Option<u64> {
    name.strip_suffix(".loquat")?.rsplit_once('.')?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    /// What tensorboard 2.20's RecordWriter makes of the same event.
    const RECORD_OF_TENSORBOARD: &str = "2100000000000000017becf60900002040fc54d94110ac022a130a110a0a747261696e2f6c6f7373\
                                         15000020403cf09030";

    #[test]
    fn records_are_those_that_tensorboard_writes() {
        let mut found = Vec::new();
        let mut event = Message::default();
        event.double(WALL_TIME, 1_700_000_000.5).varint(STEP, 300);
        event.message(SUMMARY, |s| {
            _ = s.message(VALUE, |v| _ = v.bytes(TAG, b"train/loss").float(SIMPLE_VALUE, 2.5))
        });
        write_record(&mut found, &event.take());
        assert_eq!(hex::encode(&found), RECORD_OF_TENSORBOARD);
    }

    #[test]
    fn a_run_that_goes_on_drops_later_files() {
        let store = store::open("mem:").unwrap();
        let eval = |step| Event::Eval { step, nats_per_token: 1.0, bits_per_byte: 2.0, parts: Vec::new() };
        let names = || {
            store
                .list("runs/r/tensorboard")
                .unwrap()
                .iter()
                .map(|o| first_step(o.name.as_str()).unwrap())
                .collect::<Vec<_>>()
        };
        let mut board = TensorBoard::open(store.clone(), "r", 0, 1e9).unwrap();
        for step in [1, 5, 9] {
            board.push(step as f64, &eval(step)).unwrap();
            board.flush(step as f64).unwrap();
        }
        assert_eq!(names(), [0, 5, 9]);
        board.flush(20.0).unwrap();
        assert_eq!(names(), [0, 5, 9], "nothing new is no file");
        let mut board = TensorBoard::open(store.clone(), "r", 6, 2e9).unwrap();
        board.push(100.0, &eval(7)).unwrap();
        assert_eq!(names(), [0, 5, 6], "it is told at once after a while");
    }
}
