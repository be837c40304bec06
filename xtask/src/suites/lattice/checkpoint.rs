//! A trained network from a file, and what it is evaluated on.

use anyhow::{Context, Result, bail};
use prune_lattice::data::{Dataset, Examples};
use prune_lattice::experiment::{self, ExperimentConfig, Row, Trained};
use prune_lattice::mask::MaskSet;
use prune_lattice::onnx::OnnxFile;
use prune_lattice::rnn::{CheckpointNames, ReadOut, Rnn, TrainConfig};
use prune_lattice::rnnoise::{Clips, Stored, WeightFile};
use prune_lattice::tasks::{Task, Vocabulary, read_text};
use std::path::{Path, PathBuf};

use crate::bar::Bar;

/// Characters of a text that a checkpoint is fine-tuned on.
const FINETUNE_CHARACTERS: usize = 60_000;

/// A trained network. Without a text it is evaluated on the experiment's only task.
#[derive(Debug, Clone)]
pub struct CheckpointConfig {
    /// safetensors or ONNX file, or a weight file of RNNoise.
    pub weights: PathBuf,
    /// Node of an ONNX file; `None`: the only one.
    pub node: Option<String>,
    /// Prefix of the read-out's weight and bias.
    pub read_out: Option<String>,
    /// What is applied to the states before the read-out.
    pub activation: ReadOut,
    /// The text of a character network.
    pub characters: Option<Characters>,
    /// Where the pruned networks go.
    pub save: Option<SaveConfig>,
}

/// Where pruned networks go.
#[derive(Debug, Clone)]
pub struct SaveConfig {
    /// A new folder.
    pub folder: PathBuf,
    /// How RNNoise's weights are stored.
    pub stored: Stored,
}

/// The text that a character network is tested on.
#[derive(Debug, Clone)]
pub struct Characters {
    /// JSON with the id of each character.
    pub vocab: PathBuf,
    /// Text: 90 % for fine-tuning, 5 % validation, 5 % test.
    pub text: PathBuf,
}

/// What kind of file a network came from.
#[derive(Debug)]
pub(super) enum Origin {
    Tensors,
    Onnx { file: OnnxFile, node: String },
    Noise(WeightFile),
}

/// A network that was read.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) trained: Trained,
    pub(super) origin: Origin,
}

impl Opened {
    /// The rows of all methods; `visit` sees each pruned network.
    pub(super) fn run(
        &self,
        name: &str,
        config: &CheckpointConfig,
        experiment: &ExperimentConfig,
        visit: &experiment::Visit<'_>,
        bar: &Bar,
    ) -> Result<Vec<Row>> {
        Ok(match &self.origin {
            Origin::Noise(file) => {
                let folder = clips(config, experiment)?;
                experiment::run_rnnoise(name, file, folder, experiment, visit, bar)?
            }
            _ => experiment::run_model(name, &self.trained, experiment, visit, bar)?,
        })
    }
}

/// The task that a network from a file is evaluated on.
fn task(experiment: &ExperimentConfig) -> Result<&Task> {
    match experiment.tasks.as_slice() {
        [task] => Ok(task),
        _ => bail!("--weights: a network from a file is evaluated on one --task"),
    }
}

/// The folder of clips that RNNoise is evaluated on.
fn clips<'a>(config: &CheckpointConfig, experiment: &'a ExperimentConfig) -> Result<&'a Path> {
    match task(experiment)? {
        Task::Vad(folder) => Ok(folder),
        task => bail!(
            "--task {task}: {} is evaluated on clips, --task vad:FOLDER",
            config.weights.display()
        ),
    }
}

fn network(config: &CheckpointConfig) -> Result<(Rnn, Origin)> {
    let file = &config.weights;
    let extension = file.extension().and_then(|e| e.to_str());
    if extension != Some("onnx") && config.node.is_some() {
        bail!("--node: {} is not an ONNX file", file.display());
    }
    match extension {
        Some("onnx") => {
            let onnx = OnnxFile::open(file)?;
            let node = onnx.node(config.node.as_deref())?;
            let rnn = onnx.network(node, config.read_out.as_deref(), config.activation)?;
            let node = node.name.clone();
            Ok((rnn, Origin::Onnx { file: onnx, node }))
        }
        Some("safetensors") => {
            let names = CheckpointNames::default().with(|names| {
                names.dense_input = config.characters.is_none();
                names.read_out = config.activation;
                if let Some(read_out) = &config.read_out {
                    names.output = read_out.clone();
                }
            });
            let rnn = Rnn::load(file, &names).with_context(|| file.display().to_string())?;
            Ok((rnn, Origin::Tensors))
        }
        _ => {
            if config.read_out.is_some() || config.characters.is_some() {
                bail!(
                    "{}: a weight file of RNNoise has read-outs and clips of its own",
                    file.display()
                );
            }
            let noise = WeightFile::open(file)?;
            let rnn = noise
                .network()
                .with_context(|| file.display().to_string())?;
            Ok((rnn, Origin::Noise(noise)))
        }
    }
}

pub(super) fn open(config: &CheckpointConfig, experiment: &ExperimentConfig) -> Result<Opened> {
    let (rnn, origin) = network(config)?;
    let wired = MaskSet::default();
    let (data, training) = match (&config.characters, &origin) {
        (Some(characters), _) => (
            of_text(characters, &rnn)?,
            TrainConfig::default().with(|c| {
                c.learning_rate = 1e-3;
                c.batch = 32;
                c.window = 64;
            }),
        ),
        (None, Origin::Noise(noise)) => {
            let folder = clips(config, experiment)?;
            let train = Clips::load(&folder.join("train.safetensors"))?.examples(noise)?;
            let data = Dataset {
                valid: train.clone(),
                test: train.clone(),
                train,
                input: rnn.config().input,
                outputs: rnn.config().outputs,
            };
            (data, TrainConfig::default())
        }
        (None, _) => {
            let task = task(experiment)?;
            let seed = experiment.seeds.first().copied().unwrap_or_default();
            let training = experiment.training(task, rnn.config().cell);
            (experiment.data(task, seed)?, training)
        }
    };
    let trained = Trained {
        rnn,
        data,
        training,
        wired,
    };
    Ok(Opened { trained, origin })
}

fn of_text(config: &Characters, rnn: &Rnn) -> Result<Dataset> {
    let symbols = Vocabulary::load(&config.vocab)?
        .encode(&read_text(&config.text)?)
        .with_context(|| config.text.display().to_string())?;
    let at = |share: f64| (symbols.len() as f64 * share) as usize;
    Ok(Dataset {
        train: Examples::Text(symbols[..at(0.9).min(FINETUNE_CHARACTERS)].to_vec()),
        valid: Examples::Text(symbols[at(0.9)..at(0.95)].to_vec()),
        test: Examples::Text(symbols[at(0.95)..].to_vec()),
        input: rnn.config().input,
        outputs: rnn.config().outputs,
    })
}
