//! Tasks made in-process from a seed, and two that read files. Nothing is downloaded.
//!
//! Row images and plain Reber strings hardly need `W_hh`: a network without recurrent weights solves them almost as well, so
//! they cannot show bad recurrent pruning. Counting modulo k needs it: without `W_hh` an LSTM is a diagonal recurrence that
//! cannot count (Grazzi et al., arXiv 2411.12537). Every report should hold one of the latter.

mod adding;
mod automaton;
mod digits;
mod mnist;
mod reber;
mod text;
mod vad;

pub use automaton::{Dfa, tomita};
pub use reber::{is_embedded_reber, is_reber, reber_automaton};
pub use text::{Vocabulary, grammar_text, read_text};

use crate::{
    cell::Cell,
    data::Dataset,
    error::{Error, Result},
    rnn::{Decay, TrainConfig},
};
use serde::{Deserialize, Serialize};
use std::{fmt, path::PathBuf, str::FromStr};

/// Something to train on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[non_exhaustive]
pub enum Task {
    /// Whether a string is a Reber string; invalid ones have one symbol of the alphabet changed.
    Reber,
    /// Whether the branch symbol after the first comes back before the last, a Reber string lying between.
    EmbeddedReber,
    /// Digits of 16 x 16 pixels, a row a step.
    RowDigits,
    /// Number of ones modulo 2 or 3.
    Mod(u32),
    /// Membership in Tomita's language 1 to 7.
    Tomita(u8),
    /// Sum of the two marked numbers of 50 (Hochreiter and Schmidhuber 1997); squared error.
    Adding,
    /// Next character of sentences from a grammar with brackets and agreement.
    CharGrammar,
    /// Next character of a text file: first 90 % training, then 5 % validation and 5 % test.
    Text(PathBuf),
    /// MNIST, a row a step, from a folder with the IDX files, plain or gzipped.
    Mnist(PathBuf),
    /// The same with all pixels permuted once: what needs memory over the whole image.
    MnistPermuted(PathBuf),
    /// The same, a pixel a step: 784 steps, 28 times the time of rows.
    MnistPixel(PathBuf),
    /// Decisions at every step of recorded clips: a folder with `train.safetensors` and `test.safetensors`, each with
    /// `features` `[clips, steps, dim]`, `labels` (0, 1, 255: not counted) and `probs` of the original network, which
    /// fine-tuning imitates.
    Vad(PathBuf),
}

/// Number of examples of each split (sequences; characters for texts).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Training.
    pub train: usize,
    /// Validation.
    pub valid: usize,
    /// Test.
    pub test: usize,
}

impl Task {
    /// The names that parse.
    pub const NAMES: &'static str = "reber, embedded-reber, row-digits, mod2, mod3, tomita1 to tomita7, adding, char-grammar, text:FILE, mnist:FOLDER, mnist-permuted:FOLDER, mnist-pixel:FOLDER, vad:FOLDER";

    /// Examples of every split, drawn from separate streams of the seed. Strings of the same generator may occur in more
    /// than one split.
    ///
    /// # Errors
    /// For tasks from files: a file is missing or malformed, or has fewer examples than asked for.
    pub fn generate(&self, sizes: Sizes, seed: u64) -> Result<Dataset> {
        match self {
            Task::Reber => reber::dataset(false, sizes, seed),
            Task::EmbeddedReber => reber::dataset(true, sizes, seed),
            Task::RowDigits => digits::dataset(sizes, seed),
            Task::Mod(k) => automaton::counting(*k, sizes, seed),
            Task::Tomita(k) => automaton::tomita_dataset(*k, sizes, seed),
            Task::Adding => adding::dataset(sizes, seed),
            Task::CharGrammar => text::grammar_dataset(sizes, seed),
            Task::Text(file) => text::file_dataset(file),
            Task::Mnist(folder) => mnist::dataset(folder, sizes, mnist::Order::Rows),
            Task::MnistPermuted(folder) => mnist::dataset(folder, sizes, mnist::Order::Permuted),
            Task::MnistPixel(folder) => mnist::dataset(folder, sizes, mnist::Order::Pixels),
            Task::Vad(folder) => vad::dataset(folder),
        }
    }

    /// Sizes with which the default suite stays within its two minutes.
    pub fn default_sizes(&self) -> Sizes {
        let (train, valid, test) = match self {
            Task::CharGrammar => (60_000, 6_000, 12_000),
            _ if self.has_images() => (9_000, 1_000, 10_000),
            _ => (3_000, 500, 1_000),
        };
        Sizes { train, valid, test }
    }

    /// Hidden sizes of the layers that the default suite uses.
    pub fn default_hidden(&self, cell: Cell) -> Vec<usize> {
        let wide = if cell == Cell::Lstm { 32 } else { 40 };
        vec![match self {
            Task::Mod(_) | Task::Tomita(_) => 24,
            Task::Text(_) => 64,
            Task::Vad(_) => 128,
            _ if self.has_images() => 128,
            _ => wide,
        }]
    }

    /// Whether networks of ungated cells need an orthogonal `W_hh` to begin with: they do on long sequences.
    pub fn orthogonal_recurrence(&self, cell: Cell) -> bool {
        cell.gates() == 1 && self.has_images()
    }

    /// Whether its examples are images, which are deformed in training.
    pub fn has_images(&self) -> bool {
        matches!(
            self,
            Task::Mnist(_) | Task::MnistPermuted(_) | Task::MnistPixel(_)
        )
    }

    /// Whether the number of its examples can be chosen; a folder of clips and a text are taken whole.
    pub fn has_sizes(&self) -> bool {
        !matches!(self, Task::Text(_) | Task::Vad(_))
    }

    /// How the default suite trains.
    pub fn default_training(&self, cell: Cell) -> TrainConfig {
        let base = TrainConfig {
            target_loss: Some(0.01),
            ..TrainConfig::default()
        };
        match self {
            Task::Mod(_) => TrainConfig {
                epochs: 60,
                learning_rate: 1e-2,
                patience: Some(20),
                ..base
            },
            Task::Tomita(_) => TrainConfig {
                epochs: 40,
                learning_rate: 5e-3,
                patience: Some(10),
                ..base
            },
            Task::EmbeddedReber => TrainConfig {
                epochs: 60,
                learning_rate: 5e-3,
                patience: Some(20),
                ..base
            },
            Task::Reber => TrainConfig {
                epochs: 20,
                learning_rate: 5e-3,
                ..base
            },
            Task::RowDigits => TrainConfig { epochs: 10, ..base },
            Task::Adding => TrainConfig {
                epochs: 30,
                learning_rate: 5e-3,
                patience: Some(10),
                target_loss: Some(1e-3),
                ..base
            },
            Task::CharGrammar | Task::Text(_) => TrainConfig {
                epochs: 8,
                learning_rate: 5e-3,
                target_loss: None,
                ..base
            },
            Task::Mnist(_) | Task::MnistPermuted(_) | Task::MnistPixel(_) => TrainConfig {
                epochs: 20,
                batch: 100,
                learning_rate: if cell.gates() == 1 { 1e-3 } else { 3e-3 },
                warmup: 100,
                decay: Decay::Cosine,
                patience: None,
                target_loss: None,
                shards: 2,
                ..base
            },
            Task::Vad(_) => TrainConfig {
                epochs: 10,
                batch: 16,
                learning_rate: 2e-3,
                window: 100,
                patience: None,
                target_loss: None,
                ..base
            },
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Task::Reber => f.write_str("reber"),
            Task::EmbeddedReber => f.write_str("embedded-reber"),
            Task::RowDigits => f.write_str("row-digits"),
            Task::Mod(k) => write!(f, "mod{k}"),
            Task::Tomita(k) => write!(f, "tomita{k}"),
            Task::Adding => f.write_str("adding"),
            Task::CharGrammar => f.write_str("char-grammar"),
            Task::Text(file) => write!(f, "text:{}", file.display()),
            Task::Mnist(folder) => write!(f, "mnist:{}", folder.display()),
            Task::MnistPermuted(folder) => write!(f, "mnist-permuted:{}", folder.display()),
            Task::MnistPixel(folder) => write!(f, "mnist-pixel:{}", folder.display()),
            Task::Vad(folder) => write!(f, "vad:{}", folder.display()),
        }
    }
}

impl FromStr for Task {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        let unknown = || Error::UnknownName {
            kind: "task",
            name: name.into(),
            expected: Task::NAMES.into(),
        };
        if let Some((kind, path)) = name.split_once(':') {
            return match kind {
                "text" => Ok(Task::Text(path.into())),
                "mnist" => Ok(Task::Mnist(path.into())),
                "mnist-permuted" => Ok(Task::MnistPermuted(path.into())),
                "mnist-pixel" => Ok(Task::MnistPixel(path.into())),
                "vad" => Ok(Task::Vad(path.into())),
                _ => Err(unknown()),
            };
        }
        match name {
            "reber" => Ok(Task::Reber),
            "embedded-reber" => Ok(Task::EmbeddedReber),
            "row-digits" => Ok(Task::RowDigits),
            "mod2" => Ok(Task::Mod(2)),
            "mod3" => Ok(Task::Mod(3)),
            "adding" => Ok(Task::Adding),
            "char-grammar" => Ok(Task::CharGrammar),
            _ => match name.strip_prefix("tomita").and_then(|k| k.parse().ok()) {
                Some(k @ 1..=7) => Ok(Task::Tomita(k)),
                _ => Err(unknown()),
            },
        }
    }
}

impl From<Task> for String {
    fn from(task: Task) -> String {
        task.to_string()
    }
}

impl TryFrom<String> for Task {
    type Error = Error;
    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

/// Builds the three splits, each from its own stream.
fn splits<T>(
    task: &str,
    sizes: Sizes,
    seed: u64,
    mut make: impl FnMut(usize, &mut rand_chacha::ChaCha8Rng) -> Result<T>,
) -> Result<[T; 3]> {
    let mut split = |name: &str, size: usize| {
        make(size, &mut crate::seed::rng(seed, &format!("{task} {name}")))
    };
    Ok([
        split("train", sizes.train)?,
        split("valid", sizes.valid)?,
        split("test", sizes.test)?,
    ])
}

/// Classification of symbol strings.
fn symbol_dataset(
    task: &str,
    vocab: usize,
    classes: usize,
    sizes: Sizes,
    seed: u64,
    mut draw: impl FnMut(&mut rand_chacha::ChaCha8Rng) -> Result<(Vec<u32>, u32)>,
) -> Result<Dataset> {
    use crate::data::{Examples, Inputs, Sequences, Targets};
    let [train, valid, test] = splits(task, sizes, seed, |size, rng| {
        let (mut symbols, mut lengths, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..size {
            let (string, label) = draw(rng)?;
            lengths.push(string.len());
            symbols.extend(string);
            labels.push(label);
        }
        Ok(Examples::Sequences(Sequences::new(
            Inputs::Symbols(symbols),
            &lengths,
            Targets::Classes(labels),
        )?))
    })?;
    Ok(Dataset {
        train,
        valid,
        test,
        input: crate::rnn::InputKind::OneHot { vocab },
        outputs: classes,
    })
}
