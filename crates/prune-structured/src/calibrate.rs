//! One pass of calibration windows through the dense model, shared by every method.

use crate::stats::{
    ColumnStats, Fluctuation, GramCollector, GramStore, LayerStats, Moments, Needs, Part,
};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
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
    /// What reading or running the model reports, among it activations that are not finite;
    /// [`Error::Cancelled`].
    pub fn run(
        decoder: &Decoder<'_>,
        windows: &Windows,
        collect: &Collect,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let mut hidden = Hidden::embed(decoder, windows)?;
        let mut layers = Vec::with_capacity(decoder.config().layers());
        progress.begin("calibration", decoder.config().layers() as u64);
        for layer in 0..decoder.config().layers() {
            let block = decoder.block(layer)?;
            decoder.release(layer);
            let mut collector = Collector::new(&block, windows.window_len(), collect)?;
            hidden.advance(&block, &mut collector)?;
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
    gram: Option<GramCollector>,
}

impl Collector {
    pub(crate) fn new(block: &Block, window_len: usize, collect: &Collect) -> Result<Self> {
        let part = |linear: &Linear| PartCollector::new(linear, collect);
        Ok(Self {
            window_len,
            attention: block.attention.as_ref().map(|a| part(&a.o)).transpose()?,
            mlp: block.mlp.as_ref().map(|m| part(&m.down)).transpose()?,
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
            let Some(PartCollector { stats, gram }) = collector else {
                return Ok(None);
            };
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
    fn new(linear: &Linear, collect: &Collect) -> Result<Self> {
        let weight = linear.weight.to_dtype(DType::F32)?;
        let (outputs, width) = weight.dims2()?;
        let mut weight_square = vec![0f64; width];
        let mut weight_abs = vec![0f64; width];
        for row in weight.to_device(&Device::Cpu)?.to_vec2::<f32>()? {
            for ((square, abs), w) in weight_square.iter_mut().zip(&mut weight_abs).zip(row) {
                *square += f64::from(w) * f64::from(w);
                *abs += f64::from(w.abs());
            }
        }
        let stats = ColumnStats {
            moments: Moments::new(width),
            samples: 0,
            fluctuation: collect.fluctuation.then(|| Fluctuation::new(width)),
            weight_square,
            weight_abs,
            outputs,
        };
        let gram = match collect.gram {
            Some(_) => Some(GramCollector::new(width, weight.device())?),
            None => None,
        };
        Ok(Self { stats, gram })
    }

    fn update(&mut self, x: &Tensor, window_len: usize) -> Result<()> {
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
