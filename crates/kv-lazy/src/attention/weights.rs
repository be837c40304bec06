//! Attention weights that a call hands out beside its output: one number per cached token.

use serde::{Deserialize, Serialize};

/// How the weights of the query heads that share a KV head become one weight per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reduce {
    /// The largest: some head of the group needs the token.
    #[default]
    Max,
    /// The mean over the group.
    Mean,
    /// The sum over the group.
    Sum,
}

impl Reduce {
    /// Takes one of `group` heads' weights into `reduced`, which starts at 0.
    #[cfg(feature = "trace")]
    pub(crate) fn accumulate(self, reduced: &mut [f32], weights: &[f32], group: usize) {
        let pairs = reduced.iter_mut().zip(weights);
        match self {
            Reduce::Max => pairs.for_each(|(r, w)| *r = r.max(*w)),
            Reduce::Sum => pairs.for_each(|(r, w)| *r += w),
            Reduce::Mean => {
                let share = 1.0 / group as f32;
                pairs.for_each(|(r, w)| *r += w * share);
            }
        }
    }
}

/// Which weights: of a single query, or of all queries of the step together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightKind {
    /// The weights of one query, reduced over the group. A prompt step gives those of its last query; a decode step of up to 16 tokens
    /// gives those of each query in turn, a longer one those of its last.
    Last(Reduce),
    /// The weights summed over all queries of the step and over the group.
    Columns,
}

/// A set of [`WeightKind`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WeightKinds(u8);

impl WeightKinds {
    /// The empty set.
    pub const NONE: Self = Self(0);
    /// Column sums alone.
    pub const COLUMNS: Self = Self(8);

    const LAST: [Reduce; 3] = [Reduce::Max, Reduce::Mean, Reduce::Sum];

    /// The weights of single queries, reduced by `reduce`, alone.
    pub const fn last(reduce: Reduce) -> Self {
        Self(1 << reduce as u8)
    }

    /// What is in either set.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether nothing is wanted.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether column sums are wanted.
    pub const fn columns(self) -> bool {
        self.0 & Self::COLUMNS.0 != 0
    }

    /// Whether weights of single queries are wanted.
    pub(crate) const fn single(self) -> bool {
        self.0 & !Self::COLUMNS.0 != 0
    }

    /// Whether `kind` is in the set.
    pub const fn contains(self, kind: WeightKind) -> bool {
        match kind {
            WeightKind::Last(reduce) => self.0 & Self::last(reduce).0 != 0,
            WeightKind::Columns => self.columns(),
        }
    }

    /// What is in the set.
    pub fn iter(self) -> impl Iterator<Item = WeightKind> {
        let columns = self.columns().then_some(WeightKind::Columns);
        self.reductions().map(WeightKind::Last).chain(columns)
    }

    /// The reductions of single queries in the set.
    pub(crate) fn reductions(self) -> impl Iterator<Item = Reduce> + Clone {
        Self::LAST
            .into_iter()
            .filter(move |&reduce| self.contains(WeightKind::Last(reduce)))
    }
}

/// Where a call puts its weights.
///
/// A row's weights are contiguous: for each exported query one block of n weights per reduction, then one block of column sums. Rows may
/// hold different numbers of tokens.
#[derive(Debug, Clone, Default)]
pub(crate) struct Exported {
    kinds: WeightKinds,
    queries: usize,
    weights: Vec<f32>,
    offsets: Vec<usize>,
}

impl Exported {
    /// Room for `kinds` of rows of these lengths, all zero; single queries are the last `queries` of the step.
    pub(crate) fn prepare(
        &mut self,
        kinds: WeightKinds,
        queries: usize,
        lens: impl Iterator<Item = usize>,
    ) {
        (self.kinds, self.queries) = (kinds, queries);
        let blocks = self.blocks();
        self.offsets.clear();
        self.offsets.push(0);
        let mut end = 0;
        for len in lens {
            end += blocks * len;
            self.offsets.push(end);
        }
        self.weights.clear();
        self.weights.resize(end, 0.0);
    }

    /// Forgets everything and frees the memory.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn kinds(&self) -> WeightKinds {
        self.kinds
    }

    pub(crate) fn queries(&self) -> usize {
        self.queries
    }

    /// Blocks of a row.
    pub(crate) fn blocks(&self) -> usize {
        self.queries * self.kinds.reductions().count() + usize::from(self.kinds.columns())
    }

    /// Numbers held.
    pub(crate) fn len(&self) -> usize {
        self.weights.len()
    }

    /// Each row's blocks.
    pub(crate) fn rows_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let mut rest = self.weights.as_mut_slice();
        self.offsets.windows(2).map(move |pair| {
            let (row, after) = std::mem::take(&mut rest).split_at_mut(pair[1] - pair[0]);
            rest = after;
            row
        })
    }

    /// Each row's column sums.
    pub(crate) fn columns_mut(&mut self) -> Vec<&mut [f32]> {
        let blocks = self.blocks();
        self.rows_mut()
            .map(|row| {
                let from = row.len() - row.len() / blocks;
                &mut row[from..]
            })
            .collect()
    }

    /// What a row exported at place `block` of [`blocks`](Self::blocks): the index of the query among the exported ones (the last one for
    /// column sums), the kind, and the weights of the tokens that this query saw.
    pub(crate) fn block(&self, row: usize, block: usize) -> (usize, WeightKind, &[f32]) {
        let all = &self.weights[self.offsets[row]..self.offsets[row + 1]];
        let len = all.len() / self.blocks();
        let weights = &all[block * len..(block + 1) * len];
        let mut reductions = self.kinds.reductions();
        let per_query = reductions.clone().count();
        if block < self.queries * per_query
            && let Some(reduce) = reductions.nth(block % per_query)
        {
            let query = block / per_query;
            let seen = len - (self.queries - 1 - query);
            return (query, WeightKind::Last(reduce), &weights[..seen]);
        }
        let last = self.queries.saturating_sub(1);
        (last, WeightKind::Columns, weights)
    }

    /// All weights, `[row][block][n]`.
    #[cfg(feature = "trace")]
    pub(crate) fn into_weights(self) -> Vec<f32> {
        self.weights
    }

    /// The first row with a weight that is not finite.
    pub(crate) fn not_finite(&self) -> Option<usize> {
        let at = self.weights.iter().position(|w| !w.is_finite())?;
        Some(self.offsets.partition_point(|&offset| offset <= at) - 1)
    }

    /// All weights, to be written by the caller: `[row][block][n]`.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.weights
    }
}
