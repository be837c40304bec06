//! One linear without a model: from W, W_c and inputs X to B A.
//!
//! [`InputCollector`] sums up inputs batch by batch; [`Method::solve`] or [`Method::solve_tensors`] finds the correction
//! that is best for them, as a [`Solution`]. The parts are there too: [`solve`] takes D = W − W_c and H in any form of
//! [`Weighting`], [`alternate`] compresses and corrects in turns.

pub use crate::solve::{
    Alternated, Criterion, LowRank, Method, Options, Route, Solution, Spectrum, Split, Weighting,
    Whitening, alternate, solve,
};
pub use crate::stats::{
    Accumulation, Collect, Diagonal, FactorCollector, Gram, GramCollector, Importance,
    InputCollector, InputStats, OutputCollector, Pick, Rows, Sampler,
};
