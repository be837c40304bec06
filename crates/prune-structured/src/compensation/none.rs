//! No compensation.

use super::{Change, Compensate, Pruned};
use crate::{Calibration, Result};
use serde::{Deserialize, Serialize};

/// Kept columns stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoCompensation;

impl Compensate for NoCompensation {
    fn change(&self, _pruned: &Pruned<'_>, _calibration: Option<&Calibration>) -> Result<Change> {
        Ok(Change::Nothing)
    }
}
