//! Runs an experiment and prints means over seeds, with the verdict: does order matter?
//!
//! `cargo run --release -p prune-lattice --example suite -- [TASK,.. [CELL,.. [EPOCHS [METHOD,.. [SEED,.. [WIRING [ROWS.json
//! [REPAIR,.. [COMPETE]]]]]]]]]`, the default suite without arguments; `-` leaves an argument at its default.

use prune_lattice::{
    Cancelled, Progress,
    experiment::{ExperimentConfig, Repair, Row, Stage, run, verdict},
};
use std::{collections::BTreeMap, time::Instant};

fn list<T: std::str::FromStr>(text: &str) -> Result<Vec<T>, T::Err> {
    text.split(',').map(str::parse).collect()
}

/// Messages on stderr.
struct Messages(Instant);

impl Progress for Messages {
    fn advance(&self, _: u64) -> Result<(), Cancelled> {
        Ok(())
    }

    fn message(&self, text: &str) {
        eprintln!("{:7.1} s  {text}", self.0.elapsed().as_secs_f64());
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = ExperimentConfig::default();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let given = |k: usize| args.get(k).map(String::as_str).filter(|a| *a != "-");
    if let Some(tasks) = given(0) {
        config.tasks = list(tasks)?;
    }
    if let Some(cells) = given(1) {
        config.cells = list(cells)?;
    }
    if let Some(epochs) = given(2) {
        config.finetune_epochs = epochs.parse()?;
    }
    if let Some(methods) = given(3) {
        config.methods = list(methods)?;
    }
    if let Some(seeds) = given(4) {
        config.seeds = list(seeds)?;
    }
    if let Some(wiring) = given(5) {
        config.wiring = wiring.parse()?;
    }
    if let Some(repairs) = given(7) {
        config.repairs = list(repairs)?;
    }
    if let Some(compete) = given(8) {
        config.compete = compete.parse()?;
    }
    let start = Instant::now();
    let rows = run(&config, &Messages(start))?;
    let seconds = start.elapsed().as_secs_f64();
    if let Some(file) = given(6) {
        std::fs::write(file, serde_json::to_string(&rows)?)?;
    }
    let mut cells: BTreeMap<_, Vec<&Row>> = BTreeMap::new();
    for row in &rows {
        let key = (
            row.task.clone(),
            row.cell.name(),
            row.method,
            (row.sparsity * 1000.0) as u32,
            row.repair,
            row.stage,
        );
        cells.entry(key).or_default().push(row);
    }
    let mut last = (String::new(), "");
    for ((task, cell, method, _, repair, stage), rows) in cells {
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
        if last != (task.clone(), cell) {
            println!("\n{task} ({cell}), dense {dense:.2?}");
            last = (task, cell);
        }
        if stage == Stage::OneShot {
            let reached = rows.iter().filter_map(|r| Some(r.reached?.recurrent));
            let removed = reached.sum::<f64>() / rows.len() as f64;
            let name = match repair {
                Repair::None => method.to_string(),
                repair => format!("{method} + {repair}"),
            };
            print!("\n  {name:<32} {:>5.1} % of W_hh: ", 100.0 * removed);
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
