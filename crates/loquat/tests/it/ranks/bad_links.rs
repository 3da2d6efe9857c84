//! `./test --long`: links that are cut for a while, or slow and full of losses: the bytes are those of a run without.

use super::*;

/// A cut that ends before anybody gives up costs its time and nothing else.
#[test]
fn a_cut_of_half_a_minute_is_sat_out() {
    let (Some(runs), Some(hosts)) = (Runs::prepared(), Hosts::up("c")) else { return };
    let command = |run: &str, steps| hosts.command(&runs, run, steps, "--ranks 2 --rank-limit 150");
    let (begun, steps, run) = runs.begin_midway("cut", command);
    hosts.set_link(2, "down");
    std::thread::sleep(Duration::from_secs(30));
    hosts.set_link(2, "up");
    let told = begun.end();
    assert_eq!(told.matches("\"event\":\"started\"").count(), 1, "{told}");
    let waited = told.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let waited = waited.filter_map(|event| event["ranks"]["exchange_seconds"].as_f64()).fold(0.0, f64::max);
    assert!(waited > 20.0, "the step that waited says so: {waited}");
    runs.must_run("whole", steps, "");
    assert!(runs.weights(&run) == runs.weights("whole"), "{told}");
}

/// One frame of a hundred is lost, each takes 20 ms.
#[test]
fn losses_and_delays_change_no_bit() {
    let (Some(runs), Some(hosts)) = (Runs::prepared(), Hosts::up_behind_slow_switch("l", [20, 1])) else {
        return;
    };
    let steps = 30;
    runs.must_run("whole", steps, "");
    for (run, extra) in [("plain", "--ranks 2"), ("divided", "--ranks 2 --zero 1")] {
        let begun = Instant::now();
        let output = hosts.command(&runs, run, steps, extra).output().unwrap();
        let told = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{told}");
        // There and back once a step at least: the links are as slow as they should be.
        let seconds = begun.elapsed().as_secs_f64();
        assert!(seconds > 0.04 * steps as f64, "{seconds} s");
        println!("{run}: {steps} steps in {seconds:.1} s at 20 ms and 1 % loss");
        assert!(runs.weights(run) == runs.weights("whole"), "{told}");
    }
}
