//! One linear: W_c, B and A.

use super::block::BlockRepair;
use super::inputs::Statistics;
use super::source::{CompressedLinear, Linear};
use super::state::RepairedLayer;
use super::stream::View;
use super::{Bytes, Energy, LayerId, LayerReport, Requantised, Seconds, StoredWeight};
use crate::compress::Compressor;
use crate::solve::{self, Method, RefitCollector, Weighting, drift_residual};
use crate::stats::{Gram, InputStats};
use crate::{Error, Result};
use candle_core::DType;
use causal_lm::Site;
use faer::{Mat, MatRef};
use std::time::Instant;

impl BlockRepair<'_> {
    /// A linear with W_c and nothing else yet; W and W_c.
    pub(super) fn compressed(
        &self,
        id: LayerId,
        inputs: &InputStats,
    ) -> Result<(RepairedLayer, Mat<f64>, Mat<f64>)> {
        let start = Instant::now();
        let (weight, dtype) = self.weight(id)?;
        let CompressedLinear {
            weight: stored,
            sweep,
        } = self.source.compressed(&Linear {
            layer: id,
            weight: weight.as_ref(),
            dtype,
            place: self.place(id),
            inputs,
        })?;
        if stored.shape() != weight.shape() {
            let (rows, cols) = stored.shape();
            return Err(Error::Shape {
                what: "compressed weight",
                found: vec![rows, cols],
                expected: vec![weight.nrows(), weight.ncols()],
            });
        }
        let compressed = stored.matrix()?;
        let layer = RepairedLayer {
            report: LayerReport {
                layer: id,
                outputs: weight.nrows(),
                inputs: weight.ncols(),
                rank: 0,
                tokens: 0,
                calibration: Energy::default(),
                held_out: None,
                held_out_drift: None,
                requantised: None,
                sweep,
                spectrum: None,
                seconds: Seconds {
                    compress: start.elapsed().as_secs_f64(),
                    ..Seconds::default()
                },
                bytes: Bytes {
                    dense: self.decoder.checkpoint().info(&id.weight())?.bytes as u64,
                    compressed: stored.bytes()?,
                    factors: 0,
                },
                statistics_bytes: 0,
            },
            weight: stored,
            factors: None,
            requantised: None,
            mean_square: Vec::new(),
        };
        Ok((layer, weight, compressed))
    }

    /// The rank of the correction of D, and its method.
    fn wanted(&self, id: LayerId, d: &Mat<f64>) -> Option<(Method, usize)> {
        let method = self.repair.method?;
        let rank = self.repair.ranks.of(id, d.shape());
        // A weight that lost nothing needs no factors.
        (rank > 0 && d.norm_max() > 0.0).then_some((method, rank))
    }

    /// Whether the correction of D needs G where there is no H.
    pub(super) fn needs_output(&self, id: LayerId, d: &Mat<f64>) -> bool {
        let wanted = self.wanted(id, d);
        wanted.is_some_and(|(method, _)| method.needs().gram)
    }

    /// Finds B and A and merges by requantisation where asked for; of a streamed input with G.
    pub(super) fn correct(
        &self,
        layer: &mut RepairedLayer,
        (weight, compressed): (&Mat<f64>, &Mat<f64>),
        statistics: &Statistics,
        streamed: Option<(View<'_>, Site, Option<&Gram>)>,
    ) -> Result<()> {
        let inputs = &statistics.inputs;
        let d = weight - compressed;
        if let Some((method, rank)) = self.wanted(layer.report.layer, &d) {
            let options = &self.repair.solver;
            let solution = match streamed {
                Some((_, _, Some(output))) => {
                    let output = Weighting::Output(output.matrix());
                    solve::solve(d.as_ref(), &output, rank, options)?
                }
                _ => method.solve(weight.as_ref(), compressed.as_ref(), inputs, rank, options)?,
            };
            let refit = |a: MatRef<'_, f64>| match streamed {
                Some((view, site, Some(_))) => {
                    let mut sums = RefitCollector::new(d.as_ref(), a)?;
                    view.pass(vec![(site, &mut sums)])?;
                    sums.finish()
                }
                _ => refit_by_inputs(method, (weight, &d), statistics, a),
            };
            let (rounded, bytes) = self.repair.factors.round(&solution.factors, refit)?;
            layer.report.rank = rounded.rank();
            layer.report.bytes.factors = bytes;
            layer.report.spectrum = Some(solution.spectrum);
            layer.factors = Some(rounded);
        }
        if let Some(compressor) = self.repair.requantise {
            self.requantise(layer, compressor, inputs)?;
        }
        Ok(())
    }

    /// compress(W_c + B A); what it loses is measured later.
    fn requantise(
        &self,
        layer: &mut RepairedLayer,
        compressor: Compressor,
        inputs: &InputStats,
    ) -> Result<()> {
        let name = layer.report.layer.weight();
        let dtype = self.decoder.checkpoint().info(&name)?.candle_dtype();
        let merged = layer.merged()?;
        let compressor = compressor.at(self.place(layer.report.layer));
        let again = compressor.compress(merged.as_ref(), Some(inputs.into()))?;
        let sweep = again.sweep;
        let stored = StoredWeight::of(again, dtype.unwrap_or(DType::F32))?;
        layer.report.requantised = Some(Requantised {
            calibration: 0.0,
            held_out: None,
            bytes: stored.bytes()?,
            sweep,
        });
        layer.requantised = Some(stored);
        Ok(())
    }
}

/// The best B for a given A under what is known of the inputs.
fn refit_by_inputs(
    method: Method,
    (weight, d): (&Mat<f64>, &Mat<f64>),
    statistics: &Statistics,
    a: MatRef<'_, f64>,
) -> Result<Mat<f64>> {
    let inputs = &statistics.inputs;
    let diagonal = method.diagonal(&inputs.diagonal);
    let weighting = match &diagonal {
        Some(diagonal) => Weighting::Diagonal(diagonal),
        None if method == Method::Svd => Weighting::Identity,
        None => statistics.gram()?,
    };
    let drift = match (method, weighting, &inputs.cross) {
        (Method::EoraDrift { damping }, Weighting::Gram(gram), Some(cross)) => {
            let (weight, d) = (weight.as_ref(), d.as_ref());
            Some(drift_residual(weight, d, gram, cross.as_ref(), damping)?)
        }
        _ => None,
    };
    solve::refit(drift.as_ref().unwrap_or(d).as_ref(), &weighting, a)
}
