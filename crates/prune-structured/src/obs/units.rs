//! How columns form units, and which units are removed together.

use crate::ranking::Ranking;
use crate::stats::Part;

/// Units of equally many consecutive columns, which are removed in steps.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Units {
    /// Columns of one unit.
    pub columns: usize,
    /// Units in the sublayer.
    pub count: usize,
    /// Consecutive runs of units of which each step takes equally many: the key/value heads when
    /// query heads are the units, else 1.
    pub pools: usize,
    /// Units in each step, the one that is removed last in front.
    pub(crate) steps: Vec<usize>,
    /// Units in the first k steps, for k = 0 ..= steps.
    kept: Vec<usize>,
}

impl Units {
    /// `count` units of `columns` columns in `pools` pools, removed in `steps`.
    pub fn new(columns: usize, count: usize, pools: usize, steps: Vec<usize>) -> Self {
        let mut kept = Vec::with_capacity(steps.len() + 1);
        kept.push(0);
        kept.extend(steps.iter().scan(0, |sum, step| {
            *sum += step;
            Some(*sum)
        }));
        Self {
            columns,
            count,
            pools,
            steps,
            kept,
        }
    }

    /// `count` units of `columns` columns, each a step of its own.
    pub fn single(count: usize, columns: usize) -> Self {
        Self::new(columns, count, 1, vec![1; count])
    }

    /// Units and steps of a ranking over `columns` columns.
    pub fn of(ranking: &Ranking, columns: usize) -> Self {
        let count = ranking.order().len();
        let steps: Vec<usize> = ranking.steps().iter().map(|step| step.units).collect();
        let pools = match ranking.part {
            // Attention is removed in steps of one unit, or of one from each group.
            Part::Attention => steps[0],
            Part::Mlp => 1,
        };
        Self::new(columns / count, count, pools, steps)
    }

    /// Units in the first `steps` steps.
    pub fn kept(&self, steps: usize) -> usize {
        self.kept[steps]
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
