//! What can go wrong when a model is pruned.

use causal_lm::Cancelled;
use std::path::PathBuf;

/// An error of this crate; every case names what was wrong and where.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model could not be read or run.
    #[error(transparent)]
    Model(#[from] causal_lm::Error),
    /// A checkpoint or statistics file could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] tensor_io::Error),
    /// A tensor operation failed.
    #[error("tensor operation failed")]
    Candle(#[from] candle_core::Error),
    /// Statistics that cannot be put together or taken apart.
    #[error("parts of a calibration: {0}")]
    Parts(String),
    /// A ratio outside `[0, 1)`.
    #[error("sparsity ratio {0} is outside [0, 1)")]
    Ratio(f64),
    /// The minimum widths do not leave enough to remove.
    #[error(
        "ratio {ratio} cannot be reached: minimum widths keep {kept} of {total} prunable parameters"
    )]
    Unreachable {
        /// The ratio asked for.
        ratio: f64,
        /// Parameters that the minimum widths keep.
        kept: u64,
        /// Parameters that could be removed without minimum widths.
        total: u64,
    },
    /// A minimum or alignment that no layer can satisfy.
    #[error("{option} {value} does not fit layer {layer}, which has {width}")]
    Width {
        /// The option's name.
        option: &'static str,
        /// Its value.
        value: usize,
        /// The layer.
        layer: usize,
        /// The layer's width.
        width: usize,
    },
    /// Heads that cannot be removed one by one.
    #[error(
        "{model_type} normalises the queries and keys of all heads together, so that removing some would change the others; prune its MLPs alone"
    )]
    Attention {
        /// The architecture.
        model_type: &'static str,
    },
    /// A layer that keeps fewer experts than each token is sent to.
    #[error(
        "layer {layer}: {kept} experts stay, but each token goes to {chosen}; keep at least as many"
    )]
    Experts {
        /// The layer.
        layer: usize,
        /// Experts that stay.
        kept: usize,
        /// Experts that are chosen for a token.
        chosen: usize,
    },
    /// A method that is not implemented for this architecture.
    #[error("{method} cannot prune {model_type}: {reason}")]
    Unsupported {
        /// The method.
        method: &'static str,
        /// The architecture.
        model_type: &'static str,
        /// What is in the way.
        reason: &'static str,
    },
    /// An option out of range.
    #[error("{option} is {value}, but {expected}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// Its value.
        value: f64,
        /// What is expected.
        expected: &'static str,
    },
    /// No widths that are equal in all layers come near the ratio.
    #[error(
        "equal widths cannot reach ratio {ratio}: the nearest, {heads} query heads and {neurons} neurons in every layer, remove {reached:.4}; align less or allow narrower layers"
    )]
    Uniform {
        /// The ratio asked for.
        ratio: f64,
        /// The ratio that comes nearest.
        reached: f64,
        /// Query heads of the nearest.
        heads: usize,
        /// Neurons of the nearest.
        neurons: usize,
    },
    /// The layers of the dense model differ in width, so that they cannot be made equal.
    #[error("layer {layer} is not as wide as layer 0, so widths cannot be made equal")]
    NotUniform {
        /// The first layer that differs.
        layer: usize,
    },
    /// A model that an export's format cannot represent.
    #[error("{format} cannot hold {what}: {reason}")]
    Export {
        /// The format.
        format: &'static str,
        /// What does not fit.
        what: String,
        /// Why.
        reason: String,
    },
    /// An export that could not be written, or a tokenizer file that it needs and cannot use.
    #[error("{path}: {reason}", path = path.display())]
    ExportFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Weights that cannot be rounded to blocks.
    #[error(transparent)]
    Packed(#[from] packed::Error),
    /// Statistics that the calibration did not collect.
    #[error("layer {layer}: {what} was not collected in calibration; {need}")]
    Missing {
        /// The layer.
        layer: usize,
        /// What is missing.
        what: &'static str,
        /// How to get it.
        need: &'static str,
    },
    /// The plan was made for another model.
    #[error("the plan does not fit this model: {0}")]
    PlanMismatch(String),
    /// A plan file that cannot be read or written.
    #[error("{path}: {reason}", path = path.display())]
    PlanFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A search option out of range.
    #[error("search option {option} is {value}; expected {expected}")]
    Search {
        /// The option's name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is expected.
        expected: &'static str,
    },
    /// A file of statistics or of a search that cannot be read or written, is damaged, or belongs to another search.
    #[error("{path}: {reason}", path = path.display())]
    StateFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What an implementation of [`Sites`](crate::divergence::Sites) reports.
    #[error(transparent)]
    Site(Box<dyn std::error::Error + Send + Sync>),
    /// The call was cancelled by its progress. A search continues from its folder.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// The normal equations of a least-squares refit are singular.
    #[error(
        "layer {layer}: the least-squares refit is singular; use a larger ridge or more calibration windows"
    )]
    Singular {
        /// The layer.
        layer: usize,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
