//! One pass of calibration windows through the dense model, shared by every method.

use crate::stats::{
    ColumnStats, Fluctuation, GramCollector, GramStore, LayerStats, Moments, Needs, Part, gains,
};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::block::Norm;
use causal_lm::{Block, Decoder, Hidden, Linear, Progress, Site, Tap, TapResult, Windows};
use std::path::PathBuf;

/// What a calibration collects beside moments.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Collect {
    /// The fluctuation of FLAP's published implementation, for `flap-compat`.
    pub fluctuation: bool,
    /// Gram matrices for least-squares refits, written to this store.
    pub gram: Option<GramStore>,
}

impl Collect {
    /// What methods with these needs read, Gram matrices in `dir`, which must exist and outlive the calibration.
    pub fn new(needs: Needs, dir: impl Into<PathBuf>) -> Self {
        Self {
            fluctuation: needs.fluctuation,
            gram: needs.gram.then(|| GramStore::new(dir)),
        }
    }
}

/// Statistics of all blocks of a model on a set of windows.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// One entry per block.
    pub layers: Vec<LayerStats>,
    /// Gram matrices, when they were collected.
    pub gram: Option<GramStore>,
}

impl Calibration {
    /// Runs `windows` through the dense model, one block in memory at a time; a step of `progress` is a block.
    ///
    /// # Errors
    /// What reading or running the model reports, among it activations that are not finite, and router rows that share experts;
    /// [`Error::Cancelled`].
    pub fn run(
        decoder: &Decoder<'_>,
        windows: &Windows,
        collect: &Collect,
        progress: &dyn Progress,
    ) -> Result<Self> {
        decoder
            .config()
            .refuse_expert_map("pruning attention and MLPs")?;
        let mut hidden = Hidden::embed(decoder, windows)?;
        let mut layers = Vec::with_capacity(decoder.config().layers());
        progress.begin("calibration", decoder.config().layers() as u64);
        for layer in 0..decoder.config().layers() {
            let block = decoder.frame(layer)?;
            let mut expert = |expert: usize| {
                let mlp = decoder.expert(layer, expert)?;
                decoder.release_expert(layer, expert);
                Ok(mlp)
            };
            let mut collector = Collector::new(&block, windows.window_len(), collect)?;
            hidden.advance_experts(&block, &mut expert, &mut collector)?;
            decoder.release(layer);
            layers.push(collector.finish(layer, collect.gram.as_ref(), hidden.batches())?);
            progress.advance(1)?;
        }
        Ok(Self {
            layers,
            gram: collect.gram.clone(),
        })
    }

    /// Statistics of one half of a block.
    ///
    /// # Errors
    /// [`Error::Missing`] when the block has no such half.
    pub fn part(&self, layer: usize, part: Part) -> Result<&ColumnStats> {
        self.layers
            .get(layer)
            .and_then(|stats| stats.part(part))
            .ok_or(Error::Missing {
                layer,
                what: "the statistics of a sublayer",
                need: "calibrate the same model that is pruned",
            })
    }

    /// Gram matrix of the inputs of one half of a block, `[columns, columns]` f32.
    ///
    /// # Errors
    /// [`Error::Missing`] when none were collected, and what reading its file reports.
    pub fn gram(&self, layer: usize, part: Part) -> Result<Tensor> {
        let store = self.gram.as_ref().ok_or(Error::Missing {
            layer,
            what: "the Gram matrix",
            need: "ask for Gram matrices when calibrating",
        })?;
        store.load(layer, part)
    }
}

/// Collects one block's statistics while it runs.
pub(crate) struct Collector {
    window_len: usize,
    attention: Option<PartCollector>,
    mlp: Option<PartCollector>,
}

struct PartCollector {
    stats: ColumnStats,
    /// The projection, where a norm follows, and the sum of its squared outputs.
    output: Option<(Linear, f64)>,
    gram: Option<GramCollector>,
}

impl Collector {
    pub(crate) fn new(block: &Block, window_len: usize, collect: &Collect) -> Result<Self> {
        let (attention, mlp) = (&block.attention, &block.mlp);
        let part = |linear: Option<&Linear>, after: &Option<Norm>| {
            linear
                .map(|linear| PartCollector::new(linear, after.as_ref(), collect))
                .transpose()
        };
        Ok(Self {
            window_len,
            attention: part(attention.attention().map(|a| &a.o), &attention.after)?,
            mlp: part(mlp.body.as_ref().map(|m| &m.down), &mlp.after)?,
        })
    }

    /// Ends the collection, `outputs` being what the block put out.
    pub(crate) fn finish(
        self,
        layer: usize,
        store: Option<&GramStore>,
        outputs: &[Tensor],
    ) -> Result<LayerStats> {
        let finish = |collector: Option<PartCollector>, part| -> Result<Option<ColumnStats>> {
            let Some(PartCollector {
                mut stats,
                output,
                gram,
            }) = collector
            else {
                return Ok(None);
            };
            if let Some((_, sum)) = output {
                let values = stats.moments.count * stats.outputs as u64;
                stats.output_square = Some(sum / values.max(1) as f64);
            }
            if let (Some(store), Some(gram)) = (store, gram) {
                store.save(layer, part, &gram.finish()?)?;
            }
            Ok(Some(stats))
        };
        Ok(LayerStats {
            attention: finish(self.attention, Part::Attention)?,
            mlp: finish(self.mlp, Part::Mlp)?,
            hidden_square: outputs.iter().map(square).sum::<Result<f64>>()?,
        })
    }
}

fn square(batch: &Tensor) -> Result<f64> {
    let sum = batch.to_dtype(DType::F32)?.sqr()?.sum_all()?;
    Ok(sum.to_scalar::<f32>()?.into())
}

impl Tap for Collector {
    fn observe(&mut self, _layer: usize, site: Site, x: &Tensor) -> TapResult {
        let part = match site {
            Site::O => &mut self.attention,
            Site::Down => &mut self.mlp,
            Site::Qkv | Site::GateUp => return Ok(()),
        };
        if let Some(part) = part {
            part.update(x, self.window_len)?;
        }
        Ok(())
    }
}

impl PartCollector {
    fn new(linear: &Linear, after: Option<&Norm>, collect: &Collect) -> Result<Self> {
        let weight = linear.weight()?.to_dtype(DType::F32)?;
        let (outputs, width) = weight.dims2()?;
        let gains = after.map(gains).transpose()?;
        let mut plain_square = vec![0f64; width];
        let mut weight_square = vec![0f64; width];
        let mut weight_abs = vec![0f64; width];
        let rows = weight.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
        for (output, row) in rows.into_iter().enumerate() {
            let gain = gains.as_ref().map_or(1.0, |gains| gains[output]);
            for (column, w) in row.into_iter().map(f64::from).enumerate() {
                plain_square[column] += w * w;
                weight_square[column] += (gain * w).powi(2);
                weight_abs[column] += (gain * w).abs();
            }
        }
        let stats = ColumnStats {
            moments: Moments::new(width),
            samples: 0,
            fluctuation: collect.fluctuation.then(|| Fluctuation::new(width)),
            weight_square,
            weight_abs,
            plain_square: collect.fluctuation.then_some(plain_square),
            output_square: None,
            outputs,
        };
        let output = gains.map(|_| (linear.clone(), 0.0));
        let gram = match collect.gram {
            Some(_) => Some(GramCollector::new(width, weight.device())?),
            None => None,
        };
        Ok(Self {
            stats,
            output,
            gram,
        })
    }

    fn update(&mut self, x: &Tensor, window_len: usize) -> Result<()> {
        if let Some((linear, sum)) = &mut self.output {
            *sum += square(&linear.forward(x)?)?;
        }
        let x = x.to_dtype(DType::F32)?;
        if let Some(gram) = &mut self.gram {
            gram.update(&x)?;
        }
        let (rows, width) = x.dims2()?;
        let values = x.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        self.stats.moments.update(&values);
        self.stats.samples += (rows / window_len) as u64;
        if let Some(fluctuation) = &mut self.stats.fluctuation {
            for sample in values.chunks_exact(window_len * width) {
                fluctuation.update(sample);
            }
        }
        Ok(())
    }
}
