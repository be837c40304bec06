//! Prunes a checkpoint by FLAP:
//! `cargo run --release -p prune-structured --example prune -- MODEL CALIBRATION_TEXT RATIO OUT`,
//! e.g. with `xtask/model xtask/model/calibration.txt 0.25 pruned`.

use candle_core::{DType, Device};
use causal_lm::{Decoder, TextTokenizer, Windows};
use prune_structured::stats::GramStore;
use prune_structured::{Calibration, Collect, Cost, Form, Plan, Recipe, write};
use tensor_io::{Checkpoint, WriteOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, ratio, out] = &arguments[..] else {
        return Err("usage: prune MODEL CALIBRATION_TEXT RATIO OUT".into());
    };
    let checkpoint = Checkpoint::open(model)?;
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
    let tokenizer = TextTokenizer::open(model)?;
    let window = decoder.config().max_positions.min(512);
    let windows =
        Windows::cut(&tokenizer.encode_file(text)?, window, tokenizer.bos())?.sample(128, 0);

    // Gram matrices serve architectures that have no slot for FLAP's bias.
    let scratch = tempfile::tempdir()?;
    let collect = Collect {
        gram: Some(GramStore::new(scratch.path())),
        ..Collect::default()
    };
    let calibration = Calibration::run(&decoder, &windows, &collect, &mut || eprint!("."))?;
    let recipe = Recipe::named("flap", 0).ok_or("a known name")?;
    let plan = Plan::make(&decoder, &calibration, &recipe, ratio.parse()?)?;
    let cost = Cost::of(&decoder, &plan)?;
    println!(
        "\n{} of {} parameters stay",
        cost.total_after().parameters,
        cost.total_before().parameters
    );
    let options = WriteOptions::default();
    write(
        &decoder,
        &plan,
        Some(&calibration),
        Form::Sliced,
        out,
        &options,
        &mut || (),
    )?;
    Ok(())
}
