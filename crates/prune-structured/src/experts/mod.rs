//! Dropping experts of mixtures.
//!
//! A mixture's router chooses a few experts for each token. Dropping one removes its tensors and its row of the router;
//! the next best expert takes its place for the tokens that chose it. Memory falls, work per token does not.
//!
//! ```text
//! plan     one pass of windows, a layer at a time: which experts stay, merged or scaled where the method says so
//! narrow   a pass behind the dropped experts: which neurons stay of those that are left
//! joint    both under one budget
//! fewer    the same experts, fewer of them for each token
//! write    a checkpoint that stock runtimes open where all layers keep as many experts of one width
//! ```
//!
//! One expert's weights are in memory at a time, and what all tokens of the windows are at one layer.
//!
//! A method is a file of `method` and a line of [`ExpertMethod`]; a compensation a file of `compensation` and a line of
//! [`ExpertCompensation`].

mod cluster;
mod collect;
pub mod compensation;
mod divergence;
mod fewer;
mod joint;
mod layer;
mod map;
mod merge;
pub mod method;
mod neurons;
mod options;
mod output;
mod plan;
mod recipe;
mod refits;
mod regression;
mod routing;
mod select;
mod statistics;
#[cfg(test)]
mod tests;

pub use compensation::ExpertCompensation;
pub use fewer::{FewerExperts, FittedTerm, fewer, fewer_with_terms};
pub use joint::{Joint, JointData, JointOptions, Pair, joint};
pub use map::router_map;
pub use method::ExpertMethod;
pub use neurons::{ExpertNeurons, NeuronOptions, narrow};
pub use options::{ExpertOptions, Keep};
pub use output::{ExpertCost, ExpertSettings, write};
pub use plan::{ExpertPlan, LayerExperts, Member};
pub use recipe::{Aim, Change, ExpertRecipe};
pub use refits::ExpertRefits;
pub use select::{LayerError, LayerOutcome, Outcome, plan, plan_by_layer};
pub use statistics::{ExpertStatistics, LayerStatistics};
