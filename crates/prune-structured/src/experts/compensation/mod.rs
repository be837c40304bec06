//! What makes up for dropped experts.

mod expert_scale;
mod none;
mod novice;

use super::layer::Layer;
use super::method::Choice;
use crate::Result;
use crate::methods::methods;

pub use expert_scale::ExpertScale;
pub(crate) use expert_scale::Moments;
pub use none::NoExpertCompensation;
pub use novice::Novice;

methods! {
    /// What makes up for dropped experts.
    pub enum ExpertCompensation: Compensate {
        /// Nothing.
        "none" => Nothing(NoExpertCompensation),
        /// One factor on the output of each expert that stays, by least squares.
        "expert-scale" => ExpertScale(ExpertScale),
        /// A constant in the place of each expert that goes, whose router row stays (MoNE, arXiv 2507.00390).
        "novice" => Novice(Novice),
    }
}

/// What a compensation has to say.
pub(crate) trait Compensate {
    /// For each expert that stays the factors on its output: none, one, or one for each channel.
    fn factors(&self, layer: &Layer<'_>, choice: &Choice) -> Result<Vec<Vec<f64>>>;

    /// Whether experts that go become constants, so that all router rows stay.
    fn keeps_rows(&self) -> bool {
        false
    }

    /// The constants of experts that go, in ascending order, where they become some: a number for each channel.
    fn novices(&self, _layer: &Layer<'_>, _choice: &Choice) -> Result<Vec<Vec<f32>>> {
        Ok(vec![])
    }
}
