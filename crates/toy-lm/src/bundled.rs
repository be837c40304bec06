//! The model that the evaluation runs on where none is given: architecture, tokenizer, training, and its two texts.
//!
//! Training takes hours on a few cores and is done once; the checkpoint is committed beside the program that uses it.

mod stream;
mod vocabulary;

use std::path::PathBuf;

use candle_core::{DType, Device};
use causal_lm::ModelConfig;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tensor_io::{Progress, WriteOptions};

use crate::{
    Batch, Corpus, Error, Generator, Result, Split, Stage, TrainOptions, TrainableDecoder, Trained,
};
use stream::TokenStream;

/// Name of the evaluation text in the model's folder.
pub const EVALUATION: &str = "evaluation.txt";
/// Name of the calibration text in the model's folder.
pub const CALIBRATION: &str = "calibration.txt";

/// Bytes of either text.
const TEXT_BYTES: usize = 96 << 10;
/// Positions of a window.
const CONTEXT: usize = 512;
/// Tokens of a step.
const BATCH_TOKENS: usize = 4096;
/// Short windows cost less and teach nearly everything; the last fifth of the steps uses whole ones.
const STAGES: [Stage; 2] = [
    Stage {
        length: 256,
        until: 0.8,
    },
    Stage {
        length: CONTEXT,
        until: 1.0,
    },
];
/// Bytes of text that the tokenizer is trained on, and that are tokenised at a time.
const PIECE: usize = 1 << 20;

/// The evaluation text, as in the model's folder.
pub fn evaluation() -> Corpus {
    Generator::new(Split::Evaluation, 0).corpus(TEXT_BYTES)
}

/// The calibration text, as in the model's folder.
pub fn calibration() -> Corpus {
    Generator::new(Split::Calibration, 0).corpus(TEXT_BYTES)
}

/// Which model to train.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// The bundled one: a Llama of 3.0 million parameters.
    #[default]
    Dense,
    /// A Mixtral of sixteen experts in each of four layers, two of them for each token: 3.5 million parameters, of which 0.7
    /// million act on a token.
    Mixture,
}

/// What to train.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// Which model.
    pub architecture: Architecture,
    /// Folder to write.
    pub out: PathBuf,
    /// Whether to replace what is there.
    pub overwrite: bool,
    /// Steps of 4,096 tokens.
    pub steps: usize,
    /// Seed of the initial weights and of the text.
    pub seed: u64,
}

impl Options {
    /// The steps and the seed of the committed model.
    pub fn new(out: impl Into<PathBuf>) -> Self {
        Self {
            architecture: Architecture::default(),
            out: out.into(),
            overwrite: false,
            steps: 2500,
            seed: 0,
        }
    }

    /// Tokens of the whole run.
    pub fn tokens(&self) -> usize {
        self.steps * BATCH_TOKENS
    }
}

/// Its config: grouped queries, tied embeddings.
fn config(architecture: Architecture) -> tensor_io::Config {
    let fields = match architecture {
        Architecture::Dense => json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": vocabulary::SIZE, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": CONTEXT,
            "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "attention_bias": false,
            "mlp_bias": false, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
        }),
        Architecture::Mixture => json!({
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
            "vocab_size": vocabulary::SIZE, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": CONTEXT,
            "num_local_experts": 16, "num_experts_per_tok": 2, "sliding_window": null,
            "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
            "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
        }),
    };
    tensor_io::Config::new(fields.as_object().cloned().unwrap_or_default())
}

/// Trains the model and writes it with its tokenizer and its two texts.
///
/// # Errors
/// A folder that exists already or cannot be written, what the device reports, and [`Error::Cancelled`].
pub fn train(options: &Options, device: &Device, progress: &dyn Progress) -> Result<Trained> {
    if options.out.exists() && !options.overwrite {
        return Err(Error::Option {
            option: "out",
            reason: format!("{} already exists", options.out.display()),
        });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let mut text = Generator::new(Split::Training, options.seed);
    let tokenizer = vocabulary::train(&text.corpus(PIECE).text)?;
    let bos = tokenizer.token_to_id(vocabulary::BOS);
    let bos = bos.ok_or_else(|| Error::Tokenizer("no BOS in the vocabulary".into()))?;
    let mut stream = TokenStream::new(|| text.corpus(PIECE).text, &tokenizer, bos);

    let fields = config(options.architecture);
    let model = ModelConfig::new(&fields)?;
    let depth = (2.0 * model.layers() as f32).sqrt();
    let decoder = TrainableDecoder::new(model, device, |name, shape| {
        let count: usize = shape.iter().product();
        // Outputs into the residual stream are smaller the more of them there are.
        let deviation = match name {
            n if n.ends_with("norm.weight") => return vec![1.0; count],
            n if ["o_proj", "down_proj", ".w2."]
                .iter()
                .any(|part| n.contains(part)) =>
            {
                0.04 / depth
            }
            _ => 0.04,
        };
        let range = deviation * 3f32.sqrt();
        (0..count)
            .map(|_| rng.random_range(-range..=range))
            .collect()
    })?;
    let schedule = TrainOptions {
        stages: STAGES.to_vec(),
        ..TrainOptions::new(options.steps, CONTEXT)
    };
    let batch = |length| {
        let windows = (0..BATCH_TOKENS / length).map(|_| stream.window(length));
        Batch::next_tokens(windows.collect::<Result<_>>()?)
    };
    let trained = crate::train(&decoder, &schedule, batch, progress)?;

    let mut files = vocabulary::files(&tokenizer, CONTEXT)?.to_vec();
    files.push((EVALUATION, evaluation().text.into_bytes()));
    files.push((CALIBRATION, calibration().text.into_bytes()));
    let write = WriteOptions::default().with_overwrite(options.overwrite);
    decoder.write(&fields, DType::BF16, &options.out, &write, &files)?;
    Ok(trained)
}
