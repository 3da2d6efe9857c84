//! The whole HTTP surface and the console over a scripted model, for trying clients and for working on the console:
//! `cargo run -p api --example serve_fake [PORT]`. The key is `sk-test`; a training run grows as one watches.

#[allow(dead_code)]
#[path = "../tests/http/fake.rs"]
mod fake;

use std::time::Duration;

use api::{Limits, serve};
use store::ObjectName;
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let port = std::env::args()
        .nth(1)
        .map_or(Ok(8080), |port| port.parse::<u16>())
        .map_err(std::io::Error::other)?;
    let store = fake::metrics_store();
    let state = fake::state_over(Limits::default(), Duration::from_millis(8), store.clone());
    std::thread::spawn(move || train(&*store));
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    println!("http://{}/#key={}", listener.local_addr()?, fake::KEY);
    let interrupted = async {
        if let Err(error) = tokio::signal::ctrl_c().await {
            eprintln!("cannot wait for Ctrl-C: {error}");
        }
    };
    serve(listener, state, interrupted).await
}

/// Writes an object of ten steps twice a second, shaped like a real run: a fall, then a slope, with noise.
fn train(store: &dyn store::Store) {
    for object in 0..60u64 {
        let mut lines = String::new();
        for step in object * 10 + 2..object * 10 + 12 {
            let progress = step as f64 / 600.0;
            let noise = ((step * 2_654_435_761) % 1000) as f64 / 1000.0 - 0.5;
            let loss = 3.4 + 4.9 * (-9.0 * progress).exp() - 0.6 * progress + 0.16 * noise;
            let (lr, tokens, speed) = (1e-3 * (1.0 - progress), step * 4096, 9000.0 + 400.0 * noise);
            lines += &format!(
                "{{\"event\":\"step\",\"step\":{step},\"loss\":{loss},\"lr\":{lr},\"tokens\":{tokens},\"tokens_per_second\":{speed}}}\n"
            );
            if step % 50 == 0 {
                let bits = loss / 2.72;
                lines += &format!("{{\"event\":\"eval\",\"step\":{step},\"bits_per_byte\":{bits}}}\n");
            }
        }
        if object == 0 {
            lines += "{\"event\":\"plan\",\"steps_total\":600}\n";
        }
        let name =
            ObjectName::parse(&format!("runs/sotu/metrics/{:06}.jsonl", object + 2)).expect("a plain name");
        store.put(&name, lines.as_bytes()).expect("memory takes it");
        if object >= 20 {
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}
