//! The allocation of a searched plan, which no ranking gives: see [`crate::tyr`].

use super::{Allocate, Budget};
use crate::ranking::Ranking;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// What a search over whole models has found; [`crate::tyr::search`] makes the plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Searched;

impl Allocate for Searched {
    fn keep(&self, _rankings: &[Ranking], _budget: Budget) -> Result<Vec<usize>> {
        Err(Error::Missing {
            layer: 0,
            what: "the result of a search",
            need: "tyr::search makes the plan",
        })
    }
}
