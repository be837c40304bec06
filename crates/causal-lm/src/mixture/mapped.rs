//! Router rows that share experts or stand for constants, as a block runs them.

use crate::config::ExpertMap;
use crate::{Error, Result};
use candle_core::Tensor;

/// What the rows of a router stand for, where they are not the experts one by one.
#[derive(Clone, Debug)]
pub struct MappedRows {
    /// The expert or constant of each row.
    pub map: ExpertMap,
    /// The constants, `[constants, hidden]`; none where every row is an expert.
    pub novices: Option<Tensor>,
}

impl MappedRows {
    /// The constants, where there are some.
    pub(crate) fn constants(&self) -> Result<Option<&Tensor>> {
        match (self.map.constants(), &self.novices) {
            (0, _) => Ok(None),
            (_, Some(novices)) => Ok(Some(novices)),
            (constants, None) => Err(Error::Routing {
                chosen: self.map.experts() + constants,
                experts: self.map.experts(),
            }),
        }
    }
}
