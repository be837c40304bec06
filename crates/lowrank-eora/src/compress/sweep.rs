//! The sweep over columns that SparseGPT and GPTQ share.
//!
//! Column after column is pruned, rounded or both; its error, divided by U_ii, is taken over by the columns after it along
//! row i of U (H⁻¹ = UᵀU). Within a block of columns that happens at once, for all columns after the block by one matrix
//! product when the block is done. Given U, outputs do not depend on each other, so strips of them run in parallel.
//! The sum of the squared errors is ‖(W − W_c) X‖² for the damped H.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use packed::{QuantRows, RowGrid};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::ops::Range;

use super::factor::Factor;
use super::grid::{Grid, Step};
use super::prune::{Mask, Pattern, mark_few, share};
use super::quantised::Quantised;
use super::rows::{Rows, STRIP};

/// Parameters of the sweep.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Sweep {
    /// Added to the diagonal of H, as a share of its mean.
    pub damping: f64,
    /// Columns of a block. Unstructured SparseGPT ranks weights within a block; else it only matters for speed, unless
    /// group parameters are [`GroupFit::Stale`].
    pub block: usize,
}

impl Sweep {
    /// Damping of the reference codes.
    pub const DAMPING: f64 = 0.01;
    /// Columns of a block in the reference codes.
    pub const BLOCK: usize = 128;
}

impl Default for Sweep {
    /// As in the reference codes.
    fn default() -> Self {
        Self {
            damping: Self::DAMPING,
            block: Self::BLOCK,
        }
    }
}

/// Order in which GPTQ quantises columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ColumnOrder {
    /// As they stand.
    Natural,
    /// Inputs with the largest sum of squares first (`desc_act`).
    Activation,
}

/// Which weights the scale and zero of a group are fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupFit {
    /// Those that have taken over all errors made before the group.
    Updated,
    /// Those as they stood at the beginning of the block in which the group begins. The reference code of GPTQ does this,
    /// which for groups smaller than a block leaves out the errors made within the block.
    Stale,
    /// The original weights of neighbouring columns, whatever the order of quantisation (`static_groups`).
    Static,
}

/// What a sweep met.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SweepReport {
    /// ‖(W − W_c) X‖² under the damped H, W without the columns of dead inputs.
    pub loss: f64,
    /// Damping used, as a share of the mean diagonal.
    pub damping: f64,
    /// How often damping had to grow tenfold because H was not positive definite.
    pub retries: usize,
    /// Inputs that are always zero. Their weights are set to zero.
    pub dead: usize,
}

/// What a sweep prunes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pruning {
    /// What the mask says already.
    Given,
    /// What SparseGPT's score says.
    Pattern(Pattern),
}

/// One sweep.
pub(crate) struct Task<'a> {
    pub(crate) factor: &'a Factor,
    pub(crate) sweep: Sweep,
    pub(crate) pruning: Pruning,
    pub(crate) rounding: Option<Target<'a>>,
}

/// What a sweep rounds to.
#[derive(Clone, Copy)]
pub(crate) enum Target<'a> {
    /// Codes in groups, whose scales are fitted in the sweep.
    Groups(Grid, GroupFit),
    /// Codes in blocks with the scales of these.
    Blocks(&'a QuantRows<'static>),
}

pub(crate) struct Outcome {
    pub(crate) report: SweepReport,
    pub(crate) quantised: Option<Quantised>,
    pub(crate) blocks: Option<QuantRows<'static>>,
}

/// Some outputs in mid-sweep, their columns in the order of the sweep.
struct Strip {
    rows: usize,
    weights: Vec<f64>,
    pruned: Vec<bool>,
    codes: Vec<u8>,
    /// `[rows, groups]`, once they are fitted.
    steps: Vec<Option<Step>>,
    /// One for each row, where blocks are the target.
    grids: Vec<RowGrid>,
    loss: f64,
}

impl Task<'_> {
    /// Replaces the weights, and marks in `mask` what was pruned.
    pub(crate) fn run(&self, rows: &mut Rows, mask: &mut Mask) -> Outcome {
        let n = rows.cols();
        let report = |loss| SweepReport {
            loss,
            damping: self.factor.damping,
            retries: self.factor.retries,
            dead: self.factor.dead.len(),
        };
        let mut strips: Vec<Strip> = (
            rows.data().par_chunks(STRIP * n.max(1)),
            mask.pruned().par_chunks(STRIP * n.max(1)),
        )
            .into_par_iter()
            .enumerate()
            .map(|(index, (weights, pruned))| self.strip(index * STRIP, weights, pruned))
            .collect();

        let mut start = 0;
        while start < n {
            let block = start..self.block_end(start);
            if let Pruning::Pattern(Pattern::Unstructured { percent, cut }) = self.pruning {
                let m = rows.rows();
                let scores: Vec<f64> = strips
                    .par_iter()
                    .flat_map_iter(|strip| self.scores(strip, &block))
                    .collect();
                let mut pruned = vec![false; scores.len()];
                // Taken from the running total, so that blocks do not each lose a fraction.
                let count = share(m * block.end, percent) - share(m * start, percent);
                cut.mark(&scores, count, &mut pruned);
                let parts = pruned.par_chunks(STRIP * block.len());
                strips.par_iter_mut().zip(parts).for_each(|(strip, part)| {
                    let lines = strip.pruned.chunks_mut(n).zip(part.chunks(block.len()));
                    for (line, part) in lines {
                        line[block.clone()].copy_from_slice(part);
                    }
                });
            }
            strips
                .par_iter_mut()
                .for_each(|strip| self.block(strip, block.clone()));
            start = block.end;
        }

        let order = &self.factor.order;
        let weights = rows.data_mut().par_chunks_mut(STRIP * n.max(1));
        let pruned = mask.pruned_mut().par_chunks_mut(STRIP * n.max(1));
        (weights, pruned, &strips)
            .into_par_iter()
            .for_each(|(weights, pruned, strip)| {
                scatter(&strip.weights, order, weights);
                scatter(&strip.pruned, order, pruned);
            });
        Outcome {
            report: report(strips.iter().map(|strip| strip.loss).sum()),
            quantised: match self.rounding {
                Some(Target::Groups(grid, fit)) => Some(self.quantised(&grid, fit, &strips)),
                _ => None,
            },
            blocks: match self.rounding {
                Some(Target::Blocks(blocks)) => Some(self.packed(blocks, &strips)),
                _ => None,
            },
        }
    }

    fn quantised(&self, grid: &Grid, fit: GroupFit, strips: &[Strip]) -> Quantised {
        let order = &self.factor.order;
        let n = order.len();
        let group_width = grid.group.width(n);
        let mut group_index = vec![0; n];
        for (i, &column) in order.iter().enumerate() {
            group_index[column] = (self.group_of(fit, group_width, i)) as u32;
        }
        let rows = strips.iter().map(|strip| strip.rows).sum();
        let mut codes = vec![0; rows * n];
        codes
            .par_chunks_mut(STRIP * n.max(1))
            .zip(strips)
            .for_each(|(codes, strip)| scatter(&strip.codes, order, codes));
        let steps = || {
            let steps = strips.iter().flat_map(|strip| &strip.steps);
            steps.map(|step| step.expect("the sweep has passed every group"))
        };
        Quantised {
            bits: grid.bits,
            rows,
            cols: n,
            group_width,
            codes,
            scales: steps().map(|step| step.scale).collect(),
            zeros: steps().map(|step| step.zero).collect(),
            offsets: grid.stored_offsets(steps().map(|step| step.offset).collect()),
            group_index,
        }
    }

    /// The codes of the sweep in the blocks whose scales it used.
    fn packed(&self, blocks: &QuantRows<'static>, strips: &[Strip]) -> QuantRows<'static> {
        let order = &self.factor.order;
        let (n, row_bytes) = (order.len(), blocks.row_bytes());
        let mut bytes = vec![0; blocks.bytes().len()];
        bytes
            .par_chunks_mut((STRIP * row_bytes).max(1))
            .zip(strips)
            .for_each(|(bytes, strip)| {
                let mut codes = vec![0; n];
                let rows = strip.codes.chunks(n).zip(&strip.grids);
                for (bytes, (ordered, grid)) in bytes.chunks_mut(row_bytes).zip(rows) {
                    scatter(ordered, order, &mut codes);
                    let row = grid.pack(&codes).expect("codes that the grid gave");
                    bytes.copy_from_slice(&row);
                }
            });
        QuantRows::new(blocks.block_type(), blocks.rows(), n, bytes)
            .expect("as many bytes as the blocks had")
    }

    /// The group of the column that comes i-th in the sweep.
    fn group_of(&self, fit: GroupFit, width: usize, i: usize) -> usize {
        match fit {
            GroupFit::Static => self.factor.order[i] / width,
            GroupFit::Updated | GroupFit::Stale => i / width,
        }
    }

    /// Brings some outputs into the order of the sweep.
    fn strip(&self, first: usize, weights: &[f64], pruned: &[bool]) -> Strip {
        let order = &self.factor.order;
        let n = order.len();
        let rows = weights.len() / n.max(1);
        let mut weights = weights.to_vec();
        for row in weights.chunks_mut(n.max(1)) {
            for &dead in &self.factor.dead {
                row[dead] = 0.0;
            }
        }
        let mut strip = Strip {
            rows,
            weights: Vec::new(),
            pruned: gather(pruned, order),
            codes: Vec::new(),
            steps: Vec::new(),
            grids: Vec::new(),
            loss: 0.0,
        };
        if let Some(Target::Blocks(blocks)) = self.rounding {
            strip.codes = vec![0; rows * n];
            let grid = |row| {
                RowGrid::from_bytes(blocks.block_type(), blocks.row(row))
                    .expect("finite scales, as rounding to the nearest found them")
            };
            strip.grids = (first..first + rows).map(grid).collect();
        }
        if let Some(Target::Groups(grid, fit)) = self.rounding {
            strip.codes = vec![0; rows * n];
            strip.steps = vec![None; rows * grid.group.count(n)];
            if fit == GroupFit::Static {
                let groups = weights
                    .chunks(n)
                    .flat_map(|row| row.chunks(grid.group.width(n)));
                for (step, group) in strip.steps.iter_mut().zip(groups) {
                    *step = Some(grid.fit(group));
                }
            }
        }
        strip.weights = gather(&weights, order);
        strip
    }

    /// Where the block that begins at `start` ends: so that no group is fitted before its weights have taken over all
    /// errors, a block ends where a group begins that reaches beyond it.
    fn block_end(&self, start: usize) -> usize {
        let n = self.factor.order.len();
        let end = (start + self.sweep.block).min(n);
        let Some(Target::Groups(grid, GroupFit::Updated)) = self.rounding else {
            return end;
        };
        let width = grid.group.width(n);
        let group = end / width * width;
        if group > start && group < end && group + width > end {
            group
        } else {
            end
        }
    }

    /// SparseGPT's scores in a block, row-major.
    fn scores(&self, strip: &Strip, block: &Range<usize>) -> Vec<f64> {
        let n = self.factor.order.len();
        let mut scores = Vec::with_capacity(strip.rows * block.len());
        for row in strip.weights.chunks(n) {
            scores.extend(block.clone().map(|i| self.score(row[i], i)));
        }
        scores
    }

    #[inline]
    fn score(&self, weight: f64, i: usize) -> f64 {
        let ratio = weight / self.factor.row(i)[i];
        ratio * ratio
    }

    fn block(&self, strip: &mut Strip, block: Range<usize>) {
        let n = self.factor.order.len();
        let mut errors = vec![0.0; strip.rows * block.len()];
        let groups = strip.steps.len() / strip.rows;
        for row in 0..strip.rows {
            let line = Line {
                weights: &mut strip.weights[row * n..][..n],
                pruned: &mut strip.pruned[row * n..][..n],
                codes: strip
                    .codes
                    .get_mut(row * n..(row + 1) * n)
                    .unwrap_or_default(),
                steps: &mut strip.steps[row * groups..][..groups],
                grid: strip.grids.get(row),
            };
            let errors = &mut errors[row * block.len()..][..block.len()];
            self.line(line, block.clone(), errors);
            strip.loss += errors.iter().map(|e| e * e).sum::<f64>();
        }
        // W[:, rest] −= E U[block, rest], transposed.
        let transposed = self.factor.transposed();
        let rest = n - block.end;
        matmul(
            MatMut::from_column_major_slice_mut(&mut strip.weights, n, strip.rows)
                .subrows_mut(block.end, rest),
            Accum::Add,
            transposed.submatrix(block.end, block.start, rest, block.len()),
            MatRef::from_column_major_slice(&errors, block.len(), strip.rows),
            -1.0,
            Par::Seq,
        );
    }

    /// One output through one block.
    fn line(&self, line: Line<'_>, block: Range<usize>, errors: &mut [f64]) {
        let n = line.weights.len();
        let mut fitted = Vec::new();
        if let Some(Target::Groups(grid, GroupFit::Stale)) = &self.rounding {
            let width = grid.group.width(n);
            for group in block.start.div_ceil(width)..block.end.div_ceil(width) {
                line.steps[group] =
                    Some(self.fit(grid, line.weights, line.pruned, group, &mut fitted));
            }
        }
        for (i, error) in block.clone().zip(errors) {
            if let Some(Target::Groups(grid, GroupFit::Updated)) = &self.rounding {
                let width = grid.group.width(n);
                if i.is_multiple_of(width) {
                    let group = i / width;
                    line.steps[group] =
                        Some(self.fit(grid, line.weights, line.pruned, group, &mut fitted));
                }
            }
            if let Pruning::Pattern(Pattern::Nm { keep, of }) = self.pruning
                && i.is_multiple_of(of)
            {
                fitted.clear();
                fitted.extend((i..i + of).map(|j| self.score(line.weights[j], j)));
                mark_few(&fitted, of - keep, &mut line.pruned[i..i + of]);
            }
            let (before, after) = line.weights[..block.end].split_at_mut(i + 1);
            let weight = &mut before[i];
            let mut value = if line.pruned[i] { 0.0 } else { *weight };
            if let Some(grid) = line.grid {
                let column = self.factor.order[i];
                line.codes[i] = grid.code(column, value as f32);
                value = f64::from(grid.value(column, line.codes[i]));
            }
            if let Some(Target::Groups(grid, fit)) = &self.rounding {
                let group = self.group_of(*fit, grid.group.width(n), i);
                let step = line.steps[group].expect("a group is fitted before its first column");
                line.codes[i] = step.code(value);
                value = step.value(line.codes[i]);
            }
            let u = &self.factor.row(i)[i..block.end];
            *error = (*weight - value) / u[0];
            *weight = value;
            for (weight, u) in after.iter_mut().zip(&u[1..]) {
                *weight -= *error * u;
            }
        }
    }

    /// Fits a group to its weights, those known to be pruned counting as zero.
    fn fit(
        &self,
        grid: &Grid,
        weights: &[f64],
        pruned: &[bool],
        group: usize,
        buffer: &mut Vec<f64>,
    ) -> Step {
        let width = grid.group.width(weights.len());
        let columns = group * width..((group + 1) * width).min(weights.len());
        buffer.clear();
        buffer.extend(columns.map(|j| if pruned[j] { 0.0 } else { weights[j] }));
        grid.fit(buffer)
    }
}

/// One output of a strip.
struct Line<'a> {
    weights: &'a mut [f64],
    pruned: &'a mut [bool],
    codes: &'a mut [u8],
    steps: &'a mut [Option<Step>],
    grid: Option<&'a RowGrid>,
}

/// Rows with their columns brought into an order.
fn gather<T: Copy>(rows: &[T], order: &[usize]) -> Vec<T> {
    rows.chunks(order.len().max(1))
        .flat_map(|row| order.iter().map(|&column| row[column]))
        .collect()
}

/// Rows in an order brought back.
fn scatter<T: Copy>(ordered: &[T], order: &[usize], rows: &mut [T]) {
    let n = order.len().max(1);
    for (source, target) in ordered.chunks(n).zip(rows.chunks_mut(n)) {
        for (&value, &column) in source.iter().zip(order) {
            target[column] = value;
        }
    }
}
