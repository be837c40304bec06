//! No compensation.

use super::Compensate;
use crate::Result;
use crate::experts::layer::Layer;
use crate::experts::method::Choice;
use serde::{Deserialize, Serialize};

/// Experts that stay are as they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoExpertCompensation;

impl Compensate for NoExpertCompensation {
    fn factors(&self, _layer: &Layer<'_>, choice: &Choice) -> Result<Vec<Vec<f64>>> {
        Ok(vec![vec![]; choice.kept.len()])
    }
}
