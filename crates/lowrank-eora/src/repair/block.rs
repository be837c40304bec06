//! The repair of one block.

use super::layer::{SITES, linear_mut, site_index};
use super::source::Linear;
use super::state::RepairedLayer;
use super::stream::{SiteStats, Statistics, Stream};
use super::{
    Bytes, Energy, LayerId, LayerReport, Repair, Requantised, Seconds, Source, StoredWeight,
    WithinBlock,
};
use crate::compress::Inputs;
use crate::matrix::{from_tensor, to_tensor};
use crate::solve::{LowRank, Method, Weighting, drift_residual};
use crate::{Error, Result};
use candle_core::{DType, Device};
use causal_lm::{Block, Decoder, LinearName, Site};
use faer::{Mat, MatRef};
use std::time::Instant;

/// All that the repair of any block needs.
pub(super) struct BlockRepair<'a> {
    pub(super) decoder: &'a Decoder<'a>,
    pub(super) source: &'a dyn Source,
    pub(super) repair: &'a Repair,
}

/// Statistics of one input.
#[derive(Clone, Copy)]
struct Observed<'a> {
    calibration: &'a Statistics,
    held_out: Option<&'a Statistics>,
}

impl BlockRepair<'_> {
    /// The linears of a block, compressed and repaired.
    pub(super) fn run(
        &self,
        dense: &Block,
        calibration: &Stream,
        held_out: Option<&Stream>,
    ) -> Result<Vec<RepairedLayer>> {
        const ALL: &[Site] = &[Site::Qkv, Site::O, Site::GateUp, Site::Down];
        let passes: Vec<&[Site]> = match self.repair.within_block {
            WithinBlock::Original => vec![ALL],
            WithinBlock::Sequential => ALL.chunks(1).collect(),
        };
        let mut current = dense.clone();
        let mut layers = Vec::new();
        for sites in passes {
            let start = Instant::now();
            let stats = calibration.collect(dense, &current, sites)?;
            let held_out = match held_out {
                Some(stream) => stream.collect(dense, &current, sites)?,
                None => SiteStats::default(),
            };
            let seconds = start.elapsed().as_secs_f64();
            let linears: Vec<(usize, LinearName)> = (sites.iter().map(|&site| site_index(site)))
                .filter(|&index| stats[index].is_some())
                .flat_map(|index| SITES[index].1.iter().map(move |&linear| (index, linear)))
                .collect();
            for &(index, linear) in &linears {
                let Some(calibration) = &stats[index] else {
                    continue;
                };
                let id = LayerId {
                    block: dense.layer,
                    linear,
                };
                let observed = Observed {
                    calibration,
                    held_out: held_out[index].as_ref(),
                };
                let mut layer = self.linear(id, observed).map_err(|source| Error::Layer {
                    layer: id.to_string(),
                    source: Box::new(source),
                })?;
                layer.report.seconds.collect = seconds / linears.len() as f64;
                self.replace(&mut current, &layer)?;
                layers.push(layer);
            }
        }
        Ok(layers)
    }

    /// The dense block with some of its linears repaired.
    pub(super) fn repaired(&self, dense: &Block, layers: &[RepairedLayer]) -> Result<Block> {
        let mut block = dense.clone();
        for layer in layers {
            self.replace(&mut block, layer)?;
        }
        Ok(block)
    }

    fn replace(&self, block: &mut Block, layer: &RepairedLayer) -> Result<()> {
        if let Some(linear) = linear_mut(block, layer.report.layer.linear) {
            let merged = layer.merged()?;
            linear.weight =
                to_tensor(merged.as_ref(), self.decoder.dtype(), self.decoder.device())?;
        }
        Ok(())
    }

    fn linear(&self, id: LayerId, observed: Observed<'_>) -> Result<RepairedLayer> {
        let checkpoint = self.decoder.checkpoint();
        let name = id.weight();
        let stored = checkpoint.info(&name)?;
        let dense_bytes = stored.bytes as u64;
        let dtype = stored.candle_dtype().unwrap_or(DType::F32);
        let weight = from_tensor(
            &checkpoint.tensor_as(&name, DType::F64, &Device::Cpu)?,
            "weight",
        )?;
        checkpoint.release([name.as_str()]);
        let (m, n) = weight.shape();

        let start = Instant::now();
        let compressed = self.source.compressed(&Linear {
            layer: id,
            weight: weight.as_ref(),
            dtype,
            inputs: &observed.calibration.inputs,
        })?;
        if compressed.shape() != (m, n) {
            let (rows, cols) = compressed.shape();
            return Err(Error::Shape {
                what: "compressed weight",
                found: vec![rows, cols],
                expected: vec![m, n],
            });
        }
        let w_c = compressed.matrix()?;
        let compress = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let d = &weight - &w_c;
        let mut report = LayerReport {
            layer: id,
            outputs: m,
            inputs: n,
            rank: 0,
            calibration: Energy::default(),
            held_out: None,
            held_out_drift: None,
            requantised: None,
            spectrum: None,
            seconds: Seconds::default(),
            bytes: Bytes {
                dense: dense_bytes,
                compressed: compressed.bytes()?,
                factors: 0,
            },
        };
        // A weight that lost nothing needs no factors.
        let rank = if d.norm_max() > 0.0 {
            self.repair.ranks.of(id, (m, n))
        } else {
            0
        };
        let mut factors = None;
        if let (Some(method), 1..) = (self.repair.method, rank) {
            let inputs = &observed.calibration.inputs;
            let solution = method.solve(
                weight.as_ref(),
                w_c.as_ref(),
                inputs,
                rank,
                &self.repair.solver,
            )?;
            let (rounded, bytes) = self.round(
                method,
                &solution.factors,
                (&weight, &d),
                observed.calibration,
            )?;
            report.rank = rounded.rank();
            report.bytes.factors = bytes;
            report.spectrum = Some(solution.spectrum);
            factors = Some(rounded);
        }
        let error = match &factors {
            Some(factors) => factors.error(d.as_ref()),
            None => d.clone(),
        };
        let energy = |statistics: &Statistics| -> Result<Energy> {
            let h = statistics.gram()?;
            let before = h.energy(d.as_ref())?.max(0.0);
            Ok(Energy {
                target: h.energy(weight.as_ref())?.max(0.0),
                before,
                after: match factors {
                    Some(_) => h.energy(error.as_ref())?.max(0.0),
                    None => before,
                },
            })
        };
        report.calibration = energy(observed.calibration)?;
        report.held_out = observed.held_out.map(energy).transpose()?;
        report.held_out_drift = match observed.held_out {
            Some(statistics) => drift_energy(&weight, (&d, &error), statistics)?,
            None => None,
        };
        let mut requantised = None;
        if self.repair.requantise.is_some() {
            let (stored, lost) =
                self.requantise((&weight, &(&weight - &error)), dtype, observed)?;
            report.requantised = Some(lost);
            requantised = Some(stored);
        }
        report.seconds.compress = compress;
        report.seconds.solve = start.elapsed().as_secs_f64();
        Ok(RepairedLayer {
            report,
            weight: compressed,
            factors,
            requantised,
        })
    }

    /// B and A as they will be stored.
    fn round(
        &self,
        method: Method,
        factors: &LowRank,
        (weight, d): (&Mat<f64>, &Mat<f64>),
        calibration: &Statistics,
    ) -> Result<(LowRank, u64)> {
        let inputs = &calibration.inputs;
        let gram = calibration.gram()?;
        let diagonal = method.diagonal(&inputs.diagonal);
        let weighting = match &diagonal {
            Some(diagonal) => Weighting::Diagonal(diagonal),
            None if method == Method::Svd => Weighting::Identity,
            None => gram,
        };
        let drift = match (method, &inputs.gram, &inputs.cross) {
            (Method::EoraDrift { damping }, Some(gram), Some(cross)) => Some(drift_residual(
                weight.as_ref(),
                d.as_ref(),
                gram.matrix(),
                cross.as_ref(),
                damping,
            )?),
            _ => None,
        };
        let target = drift.as_ref().unwrap_or(d);
        self.repair
            .factors
            .round(factors, target.as_ref(), &weighting)
    }

    /// compress(W_c + B A), and what it loses.
    fn requantise(
        &self,
        (weight, merged): (&Mat<f64>, &Mat<f64>),
        dtype: DType,
        observed: Observed<'_>,
    ) -> Result<(StoredWeight, Requantised)> {
        let compressor = self
            .repair
            .requantise
            .unwrap_or(crate::compress::Compressor::NONE);
        let gram = observed.calibration.inputs.gram.as_ref();
        let inputs = gram.map(|gram| Inputs::Gram(gram.matrix()));
        let stored = StoredWeight::of(compressor.compress(merged.as_ref(), inputs)?, dtype)?;
        let error = weight - &stored.matrix()?;
        let energy = |statistics: &Statistics| -> Result<f64> {
            Ok(statistics.gram()?.energy(error.as_ref())?.max(0.0))
        };
        let lost = Requantised {
            calibration: energy(observed.calibration)?,
            held_out: observed.held_out.map(energy).transpose()?,
            bytes: stored.bytes()?,
        };
        Ok((stored, lost))
    }
}

/// ‖W X − V X̂‖² = tr(W H Wᵀ) − 2 tr(W K Vᵀ) + tr(V Ĥ Vᵀ) for V = W − E.
fn drift_energy(
    weight: &Mat<f64>,
    (before, after): (&Mat<f64>, &Mat<f64>),
    statistics: &Statistics,
) -> Result<Option<Energy>> {
    let (Some(teacher), Some(cross)) = (&statistics.teacher, &statistics.inputs.cross) else {
        return Ok(None);
    };
    let target = Weighting::Gram(teacher.matrix()).energy(weight.as_ref())?;
    let wk = weight * cross;
    let energy = |error: &Mat<f64>| -> Result<f64> {
        let v = weight - error;
        let own = statistics.gram()?.energy(v.as_ref())?;
        Ok((target - 2.0 * inner(wk.as_ref(), v.as_ref()) + own).max(0.0))
    };
    Ok(Some(Energy {
        target,
        before: energy(before)?,
        after: energy(after)?,
    }))
}

/// Σ a ∘ b.
fn inner(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> f64 {
    let columns = a.col_iter().zip(b.col_iter());
    columns
        .map(|(a, b)| a.iter().zip(b.iter()).map(|(x, y)| x * y).sum::<f64>())
        .sum()
}
