//! Compressors whose loss is repaired: pruning by magnitude, Wanda and SparseGPT, quantisation by rounding and GPTQ.
//!
//! A [`Compressor`] is plain data with a name (`sparsegpt-2:4`, `gptq-int4-g128-sym-act`, `wanda-2:4+rtn-int4`). It maps
//! W (`m × n`, outputs × inputs) and what is known of the inputs, H = X Xᵀ or its diagonal, to W_c. Any positive
//! multiple of H gives the same W_c. Pruning comes first, quantisation keeps the zeros.
//!
//! Cost for `m × n` weights, all in f64: magnitude, Wanda and rounding pass over W a few times, `O(mn)`, 80 times with the
//! `mse` search. SparseGPT and GPTQ factorise H once, `2n³/3` multiply-adds and `2n²` numbers of memory, and sweep in
//! blocks of b columns: `mnb/2` multiply-adds within blocks, `mn²/2` in matrix products after them.
//!
//! Work is shared out by rows in strips of fixed size, so results do not depend on the number of threads.

mod blocks;
mod factor;
mod finer;
mod grid;
mod mix;
mod name;
mod nearest;
mod prune;
mod quantised;
mod rows;
mod storage;
mod sweep;
mod tensor;
#[cfg(test)]
mod tests;

use faer::{Mat, MatRef};
use packed::{BlockType, QuantRows};
use serde::{Deserialize, Serialize};

use crate::matrix::expect_shape;
use crate::{Error, Result};

pub(crate) use blocks::importance;
pub use blocks::{BlockQuantise, BlockRounding};
pub use finer::{LinearShape, Shapes};
pub use grid::{Bits, Grid, Group, Range, ScaleDtype, Symmetry};
pub use mix::{BlockTypes, Mix, Place};
pub(crate) use name::GRAMMAR;
pub use prune::{Cut, Mask, Pattern, Prune, Score};
pub use quantised::Quantised;
pub use storage::Storage;
pub use sweep::{ColumnOrder, GroupFit, Sweep, SweepReport};

use factor::Factor;
pub(crate) use rows::Rows;
use sweep::{Pruning, Target, Task};

/// Largest width of a group or block of columns: wider than any linear, and far from overflow.
const WIDEST: usize = 1 << 20;

/// How a weight is compressed. Parsed from and shown as its name; serialised as that name too.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub struct Compressor {
    /// What is set to zero.
    pub prune: Option<Prune>,
    /// How what remains is quantised in groups, for GPTQ and compressed-tensors files.
    pub quantise: Option<Quantise>,
    /// How what remains is quantised in blocks, for GGUF files; excludes the other.
    pub blocks: Option<BlockQuantise>,
    /// Parameters of the sweep over columns that SparseGPT and GPTQ make; unused by the others.
    pub sweep: Sweep,
}

/// Quantisation: the grid of values, and how weights are assigned to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quantise {
    /// The values that can be stored.
    pub grid: Grid,
    /// How weights come to them.
    pub rounding: Rounding,
}

/// How weights are assigned to the values of a grid.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Rounding {
    /// Each to the nearest.
    Nearest,
    /// Column by column, the remaining columns taking over the error (GPTQ, arXiv 2210.17323).
    Gptq {
        /// Order of the columns.
        order: ColumnOrder,
        /// Which weights a group's parameters are fitted to.
        fit: GroupFit,
    },
}

/// What is known of the inputs X (`n × t`, tokens as columns) of a linear.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Inputs<'a> {
    /// H = X Xᵀ, `n × n`, or a positive multiple. Only the lower triangle is read.
    Gram(MatRef<'a, f64>),
    /// The diagonal of H: Σ_t X_jt², one value per input, or a positive multiple.
    Diagonal(&'a [f64]),
}

/// What a compressor needs to know of the inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// The diagonal of X Xᵀ.
    Diagonal,
    /// X Xᵀ.
    Gram,
}

/// A compressed weight.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Compressed {
    /// W_c, `m × n`. Where it is quantised, exactly what [`Compressed::quantised`] or [`Compressed::blocks`] holds.
    pub weight: Mat<f64>,
    /// Which weights were pruned; None if nothing was.
    pub mask: Option<Mask>,
    /// The stored form of a weight that was quantised in groups.
    pub quantised: Option<Quantised>,
    /// The stored form of a weight that was quantised in blocks.
    pub blocks: Option<QuantRows<'static>>,
    /// What the last sweep of SparseGPT or GPTQ met.
    pub sweep: Option<SweepReport>,
}

impl Quantise {
    /// Whether groups are no runs of neighbouring inputs.
    pub(crate) fn takes_groups_apart(&self) -> bool {
        let Rounding::Gptq { order, fit } = self.rounding else {
            return false;
        };
        order == ColumnOrder::Activation
            && fit != GroupFit::Static
            && self.grid.group != Group::Channel
    }
}

impl Compressor {
    /// Names in common use; more can be formed by the grammar that a failing parse states.
    pub const COMMON: [&'static str; 19] = [
        "magnitude-50",
        "magnitude-2:4",
        "wanda-50",
        "wanda-2:4",
        "sparsegpt-50",
        "sparsegpt-2:4",
        "rtn-int3",
        "rtn-int4",
        "gptq-int3",
        "gptq-int4",
        "gptq-int3-g128",
        "gptq-int4-g128",
        "wanda-2:4+rtn-int4",
        "sparsegpt-2:4+gptq-int4",
        "q4_0",
        "q4_k",
        "q3_k-imatrix",
        "q4_k_m-imatrix",
        "gptq-q4_k_m",
    ];

    /// What [`Compressor::compress`] must be told of the inputs.
    pub fn needs(&self) -> Needs {
        let needs = self.needs_beside_importance();
        match self.weights_by_importance() {
            true => needs.max(Needs::Diagonal),
            false => needs,
        }
    }

    /// What [`Compressor::compress_weighted`] must be told of the inputs beside their importance.
    pub fn needs_beside_importance(&self) -> Needs {
        if self.sweeps() {
            Needs::Gram
        } else if self.prune.is_some_and(|prune| prune.score == Score::Wanda) {
            Needs::Diagonal
        } else {
            Needs::Nothing
        }
    }

    /// Whether it weights the error of each column with the importance of its input when it fits the scales of blocks.
    pub fn weights_by_importance(&self) -> bool {
        self.blocks
            .is_some_and(|blocks| blocks.rounding.importance())
    }

    /// The compressor of one linear of a model: a mix of block types becomes the type of this linear, as does a type for which
    /// llama.cpp makes exceptions.
    pub fn at(&self, place: Place) -> Self {
        let mut resolved = *self;
        if let Some(blocks) = &mut resolved.blocks {
            // Whether the type fits the rows is seen when they are compressed.
            blocks.types = BlockTypes::One(blocks.types.wanted(place));
            let rounded = blocks.rounding == BlockRounding::Nearest { importance: true };
            if rounded && self.prune.is_none() {
                blocks.types = blocks.types.weighted(place);
            }
        }
        resolved
    }

    /// Compresses W, `m × n`. Inputs may say more than is needed. A mix of block types has to be resolved first
    /// ([`Compressor::at`]).
    ///
    /// # Errors
    /// [`Error::NeedsInputs`]; [`Error::Shape`] and [`Error::NotFinite`] for W and inputs; [`Error::NotGram`] for a Gram
    /// matrix with a negative diagonal; [`Error::Compressor`] if n does not fit the pattern N:M.
    pub fn compress(
        &self,
        weight: MatRef<'_, f64>,
        inputs: Option<Inputs<'_>>,
    ) -> Result<Compressed> {
        self.compress_weighted(weight, inputs, None)
    }

    /// As [`Compressor::compress`], with another importance of the inputs than `inputs` tell, as an importance matrix has it:
    /// the mean square of each, or a positive multiple.
    ///
    /// # Errors
    /// As [`Compressor::compress`], also for an importance of another length or with values that are no squares.
    pub fn compress_weighted(
        &self,
        weight: MatRef<'_, f64>,
        inputs: Option<Inputs<'_>>,
        importance: Option<&[f64]>,
    ) -> Result<Compressed> {
        self.validate(Some(weight.ncols()))?;
        let mut rows = Rows::read(weight, "weight")?;
        let columns = rows.cols();
        let factor = match self.needs() {
            Needs::Gram => {
                let gram = self.gram(inputs, columns)?;
                Some(Factor::new(gram, self.sweep.damping, self.order())?)
            }
            Needs::Diagonal | Needs::Nothing => None,
        };

        let mut mask = None;
        let mut report = None;
        if let Some(prune) = self.prune {
            let mut pruned = Mask::none(rows.rows(), columns);
            match (prune.score, &factor) {
                (Score::SparseGpt, Some(factor)) if !self.is_joint() => {
                    let task = Task {
                        factor,
                        sweep: self.sweep,
                        pruning: Pruning::Pattern(prune.pattern),
                        rounding: None,
                    };
                    report = Some(task.run(&mut rows, &mut pruned).report);
                }
                (Score::SparseGpt, _) => {}
                (Score::Magnitude, _) => {
                    prune::by_magnitude(&mut rows, prune.pattern, &mut pruned);
                }
                (Score::Wanda, _) => {
                    let squares = self.diagonal(inputs, columns)?;
                    prune::by_wanda(&mut rows, &squares, prune.pattern, &mut pruned);
                }
            }
            mask = Some(pruned);
        }

        let mut quantised = None;
        if let Some(Quantise { grid, rounding }) = self.quantise {
            match (rounding, &factor) {
                (Rounding::Gptq { fit, .. }, Some(factor)) => {
                    let pruning = match self.prune {
                        Some(prune) if self.is_joint() => Pruning::Pattern(prune.pattern),
                        _ => Pruning::Given,
                    };
                    let task = Task {
                        factor,
                        sweep: self.sweep,
                        pruning,
                        rounding: Some(Target::Groups(grid, fit)),
                    };
                    let mut none = Mask::none(rows.rows(), columns);
                    let outcome = task.run(&mut rows, mask.as_mut().unwrap_or(&mut none));
                    report = Some(outcome.report);
                    quantised = outcome.quantised;
                }
                _ => quantised = Some(nearest::round(&mut rows, &grid)),
            }
        }

        let mut blocks = None;
        if let Some(block) = self.blocks {
            let BlockTypes::One(ty) = block.types else {
                return Err(Error::Compressor {
                    compressor: self.to_string(),
                    reason: "a mix chooses by linear: say which one it is, by `at`".to_string(),
                });
            };
            let importance = match (block.rounding.importance(), importance) {
                (false, _) => None,
                (true, None) => Some(blocks::importance(&self.diagonal(inputs, columns)?)),
                (true, Some(given)) => {
                    let given = self.diagonal(Some(Inputs::Diagonal(given)), columns)?;
                    Some(blocks::importance(&given))
                }
            };
            let rounded = self.round_to_blocks(
                (ty, block.rounding),
                importance,
                &factor,
                (&mut rows, &mut mask),
            )?;
            report = rounded.1.or(report);
            blocks = Some(rounded.0);
        }

        Ok(Compressed {
            weight: rows.to_mat(),
            mask,
            quantised,
            blocks,
            sweep: report,
        })
    }

    /// Rounds what pruning left to blocks.
    fn round_to_blocks(
        &self,
        (ty, rounding): (BlockType, BlockRounding),
        importance: Option<Vec<f32>>,
        factor: &Option<Factor>,
        (rows, mask): (&mut Rows, &mut Option<Mask>),
    ) -> Result<(QuantRows<'static>, Option<SweepReport>)> {
        // The scales that a sweep uses are those of the weights as they are, but for dead inputs, which lose theirs.
        if let Some(factor) = factor {
            let cols = rows.cols();
            for &dead in &factor.dead {
                rows.data_mut()
                    .iter_mut()
                    .skip(dead)
                    .step_by(cols.max(1))
                    .for_each(|w| *w = 0.0);
            }
        }
        let nearest = blocks::nearest(rows, ty, importance.as_deref())?;
        let (rounded, report) = match (rounding, factor) {
            (BlockRounding::Gptq { .. }, Some(factor)) if nearest.block_type().is_quantised() => {
                let pruning = match self.prune {
                    Some(prune) if self.is_joint() => Pruning::Pattern(prune.pattern),
                    _ => Pruning::Given,
                };
                let task = Task {
                    factor,
                    sweep: self.sweep,
                    pruning,
                    rounding: Some(Target::Blocks(&nearest)),
                };
                let mut none = Mask::none(rows.rows(), rows.cols());
                let outcome = task.run(rows, mask.as_mut().unwrap_or(&mut none));
                (outcome.blocks.unwrap_or(nearest), Some(outcome.report))
            }
            _ => (nearest, None),
        };
        for (target, value) in rows.data_mut().iter_mut().zip(rounded.dequantise()) {
            *target = f64::from(value);
        }
        Ok((rounded, report))
    }

    /// Whether weights with rows of `columns` can be compressed.
    ///
    /// # Errors
    /// [`Error::Compressor`] with what does not fit.
    pub fn check_columns(&self, columns: usize) -> Result<()> {
        self.validate(Some(columns))
    }

    /// Checks the parameters against each other and against the number of columns.
    fn validate(&self, columns: Option<usize>) -> Result<()> {
        let refuse = |reason: String| {
            Err(Error::Compressor {
                compressor: self.to_string(),
                reason,
            })
        };
        if !(self.sweep.damping >= 0.0 && self.sweep.damping.is_finite()) {
            return refuse(format!("damping {} is not ≥ 0", self.sweep.damping));
        }
        if !(1..=WIDEST).contains(&self.sweep.block) {
            return refuse(format!("a block has 1 to {WIDEST} columns"));
        }
        if let Some(quantise) = self.quantise
            && let Group::Columns(width) = quantise.grid.group
            && !(1..=WIDEST).contains(&width)
        {
            return refuse(format!("a group has 1 to {WIDEST} columns"));
        }
        if self.quantise.is_some() && self.blocks.is_some() {
            return refuse("it quantises in groups and in blocks; take one of them".to_string());
        }
        let Some(prune) = self.prune else {
            return Ok(());
        };
        if let Some(quantise) = self.quantise
            && quantise.grid.symmetry == Symmetry::Offset
        {
            return refuse("an offset grid does not keep zeros; take `sym`".to_string());
        }
        if let Some(block) = self.blocks
            && !matches!(block.types, BlockTypes::One(ty) if blocks::keeps_zeros(ty))
        {
            return refuse(format!(
                "{} does not keep zeros; take q4_0, q5_0, q8_0, q3_k or q6_k",
                block.types
            ));
        }
        match prune.pattern {
            Pattern::Unstructured { percent, .. } => {
                if !(0.0..100.0).contains(&percent) {
                    return refuse(format!("{percent} percent is outside [0, 100)"));
                }
            }
            Pattern::Nm { keep, of } => {
                if keep == 0 || keep >= of {
                    return refuse(format!("{keep}:{of} needs 0 < N < M"));
                }
                if let Some(columns) = columns
                    && !columns.is_multiple_of(of)
                {
                    return refuse(format!("{columns} columns are not a multiple of {of}"));
                }
                if prune.score != Score::SparseGpt {
                    return Ok(());
                }
                if !self.sweep.block.is_multiple_of(of) {
                    return refuse(format!(
                        "blocks of {} columns are not a multiple of {of}",
                        self.sweep.block
                    ));
                }
                if self.is_joint() {
                    if self.order() == ColumnOrder::Activation {
                        return refuse(format!(
                            "SparseGPT chooses among {of} neighbours, which act-order takes apart; leave out `act`"
                        ));
                    }
                    if let Some(Quantise { grid, .. }) = self.quantise
                        && let Group::Columns(group) = grid.group
                        && !group.is_multiple_of(of)
                    {
                        return refuse(format!(
                            "groups of {group} columns are not a multiple of {of}"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether it quantises, in groups or in blocks.
    pub fn quantises(&self) -> bool {
        self.quantise.is_some() || self.blocks.is_some()
    }

    fn sweeps(&self) -> bool {
        self.prune
            .is_some_and(|prune| prune.score == Score::SparseGpt)
            || self.is_gptq()
    }

    fn is_gptq(&self) -> bool {
        self.quantise
            .is_some_and(|quantise| matches!(quantise.rounding, Rounding::Gptq { .. }))
            || self
                .blocks
                .is_some_and(|blocks| matches!(blocks.rounding, BlockRounding::Gptq { .. }))
    }

    /// Whether one sweep both prunes and quantises.
    fn is_joint(&self) -> bool {
        self.is_gptq()
            && self
                .prune
                .is_some_and(|prune| prune.score == Score::SparseGpt)
    }

    fn order(&self) -> ColumnOrder {
        if let Some(BlockRounding::Gptq { order, .. }) = self.blocks.map(|b| b.rounding) {
            return order;
        }
        match self.quantise.map(|quantise| quantise.rounding) {
            Some(Rounding::Gptq { order, .. }) => order,
            _ => ColumnOrder::Natural,
        }
    }

    fn gram<'a>(&self, inputs: Option<Inputs<'a>>, columns: usize) -> Result<MatRef<'a, f64>> {
        let Some(Inputs::Gram(gram)) = inputs else {
            return Err(Error::NeedsInputs {
                compressor: self.to_string(),
                needs: "the Gram matrix X Xᵀ of the inputs",
            });
        };
        expect_shape("Gram matrix of the inputs", gram, (columns, columns))?;
        Ok(gram)
    }

    fn diagonal(&self, inputs: Option<Inputs<'_>>, columns: usize) -> Result<Vec<f64>> {
        let diagonal = match inputs {
            Some(Inputs::Gram(_)) => {
                let gram = self.gram(inputs, columns)?;
                (0..columns).map(|j| gram[(j, j)]).collect()
            }
            Some(Inputs::Diagonal(diagonal)) => diagonal.to_vec(),
            None => {
                return Err(Error::NeedsInputs {
                    compressor: self.to_string(),
                    needs: "the Gram matrix X Xᵀ of the inputs, or its diagonal",
                });
            }
        };
        if diagonal.len() != columns {
            return Err(Error::Shape {
                what: "diagonal of the Gram matrix",
                found: vec![diagonal.len()],
                expected: vec![columns],
            });
        }
        factor::check_diagonal(&diagonal)?;
        Ok(diagonal)
    }
}
