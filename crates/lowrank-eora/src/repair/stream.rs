//! Windows on their way through a model, block by block, and passes that show sums what linears are fed.

use super::options::Sampling;
use super::sites::{SITES, linears_at, site_index};
use crate::solve::RefitCollector;
use crate::stats::{
    Accumulation, EnergyCollector, GramCollector, InputCollector, OutputCollector, Rows, Sampler,
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
    pub(super) how: How,
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

/// Windows before a block, and what they are sent through to see the inputs of its linears.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) stream: &'a Stream,
    pub(super) dense: &'a Block,
    /// What the student's states are sent through.
    pub(super) block: &'a Block,
}

/// Something that is summed up over the tokens of an input.
pub(super) trait Sum {
    /// Adds a batch as the linears are fed it, and where K is collected the same tokens as the dense
    /// model feeds them.
    fn update(&mut self, rows: &Rows, teacher: Option<&Rows>) -> Result<()>;

    /// Bytes held.
    fn bytes(&self) -> u64;
}

impl Sum for InputCollector {
    fn update(&mut self, rows: &Rows, teacher: Option<&Rows>) -> Result<()> {
        self.update(rows, teacher)
    }

    fn bytes(&self) -> u64 {
        self.bytes()
    }
}

impl Sum for OutputCollector {
    fn update(&mut self, rows: &Rows, _teacher: Option<&Rows>) -> Result<()> {
        self.update(rows)
    }

    fn bytes(&self) -> u64 {
        self.bytes()
    }
}

impl Sum for EnergyCollector {
    fn update(&mut self, rows: &Rows, _teacher: Option<&Rows>) -> Result<()> {
        self.update(rows)
    }

    fn bytes(&self) -> u64 {
        self.bytes()
    }
}

impl Sum for RefitCollector {
    fn update(&mut self, rows: &Rows, _teacher: Option<&Rows>) -> Result<()> {
        self.update(rows)
    }

    fn bytes(&self) -> u64 {
        self.bytes()
    }
}

/// H of what the dense model feeds.
pub(super) struct TeacherGram(pub(super) GramCollector);

impl Sum for TeacherGram {
    fn update(&mut self, _rows: &Rows, teacher: Option<&Rows>) -> Result<()> {
        teacher.map_or(Ok(()), |teacher| self.0.update(teacher))
    }

    fn bytes(&self) -> u64 {
        self.0.bytes()
    }
}

/// Sums with the input that each is of.
pub(super) type Sums<'a> = Vec<(Site, &'a mut dyn Sum)>;

/// Bytes that the sums of each site held together, by place in [`SITES`].
pub(super) type Held = [u64; SITES.len()];

impl View<'_> {
    /// Shows all tokens to the sums, the same ones in every pass.
    pub(super) fn pass(self, sums: Sums<'_>) -> Result<Held> {
        let mut held = Held::default();
        let (stream, how) = (self.stream, &self.stream.how);
        // Of `block` on the student's states, or of the dense block where there is no student.
        let (hidden, block) = match (&stream.student, &stream.teacher) {
            (Some(student), _) => (student, self.block),
            (None, Some(teacher)) => (teacher, self.dense),
            (None, None) => return Ok(held),
        };
        if sums.is_empty() {
            return Ok(held);
        }
        let mut observer = Observer::new(sums, block.layer, how)?;
        let mut first = 0;
        for (index, batch) in hidden.batches().iter().enumerate() {
            observer.teacher = match &stream.teacher {
                Some(teacher) if how.cross => {
                    let mut record = Recorder::default();
                    let batch = &teacher.batches()[index];
                    let dense = self.dense;
                    dense.forward(batch, &stream.rope, &mut Mixer::Windows, &mut record)?;
                    record.rows
                }
                _ => Default::default(),
            };
            let windows = batch.dims()[0];
            observer.weights = how.weights.as_ref().map(|weights| {
                let windows = weights[first..first + windows].iter();
                windows
                    .flat_map(|&w| std::iter::repeat_n(w, stream.window_len))
                    .collect()
            });
            first += windows;
            block.forward(batch, &stream.rope, &mut Mixer::Windows, &mut observer)?;
        }
        for (site, sum) in &observer.sums {
            held[site_index(*site)] += sum.bytes();
        }
        Ok(held)
    }
}

/// Hands what the linears of one block are fed to the sums.
struct Observer<'a> {
    sums: Sums<'a>,
    samplers: [Option<Sampler>; SITES.len()],
    /// Weights of the tokens of the batch under way.
    weights: Option<Vec<f64>>,
    /// What the dense model feeds the same tokens.
    teacher: [Option<Rows>; SITES.len()],
}

impl<'a> Observer<'a> {
    fn new(sums: Sums<'a>, layer: usize, how: &How) -> Result<Self> {
        let mut samplers = [const { None }; SITES.len()];
        if let Some(sampling) = how.sampling {
            for (index, sampler) in samplers.iter_mut().enumerate() {
                // Every input has draws of its own.
                let seed = sampling
                    .seed
                    .wrapping_add((layer * SITES.len() + index) as u64);
                *sampler = Some(Sampler::new(sampling.importance, sampling.share, seed)?);
            }
        }
        Ok(Self {
            sums,
            samplers,
            weights: None,
            teacher: Default::default(),
        })
    }

    fn update(&mut self, site: Site, x: &Tensor) -> Result<()> {
        if self.sums.iter().all(|(other, _)| *other != site) {
            return Ok(());
        }
        let index = site_index(site);
        let mut rows = Rows::from_tensor(x)?;
        if let Some(weights) = &self.weights {
            rows = rows.weighted(weights)?;
        }
        let mut teacher = self.teacher[index].take();
        if let Some(sampler) = &mut self.samplers[index] {
            let picks = sampler.pick(&rows)?;
            rows = rows.picked(&picks)?;
            teacher = teacher.map(|rows| rows.picked(&picks)).transpose()?;
        }
        for (_, sum) in self.sums.iter_mut().filter(|(other, _)| *other == site) {
            sum.update(&rows, teacher.as_ref())?;
        }
        Ok(())
    }
}

impl Tap for Observer<'_> {
    fn observe(&mut self, _block: usize, site: Site, x: &Tensor) -> TapResult {
        Ok(self.update(site, x).map_err(|source| at(site, source))?)
    }
}

/// Keeps what the linears of one block are fed.
#[derive(Default)]
struct Recorder {
    rows: [Option<Rows>; SITES.len()],
}

impl Tap for Recorder {
    fn observe(&mut self, _block: usize, site: Site, x: &Tensor) -> TapResult {
        let rows = Rows::from_tensor(x).map_err(|source| at(site, source))?;
        self.rows[site_index(site)] = Some(rows);
        Ok(())
    }
}

fn at(site: Site, source: Error) -> Error {
    Error::Layer {
        layer: format!("input of {}", linears_at(site)[0]),
        source: Box::new(source),
    }
}
