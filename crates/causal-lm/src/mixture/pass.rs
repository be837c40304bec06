//! Batches on their way through the experts of a block, one expert after the other.

use super::{MappedRows, Moe, Routing};
use crate::attention::Mixer;
use crate::block::{BetweenHalves, Block, Mlp, RopeTables};
use crate::ops;
use crate::tap::{ExpertPass, Routed, Tap};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Tokens of a batch with their gates.
type Chosen = (Vec<u32>, Vec<f32>);

/// Batches on their way through a block with experts.
///
/// Each expert that a token chose is added once, in ascending order: experts may be loaded one at a time, and the sum of a
/// token does not depend on what runs beside it.
pub struct MixturePass<'a> {
    block: &'a Block,
    moe: &'a Moe,
    halves: Vec<BetweenHalves>,
    /// For each batch the tokens of each expert, and behind these those of each constant.
    by_expert: Vec<Vec<Chosen>>,
    sums: Vec<Sum>,
}

impl<'a> MixturePass<'a> {
    /// Sends batches, `[windows, len, hidden]` each, through attention and router. `None` for a block without experts.
    ///
    /// # Errors
    /// What running the block reports, and [`Error::Tap`].
    pub fn begin(
        block: &'a Block,
        batches: &[Tensor],
        (rope, mixer): (&RopeTables, &mut Mixer<'_>),
        tap: &mut dyn Tap,
    ) -> Result<Option<Self>> {
        let Some(moe) = &block.experts else {
            return Ok(None);
        };
        let mut halves = Vec::with_capacity(batches.len());
        for x in batches {
            halves.push(block.first_half(x, rope, mixer, tap)?);
        }
        let inputs: Vec<Tensor> = halves.iter().map(|half| half.input.clone()).collect();
        let routings = inputs.iter().map(|x| moe.route(x));
        let routings: Vec<Routing> = routings.collect::<Result<_>>()?;
        let routed = Routed {
            inputs: &inputs,
            routings: &routings,
        };
        tap.routed(block.layer, &routed)
            .map_err(|source| Error::Tap {
                layer: block.layer,
                source,
            })?;
        Ok(Some(Self {
            block,
            moe,
            by_expert: routings.iter().map(Routing::by_expert).collect(),
            sums: inputs.iter().map(Sum::new).collect::<Result<_>>()?,
            halves,
        }))
    }

    /// The same through all of the block, with each expert that is needed asked for once.
    pub(crate) fn through(
        block: &'a Block,
        batches: &[Tensor],
        run: (&RopeTables, &mut Mixer<'_>),
        expert: &mut dyn FnMut(usize) -> Result<Mlp>,
        tap: &mut dyn Tap,
    ) -> Result<Option<Vec<Tensor>>> {
        let Some(mut pass) = Self::begin(block, batches, run, tap)? else {
            return Ok(None);
        };
        for id in 0..pass.experts() {
            if pass.wants(id) {
                pass.add(id, &expert(id)?, tap)?;
            }
        }
        pass.finish(tap).map(Some)
    }

    /// Experts of the block, those to be added.
    pub fn experts(&self) -> usize {
        self.moe.experts()
    }

    /// Whether a token chose this expert.
    pub fn wants(&self, expert: usize) -> bool {
        let mut batches = self.by_expert.iter();
        batches.any(|of_batch| {
            of_batch
                .get(expert)
                .is_some_and(|(tokens, _)| !tokens.is_empty())
        })
    }

    /// Adds what an expert puts out for the tokens that chose it.
    ///
    /// # Errors
    /// When the expert has other widths than the block, and [`Error::Tap`].
    pub fn add(&mut self, expert: usize, mlp: &Mlp, tap: &mut dyn Tap) -> Result<()> {
        if expert >= self.experts() || !self.wants(expert) {
            return Ok(());
        }
        // What the expert reads of each batch.
        let mut rows = Vec::with_capacity(self.halves.len());
        let (mut tokens, mut gates, mut first) = (Vec::new(), Vec::new(), 0);
        for (half, of_batch) in self.halves.iter().zip(&self.by_expert) {
            let x = &half.input;
            let (of_batch, of_gates) = &of_batch[expert];
            if !of_batch.is_empty() {
                let index = Tensor::new(&of_batch[..], x.device())?;
                rows.push(x.index_select(&index, 0)?);
            }
            tokens.extend(of_batch.iter().map(|token| token + first));
            gates.extend(of_gates);
            first += x.dim(0)? as u32;
        }
        let pass = pass(mlp, Some(expert), Tensor::cat(&rows, 0)?, tokens, gates)?;
        self.observe(&pass, tap)?;
        let weighted = pass.weighted()?;
        let mut at = 0;
        for (sum, of_batch) in self.sums.iter_mut().zip(&self.by_expert) {
            let (of_batch, _) = &of_batch[expert];
            if !of_batch.is_empty() {
                sum.add(of_batch, &weighted.narrow(0, at, of_batch.len())?)?;
            }
            at += of_batch.len();
        }
        Ok(())
    }

    /// Adds the constants that tokens chose, ascending.
    fn add_constants(&mut self) -> Result<()> {
        let mapped = self.moe.mapped.as_ref();
        let constants = mapped.map(MappedRows::constants).transpose()?.flatten();
        let Some(constants) = constants else {
            return Ok(());
        };
        for (sum, of_batch) in self.sums.iter_mut().zip(&self.by_expert) {
            for (at, (tokens, gates)) in of_batch[self.moe.experts()..].iter().enumerate() {
                if !tokens.is_empty() {
                    let gates = Tensor::new(&gates[..], constants.device())?.unsqueeze(1)?;
                    let gates = gates.to_dtype(constants.dtype())?;
                    sum.add(tokens, &gates.broadcast_mul(&constants.narrow(0, at, 1)?)?)?;
                }
            }
        }
        Ok(())
    }

    /// Adds the linear term, constants and the expert that every token passes through; the outputs of the block.
    ///
    /// # Errors
    /// What running it reports, and [`Error::Tap`].
    pub fn finish(mut self, tap: &mut dyn Tap) -> Result<Vec<Tensor>> {
        self.add_constants()?;
        let mut outputs = Vec::with_capacity(self.halves.len());
        let mut first = 0;
        let sums = std::mem::take(&mut self.sums);
        for (sum, half) in sums.into_iter().zip(&self.halves) {
            let x = &half.input;
            let sum = sum.finish(x)?;
            let sum = match &self.moe.term {
                Some(term) => (sum + term.forward(x)?)?,
                None => sum,
            };
            let count = x.dim(0)? as u32;
            outputs.push(match &self.moe.shared {
                None => sum,
                Some(shared) => {
                    let gates = shared.gates(x)?.to_dtype(DType::F32)?;
                    let gates = gates.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
                    let tokens = (first..first + count).collect();
                    let pass = pass(&shared.mlp, None, x.clone(), tokens, gates)?;
                    self.observe(&pass, tap)?;
                    (sum + pass.weighted()?)?
                }
            });
            first += count;
        }
        let done = self.halves.into_iter().zip(outputs);
        done.map(|(half, output)| self.block.second_half(half, output))
            .collect()
    }

    fn observe(&self, pass: &ExpertPass, tap: &mut dyn Tap) -> Result<()> {
        let layer = self.block.layer;
        tap.expert(layer, pass)
            .map_err(|source| Error::Tap { layer, source })
    }
}

fn pass(
    mlp: &Mlp,
    expert: Option<usize>,
    input: Tensor,
    tokens: Vec<u32>,
    gates: Vec<f32>,
) -> Result<ExpertPass> {
    let neurons = mlp.neurons(&input)?;
    Ok(ExpertPass {
        expert,
        tokens,
        gates,
        output: mlp.down.forward(&neurons)?,
        input,
        neurons,
    })
}

impl ExpertPass {
    /// The outputs multiplied by their gates.
    fn weighted(&self) -> Result<Tensor> {
        let output = &self.output;
        let gates = Tensor::new(&self.gates[..], output.device())?;
        let gates = gates.to_dtype(output.dtype())?.unsqueeze(1)?;
        Ok(output.broadcast_mul(&gates)?)
    }
}

/// The sum of what experts put out for a batch, in place where that is possible.
enum Sum {
    Cpu(Vec<f32>),
    Other(Tensor),
}

impl Sum {
    fn new(x: &Tensor) -> Result<Self> {
        Ok(
            match matches!(x.device(), Device::Cpu) && x.dtype() == DType::F32 {
                true => Self::Cpu(vec![0.0; x.elem_count()]),
                false => Self::Other(x.zeros_like()?),
            },
        )
    }

    fn add(&mut self, tokens: &[u32], rows: &Tensor) -> Result<()> {
        match self {
            Self::Cpu(sums) => {
                let width = rows.dim(1)?;
                ops::with_f32(rows, |rows| {
                    for (&token, row) in tokens.iter().zip(rows.chunks(width)) {
                        let sums = &mut sums[token as usize * width..][..width];
                        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                    }
                })
            }
            Self::Other(sum) => {
                let tokens = Tensor::new(tokens, rows.device())?;
                *sum = sum.index_add(&tokens, rows, 0)?;
                Ok(())
            }
        }
    }

    fn finish(self, like: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Cpu(sums) => Tensor::from_vec(sums, like.shape(), like.device())?,
            Self::Other(sum) => sum,
        })
    }
}
