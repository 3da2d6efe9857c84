//! `loquat doctor`: what this machine can do, and whether what Loquat keeps here is in order.

use std::process::ExitCode;

use anyhow::Result;
use store::Bundle;
use tensor::Pool;

use crate::home::Home;

pub(crate) fn run(home: &Home) -> Result<ExitCode> {
    println!("{}", tensor::cpu::describe());
    let limits = tensor::limits::measure(&Pool::new(crate::n_threads()));
    println!(
        "compute   {:.0} GFLOP/s f32, {:.0} bf16, {:.0} Gop/s int16",
        limits.f32_per_s / 1e9,
        limits.bf16_per_s / 1e9,
        limits.int16_per_s / 1e9
    );
    let (cache, memory) = (limits.cache_bytes_per_s / 1e9, limits.memory_bytes_per_s / 1e9);
    println!("read      {cache:.0} GB/s from cache, {memory:.0} GB/s from memory");
    println!("devices   {} NVIDIA", crate::machine::accelerators());
    let store = home.store()?;
    println!("store     {}", store.url());
    for object in store.list("")? {
        let Some(prefix) = object.name.as_str().strip_suffix("/manifest.json") else { continue };
        let state = match Bundle::open(&store, prefix) {
            Ok(Some(bundle)) => check(&bundle),
            Ok(None) => "gone".to_owned(),
            Err(error) => format!("damaged: {error}"),
        };
        println!("  {prefix:<40} {state}");
    }
    let control = home.control()?;
    println!(
        "database  {}: {} models, {} keys, {} jobs",
        control.name(),
        control.list_models()?.len(),
        control.list_keys()?.len(),
        control.list_jobs(usize::MAX)?.len()
    );
    Ok(ExitCode::SUCCESS)
}

/// Reads every file of a bundle, which compares its checksum.
fn check(bundle: &Bundle) -> String {
    let files = &bundle.manifest().files;
    let bytes: u64 = files.iter().map(|f| f.bytes).sum();
    match files.iter().try_for_each(|f| bundle.read(&f.name).map(drop)) {
        Ok(()) => format!("{} files, {:.1} MB, whole", files.len(), bytes as f64 / 1e6),
        Err(error) => format!("damaged: {error}"),
    }
}
