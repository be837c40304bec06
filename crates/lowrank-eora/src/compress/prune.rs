//! Which weights are set to zero: scores, patterns of zeros, and the masks that come of them.

use rayon::prelude::*;

use super::rows::Rows;

/// Pruning: how dispensable each weight is, and where zeros may lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prune {
    /// How dispensable a weight is.
    pub score: Score,
    /// Where zeros lie.
    pub pattern: Pattern,
}

/// How dispensable a weight is; the lowest scores are pruned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Score {
    /// |W_ij|, compared over the whole matrix.
    Magnitude,
    /// |W_ij| √H_jj, compared within each output (Wanda, arXiv 2306.11695).
    Wanda,
    /// W_ij² / U_jj² with U the upper Cholesky factor of H⁻¹, the remaining columns taking over the error
    /// (SparseGPT, arXiv 2301.00774). Compared within each block of columns.
    SparseGpt,
}

/// Where zeros lie.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Pattern {
    /// Anywhere.
    Unstructured {
        /// Share of the weights that is pruned, in percent.
        percent: f64,
        /// How many that is exactly.
        cut: Cut,
    },
    /// `keep` weights stay of every `of` neighbouring inputs of an output.
    Nm {
        /// N: weights that stay.
        keep: usize,
        /// M: neighbours.
        of: usize,
    },
}

/// How many weights a percentage prunes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// ⌊count · percent / 100⌋, the first of equal scores before later ones.
    Count,
    /// All scores up to the one at that position, counted from 0, in their ascending order: one more, and all equal to it.
    /// The reference codes of Wanda (for magnitude) and SparseGPT do this. Wanda itself always counts.
    Threshold,
}

/// Which weights of a matrix are pruned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    rows: usize,
    cols: usize,
    pruned: Vec<bool>,
}

impl Mask {
    /// A mask that prunes nothing.
    pub(crate) fn none(rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            pruned: vec![false; rows * cols],
        }
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Whether each weight is pruned, row-major.
    pub fn pruned(&self) -> &[bool] {
        &self.pruned
    }

    /// How many weights are pruned.
    pub fn count(&self) -> usize {
        self.pruned.iter().filter(|&&pruned| pruned).count()
    }

    pub(crate) fn pruned_mut(&mut self) -> &mut [bool] {
        &mut self.pruned
    }
}

/// ⌊count · percent / 100⌋.
pub(crate) fn share(count: usize, percent: f64) -> usize {
    ((count as f64 * percent / 100.0) as usize).min(count)
}

/// Prunes by magnitude.
pub(crate) fn by_magnitude(rows: &mut Rows, pattern: Pattern, mask: &mut Mask) {
    match pattern {
        Pattern::Nm { .. } => by_wanda(rows, &vec![1.0; rows.cols()], pattern, mask),
        Pattern::Unstructured { percent, cut } => {
            let scores: Vec<f64> = rows.data().par_iter().map(|w| w.abs()).collect();
            let count = share(scores.len(), percent);
            cut.mark(&scores, count, &mut mask.pruned);
            zero(rows.data_mut(), &mask.pruned);
        }
    }
}

/// Prunes by |W_ij| √c_j with c_j the sum of squares of input j.
pub(crate) fn by_wanda(rows: &mut Rows, squares: &[f64], pattern: Pattern, mask: &mut Mask) {
    let n = rows.cols();
    if n == 0 {
        return;
    }
    let norms: Vec<f64> = squares.iter().map(|c| c.sqrt()).collect();
    (
        rows.data_mut().par_chunks_mut(n),
        mask.pruned.par_chunks_mut(n),
    )
        .into_par_iter()
        .for_each_init(Vec::new, |scores, (row, pruned)| {
            scores.clear();
            scores.extend(row.iter().zip(&norms).map(|(w, norm)| w.abs() * norm));
            match pattern {
                Pattern::Unstructured { percent, .. } => {
                    Cut::Count.mark(scores, share(n, percent), pruned);
                }
                Pattern::Nm { keep, of } => {
                    for (scores, pruned) in scores.chunks(of).zip(pruned.chunks_mut(of)) {
                        mark_few(scores, of - keep, pruned);
                    }
                }
            }
            zero(row, pruned);
        });
}

fn zero(weights: &mut [f64], pruned: &[bool]) {
    for (weight, &pruned) in weights.iter_mut().zip(pruned) {
        if pruned {
            *weight = 0.0;
        }
    }
}

impl Cut {
    /// Marks the lowest scores; `count` as the variants define it.
    pub(crate) fn mark(self, scores: &[f64], count: usize, pruned: &mut [bool]) {
        if count == 0 {
            return;
        }
        let mut sorted = scores.to_vec();
        match self {
            Self::Count => {
                let (_, &mut threshold, _) =
                    sorted.select_nth_unstable_by(count - 1, f64::total_cmp);
                let below = scores.iter().filter(|&&score| score < threshold).count();
                let mut equal = count - below;
                for (&score, pruned) in scores.iter().zip(pruned) {
                    let tie = score == threshold && equal > 0;
                    equal -= usize::from(tie);
                    *pruned = tie || score < threshold;
                }
            }
            Self::Threshold => {
                let at = count.min(scores.len() - 1);
                let (_, &mut threshold, _) = sorted.select_nth_unstable_by(at, f64::total_cmp);
                for (&score, pruned) in scores.iter().zip(pruned) {
                    *pruned = score <= threshold;
                }
            }
        }
    }
}

/// Marks the `count` lowest of a few scores, the first of equal ones before later ones.
pub(crate) fn mark_few(scores: &[f64], count: usize, pruned: &mut [bool]) {
    for (i, (score, pruned)) in scores.iter().zip(pruned).enumerate() {
        let lower = scores
            .iter()
            .enumerate()
            .filter(|&(j, other)| other < score || (other == score && j < i));
        *pruned = lower.count() < count;
    }
}
