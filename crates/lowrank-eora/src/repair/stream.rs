//! Windows on their way through a model, block by block, and the statistics of what linears are fed.

use super::layer::{SITES, site_index, width};
use super::options::Sampling;
use crate::solve::Weighting;
use crate::stats::{
    Accumulation, Collect, Gram, GramCollector, InputCollector, InputStats, Rows, Sampler,
};
use crate::{Error, Result};
use candle_core::Tensor;
use causal_lm::block::RopeTables;
use causal_lm::{Block, Decoder, Hidden, Mixer, NoTap, Site, Tap, TapResult, Windows};

/// One set of windows between two blocks.
pub(super) struct Stream {
    /// Behind the repaired blocks, where anybody reads that.
    student: Option<Hidden>,
    /// Behind the dense blocks, where anybody reads that.
    teacher: Option<Hidden>,
    rope: RopeTables,
    window_len: usize,
    how: How,
}

/// How the tokens of a stream are counted.
#[derive(Clone, Debug, Default)]
pub(super) struct How {
    /// K.
    pub(super) cross: bool,
    /// The dense model's own H.
    pub(super) teacher: bool,
    pub(super) weights: Option<Vec<f64>>,
    pub(super) sampling: Option<Sampling>,
    pub(super) accumulation: Accumulation,
}

/// What is known of one input.
#[derive(Debug)]
pub(super) struct Statistics {
    /// Of what the linears are fed.
    pub(super) inputs: InputStats,
    /// H of what the dense model feeds them.
    pub(super) teacher: Option<Gram>,
}

impl Statistics {
    /// H.
    pub(super) fn gram(&self) -> Result<Weighting<'_>> {
        let gram = self.inputs.gram.as_ref().ok_or(Error::MissingStatistic {
            method: "a loss",
            statistic: "H",
        })?;
        Ok(Weighting::Gram(gram.matrix()))
    }
}

/// Statistics by place in [`SITES`]; `None` where the block lacks that half or was not asked.
pub(super) type SiteStats = [Option<Statistics>; 4];

impl Stream {
    pub(super) fn embed(
        decoder: &Decoder<'_>,
        windows: &Windows,
        (student, teacher): (bool, bool),
        how: How,
    ) -> Result<Self> {
        if let Some(weights) = &how.weights
            && weights.len() != windows.count()
        {
            return Err(Error::Shape {
                what: "weights of calibration windows",
                found: vec![weights.len()],
                expected: vec![windows.count()],
            });
        }
        let hidden = Hidden::embed(decoder, windows)?;
        Ok(Self {
            student: student.then(|| hidden.clone()),
            teacher: teacher.then_some(hidden),
            rope: decoder.rope(0, windows.window_len())?,
            window_len: windows.window_len(),
            how,
        })
    }

    /// Statistics of the inputs at some sites: of `block` on the student's states, or of the dense
    /// block where there is no student.
    pub(super) fn collect(
        &self,
        dense: &Block,
        block: &Block,
        sites: &[Site],
    ) -> Result<SiteStats> {
        let (hidden, block) = match (&self.student, &self.teacher) {
            (Some(student), _) => (student, block),
            (None, Some(teacher)) => (teacher, dense),
            (None, None) => return Ok(Default::default()),
        };
        let mut collector = Collector::new(block, sites, &self.how)?;
        let mut first = 0;
        for (index, batch) in hidden.batches().iter().enumerate() {
            collector.teacher = match &self.teacher {
                Some(teacher) if self.how.cross => {
                    let mut record = Recorder::new(sites);
                    let batch = &teacher.batches()[index];
                    dense.forward(batch, &self.rope, &mut Mixer::Windows, &mut record)?;
                    record.rows
                }
                _ => Default::default(),
            };
            let windows = batch.dims()[0];
            collector.weights = self.how.weights.as_ref().map(|weights| {
                let windows = weights[first..first + windows].iter();
                windows
                    .flat_map(|&w| std::iter::repeat_n(w, self.window_len))
                    .collect()
            });
            first += windows;
            block.forward(batch, &self.rope, &mut Mixer::Windows, &mut collector)?;
        }
        Ok(collector.sites.map(|site| site.map(SiteCollector::finish)))
    }

    /// Sends the windows through a block.
    pub(super) fn advance(&mut self, dense: &Block, repaired: &Block) -> Result<()> {
        if let Some(student) = &mut self.student {
            student.advance(repaired, &mut NoTap)?;
        }
        if let Some(teacher) = &mut self.teacher {
            teacher.advance(dense, &mut NoTap)?;
        }
        Ok(())
    }
}

/// Sums up what the linears of one block are fed.
struct Collector {
    sites: [Option<SiteCollector>; 4],
    /// Weights of the tokens of the batch under way.
    weights: Option<Vec<f64>>,
    /// What the dense model feeds the same tokens.
    teacher: [Option<Rows>; 4],
}

struct SiteCollector {
    sums: InputCollector,
    teacher: Option<GramCollector>,
    sampler: Option<Sampler>,
}

impl SiteCollector {
    fn finish(self) -> Statistics {
        Statistics {
            inputs: self.sums.finish(),
            teacher: self.teacher.map(GramCollector::finish),
        }
    }
}

impl Collector {
    fn new(block: &Block, sites: &[Site], how: &How) -> Result<Self> {
        let mut collectors = [const { None }; 4];
        let collect = Collect {
            gram: true,
            cross: how.cross,
        };
        for &site in sites {
            let Some(width) = width(block, site) else {
                continue;
            };
            let index = site_index(site);
            let sampler = how.sampling.map(|sampling| {
                // Every input has draws of its own.
                let seed = sampling
                    .seed
                    .wrapping_add((block.layer * SITES.len() + index) as u64);
                Sampler::new(sampling.importance, sampling.share, seed)
            });
            collectors[index] = Some(SiteCollector {
                sums: InputCollector::new(width, collect, how.accumulation)?,
                teacher: (how
                    .teacher
                    .then(|| GramCollector::new(width, how.accumulation)))
                .transpose()?,
                sampler: sampler.transpose()?,
            });
        }
        Ok(Self {
            sites: collectors,
            weights: None,
            teacher: Default::default(),
        })
    }

    fn update(&mut self, site: Site, x: &Tensor) -> Result<()> {
        let index = site_index(site);
        let Some(site) = &mut self.sites[index] else {
            return Ok(());
        };
        let mut rows = Rows::from_tensor(x)?;
        if let Some(weights) = &self.weights {
            rows = rows.weighted(weights)?;
        }
        let mut teacher = self.teacher[index].take();
        if let Some(sampler) = &mut site.sampler {
            let picks = sampler.pick(&rows)?;
            rows = rows.picked(&picks)?;
            teacher = teacher.map(|rows| rows.picked(&picks)).transpose()?;
        }
        if let (Some(sum), Some(teacher)) = (&mut site.teacher, &teacher) {
            sum.update(teacher)?;
        }
        site.sums.update(&rows, teacher.as_ref())
    }
}

impl Tap for Collector {
    fn observe(&mut self, _block: usize, site: Site, x: &Tensor) -> TapResult {
        Ok(self.update(site, x).map_err(|source| at(site, source))?)
    }
}

/// Keeps what the linears of one block are fed.
struct Recorder<'a> {
    sites: &'a [Site],
    rows: [Option<Rows>; 4],
}

impl<'a> Recorder<'a> {
    fn new(sites: &'a [Site]) -> Self {
        Self {
            sites,
            rows: Default::default(),
        }
    }
}

impl Tap for Recorder<'_> {
    fn observe(&mut self, _block: usize, site: Site, x: &Tensor) -> TapResult {
        if self.sites.contains(&site) {
            let rows = Rows::from_tensor(x).map_err(|source| at(site, source))?;
            self.rows[site_index(site)] = Some(rows);
        }
        Ok(())
    }
}

fn at(site: Site, source: Error) -> Error {
    let (_, linears) = SITES[site_index(site)];
    Error::Layer {
        layer: format!("input of {}", linears[0].path()),
        source: Box::new(source),
    }
}
