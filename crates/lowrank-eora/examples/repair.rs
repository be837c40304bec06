//! Compresses a checkpoint, repairs it by EoRA and writes what runtimes load:
//! `cargo run --release -p lowrank-eora --example repair -- MODEL CALIBRATION_TEXT COMPRESSOR RANK OUT`,
//! e.g. with `xtask/model xtask/model/calibration.txt wanda-2:4 8 repaired`.
//!
//! OUT gets `compressed`, `adapter`, `merged`, `probe.safetensors`, and `logits.safetensors`: tokens of
//! the text and the logits of the repaired model on them, for `tests/peft_logits.py`.

use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, Model, TextTokenizer, Windows};
use lowrank_eora::compress::Compressor;
use lowrank_eora::output::{Adapter, AdapterOptions, Layout, Probe, Weights, write_checkpoint};
use lowrank_eora::repair::{Energy, Ranks, Repair};
use std::path::Path;
use tensor_io::{Checkpoint, WriteOptions};

const CALIBRATION_WINDOWS: usize = 64;
const LOGIT_TOKENS: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, compressor, rank, out] = &arguments[..] else {
        return Err("usage: repair MODEL CALIBRATION_TEXT COMPRESSOR RANK OUT".into());
    };
    let (compressor, out): (Compressor, _) = (compressor.parse()?, Path::new(out));
    let checkpoint = Checkpoint::open(model)?;
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
    let tokenizer = TextTokenizer::open(model)?;
    let tokens = tokenizer.encode_file(text)?;
    let windows = Windows::cut(
        &tokens,
        decoder.config().max_positions.min(256),
        tokenizer.bos(),
    )?;
    let mut groups = windows.groups(CALIBRATION_WINDOWS);
    let calibration = groups.next().ok_or("a text without windows")?;
    let held_out = groups.next();

    let repair = Repair {
        ranks: Ranks::Constant(rank.parse()?),
        ..Repair::default()
    };
    let repaired = repair.run(
        &decoder,
        &compressor,
        &calibration,
        held_out.as_ref(),
        out.join("state"),
        &mut |done| eprintln!("block {} of {}", done.block + 1, done.blocks),
    )?;
    for report in repaired.reports() {
        let energy = report.held_out.unwrap_or(report.calibration);
        println!(
            "{:40} rank {:3}   loss {:.4} -> {:.4}",
            report.layer.to_string(),
            report.rank,
            energy.loss_before(),
            energy.loss()
        );
    }
    let calibrated: Energy = repaired.reports().map(|report| report.calibration).sum();
    println!(
        "calibration loss {:.4} -> {:.4}",
        calibrated.loss_before(),
        calibrated.loss()
    );
    let held_out: Energy = repaired
        .reports()
        .filter_map(|report| report.held_out)
        .sum();
    println!(
        "held-out loss    {:.4} -> {:.4}",
        held_out.loss_before(),
        held_out.loss()
    );

    for (name, weights) in [
        ("compressed", Weights::Compressed),
        ("merged", Weights::Merged),
    ] {
        let layout = Layout::Dense {
            dtype: Some(DType::F32),
        };
        let (dst, options) = (out.join(name), WriteOptions::default());
        write_checkpoint(
            &decoder,
            &repaired,
            weights,
            layout,
            dst,
            &options,
            &mut || (),
        )?;
    }
    let options = AdapterOptions {
        base_model: out.join("compressed").display().to_string(),
        ..AdapterOptions::default()
    };
    Adapter::write(&repaired, &options, out.join("adapter"))?;
    Probe::write(&repaired, 4, 0, out.join("probe.safetensors"))?;

    let merged = Checkpoint::open(out.join("merged"))?;
    let decoder = Decoder::new(&merged, DType::F32, &Device::Cpu)?;
    let model = Model::load(&decoder)?;
    let tokens = &tokens[..LOGIT_TOKENS.min(tokens.len())];
    let logits = model.forward_all(&[tokens], &mut model.full_cache(1)?)?;
    let tokens: Vec<i64> = tokens.iter().copied().map(i64::from).collect();
    let tokens = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
    let tensors = [("tokens", &tokens), ("logits", &logits)];
    tensor_io::write_file(out.join("logits.safetensors"), tensors, &Default::default())?;
    Ok(())
}
