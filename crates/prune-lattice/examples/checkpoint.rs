//! Prunes a trained character network by every method and prints bits per character over sparsity, one-shot and fine-tuned.
//!
//! `cargo run --release -p prune-lattice --example checkpoint -- MODEL.safetensors VOCAB.json TEXT [FINETUNE_CHARACTERS]`
//! The text is cut 90 / 5 / 5; fine-tuning reads the first so many characters of the first part, evaluation the last part.

use prune_lattice::{
    NoProgress,
    data::{Dataset, Examples},
    experiment::{ExperimentConfig, Row, Stage, measure_speed, run_model, verdict},
    prune::{Method, PruneConfig},
    rnn::{CheckpointNames, Rnn, TrainConfig, evaluate},
    tasks::Vocabulary,
};
use std::{path::Path, time::Instant};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, vocab, text, rest @ ..] = args.as_slice() else {
        return Err(
            "usage: checkpoint MODEL.safetensors VOCAB.json TEXT [FINETUNE_CHARACTERS]".into(),
        );
    };
    let budget: usize = rest.first().map_or(Ok(100_000), |n| n.parse())?;
    let rnn = Rnn::load(Path::new(model), &CheckpointNames::default())?;
    let symbols = Vocabulary::load(Path::new(vocab))?.encode(&std::fs::read_to_string(text)?)?;
    let at = |share: f64| (symbols.len() as f64 * share) as usize;
    let data = Dataset {
        train: Examples::Text(symbols[..at(0.9).min(budget)].to_vec()),
        valid: Examples::Text(symbols[at(0.9)..at(0.9) + 5_000].to_vec()),
        test: Examples::Text(symbols[at(0.95)..].to_vec()),
        input: rnn.config().input,
        outputs: rnn.config().outputs,
    };
    println!(
        "{:?}: dense {:.4} bits per character",
        rnn.config(),
        evaluate(&rnn, &data.test)?.bits()
    );
    let config = ExperimentConfig::default().with(|c| c.seeds = vec![0]);
    let training = TrainConfig::default().with(|c| {
        c.learning_rate = 1e-3;
        c.batch = 32;
        c.window = 64;
    });
    let start = Instant::now();
    let rows = run_model("checkpoint", &rnn, &data, &config, &training, &NoProgress)?;
    let bits = |method, sparsity: f64, stage| {
        let same = |r: &&Row| r.method == method && r.sparsity == sparsity && r.stage == stage;
        rows.iter()
            .find(same)
            .and_then(|r| r.bits)
            .map_or("-".to_owned(), |b| format!("{b:.3}"))
    };
    println!(
        "{:<22}{:>18}{:>18}{:>18}   (one-shot -> fine-tuned)",
        "bits per character", "50 %", "75 %", "90 %"
    );
    for method in config.all_methods() {
        let fixed = matches!(method, Method::Dense | Method::ZeroWhh);
        print!("{method:<22}");
        for s in if fixed {
            vec![0.0]
        } else {
            config.sparsities.clone()
        } {
            print!(
                "{:>18}",
                format!(
                    "{} -> {}",
                    bits(method, s, Stage::OneShot),
                    bits(method, s, Stage::FineTuned)
                )
            );
        }
        println!();
    }
    println!("{:.1} s", start.elapsed().as_secs_f64());
    verdict(&rows).iter().for_each(|line| println!("- {line}"));
    for batch in [1, 32] {
        println!(
            "{:?}",
            measure_speed(
                &rnn,
                &PruneConfig::new(Method::LatticeContext, 0.75),
                batch,
                0.5
            )?
        );
    }
    Ok(())
}
