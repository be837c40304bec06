//! What a run compresses, repairs, measures and writes.

use std::path::PathBuf;

use clap::ValueEnum;
use lowrank_eora::compress::Compressor;
use lowrank_eora::experts::GramOptions;
use lowrank_eora::repair::{Method, Repair, Spread};
use tensor_io::WriteOptions;

use super::output::Output;
use crate::estimate::Probe;
use crate::suites::perplexity;

/// What to compress, repair and measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Model, text and protocol of the evaluation.
    pub perplexity: perplexity::Config,
    /// Text to calibrate on.
    pub calib: PathBuf,
    /// Windows to calibrate on.
    pub calib_samples: usize,
    /// Other windows of the same text, to measure the loss on.
    pub held_out_samples: usize,
    /// Compressors.
    pub compressors: Vec<Compressor>,
    /// The model as another tool compressed it, a folder or a GGUF file: repaired instead of what the compressors make.
    pub compressed: Option<PathBuf>,
    /// Importance matrix for the compressors that weight by importance, instead of what calibration sees.
    pub imatrix: Option<PathBuf>,
    /// Embedding and head of models in GGUF blocks.
    pub rest: Rest,
    /// Methods; `None` leaves the compressed model as it is.
    pub methods: Vec<Option<Method>>,
    /// Ranks.
    pub ranks: Vec<usize>,
    /// Whether and how the bytes of a rank are spread over linears by what they gain.
    pub allocate: Option<Spread>,
    /// Everything of the repair but method and rank.
    pub repair: Repair,
    /// Whether each block is compressed behind the repaired ones.
    pub one_pass: bool,
    /// Whether to measure what the bytes of the factors buy otherwise.
    pub controls: bool,
    /// Folder for what is written.
    pub save: Option<PathBuf>,
    /// What is written; by default what the methods make.
    pub outputs: Option<Vec<Output>>,
    /// How checkpoints are written.
    pub write: WriteOptions,
    /// Folder for the state of each block.
    pub resume: Option<PathBuf>,
    /// Whether to measure the hidden states.
    pub hidden_metrics: bool,
    /// How tokens count where the experts of a mixture are compressed, in place of its other linears.
    pub experts: Option<GramOptions>,
    /// Flags that were given and that some compressors or methods alone read.
    pub asked: Vec<&'static str>,
}

/// How embedding and output head of a model in GGUF blocks are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Rest {
    /// As llama.cpp's quantiser: the head Q6_K, or Q8_0 where rows are no multiple of 256; an embedding beside it as most linears
    #[default]
    LlamaCpp,
    /// As the model has them
    Stored,
}

/// Name of the method that leaves the compressed model as it is.
pub const NONE: &str = "none";

/// What a method is called; `None` leaves the compressed model as it is.
pub(crate) fn method_name(method: Option<Method>) -> &'static str {
    method.map_or(NONE, Method::name)
}

impl Config {
    /// No compressors, methods and ranks, all else by default.
    pub fn new(perplexity: perplexity::Config, calib: PathBuf) -> Self {
        Self {
            perplexity,
            calib,
            calib_samples: 128,
            held_out_samples: 32,
            compressors: Vec::new(),
            compressed: None,
            imatrix: None,
            rest: Rest::default(),
            methods: Vec::new(),
            ranks: Vec::new(),
            allocate: None,
            repair: Repair::default(),
            one_pass: false,
            controls: true,
            save: None,
            outputs: None,
            write: WriteOptions::default(),
            resume: None,
            hidden_metrics: false,
            experts: None,
            asked: Vec::new(),
        }
    }

    /// About how long the run takes with so many tokens to calibrate on and to hold out, and to evaluate on.
    pub(crate) fn seconds(&self, probe: &Probe, texts: usize, evaluation: usize) -> f64 {
        let starts = self.compressors.len().max(1) as f64;
        let repairs = self.methods.iter().flatten().count() * self.ranks.len();
        // Each rank of a compressor has a control, which the methods share.
        let controls = match self.controls && repairs > 0 {
            true => self.ranks.len(),
            false => 0,
        };
        // The dense and the repaired model side by side; sums and factorisations for compressing and for repairing.
        let walk = 2.0 * probe.pass(texts) + probe.grams(texts, true) + probe.solves();
        let cell = walk + probe.copy() + probe.pass(evaluation);
        let spread = if self.allocate.is_some() { walk } else { 0.0 };
        let cells = (1 + repairs + controls) as f64 * cell + repairs as f64 * spread;
        probe.pass(evaluation) + starts * cells
    }

    /// The models it reads, which may be names on a hub.
    pub(crate) fn models(&mut self) -> Vec<&mut PathBuf> {
        std::iter::once(&mut self.perplexity.model)
            .chain(&mut self.compressed)
            .collect()
    }
}
