//! What can go wrong when a budget is divided.

use causal_lm::Cancelled;
use std::path::PathBuf;

/// An error of this crate; every case names what was wrong and where.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model could not be read or run.
    #[error(transparent)]
    Model(Box<causal_lm::Error>),
    /// Pruning or comparing failed.
    #[error(transparent)]
    Prune(Box<prune_structured::Error>),
    /// Quantising, correcting or writing failed.
    #[error(transparent)]
    Repair(Box<lowrank_eora::Error>),
    /// A cache cannot be built or used.
    #[error(transparent)]
    Cache(Box<kv_lazy::Error>),
    /// A file could not be read or written.
    #[error(transparent)]
    File(Box<tensor_io::Error>),
    /// A tensor operation failed.
    #[error("tensor operation failed")]
    Candle(#[from] candle_core::Error),
    /// A budget that not even the cheapest plan fits.
    #[error(
        "{budget} bytes are too few: the smallest plan that this target can store takes {smallest}"
    )]
    Budget {
        /// The budget asked for.
        budget: u64,
        /// The smallest that can be met.
        smallest: u64,
    },
    /// A speed that no plan within the budget reaches.
    #[error(
        "{wanted} tokens per second are too many: the fastest plan within the budget decodes {fastest:.1} by the measured table"
    )]
    Speed {
        /// Tokens per second asked for.
        wanted: f64,
        /// Those of the fastest plan.
        fastest: f64,
    },
    /// A number of parameters that no plan is within.
    #[error("{wanted} parameters are too few: the smallest plan has {fewest}")]
    Parameters {
        /// Parameters asked for.
        wanted: u64,
        /// Those of the smallest plan.
        fewest: u64,
    },
    /// An option out of range.
    #[error("{option} is {value}, but {expected}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is expected.
        expected: &'static str,
    },
    /// A format that a target cannot store.
    #[error("{target} cannot store {format}: {reason}")]
    Format {
        /// The target.
        target: &'static str,
        /// The format.
        format: String,
        /// Why.
        reason: &'static str,
    },
    /// Experts that a target cannot store.
    #[error("{target} cannot store the experts of {model_type}: {reason}")]
    Experts {
        /// The target.
        target: &'static str,
        /// The architecture.
        model_type: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// A name that is none of the known ones.
    #[error("no {what} is called `{name}`; expected {expected}")]
    Name {
        /// What was to be named.
        what: &'static str,
        /// The name.
        name: String,
        /// The names that there are.
        expected: &'static str,
    },
    /// Files that are larger than their plan said.
    #[error("{path}: {written} bytes were written for a plan of {planned}", path = path.display())]
    Larger {
        /// The folder.
        path: PathBuf,
        /// Bytes of the files.
        written: u64,
        /// Bytes of the plan.
        planned: u64,
    },
    /// A plan of another model, or with a treatment that was not considered.
    #[error("the plan does not fit: {0}")]
    PlanMismatch(String),
    /// The call was cancelled by its progress. It continues from its folder.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for prune_structured::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Prune(error) => *error,
            Error::Cancelled(cancelled) => cancelled.into(),
            error => Self::Site(Box::new(error)),
        }
    }
}

impl From<causal_lm::Error> for Error {
    fn from(error: causal_lm::Error) -> Self {
        Self::Model(Box::new(error))
    }
}

impl From<prune_structured::Error> for Error {
    fn from(error: prune_structured::Error) -> Self {
        Self::Prune(Box::new(error))
    }
}

impl From<lowrank_eora::Error> for Error {
    fn from(error: lowrank_eora::Error) -> Self {
        Self::Repair(Box::new(error))
    }
}

impl From<kv_lazy::Error> for Error {
    fn from(error: kv_lazy::Error) -> Self {
        Self::Cache(Box::new(error))
    }
}

impl From<tensor_io::Error> for Error {
    fn from(error: tensor_io::Error) -> Self {
        Self::File(Box::new(error))
    }
}
