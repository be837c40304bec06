//! What makes up for dropped experts.

mod expert_scale;
mod none;

use super::layer::Layer;
use super::method::Choice;
use crate::Result;
use crate::methods::methods;

pub use expert_scale::ExpertScale;
pub(crate) use expert_scale::{Moments, merged_are_not_run};
pub use none::NoExpertCompensation;

methods! {
    /// What makes up for dropped experts.
    pub enum ExpertCompensation: Compensate {
        /// Nothing.
        "none" => Nothing(NoExpertCompensation),
        /// One factor on the output of each expert that stays, by least squares.
        "expert-scale" => ExpertScale(ExpertScale),
    }
}

/// What a compensation has to say.
pub(crate) trait Compensate {
    /// For each expert that stays the factors on its output: none, one, or one for each channel.
    fn factors(&self, layer: &Layer<'_>, choice: &Choice) -> Result<Vec<Vec<f64>>>;
}
