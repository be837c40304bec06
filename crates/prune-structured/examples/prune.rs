//! Prunes a model by FLAP:
//!
//! ```text
//! cargo run --release --example prune                                  a random model, to see what is printed
//! cargo run --release --example prune -- MODEL TEXT RATIO OUT          a model of yours, calibrated on a text file
//! ```

use std::path::{Path, PathBuf};

use causal_lm::{Decoder, TextTokenizer, Windows, synthetic};
use prune_structured::candle_core::{DType, Device};
use prune_structured::{Calibration, Collect, Cost, NoProgress, Plan, Recipe, Settings, write};
use tensor_io::{Checkpoint, Config, WriteOptions};

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let scratch = tempfile::tempdir()?;
    let (model, text, ratio, out) = match &arguments[..] {
        [] => (
            random_model(scratch.path())?,
            None,
            0.25,
            scratch.path().join("pruned"),
        ),
        [model, text, ratio, out] => (model.into(), Some(text), ratio.parse()?, PathBuf::from(out)),
        _ => return Err("usage: prune [MODEL TEXT RATIO OUT]".into()),
    };
    let checkpoint = Checkpoint::open(&model)?;
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
    let window = decoder.config().max_positions.min(512);
    let windows = match text {
        Some(text) => {
            let tokenizer = TextTokenizer::open(&model)?;
            Windows::cut(&tokenizer.encode_file(text)?, window, tokenizer.bos())?
        }
        None => Windows::cut(&random_text(decoder.config().vocab), window, None)?,
    };

    let recipe = Recipe::named("flap", 0).ok_or("a known name")?;
    // Gram matrices serve architectures without a slot for FLAP's bias.
    let collect = Collect::new(recipe.needs(&decoder), scratch.path());
    let calibration = Calibration::run(&decoder, &windows.sample(128, 0), &collect, &NoProgress)?;
    let plan = Plan::make(&decoder, &calibration, &recipe, ratio, &NoProgress)?;
    let cost = Cost::of(&decoder, &plan)?;
    for (layer, widths) in plan.widths().iter().enumerate() {
        println!(
            "layer {layer}: {} heads, {} neurons",
            widths.heads, widths.neurons
        );
    }
    let (before, after) = (cost.total_before(), cost.total_after());
    println!(
        "{} of {} parameters are kept",
        after.parameters, before.parameters
    );
    let written = write(
        &decoder,
        &plan,
        out,
        &Settings::new(&calibration),
        &NoProgress,
    )?;
    println!("{} bytes in {}", written.bytes, written.dir.display());
    Ok(())
}

/// A small Llama with random weights.
fn random_model(dir: &Path) -> Result<PathBuf, Error> {
    let config = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4,
        "num_attention_heads": 8, "vocab_size": 256, "max_position_embeddings": 128, "attention_bias": true, "mlp_bias": true}"#;
    let config = Config::new(serde_json::from_str(config)?);
    let (dst, options) = (dir.join("model"), WriteOptions::default());
    synthetic::write(&config, DType::F32, &dst, &options, synthetic::random(0))?;
    Ok(dst)
}

fn random_text(vocab: usize) -> Vec<u32> {
    (0..16_384u64)
        .map(|i| ((i * i * 2_654_435_761) >> 7) as u32 % vocab as u32)
        .collect()
}
