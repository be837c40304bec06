//! The repair of a whole model, one block in memory at a time.
//!
//! Windows of calibration text go through the model block by block. Of each block the inputs of its
//! linears are summed up, W_c is made or read, B A is found and rounded to what will be stored, and
//! the windows go on through W_c + B A: the inputs of every block are those behind the repaired
//! blocks before it (EoRA, arXiv 2410.21271, algorithm 1). Held-out windows travel beside them and
//! tell what the repair is worth on tokens that it was not fitted to.
//!
//! A [`Repair`] says how, a [`Source`] gives W_c, and everything is kept in a folder as it is
//! finished, from which [`Repaired`] is read, [`output`](crate::output) writes what runtimes load,
//! and a run that was killed goes on.
//!
//! Memory: hidden states of all windows, one block, and for each of its four inputs H, `n × n` in
//! f64, of the calibration tokens and after them of the held-out ones.
//!
//! An input more than one and a half times as wide as the outputs of its linears together, which is
//! that of down_proj, does without H wherever it can. W_c is made before the tokens pass (from
//! channel sums of a pass of their own where a compressor wants them), they are summed up as
//! G = Σ (D x)(D x)ᵀ, `m × m`, and a further pass sums up the losses of the factors as they are
//! stored. H stays where something needs it: compression or requantisation by GPTQ or SparseGPT,
//! drift-aware repairs and their losses, and EoRA's published accumulation. Both routes find the
//! same to rounding; the one without H takes one more run of the block, or two, and 12 mn bytes for
//! 8 n².

mod block;
mod correct;
mod importance;
mod inputs;
pub mod layer;
mod measure;
mod options;
mod report;
mod sites;
mod source;
mod state;
mod stored;
mod stream;

pub use crate::format::{Format, QuantisedCheckpoint};
pub use crate::solve::{DRIFT_DAMPING, Method};
pub use importance::{InputImportance, WithImportance};
pub use options::{FactorStorage, InputSource, Ranks, Repair, Sampling, Spread, WithinBlock};
pub use report::{Bytes, Damping, Energy, LayerReport, Requantised, Seconds};
pub use sites::{LayerId, linears};
pub use source::{CompressedLinear, CompressedModel, Linear, Source};
pub use state::{Repaired, RepairedLayer};
pub use stored::StoredWeight;
pub(crate) use stored::float_type;

use crate::compress::Place;
use crate::stats::Accumulation;
use crate::{Error, Result};
use block::BlockRepair;
use causal_lm::{Decoder, Windows};
use std::path::Path;
use stream::{How, Stream};
use tensor_io::Progress;

/// The windows of text that a repair reads.
#[derive(Clone, Copy, Debug)]
pub struct Texts<'a> {
    /// Those it is fitted to.
    pub calibration: &'a Windows,
    /// Others, on which losses are measured; without them losses are those on the calibration windows.
    pub held_out: Option<&'a Windows>,
}

impl<'a> Texts<'a> {
    /// Calibration windows alone.
    pub fn new(calibration: &'a Windows) -> Self {
        Self {
            calibration,
            held_out: None,
        }
    }

    /// With windows that calibration does not see.
    pub fn with_held_out(self, held_out: &'a Windows) -> Self {
        Self {
            held_out: Some(held_out),
            ..self
        }
    }
}

impl Repair {
    /// Repairs the linears of all blocks of `decoder`.
    ///
    /// Where `folder` holds the beginning of the same run, it continues there, with the same result. `progress` counts
    /// blocks, and its messages give the loss of each; the run can be cancelled between two linears.
    ///
    /// A decoder that computes in bf16 rounds W_c + B A as a whole; f32 keeps what B A adds.
    ///
    /// # Errors
    /// [`Error::OtherRun`] where the folder holds another run; [`Error::Layer`] with the linear
    /// where a weight is missing, of another shape or not finite; [`Error::Cancelled`]; what reading, running or
    /// writing report, among it activations that are not finite and state files that are damaged.
    pub fn run(
        &self,
        decoder: &Decoder<'_>,
        source: &dyn Source,
        texts: Texts<'_>,
        folder: impl AsRef<Path>,
        progress: &dyn Progress,
    ) -> Result<Repaired> {
        let folder = folder.as_ref();
        let cross = self.method.is_some_and(|method| method.needs().cross);
        if cross && self.inputs == InputSource::Dense {
            return Err(Error::Setting {
                name: "inputs",
                value: "dense".into(),
                expected: "repaired for a drift-aware method, which compares both",
            });
        }
        source.check(decoder)?;
        let facts = state::facts(self, source, decoder, texts)?;
        state::begin(folder, &facts)?;

        let student = self.inputs == InputSource::Repaired;
        let how = How {
            cross,
            teacher: false,
            weights: self.window_weights.clone(),
            sampling: self.sampling,
            accumulation: self.accumulation,
        };
        let mut calibration = Stream::embed(
            decoder,
            texts.calibration,
            (student, cross || !student),
            how,
        )?;
        let drift = self.measure_drift;
        let how = How {
            cross: drift,
            teacher: drift,
            weights: None,
            sampling: None,
            accumulation: Accumulation::Sum,
        };
        let mut held_out = match texts.held_out {
            Some(windows) => Some(Stream::embed(decoder, windows, (true, drift), how)?),
            None => None,
        };

        let run = BlockRepair {
            decoder,
            source,
            repair: self,
            progress,
        };
        let blocks = decoder.config().layers();
        progress.begin("repair", blocks as u64);
        let mut resuming = true;
        for block in 0..blocks {
            let dense = decoder.block(block)?;
            decoder.release(block);
            let found = match resuming {
                true => state::read_block(folder, block)?,
                false => None,
            };
            resuming = found.is_some();
            let layers = match found {
                Some(layers) => layers,
                None => {
                    let layers = run.run(&dense, &calibration, held_out.as_ref())?;
                    state::write_block(folder, block, &layers)?;
                    layers
                }
            };
            if block + 1 < blocks {
                let repaired = run.repaired(&dense, &layers)?;
                calibration.advance(&dense, &repaired)?;
                if let Some(held_out) = &mut held_out {
                    held_out.advance(&dense, &repaired)?;
                }
            }
            progress.message(&summary(block, &layers, resuming));
            progress.advance(1)?;
        }
        Repaired::open(folder)
    }
}

/// What a block lost and got back.
fn summary(block: usize, layers: &[RepairedLayer], resumed: bool) -> String {
    let energy = |report: &LayerReport| report.held_out.unwrap_or(report.calibration);
    let total: Energy = layers.iter().map(|layer| energy(&layer.report)).sum();
    let resumed = if resumed { ", from an earlier run" } else { "" };
    format!(
        "block {block}: loss {:.4}, repaired {:.4}{resumed}",
        total.loss_before(),
        total.loss()
    )
}

/// Where a linear is in a model, for compressors that choose by it.
pub fn place(decoder: &Decoder<'_>, layer: LayerId) -> Place {
    let config = decoder.config();
    let widths = &config.widths;
    let mixtures = config.mixtures.iter().flatten();
    let heads_per_kv = widths
        .get(layer.block())
        .map_or(1, |widths| widths.heads / widths.kv_heads.max(1));
    Place {
        linear: layer.module().parts[0],
        block: layer.block(),
        blocks: widths.len(),
        heads_per_kv,
        experts: mixtures.map(|mixture| mixture.experts).max().unwrap_or(0),
    }
}
