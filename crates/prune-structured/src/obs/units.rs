//! How columns fall into units, and how units go together.

use crate::ranking::Ranking;
use crate::stats::Part;

/// Units of equally many consecutive columns, which go in steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Units {
    /// Columns of one unit.
    pub columns: usize,
    /// Units in the sublayer.
    pub count: usize,
    /// Consecutive runs of units of which each step takes equally many: the key/value heads when
    /// query heads are the units, else 1.
    pub pools: usize,
    /// Units in each step, the one that goes last in front.
    pub steps: Vec<usize>,
}

impl Units {
    /// `count` units of `columns` columns, each a step of its own.
    pub fn single(count: usize, columns: usize) -> Self {
        Self {
            columns,
            count,
            pools: 1,
            steps: vec![1; count],
        }
    }

    /// Units and steps of a ranking over `columns` columns.
    pub fn of(ranking: &Ranking, columns: usize) -> Self {
        let count = ranking.order.len();
        Self {
            columns: columns / count,
            count,
            pools: match ranking.part {
                // Attention goes in steps of one unit, or of one from each group.
                Part::Attention => ranking.steps[0].units,
                Part::Mlp => 1,
            },
            steps: ranking.steps.iter().map(|step| step.units).collect(),
        }
    }

    /// Units in the first `steps` steps.
    pub fn kept(&self, steps: usize) -> usize {
        self.steps[..steps].iter().sum()
    }

    /// The pool of a unit.
    pub(crate) fn pool(&self, unit: usize) -> usize {
        unit / (self.count / self.pools)
    }

    /// Columns of the ascending `units`.
    pub fn columns_of(&self, units: &[usize]) -> Vec<usize> {
        units
            .iter()
            .flat_map(|unit| unit * self.columns..(unit + 1) * self.columns)
            .collect()
    }
}
