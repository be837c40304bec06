//! The best model that fits a budget, of a random model, to see what is printed:
//!
//! ```text
//! cargo run --release -p frontier --example best_that_fits             half the bytes of the model
//! cargo run --release -p frontier --example best_that_fits -- 0.3      another fraction
//! ```

use std::path::Path;

use causal_lm::{Decoder, Windows, synthetic};
use frontier::candle_core::{DType, Device};
use frontier::{Data, Error, Frontier, Options, Target};
use tensor_io::{Checkpoint, Config, NoProgress, WriteOptions};

const VOCABULARY: u32 = 256;
/// Tokens of a window.
const WINDOW: usize = 32;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let fraction: f64 = match std::env::args().nth(1) {
        Some(fraction) => fraction.parse()?,
        None => 0.5,
    };
    let scratch = tempfile::tempdir()?;
    let model = scratch.path().join("model");
    write_random_model(&model)?;
    let checkpoint = Checkpoint::open(&model)?;
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
    // One text to fit the treatments on, another to measure what they do to the predictions.
    let (calibration, comparison) = (windows(32, 0)?, windows(16, 1)?);
    let data = Data {
        calibration: &calibration,
        comparison: &comparison,
    };

    let mut options = Options::new(Target::Here);
    options.formats = Some(formats(&[
        "gptq-int8-g32",
        "gptq-int4-g32",
        "gptq-int2-g32",
    ])?);
    options.ranks = Some(vec![4]);
    options.coarse_tokens = 256;
    options.fine_tokens = 512;
    let state = scratch.path().join("state");
    let mut frontier = Frontier::measure(&decoder, data, options, state, &NoProgress)?;
    let dense = frontier.dense_bytes();
    let plan = frontier.plan((dense as f64 * fraction) as u64, &NoProgress)?;

    println!("site          kept    units and format       bytes");
    for site in &plan.sites {
        let (name, treatment) = (site.site.to_string(), site.treatment.to_string());
        println!(
            "{name:<12} {:>4.0} %    {treatment:<18} {:>9}",
            100.0 * site.share,
            site.bytes
        );
    }
    println!(
        "{} of {dense} bytes, {:.4} nats per token from the dense model",
        plan.bytes(),
        plan.measured.mean
    );
    let written = frontier.write(&plan, scratch.path().join("small"), &NoProgress)?;
    println!("{} bytes written", written.bytes);
    Ok(())
}

fn formats(names: &[&str]) -> Result<Vec<frontier::Format>, Error> {
    names.iter().map(|name| name.parse()).collect()
}

/// A small Llama with random weights.
fn write_random_model(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let config = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 8, "vocab_size": 256, "max_position_embeddings": 64, "tie_word_embeddings": true}"#;
    let config = Config::new(serde_json::from_str(config)?);
    let mut random = synthetic::random(0);
    // Of this size, predictions depend on the tokens before.
    let make = |name: &str, shape: &[usize]| Ok((random(name, shape)? * 3.0)?);
    synthetic::write(&config, DType::BF16, dir, &WriteOptions::default(), make)?;
    Ok(())
}

/// Random text as windows.
fn windows(count: usize, seed: u64) -> Result<Windows, causal_lm::Error> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as u32 % VOCABULARY
    };
    let text: Vec<u32> = (0..count * WINDOW).map(|_| next()).collect();
    Windows::cut(&text, WINDOW, None)
}
