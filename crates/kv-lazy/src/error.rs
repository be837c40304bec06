//! The one error type of the crate: every case says what was wrong and what was expected.

use candle_core::{DType, Device};

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in building or running a cache, or in reading a trace.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The budget cannot hold what must never be evicted plus one token to choose.
    #[error(
        "a budget of {budget} is too small: sinks {sinks}, recent tokens {recent} and one more need {}",
        sinks.saturating_add(*recent).saturating_add(1)
    )]
    BudgetTooSmall {
        /// Tokens allowed.
        budget: usize,
        /// Sink tokens protected.
        sinks: usize,
        /// Recent tokens protected.
        recent: usize,
    },
    /// An eviction or observation window of zero steps.
    #[error("`{name}` is a window and must be at least 1")]
    ZeroWindow {
        /// Which setting.
        name: &'static str,
    },
    /// A setting outside its range.
    #[error("`{name}` is {value}: expected {expected}")]
    Setting {
        /// Which setting.
        name: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// No policy has this name.
    #[error("unknown policy `{name}`: expected one of {known}")]
    UnknownPolicy {
        /// What was given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The policy needs something that this path cannot give it.
    #[error("policy `{policy}` needs {need}, which {path} does not provide")]
    NeedUnavailable {
        /// The policy's name.
        policy: String,
        /// What it needs.
        need: &'static str,
        /// Where it was to run.
        path: &'static str,
    },
    /// A tensor or slice of the wrong shape.
    #[error("{what}: shape {got:?}, expected {expected}")]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What was expected.
        expected: String,
    },
    /// Query heads do not divide into groups over the KV heads.
    #[error("layer {layer}: {query_heads} query heads do not divide over {kv_heads} KV heads")]
    HeadGroups {
        /// Layer index.
        layer: usize,
        /// Query heads.
        query_heads: usize,
        /// KV heads.
        kv_heads: usize,
    },
    /// A layer index that the cache was not built for, or a layer without attention.
    #[error("layer {layer} has no cache: the cache was built for {layers} layers{}", if *.without_heads { " and this one has no KV heads" } else { "" })]
    Layer {
        /// Layer asked for.
        layer: usize,
        /// Layers there are.
        layers: usize,
        /// Whether the layer exists without heads.
        without_heads: bool,
    },
    /// A layer attended twice in one step, or outside a step, or missed in the step before.
    #[error("layer {layer}: {what}; call begin(tokens) once per step, then attend once per layer")]
    Step {
        /// Layer index.
        layer: usize,
        /// What was found.
        what: &'static str,
    },
    /// A state that a layer does not have, or has in another size.
    #[error("layer {layer}: {problem}")]
    State {
        /// Layer index.
        layer: usize,
        /// What is wrong.
        problem: String,
    },
    /// A sequence continues a cache that already holds another one.
    #[error("cache already holds {held} positions: reset() it before a new sequence")]
    NotReset {
        /// Positions already taken.
        held: usize,
    },
    /// An unsupported element type.
    #[error("dtype {got:?} cannot be cached: expected f32, f16 or bf16")]
    DType {
        /// What was given.
        got: DType,
    },
    /// A tensor on another device than the cache.
    #[error("{what} is on {got:?}, the cache on {expected:?}")]
    Device {
        /// Which tensor.
        what: &'static str,
        /// Its device.
        got: candle_core::DeviceLocation,
        /// The cache's device.
        expected: candle_core::DeviceLocation,
    },
    /// A NaN or infinity in the attention weights.
    #[error("non-finite attention weights in layer {layer}, sequence {sequence}, KV head {head}")]
    NonFinite {
        /// Layer index.
        layer: usize,
        /// Sequence in the batch.
        sequence: usize,
        /// KV head.
        head: usize,
    },
    /// Numbers that cannot be quantised.
    #[error(
        "the {what} of layer {layer}, sequence {sequence}, KV head {head} cannot be quantised: not finite, or too large for f16"
    )]
    Quantise {
        /// Layer index.
        layer: usize,
        /// Sequence in the batch.
        sequence: usize,
        /// KV head.
        head: usize,
        /// Keys or values.
        what: &'static str,
    },
    /// A plan that does not fit the cache it is applied to.
    #[error("eviction plan for {what}: {problem}")]
    Plan {
        /// Which rows.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A snapshot of a cache with another configuration.
    #[error("snapshot does not belong to this cache: {problem}")]
    Snapshot {
        /// What differs.
        problem: &'static str,
    },
    /// A trace file that is not what it should be.
    #[cfg(feature = "trace")]
    #[error("trace {path}: {problem}")]
    Trace {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Reading a file failed.
    #[cfg(feature = "trace")]
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
    /// Writing a file failed.
    #[cfg(feature = "trace")]
    #[error(transparent)]
    Write(Box<tensor_io::Error>),
    /// A long call was cancelled by its progress.
    #[cfg(feature = "trace")]
    #[error(transparent)]
    Cancelled(#[from] tensor_io::Cancelled),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

#[cfg(feature = "trace")]
impl From<tensor_io::Error> for Error {
    fn from(error: tensor_io::Error) -> Self {
        Error::Write(Box::new(error))
    }
}

impl From<Error> for candle_core::Error {
    /// Lets a model's `forward` use `?` on this crate's results.
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}

impl Error {
    /// Checks that `device` is where the cache lives.
    pub(crate) fn check_device(what: &'static str, got: &Device, expected: &Device) -> Result<()> {
        if got.same_device(expected) {
            return Ok(());
        }
        Err(Error::Device {
            what,
            got: got.location(),
            expected: expected.location(),
        })
    }
}
