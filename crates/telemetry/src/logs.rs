//! Structured logs to standard error.

use std::io;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::util::SubscriberInitExt;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One readable line per event.
    #[default]
    Text,
    /// One JSON object per event, with the fields of the spans around it.
    Json,
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("log filter {filter:?} is not valid")]
    Filter {
        filter: String,
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("logs are already set up")]
    AlreadySet(#[source] tracing_subscriber::util::TryInitError),
}

/// Sends logs to standard error from now on, for the whole process.
///
/// `filter` is a list such as `info` or `warn,engine=debug` (tracing-subscriber's `EnvFilter`); the binary takes it from its
/// flags, so nothing here reads the environment. Errors: a filter that does not parse, or a second call.
pub fn init_logs(format: LogFormat, filter: &str) -> Result<(), LogError> {
    subscriber(format, filter, io::stderr)?.try_init().map_err(LogError::AlreadySet)
}

/// The span of one request: every event inside it carries `request_id`.
///
/// `request_id` is ours, or a client's after it was checked to be short and printable.
pub fn request_span(request_id: &str) -> tracing::Span {
    tracing::info_span!("request", request_id)
}

type BoxedSubscriber = Box<dyn tracing::Subscriber + Send + Sync>;

fn subscriber<W>(format: LogFormat, filter: &str, writer: W) -> Result<BoxedSubscriber, LogError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(filter)
        .map_err(|source| LogError::Filter { filter: filter.to_owned(), source })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    Ok(match format {
        LogFormat::Text => Box::new(builder.finish()),
        LogFormat::Json => Box::new(builder.json().with_span_list(false).finish()),
    })
}

/// The error and what caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, filter: &str, work: impl FnOnce()) -> String {
        let captured = Captured::default();
        let writer = captured.clone();
        let subscriber = subscriber(format, filter, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, work);
        let bytes = captured.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_events_carry_the_request_id_and_their_fields() {
        let text = logged(LogFormat::Json, "info", || {
            request_span("req-7").in_scope(|| tracing::info!(n_tokens = 3, "say \"hi\"\nthere"));
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        let event: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(event["span"]["request_id"], "req-7");
        assert_eq!(event["fields"]["n_tokens"], 3);
        assert_eq!(event["fields"]["message"], "say \"hi\"\nthere");
        assert_eq!(event["level"], "INFO");
    }

    #[test]
    fn text_events_carry_the_request_id_and_the_filter_holds() {
        let text = logged(LogFormat::Text, "warn,telemetry=info", || {
            request_span("req-8").in_scope(|| tracing::info!("kept"));
            tracing::info!(target: "other", "dropped");
        });
        assert!(text.contains("req-8") && text.contains("kept"), "{text}");
        assert!(!text.contains("dropped"), "{text}");
    }

    #[test]
    fn a_bad_filter_is_named() {
        let error = subscriber(LogFormat::Text, "engine=loud", io::stderr).err().unwrap();
        assert!(error.to_string().contains("engine=loud"), "{error}");
    }
}
