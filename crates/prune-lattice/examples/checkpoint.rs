//! Prunes a trained character network by every method and prints bits per character over sparsity, one-shot and fine-tuned.
//!
//! `cargo run --release -p prune-lattice --example checkpoint -- MODEL.safetensors VOCAB.json TEXT [FINETUNE_CHARACTERS
//! [REPAIR,.. [COMPETE]]]`
//! The text is cut 90 / 5 / 5; fine-tuning reads the first so many characters of the first part, evaluation the last part. Repairs
//! are those of `ExperimentConfig`, `none` by default; COMPETE is within what magnitudes compete.

use prune_lattice::{
    NoProgress,
    data::{Dataset, Examples},
    experiment::{
        ExperimentConfig, Row, Stage, Trained, Treatment, measure_speed, run_model, verdict,
    },
    mask::MaskSet,
    prune::{Method, PruneConfig},
    rnn::{CheckpointNames, Rnn, TrainConfig, evaluate},
    tasks::Vocabulary,
};
use std::{path::Path, time::Instant};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, vocab, text, rest @ ..] = args.as_slice() else {
        return Err(
            "usage: checkpoint MODEL.safetensors VOCAB.json TEXT [FINETUNE_CHARACTERS [REPAIR,.. [COMPETE]]]"
                .into(),
        );
    };
    let budget: usize = rest.first().map_or(Ok(100_000), |n| n.parse())?;
    let rnn = Rnn::load(Path::new(model), &CheckpointNames::default())?;
    let contents = std::fs::read_to_string(text).map_err(|e| format!("{text}: {e}"))?;
    let symbols = Vocabulary::load(Path::new(vocab))?.encode(&contents)?;
    let at = |share: f64| (symbols.len() as f64 * share) as usize;
    let data = Dataset {
        train: Examples::Text(symbols[..at(0.9).min(budget)].to_vec()),
        valid: Examples::Text(symbols[at(0.9)..at(0.95).min(at(0.9) + 5_000)].to_vec()),
        test: Examples::Text(symbols[at(0.95)..].to_vec()),
        input: rnn.config().input,
        outputs: rnn.config().outputs,
    };
    println!(
        "{:?}: dense {:.4} bits per character",
        rnn.config(),
        evaluate(&rnn, &data.test)?.bits()
    );
    let repairs = rest.get(1).map_or("none", String::as_str).split(',');
    let repairs = repairs.map(str::parse).collect::<Result<_, _>>()?;
    let compete = rest.get(2).map(|c| c.parse()).transpose()?;
    let config = ExperimentConfig::default().with(|c| {
        c.seeds = vec![0];
        c.repairs = repairs;
        c.compete = compete.unwrap_or_default();
    });
    let training = TrainConfig::default().with(|c| {
        c.learning_rate = 1e-3;
        c.batch = 32;
        c.window = 64;
    });
    let trained = Trained {
        rnn,
        data,
        training,
        wired: MaskSet::default(),
    };
    let start = Instant::now();
    let rows = run_model("checkpoint", &trained, &config, &|_| Ok(()), &NoProgress)?;
    let bits = |treatment, sparsity: f64, stage| {
        let same =
            |r: &&Row| r.treatment() == treatment && r.sparsity == sparsity && r.stage == stage;
        rows.iter()
            .find(same)
            .and_then(|r| r.bits)
            .map_or("-".to_owned(), |b| format!("{b:.3}"))
    };
    println!(
        "{:<32}{:>18}{:>18}{:>18}   (one-shot -> fine-tuned)",
        "bits per character", "50 %", "75 %", "90 %"
    );
    for method in config.all_methods() {
        for &repair in &config.repairs {
            let treatment = Treatment::new(method, repair);
            if !rows.iter().any(|r| r.treatment() == treatment) {
                continue;
            }
            let fixed = matches!(method, Method::Dense | Method::ZeroWhh);
            print!("{treatment:<32}");
            for s in if fixed {
                vec![0.0]
            } else {
                config.sparsities.clone()
            } {
                print!(
                    "{:>18}",
                    format!(
                        "{} -> {}",
                        bits(treatment, s, Stage::OneShot),
                        bits(treatment, s, Stage::FineTuned)
                    )
                );
            }
            println!();
        }
    }
    println!("{:.1} s", start.elapsed().as_secs_f64());
    verdict(&rows).iter().for_each(|line| println!("- {line}"));
    for batch in [1, 32] {
        println!(
            "{:?}",
            measure_speed(
                &trained.rnn,
                &PruneConfig::new(Method::LatticeContext, 0.75),
                batch,
                0.5
            )?
        );
    }
    Ok(())
}
