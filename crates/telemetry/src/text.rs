//! The registry as Prometheus text.

use std::fmt::Write;

use prometheus_client::registry::Registry;

/// The `Content-Type` that [`crate::Metrics::render`]'s text must be served with.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The registry in Prometheus' text format 0.0.4.
///
/// The library writes OpenMetrics, which names a counter's family without `_total` and ends in `# EOF`. vLLM writes 0.0.4,
/// and the tools that read vLLM's metrics parse just that, so the two differences are translated here.
pub(crate) fn render(registry: &Registry) -> String {
    let mut openmetrics = String::new();
    if prometheus_client::encoding::text::encode_registry(&mut openmetrics, registry).is_err() {
        // Writing to a String cannot fail and no label encoder of ours returns an error.
        unreachable!("metrics could not be written as text");
    }
    let mut text = String::with_capacity(openmetrics.len() + 1024);
    let mut help = None;
    for line in openmetrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            write_family(&mut text, rest, help.take());
        } else {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

fn write_family(text: &mut String, type_line: &str, help: Option<(&str, &str)>) {
    let (name, kind) = type_line.split_once(' ').expect("the library writes '# TYPE name kind'");
    let suffix = if kind == "counter" { "_total" } else { "" };
    let help = help.map_or("", |(_, help)| help);
    writeln!(text, "# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}")
        .expect("writing to a String cannot fail");
}
