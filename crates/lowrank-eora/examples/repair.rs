//! Compresses a checkpoint, repairs it by EoRA and writes what runtimes load:
//!
//! ```sh
//! cargo run --release -p lowrank-eora --example repair -- MODEL CALIBRATION_TEXT COMPRESSOR RANK OUT
//! ```
//!
//! MODEL is a folder in Hugging Face's layout, COMPRESSOR a name such as `wanda-2:4` or `gptq-int4-g128-sym`. OUT gets `compressed`, `adapter`, `merged`, `probe.safetensors`, and `logits.safetensors`: tokens of
//! the text and the logits of the repaired model on them, for `tests/peft_logits.py`.

use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, Model, TextTokenizer, Windows};
use lowrank_eora::compress::Compressor;
use lowrank_eora::output::{
    Adapter, AdapterOptions, CheckpointOptions, Layout, Probe, Weights, write_checkpoint,
};
use lowrank_eora::repair::{Energy, Ranks, Repair, Texts};
use std::path::Path;
use tensor_io::{Cancelled, Checkpoint, NoProgress, Progress};

/// Prints what a long call says of its progress.
struct Print;

impl Progress for Print {
    fn advance(&self, _steps: u64) -> Result<(), Cancelled> {
        Ok(())
    }

    fn message(&self, text: &str) {
        eprintln!("{text}");
    }
}

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

    let repair = Repair::default().with_ranks(Ranks::Constant(rank.parse()?));
    let mut texts = Texts::new(&calibration);
    if let Some(held_out) = &held_out {
        texts = texts.with_held_out(held_out);
    }
    let repaired = repair.run(&decoder, &compressor, texts, out.join("state"), &Print)?;
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
        let options = CheckpointOptions::new(weights, layout);
        write_checkpoint(&decoder, &repaired, out.join(name), &options, &NoProgress)?;
    }
    let base = std::path::absolute(out.join("compressed"))?;
    let options = AdapterOptions::new(base.display().to_string());
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
