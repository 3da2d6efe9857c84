//! The whole HTTP surface and the console over a scripted model, for trying clients and for working on the console:
//! `cargo run -p api --example serve_fake [PORT]`. The key is `sk-test`; a training run grows as one watches.

#[allow(dead_code)]
#[path = "../tests/http/fake.rs"]
mod fake;

use std::time::Duration;

use api::{Eval, Limits, Point, serve};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let port = std::env::args()
        .nth(1)
        .map_or(Ok(8080), |port| port.parse::<u16>())
        .map_err(std::io::Error::other)?;
    let run = fake::OneRun::begun();
    let state = fake::state_over(Limits::default(), Duration::from_millis(8), run.clone());
    std::thread::spawn(move || train(&run));
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    println!("http://{}/#key={}", listener.local_addr()?, fake::KEY);
    let interrupted = async {
        if let Err(error) = tokio::signal::ctrl_c().await {
            eprintln!("cannot wait for Ctrl-C: {error}");
        }
    };
    serve(listener, state, interrupted).await
}

/// Two hundred steps at once, then twenty a second, shaped like a real run: a fall, then a slope, with noise.
fn train(run: &fake::OneRun) {
    for step in 2..=600 {
        let progress = step as f64 / 600.0;
        let noise = ((step * 2_654_435_761) % 1000) as f64 / 1000.0 - 0.5;
        let loss = 3.4 + 4.9 * (-9.0 * progress).exp() - 0.6 * progress + 0.3 * noise;
        let (lr, tokens, speed) =
            (Some(1e-3 * (1.0 - progress)), Some(step * 4096), Some(9000.0 + 400.0 * noise));
        let mut curve = run.0.lock().expect("nobody panics with the curve");
        curve.points.push(Point { step, loss, lr, tokens, tokens_per_second: speed });
        if step % 50 == 0 {
            curve.evals.push(Eval { step, bits_per_byte: (loss - 0.3 * noise) / 2.72, loss: None });
        }
        drop(curve);
        if step > 200 {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
