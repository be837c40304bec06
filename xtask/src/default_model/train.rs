//! `train-default`: the embedded model from nothing.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use causal_lm::ModelConfig;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tensor_io::WriteOptions;
use tokenizers::Tokenizer;

use super::vocabulary::{self, SIZE};
use super::{CALIBRATION, EVALUATION, Split, Tales, calibration, evaluation};
use crate::cli::Device;
use crate::format;
use crate::progress::Progress;
use crate::train::{Schedule, Student, Trainer};

/// Positions of a window.
pub(super) const CONTEXT: usize = 512;
/// Tokens of a step.
const BATCH: usize = 4096;
/// Positions of a window over the run, and the share of the steps after which they end: short windows cost less and teach
/// nearly everything.
const STAGES: [(usize, f64); 2] = [(256, 0.8), (CONTEXT, 1.0)];
/// Text that the vocabulary is learnt from, and that is tokenised at a time.
const PIECE: usize = 1 << 20;

/// What to train.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the checkpoint goes.
    pub out: PathBuf,
    /// Replace what is there.
    pub overwrite: bool,
    /// Steps of 4,096 tokens.
    pub steps: usize,
    /// Seed of weights and text.
    pub seed: u64,
    /// Where to compute.
    pub device: Device,
}

/// The architecture: 3.0 million parameters, grouped queries, tied embeddings.
fn architecture() -> tensor_io::Config {
    let fields = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": SIZE, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "attention_bias": false,
        "mlp_bias": false, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
    });
    tensor_io::Config::new(fields.as_object().cloned().unwrap_or_default())
}

/// Windows of text as they are evaluated: BOS and running text across documents.
struct Stream<'a> {
    tales: Tales,
    tokenizer: &'a Tokenizer,
    bos: u32,
    tokens: Vec<u32>,
}

impl Stream<'_> {
    fn window(&mut self, length: usize) -> Result<Vec<u32>> {
        let text = length - 1;
        if self.tokens.len() < text {
            let told = self.tales.take(PIECE);
            let encoding = self.tokenizer.encode_fast(told.text, false);
            let encoding = encoding.map_err(anyhow::Error::from_boxed)?;
            self.tokens.extend(encoding.get_ids());
            // Windows are taken from the end.
            self.tokens.reverse();
        }
        let rest = self.tokens.split_off(self.tokens.len() - text);
        Ok([self.bos]
            .into_iter()
            .chain(rest.into_iter().rev())
            .collect())
    }
}

/// Train and write the checkpoint.
///
/// # Errors
/// A folder that cannot be written, or a device that is not there.
pub fn run(config: &Config) -> Result<()> {
    let started = Instant::now();
    let device = config.device.open()?;
    let options = WriteOptions {
        overwrite: config.overwrite,
        ..WriteOptions::default()
    };
    ensure!(
        config.overwrite || !config.out.exists(),
        "--out {}: exists; --overwrite replaces it",
        config.out.display()
    );
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    let mut tales = Tales::new(Split::Training, config.seed);
    let tokenizer = vocabulary::learn(&tales.take(PIECE).text)?;
    let bos = tokenizer
        .token_to_id(vocabulary::BOS)
        .context("no BOS in the vocabulary")?;
    let mut stream = Stream {
        tales,
        tokenizer: &tokenizer,
        bos,
        tokens: Vec::new(),
    };

    let fields = architecture();
    let model = ModelConfig::new(&fields)?;
    let depth = (2.0 * model.layers() as f32).sqrt();
    let student = Student::new(model, &device, |name, shape| {
        let count: usize = shape.iter().product();
        // Uniform with the deviation given; outputs into the residual stream are smaller the more of them there are.
        let deviation = match name {
            n if n.ends_with("norm.weight") => return vec![1.0; count],
            n if n.contains("o_proj") || n.contains("down_proj") => 0.04 / depth,
            _ => 0.04,
        };
        let range = deviation * 3f32.sqrt();
        (0..count)
            .map(|_| rng.random_range(-range..=range))
            .collect()
    })?;
    let schedule = Schedule {
        steps: config.steps,
        warmup: (config.steps / 20).clamp(1, 200),
        rate: 3e-3,
    };
    let mut trainer = Trainer::new(&student, schedule)?;
    let bar = Progress::new("training", config.steps as u64);
    let mut mean = f64::NAN;
    for step in 0..config.steps {
        let done = step as f64 / config.steps as f64;
        let stage = STAGES.iter().find(|(_, end)| done < *end);
        let length = stage.map_or(CONTEXT, |(length, _)| *length);
        let windows = (0..BATCH / length)
            .map(|_| stream.window(length))
            .collect::<Result<Vec<_>>>()?;
        let sequences: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
        let at = (0..BATCH)
            .filter(|i| (i + 1) % length != 0)
            .map(|i| i as u32);
        let targets: Vec<u32> = windows.iter().flat_map(|w| &w[1..]).copied().collect();
        let loss = trainer.step(&student.loss(&sequences, &at.collect::<Vec<_>>(), &targets)?)?;
        mean = if mean.is_nan() {
            loss
        } else {
            0.98 * mean + 0.02 * loss
        };
        bar.set_label(format!("training, {mean:.3} nats per token"));
        bar.inc(1);
    }
    bar.finish();
    let seconds = started.elapsed().as_secs_f64();
    let mut files = vocabulary::files(&tokenizer)?.to_vec();
    files.push((EVALUATION, evaluation().text.into_bytes()));
    files.push((CALIBRATION, calibration().text.into_bytes()));
    student.write(&fields, DType::BF16, &config.out, &options, &files)?;
    let tokens = config.steps * BATCH;
    println!(
        "{}: {tokens} tokens in {} ({:.0} tokens/s), {mean:.4} nats per token on the last of them",
        config.out.display(),
        format::seconds(seconds),
        tokens as f64 / seconds
    );
    Ok(())
}
