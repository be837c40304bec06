//! Runs an experiment and prints means over seeds, with the verdict: does order matter?
//!
//! `cargo run --release -p prune-lattice --example suite -- [TASK,.. [CELL,.. [EPOCHS]]]`, default suite without arguments.

use prune_lattice::{
    NoProgress,
    experiment::{ExperimentConfig, Row, Stage, run, verdict},
};
use std::{collections::BTreeMap, time::Instant};

fn list<T: std::str::FromStr>(text: &str) -> Result<Vec<T>, T::Err> {
    text.split(',').map(str::parse).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = ExperimentConfig::default();
    let mut args = std::env::args().skip(1);
    if let Some(tasks) = args.next() {
        config.tasks = list(&tasks)?;
    }
    if let Some(cells) = args.next() {
        config.cells = list(&cells)?;
    }
    if let Some(epochs) = args.next() {
        config.finetune_epochs = epochs.parse()?;
    }
    let start = Instant::now();
    let rows = run(&config, &NoProgress)?;
    let seconds = start.elapsed().as_secs_f64();
    let mut cells: BTreeMap<_, Vec<&Row>> = BTreeMap::new();
    for row in &rows {
        let key = (
            row.task.clone(),
            row.cell.name(),
            row.method,
            (row.sparsity * 1000.0) as u32,
            row.stage,
        );
        cells.entry(key).or_default().push(row);
    }
    let mut last = String::new();
    for ((task, cell, method, _, stage), rows) in cells {
        let value = |r: &Row| r.bits.or(r.accuracy.map(|a| 100.0 * a)).or(r.loss);
        let values: Vec<f64> = rows.iter().filter_map(|r| value(r)).collect();
        let dense: Vec<f64> = rows
            .iter()
            .filter_map(|r| {
                r.bits_dense
                    .or(r.accuracy_dense.map(|a| 100.0 * a))
                    .or(Some(r.loss_dense))
            })
            .collect();
        let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
        if last != task {
            println!("\n{task} ({cell}), dense {dense:.2?}");
            last = task;
        }
        if stage == Stage::OneShot {
            let kept = rows
                .iter()
                .filter_map(|r| Some(r.reached?.recurrent))
                .sum::<f64>()
                / rows.len() as f64;
            print!("\n  {method:<22} {:>5.1} % of W_hh: ", 100.0 * kept);
        }
        match values.as_slice() {
            [] => print!("  {}", rows[0].error.as_deref().unwrap_or("-")),
            v => print!(
                "  {:>7.3} [{:.3}, {:.3}]",
                mean(v),
                v.iter().copied().fold(f64::INFINITY, f64::min),
                v.iter().copied().fold(f64::NEG_INFINITY, f64::max)
            ),
        }
    }
    println!("\n\n{} rows in {seconds:.1} s\n", rows.len());
    verdict(&rows).iter().for_each(|line| println!("- {line}"));
    Ok(())
}
