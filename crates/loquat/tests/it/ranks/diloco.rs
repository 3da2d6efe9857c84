//! Workers that train by themselves and meet now and then, as processes.

use std::time::Duration;

use super::*;

const WORKERS: &str = "--diloco workers=4,every=5,lr=0.9,momentum=0.5";

#[test]
fn workers_as_processes_give_the_same_bytes_and_survive_a_kill() {
    let Some(runs) = Runs::prepared() else { return };
    let extra = format!("{WORKERS} --launch mpi --ranks 4 --rank-limit 30");
    let (begun, steps, run) =
        runs.begin_midway("apart", |run, steps| runs.command(runs.words(run, steps, &extra)));
    let victim = runs.ranks(&run)[2].to_string();
    assert!(Command::new("kill").args(["-KILL", &victim]).status().unwrap().success());
    let recovery = begun.recovery();
    let told = begun.end();
    assert!(recovery < Duration::from_secs(30), "{recovery:?}: {told}");
    assert!(told.contains("\"event\":\"round\""), "{told}");
    runs.must_run("whole", steps, WORKERS);
    assert!(runs.weights(&run) == runs.weights("whole"), "{told}");
    let (text, code) = runs.run("many", 5, &format!("{WORKERS} --ranks 8"));
    assert!(code != Some(0) && text.contains("4 workers of DiLoCo cannot be shared by 8 ranks"), "{text}");
}

/// `./test --long`: the same tokens over a link of 10 Mbit/s, by plain data parallel and by workers that meet now and then.
#[cfg(feature = "long")]
#[test]
fn a_slow_link_is_no_limit_for_workers_that_seldom_meet() {
    let (Some(runs), Some(hosts)) = (Runs::prepared(), Hosts::up("d")) else { return };
    hosts.slow_down("10mbit");
    let steps = 640;
    let of = |run: &str, extra: &str| -> Outcome {
        let begun = Instant::now();
        let extra = format!("--ranks 2 {extra}");
        let output = hosts.command(&runs, run, steps, &extra).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        Outcome::of(&text, begun.elapsed().as_secs_f64())
    };
    let together = of("together", "");
    let apart = of("apart", "--diloco workers=2,every=128,lr=0.9,momentum=0.5");
    println!(
        "| 2 hosts, 10 Mbit/s, {steps} steps | bytes sent | seconds | held-out nats/token |\n|---|---|---|---|"
    );
    for (name, o) in [("every step together", &together), ("DiLoCo, every 128", &apart)] {
        println!("| {name} | {} | {:.0} | {:.3} |", o.bytes_sent, o.seconds, o.nats_per_token);
    }
    assert!(together.bytes_sent >= 100 * apart.bytes_sent, "{together:?} {apart:?}");
    assert!(apart.seconds < together.seconds, "{together:?} {apart:?}");
    assert!(apart.nats_per_token < together.nats_per_token + 0.15, "{together:?} {apart:?}");
    runs.must_run("threads", steps, "--ranks 2 --diloco workers=2,every=128,lr=0.9,momentum=0.5");
    assert!(runs.weights("threads") == runs.weights("apart"), "threads are as good as hosts");
}

/// What a run's events add up to.
#[cfg(feature = "long")]
#[derive(Debug, Default)]
struct Outcome {
    bytes_sent: u64,
    seconds: f64,
    nats_per_token: f64,
}

#[cfg(feature = "long")]
impl Outcome {
    fn of(text: &str, seconds: f64) -> Outcome {
        let mut outcome = Outcome { seconds, ..Outcome::default() };
        for event in text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()) {
            outcome.bytes_sent += event["ranks"]["bytes_sent"].as_u64().unwrap_or(0);
            if let Some(nats) = event["nats_per_token"].as_f64() {
                outcome.nats_per_token = nats;
            }
        }
        outcome
    }
}
