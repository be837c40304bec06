//! How a model is repaired, as plain data.

use super::{LayerId, LayerReport, float_type};
use crate::compress::Compressor;
use crate::solve::{self, Candidate, LowRank, Method};
use crate::stats::{Accumulation, Importance};
use crate::{Error, Result, matrix};
use candle_core::{DType, Device, Tensor};
use faer::{Mat, MatRef};
use packed::BlockType;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

/// How a model is repaired.
///
/// ```
/// use lowrank_eora::repair::{FactorStorage, Ranks, Repair};
///
/// let repair = Repair::default()
///     .with_ranks(Ranks::Constant(64))
///     .with_factors(FactorStorage::Bf16);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Repair {
    /// Norm in which corrections are best; `None` compresses and corrects nothing.
    pub method: Option<Method>,
    /// Ranks.
    pub ranks: Ranks,
    /// Which activations calibrate.
    pub inputs: InputSource,
    /// What a linear's inputs within a block are computed with.
    pub within_block: WithinBlock,
    /// How B and A are stored.
    pub factors: FactorStorage,
    /// Also merge by requantisation, W_c' = compress(W_c + B A), and report what that loses.
    pub requantise: Option<Compressor>,
    /// Also report losses against what the dense model computes, which takes a dense pass of the
    /// held-out windows.
    pub measure_drift: bool,
    /// What each calibration window counts, one number each; all the same where `None`.
    pub window_weights: Option<Vec<f64>>,
    /// Use part of the calibration tokens.
    pub sampling: Option<Sampling>,
    /// How sums over tokens are formed.
    pub accumulation: Accumulation,
    /// How corrections are found.
    pub solver: solve::Options,
}

impl Default for Repair {
    /// EoRA of rank 32 stored in f16, inputs from the repaired prefix of the model.
    fn default() -> Self {
        Self {
            method: Some(Method::Eora),
            ranks: Ranks::Constant(32),
            inputs: InputSource::default(),
            within_block: WithinBlock::default(),
            factors: FactorStorage::default(),
            requantise: None,
            measure_drift: false,
            window_weights: None,
            sampling: None,
            accumulation: Accumulation::default(),
            solver: solve::Options::default(),
        }
    }
}

impl Repair {
    /// The norm in which corrections are best; `None` compresses and corrects nothing.
    pub fn with_method(self, method: Option<Method>) -> Self {
        Self { method, ..self }
    }

    /// Ranks.
    pub fn with_ranks(self, ranks: Ranks) -> Self {
        Self { ranks, ..self }
    }

    /// Which activations calibrate.
    pub fn with_inputs(self, inputs: InputSource) -> Self {
        Self { inputs, ..self }
    }

    /// What a linear's inputs within a block are computed with.
    pub fn with_within_block(self, within_block: WithinBlock) -> Self {
        Self {
            within_block,
            ..self
        }
    }

    /// How B and A are stored.
    pub fn with_factors(self, factors: FactorStorage) -> Self {
        Self { factors, ..self }
    }

    /// Also merge by requantisation with this compressor.
    pub fn with_requantise(self, requantise: Option<Compressor>) -> Self {
        Self { requantise, ..self }
    }

    /// Whether losses against what the dense model computes are reported too.
    pub fn with_measure_drift(self, measure_drift: bool) -> Self {
        Self {
            measure_drift,
            ..self
        }
    }

    /// What each calibration window counts.
    pub fn with_window_weights(self, window_weights: Option<Vec<f64>>) -> Self {
        Self {
            window_weights,
            ..self
        }
    }

    /// Use part of the calibration tokens.
    pub fn with_sampling(self, sampling: Option<Sampling>) -> Self {
        Self { sampling, ..self }
    }

    /// How sums over tokens are formed.
    pub fn with_accumulation(self, accumulation: Accumulation) -> Self {
        Self {
            accumulation,
            ..self
        }
    }

    /// How corrections are found.
    pub fn with_solver(self, solver: solve::Options) -> Self {
        Self { solver, ..self }
    }
}

/// Which activations calibrate a block.
///
/// Losses on held-out tokens are always those behind the repaired blocks, which is what the
/// repaired model meets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum InputSource {
    /// Those of the model with all blocks before this one repaired, as in EoRA's program.
    #[default]
    Repaired,
    /// Those of the dense model.
    Dense,
}

/// What the inputs of a linear within a block are computed with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum WithinBlock {
    /// The block's original weights, as in EoRA's program: one pass collects for all linears.
    #[default]
    Original,
    /// The linears before it repaired: q/k/v, then o, then gate/up, then down, with a pass for each.
    Sequential,
}

/// Ranks of the corrections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Ranks {
    /// This rank for each linear, or the smaller side of its weight where that is less.
    Constant(usize),
    /// A rank for each linear named, none for the others.
    Table(BTreeMap<LayerId, usize>),
}

/// What [`Ranks::allocate`] sums up over linears.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Spread {
    /// Squared errors of outputs relative to the squared outputs of the same linear.
    #[default]
    Relative,
    /// Squared errors of outputs: what the total loss is made of. Linears with large outputs take
    /// the ranks, whatever they mean to the model.
    Absolute,
}

impl Display for InputSource {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Repaired => "the model with all earlier blocks repaired",
            Self::Dense => "the dense model",
        })
    }
}

impl Display for Spread {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Relative => "relative gain",
            Self::Absolute => "gain",
        })
    }
}

impl Display for FactorStorage {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quantised { a, b } => write!(f, "A {a}, B {b} refitted"),
            floats => f.write_str(floats.dtype().as_str()),
        }
    }
}

impl Ranks {
    /// The rank of a linear of `m × n`.
    pub fn of(&self, layer: LayerId, (m, n): (usize, usize)) -> usize {
        match self {
            Self::Constant(rank) => (*rank).min(m.min(n)),
            Self::Table(ranks) => ranks.get(&layer).map_or(0, |rank| (*rank).min(m.min(n))),
        }
    }

    /// Ranks, multiples of `multiple_of`, that spend at most `budget` bytes on factors of `bytes`
    /// bytes per entry where they take most off the sum that `spread` names.
    ///
    /// In two passes over the model: the reports are those of a repair of constant rank, the
    /// largest that a layer may get, by a method that sees the inputs (their losses are otherwise
    /// not comparable); the ranks are for a second one.
    ///
    /// What is minimised is the sum over linears, not what the model loses: on stories260K, a small
    /// model, allocated ranks had the lower summed loss and the higher perplexity than one rank for
    /// all in as many bytes. Measure both.
    ///
    /// # Errors
    /// [`Error::MissingStatistic`] for a report without spectrum, and limits that no allocation can meet.
    pub fn allocate<'a>(
        reports: impl IntoIterator<Item = &'a LayerReport>,
        budget: u64,
        bytes: usize,
        multiple_of: usize,
        spread: Spread,
    ) -> Result<Self> {
        let reports: Vec<&LayerReport> = reports.into_iter().collect();
        let candidate = |report: &&'a LayerReport| -> Result<Candidate<'a>> {
            let spectrum = report.spectrum.as_ref().ok_or(Error::MissingStatistic {
                method: "an allocation of ranks",
                statistic: "the spectrum of each layer",
            })?;
            let side = report.outputs.min(report.inputs);
            Ok(Candidate {
                spectrum,
                weight: match spread {
                    Spread::Relative if report.calibration.target > 0.0 => {
                        1.0 / report.calibration.target
                    }
                    Spread::Relative | Spread::Absolute => 1.0,
                },
                bytes_per_rank: ((report.outputs + report.inputs) * bytes) as u64,
                min: 0,
                max: spectrum.squares().len().min(side),
            })
        };
        let candidates: Vec<_> = reports.iter().map(candidate).collect::<Result<_>>()?;
        let ranks = solve::allocate(&candidates, budget, multiple_of)?;
        let table = reports.iter().map(|report| report.layer).zip(ranks);
        Ok(Self::Table(table.collect()))
    }
}

/// How B and A are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FactorStorage {
    /// IEEE half.
    #[default]
    F16,
    /// Bfloat16.
    Bf16,
    /// Single precision.
    F32,
    /// Rounded by a compressor, such as `rtn-int4-g64-sym`, to groups along the rows of A and of Bᵀ;
    /// B is refitted to the rounded A. Adapters hold their values as floats: PEFT has no integer
    /// factors.
    Quantised {
        /// Of A.
        a: Compressor,
        /// Of B.
        b: Compressor,
    },
}

impl FactorStorage {
    /// A in 4 bits and B in 8, symmetric, in groups of 64.
    pub fn integers() -> Self {
        let groups = |name: &str| name.parse().expect("the name of a compressor");
        Self::Quantised {
            a: groups("rtn-int4-g64-sym"),
            b: groups("rtn-int8-g64-sym"),
        }
    }

    /// The dtype that holds the values exactly.
    pub fn dtype(self) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            // Differences of 8-bit codes times f16 scales.
            Self::F32 | Self::Quantised { .. } => DType::F32,
        }
    }

    /// The type of GGUF files that holds the values exactly.
    pub fn block_type(self) -> BlockType {
        float_type(self.dtype())
    }

    /// The factors as a reader of the file gets them, and their bytes.
    ///
    /// # Errors
    /// When a value does not fit the dtype, or a refit fails.
    pub(super) fn round(
        self,
        factors: &LowRank,
        refit: impl FnOnce(MatRef<'_, f64>) -> Result<Mat<f64>>,
    ) -> Result<(LowRank, u64)> {
        if let Self::Quantised { a, b } = self {
            return solve::quantise_factors(factors, (&a, &b), refit);
        }
        let (a, b) = factors.to_tensors(self.dtype(), &Device::Cpu)?;
        let read = |tensor: &Tensor, what: &'static str| match (
            matrix::from_tensor(tensor, what),
            self,
        ) {
            (Err(Error::NotFinite { .. }), Self::F16) => Err(Error::Setting {
                name: "factors",
                value: "f16".into(),
                expected: "bf16 or f32: a value of the factors is beyond 65504, the largest of f16",
            }),
            (read, _) => read,
        };
        let rounded = LowRank {
            b: read(&b, "factor B as stored")?,
            a: read(&a, "factor A as stored")?,
        };
        let entries = a.elem_count() + b.elem_count();
        Ok((rounded, (entries * self.dtype().size_in_bytes()) as u64))
    }
}

/// Which part of the calibration tokens is used.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Sampling {
    /// What makes a token likely to be taken.
    pub importance: Importance,
    /// Share of the tokens that are taken, in (0, 1].
    pub share: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// About `share`, in (0, 1], of the tokens, drawn with a seed.
    pub fn new(importance: Importance, share: f64, seed: u64) -> Self {
        Self {
            importance,
            share,
            seed,
        }
    }
}
