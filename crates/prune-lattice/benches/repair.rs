//! What a repair costs: recording the states of 1,024 neurons, ranking them, solving matrices of shipped sizes again, merging.
//!
//! `cargo bench -p prune-lattice --bench repair` prints wall-clock times, the bytes of the calibration and the peak of the
//! process.

use prune_lattice::{
    Cell, NoProgress, Result,
    calibration::{Calibration, RecordConfig, record},
    data::{Examples, Inputs, Sequences, Targets},
    prune::{Method, PruneConfig, PruneContext, prune_in, rank_neurons_in},
    repair::{MergeConfig, RefitConfig, merge, refit},
    rnn::{InputKind, Rnn, RnnConfig},
};
use std::time::Instant;

const STEPS: usize = 28;
const DIM: usize = 28;

/// Runs `work` and prints how long it took.
fn timed<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let done = work()?;
    println!("{what:<58} {:>8.3} s", start.elapsed().as_secs_f64());
    Ok(done)
}

fn examples(count: usize) -> Result<Examples> {
    let values =
        (0..count * STEPS * DIM).map(|k| (k as f32 * 0.713).sin() * (k as f32 * 0.031).cos());
    let inputs = Inputs::Vectors {
        dim: DIM,
        values: values.collect(),
    };
    let targets = Targets::Classes(vec![0; count]);
    Ok(Examples::Sequences(Sequences::new(
        inputs,
        &vec![STEPS; count],
        targets,
    )?))
}

fn network(cell: Cell, n: usize) -> Result<Rnn> {
    Rnn::new(
        RnnConfig::new(cell, InputKind::Dense { dim: DIM }, [n], 10),
        0,
    )
}

/// Bytes of the sums of a calibration.
fn bytes(calibration: &Calibration) -> usize {
    let layers = calibration.layers.iter();
    let of_layers = layers.flat_map(|l| [l.before.dim(), l.after.dim()]);
    let dims = of_layers.chain([calibration.input.dim(), calibration.read_out.dim()]);
    dims.map(|n| 8 * n * (n + 1)).sum()
}

/// Peak memory of the process in MiB, where the system says it.
fn peak() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}

fn main() -> Result<()> {
    for (cell, n, count) in [
        (Cell::Lstm, 128, 2_000),
        (Cell::Gru, 384, 500),
        (Cell::Lstm, 1024, 500),
    ] {
        let rnn = network(cell, n)?;
        let name = format!("{cell} of {n} neurons, {} steps", count * STEPS);
        let data = examples(count)?;
        let calibration = timed(&format!("{name}: recording"), || {
            record(&rnn, &data, &RecordConfig::default(), &NoProgress)
        })?;
        let mib = bytes(&calibration) as f64 / f64::from(1 << 20);
        println!(
            "{name}: calibration of {mib:.1} MiB, peak of the process {:.0} MiB",
            peak().unwrap_or(f64::NAN)
        );
        let context = PruneContext::default().calibrated(&calibration);
        for method in [
            Method::Span,
            Method::PivotedCholesky,
            Method::Flow,
            Method::LatticeContext,
        ] {
            let config = PruneConfig::new(method, 0.75);
            timed(&format!("  ranking by {method}"), || {
                rank_neurons_in(&rnn, &context, &config)
            })?;
        }
        let rows = cell.gates() * n;
        for method in [Method::Magnitude, Method::Block8x4, Method::Threshold] {
            let (masks, _) = prune_in(&rnn, &context, &PruneConfig::new(method, 0.75))?;
            let mut fitted = rnn.clone();
            timed(
                &format!("  refit of {rows} x {n}, a quarter kept by {method}"),
                || refit(&mut fitted, &masks, &calibration, &RefitConfig::default()),
            )?;
        }
        let keep = rank_neurons_in(&rnn, &context, &PruneConfig::new(Method::Span, 0.75))?;
        timed("  merging half of the neurons", || {
            merge(&rnn, &keep, &calibration, &MergeConfig::default())
        })?;
    }
    Ok(())
}
