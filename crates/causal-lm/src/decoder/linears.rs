//! Linears of a decoder, as they are stored or as tensors.

use std::ops::Range;

use candle_core::Tensor;

use super::{Decoder, Multiplying};
use crate::block::Block;
use crate::linear::Linear;
use crate::names::{ExpertLayout, LinearName, Module, Run};
use crate::packing::{self, Stored};
use crate::weights::DenseReason;
use crate::{Error, Result};

impl Decoder<'_> {
    /// A linear of rows of a stored weight, all or those of `runs`, as it is stored, or why it is to be a tensor.
    pub(super) fn stored(
        &self,
        name: &str,
        runs: Option<&[Range<usize>]>,
        bias: Option<Tensor>,
    ) -> Result<Stored<Linear>> {
        let execution = match &self.multiplying {
            Multiplying::Tensors => return Ok(Stored::Dense(DenseReason::NotAsked)),
            Multiplying::Floats => {
                return match packing::quantised(self.checkpoint, name) {
                    None => Ok(Stored::Dense(DenseReason::Device)),
                    Some(stored) => Err(Error::QuantisedWeights {
                        tensor: name.to_string(),
                        stored,
                        dtype: self.dtype,
                        device: self.device.location(),
                    }),
                };
            }
            Multiplying::Packed(execution) => execution,
        };
        Ok(match packing::load(self.checkpoint, name, runs)? {
            Stored::Packed(linear) => {
                Stored::Packed(Linear::packed(linear, bias, execution.clone())?)
            }
            Stored::Dense(reason) => Stored::Dense(reason),
        })
    }

    /// The linears of a block's module as they are stored, or why they are to be tensors.
    fn stored_module(
        &self,
        layer: usize,
        module: &Module,
    ) -> Result<Stored<Vec<(LinearName, Linear)>>> {
        if let Multiplying::Tensors = self.multiplying {
            return Ok(Stored::Dense(DenseReason::NotAsked));
        }
        let name = self.config.names.weight(layer, module);
        let bias = self.module_bias(layer, module)?;
        if let &[part] = module.parts {
            let linear = self.stored(&name, None, bias)?;
            return Ok(linear.map(|linear| vec![(part, linear)]));
        }
        let all = self.config.runs(layer, module);
        let mut linears = Vec::new();
        for &part in module.parts {
            let runs = all.iter().filter(|run| run.part == part);
            let runs: Vec<Range<usize>> = runs.map(|run| run.at..run.at + run.rows.len()).collect();
            if runs.is_empty() {
                continue;
            }
            let bias = match &bias {
                None => None,
                Some(bias) => {
                    let pieces = runs.iter().map(|run| bias.narrow(0, run.start, run.len()));
                    let pieces = pieces.collect::<candle_core::Result<Vec<_>>>()?;
                    Some(Tensor::cat(&pieces, 0)?)
                }
            };
            match self.stored(&name, Some(&runs), bias)? {
                Stored::Packed(linear) => linears.push((part, linear)),
                Stored::Dense(reason) => return Ok(Stored::Dense(reason)),
            }
        }
        Ok(Stored::Packed(linears))
    }

    /// The linears of a block's module, each with its rows of the stored tensors.
    pub(super) fn module(
        &self,
        layer: usize,
        module: &Module,
    ) -> Result<Vec<(LinearName, Linear)>> {
        let reason = match self.stored_module(layer, module)? {
            Stored::Packed(linears) => return Ok(linears),
            Stored::Dense(reason) => reason,
        };
        let names = self.config.names;
        let weight = self.load(&names.weight(layer, module))?;
        let bias = self.module_bias(layer, module)?;
        self.split(layer, module, (&weight, bias.as_ref()), reason)
    }

    /// The linears of a stored module.
    fn split(
        &self,
        layer: usize,
        module: &Module,
        (weight, bias): (&Tensor, Option<&Tensor>),
        reason: DenseReason,
    ) -> Result<Vec<(LinearName, Linear)>> {
        if let &[part] = module.parts {
            let (weight, bias) = (weight.clone(), bias.cloned());
            return Ok(vec![(part, Linear::dense(weight, bias, reason))]);
        }
        let runs = self.config.runs(layer, module);
        let of_part = |&part: &LinearName| {
            let runs: Vec<&Run> = runs.iter().filter(|run| run.part == part).collect();
            if runs.is_empty() {
                return None;
            }
            let rows = |x: &Tensor| -> Result<Tensor> {
                let pieces = runs.iter().map(|run| x.narrow(0, run.at, run.rows.len()));
                let pieces = pieces.collect::<candle_core::Result<Vec<_>>>()?;
                // A single run is a view of the stored tensor.
                Ok(match &pieces[..] {
                    [all] => all.clone(),
                    _ => Tensor::cat(&pieces, 0)?,
                })
            };
            let linear = || -> Result<Linear> {
                let bias = bias.map(rows).transpose()?;
                Ok(Linear::dense(rows(weight)?, bias, reason))
            };
            Some(linear().map(|linear| (part, linear)))
        };
        module.parts.iter().filter_map(of_part).collect()
    }

    /// Puts another weight of a stored module, `[out, in]`, in place of its linears in a loaded block.
    ///
    /// # Errors
    /// When the shape is not that of the module.
    pub fn replace(&self, block: &mut Block, module: &Module, weight: &Tensor) -> Result<()> {
        let linears = self.split(block.layer, module, (weight, None), DenseReason::Given)?;
        for (name, linear) in linears {
            if let Some(old) = block.linear_mut(name) {
                old.set_weight(linear.weight()?);
            }
        }
        Ok(())
    }

    pub(super) fn module_bias(&self, layer: usize, module: &Module) -> Result<Option<Tensor>> {
        let bias = self.config.names.bias(layer, module);
        self.checkpoint
            .contains(&bias)
            .then(|| self.load(&bias))
            .transpose()
    }

    /// A linear's weight, `[out, in]`; `None` where the block has no such linear.
    ///
    /// # Errors
    /// What reading the tensor reports, among it values that are not finite.
    pub fn weight(&self, layer: usize, name: LinearName) -> Result<Option<Tensor>> {
        let Some(module) = self.config.names.module_of(name) else {
            return Ok(None);
        };
        if self.config.linear_shape(layer, name).is_none() {
            return Ok(None);
        }
        let parts = self.module(layer, module)?;
        let linear = parts.into_iter().find(|(part, _)| *part == name);
        linear.map(|(_, linear)| linear.weight()).transpose()
    }

    pub(super) fn expert_linear(
        &self,
        layer: usize,
        expert: usize,
        name: LinearName,
    ) -> Result<Linear> {
        let part = self
            .config
            .expert_part(layer, expert, name)
            .ok_or_else(|| {
                let mixture = self.config.mixtures.get(layer).copied().flatten();
                Error::Routing {
                    chosen: expert + 1,
                    experts: mixture.map_or(0, |mixture| mixture.experts),
                }
            })?;
        let range = part.rows.start..part.rows.end;
        let fused = self.config.names.layout() == ExpertLayout::Fused;
        let runs = fused.then_some(std::slice::from_ref(&range));
        let reason = match self.stored(&part.tensor, runs, None)? {
            Stored::Packed(linear) => return Ok(linear),
            Stored::Dense(reason) => reason,
        };
        let weight = match fused {
            false => self.load(&part.tensor)?,
            true => {
                let checkpoint = self.checkpoint;
                checkpoint.rows_as(&part.tensor, range, self.dtype, &self.device)?
            }
        };
        Ok(Linear::dense(weight, None, reason))
    }
}
