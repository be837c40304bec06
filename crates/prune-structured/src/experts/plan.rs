//! Which experts of which layer stay, as plain data.

use super::merge;
use super::method::ExpertMethod;
use super::{ExpertCompensation, ExpertRefits, compensation};
use crate::plan::plan_file;
use crate::tensor::values;
use crate::{Error, Result};
use candle_core::Tensor;
use causal_lm::block::Mlp;
use causal_lm::config::{ExpertMap, Mixture};
use causal_lm::{Decoder, Linear};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Experts of a model that stay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ExpertPlan {
    /// The method that chose them, unless their number is that of the model.
    pub method: Option<ExpertMethod>,
    /// What makes up for the others.
    pub compensation: ExpertCompensation,
    /// Experts that are chosen for a token, where that changes.
    pub chosen: Option<usize>,
    /// Every layer; `None` for those without experts.
    pub layers: Vec<Option<LayerExperts>>,
}

/// Experts of a layer that stay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LayerExperts {
    /// Experts of the dense layer.
    pub experts: usize,
    /// Those that stay, ascending.
    pub kept: Vec<usize>,
    /// For each of `kept` what its weights are the weighted sum of; nothing where they are its own.
    pub members: Vec<Vec<Member>>,
    /// For each of `kept` the factors on its output: none, one, or one for each channel.
    pub factors: Vec<Vec<f64>>,
    /// For each of `kept` the neurons that stay, ascending: as many of each expert, or none where all stay.
    #[serde(default)]
    pub neurons: Vec<Vec<usize>>,
    /// Where all router rows stay, what each stands for: a place in `kept`, or behind these one in `novices`. Empty where the
    /// rows of `kept` alone stay.
    #[serde(default)]
    pub rows: Vec<usize>,
    /// Constants in the place of experts that are gone, a number for each channel of the layer's output.
    #[serde(default)]
    pub novices: Vec<Vec<f32>>,
}

/// A part of merged weights.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Whose weights.
    pub expert: usize,
    /// Their share.
    pub share: f64,
    /// Whether their neurons are put in the order of the expert that stays.
    pub align: bool,
    /// Whether their row of the router is a part of that of the expert that stays, in the same share. Of members without it
    /// the row of the expert that stays is kept.
    #[serde(default)]
    pub row: bool,
}

impl ExpertPlan {
    /// Whether it changes nothing.
    pub fn is_identity(&self) -> bool {
        self.chosen.is_none() && self.layers.iter().flatten().all(LayerExperts::is_identity)
    }

    /// Refuses the plan of another model, and too few experts for a token.
    pub(crate) fn check(&self, decoder: &Decoder<'_>) -> Result<()> {
        let mismatch = |reason: String| Err(Error::PlanMismatch(reason));
        if self.chosen == Some(0) {
            return mismatch("a token goes to 0 experts".into());
        }
        decoder.config().refuse_expert_map("pruning experts")?;
        let mixtures = &decoder.config().mixtures;
        if self.layers.len() != mixtures.len() {
            return mismatch(format!(
                "{} layers, but the model has {}",
                self.layers.len(),
                mixtures.len()
            ));
        }
        for (layer, (plan, mixture)) in self.layers.iter().zip(mixtures).enumerate() {
            let (plan, mixture) = match (plan, mixture) {
                (Some(plan), Some(mixture)) => (plan, mixture),
                (None, None) => continue,
                _ => return mismatch(format!("layer {layer} has experts in one of them alone")),
            };
            let shapes = plan.experts == mixture.experts && plan.lists_all();
            let mut members = plan.members.iter().flatten();
            if !shapes
                || !ascending_below(&plan.kept, mixture.experts)
                || members.any(|member| member.expert >= mixture.experts)
            {
                return mismatch(format!(
                    "layer {layer}: experts {:?} of {}",
                    plan.kept, mixture.experts
                ));
            }
            let width = plan.neurons.first().map_or(0, Vec::len);
            let of_width = |neurons: &Vec<usize>| {
                neurons.len() == width && ascending_below(neurons, mixture.width)
            };
            if !plan.neurons.iter().all(of_width) {
                return mismatch(format!(
                    "layer {layer}: every expert must keep as many neurons, ascending ids below {}",
                    mixture.width
                ));
            }
            let channels = decoder.config().hidden;
            let fits = |factors: &Vec<f64>| [0, 1, channels].contains(&factors.len());
            if !plan.factors.iter().all(fits) {
                return mismatch(format!(
                    "layer {layer}: an expert has one factor or one for each of {channels} channels"
                ));
            }
            let map = plan
                .map()
                .map_err(|error| Error::PlanMismatch(format!("layer {layer}: {error}")))?;
            let (rows, constants) = match &map {
                Some(map) => (map.rows(), map.constants()),
                None => (plan.kept.len(), 0),
            };
            let is_constant = |values: &Vec<f32>| {
                values.len() == channels && values.iter().all(|value| value.is_finite())
            };
            if map.is_some() && rows != mixture.experts
                || constants != plan.novices.len()
                || !plan.novices.iter().all(is_constant)
            {
                return mismatch(format!(
                    "layer {layer}: {} constants for {constants} of {rows} router rows; each has {channels} finite numbers",
                    plan.novices.len()
                ));
            }
            if plan.kept.is_empty() {
                return mismatch(format!("layer {layer}: at least one expert has to stay"));
            }
            let chosen = self.chosen.unwrap_or(mixture.chosen);
            if rows < chosen {
                return Err(Error::Experts {
                    layer,
                    kept: rows,
                    chosen,
                });
            }
        }
        Ok(())
    }

    /// Whether all layers with experts keep as many, of one width and with a router row each, which is what the configs of stock
    /// runtimes can say.
    pub fn is_uniform(&self) -> bool {
        let layers = self.layers.iter().flatten();
        if layers.clone().any(LayerExperts::keeps_rows) {
            return false;
        }
        let mut shapes = layers.map(|layer| (layer.kept.len(), layer.width()));
        let first = shapes.next();
        shapes.all(|shape| Some(shape) == first)
    }

    /// Experts and their widths in each layer as the plan leaves them.
    pub fn mixtures(&self, decoder: &Decoder<'_>) -> Vec<Option<Mixture>> {
        let dense = decoder.config().mixtures.iter();
        let left = |(mixture, plan): (&Option<Mixture>, &Option<LayerExperts>)| {
            let (mixture, plan) = ((*mixture)?, plan.as_ref()?);
            Some(Mixture {
                experts: plan.kept.len(),
                width: plan.width().unwrap_or(mixture.width),
                chosen: self.chosen.unwrap_or(mixture.chosen),
                ..mixture
            })
        };
        dense.zip(&self.layers).map(left).collect()
    }

    /// What the router rows of each layer stand for where they are not the experts that stay, as the plan leaves them.
    pub(crate) fn maps(&self) -> Result<Vec<Option<ExpertMap>>> {
        let of_layer = |layer: &Option<LayerExperts>| match layer {
            Some(layer) => Ok(layer.map()?),
            None => Ok(None),
        };
        self.layers.iter().map(of_layer).collect()
    }

    /// Reads a plan from JSON. Plans of earlier versions, which list no neurons, keep all of them.
    ///
    /// # Errors
    /// [`Error::PlanFile`] when the file cannot be read or is not a plan.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| plan_file(path, e))?;
        let mut plan: Self = serde_json::from_slice(&bytes).map_err(|e| plan_file(path, e))?;
        for (layer, experts) in plan.layers.iter_mut().enumerate() {
            let Some(experts) = experts else { continue };
            let kept = experts.kept.len();
            if experts.neurons.is_empty() {
                experts.neurons = vec![vec![]; kept];
            }
            if !experts.lists_all() {
                let reason = format!(
                    "layer {layer}: expected lists of {kept} entries, one for each expert that stays"
                );
                return Err(plan_file(path, reason));
            }
        }
        Ok(plan)
    }

    /// Writes it as JSON, whole or not at all.
    ///
    /// # Errors
    /// [`Error::PlanFile`] when the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        tensor_io::atomic::write_json(path, self).map_err(|e| plan_file(path, e))
    }
}

pub(crate) fn ascending_below(ids: &[usize], end: usize) -> bool {
    ids.is_sorted_by(|a, b| a < b) && ids.last().is_none_or(|&last| last < end)
}

impl LayerExperts {
    /// Some experts as they are.
    pub fn keep(experts: usize, mut kept: Vec<usize>) -> Self {
        kept.sort_unstable();
        Self {
            experts,
            members: vec![vec![]; kept.len()],
            factors: vec![vec![]; kept.len()],
            neurons: vec![vec![]; kept.len()],
            rows: vec![],
            novices: vec![],
            kept,
        }
    }

    /// Neurons of each expert, where some of the model's are gone.
    pub fn width(&self) -> Option<usize> {
        self.neurons
            .first()
            .map(Vec::len)
            .filter(|&width| width > 0)
    }

    /// Whether all router rows stay, so that some share experts or stand for constants.
    pub fn keeps_rows(&self) -> bool {
        !self.rows.is_empty()
    }

    /// What router rows stand for, where all of them stay.
    pub(crate) fn map(&self) -> causal_lm::Result<Option<ExpertMap>> {
        match self.rows.is_empty() {
            true => Ok(None),
            false => ExpertMap::new(self.rows.clone(), self.kept.len()).map(Some),
        }
    }

    /// Whether each list has an entry for each expert that stays.
    fn lists_all(&self) -> bool {
        let lists = [self.members.len(), self.factors.len(), self.neurons.len()];
        lists.iter().all(|list| *list == self.kept.len())
    }

    /// Whether it changes nothing.
    pub fn is_identity(&self) -> bool {
        self.kept.len() == self.experts
            && !self.keeps_rows()
            && (0..self.kept.len()).all(|at| self.is_own(at))
    }

    /// Whether the weights of `kept[at]` are the model's.
    pub(crate) fn is_own(&self, at: usize) -> bool {
        self.members[at].is_empty() && self.factors[at].is_empty() && self.neurons[at].is_empty()
    }

    /// The constants, `[constants, channels]` as the model is computed; `None` without any.
    pub(crate) fn constants(&self, decoder: &Decoder<'_>) -> Result<Option<Tensor>> {
        if self.novices.is_empty() {
            return Ok(None);
        }
        let shape = (self.novices.len(), decoder.config().hidden);
        let constants = Tensor::from_vec(self.novices.concat(), shape, decoder.device())?;
        Ok(Some(constants.to_dtype(decoder.dtype())?))
    }

    /// The expert at `kept[at]` with what the plan makes of its weights.
    pub(crate) fn expert(
        &self,
        decoder: &Decoder<'_>,
        layer: usize,
        at: usize,
        refits: Option<&ExpertRefits>,
    ) -> Result<Mlp> {
        let mut mlp = self.whole(decoder, layer, at)?;
        let neurons = &self.neurons[at];
        if !neurons.is_empty() {
            mlp = narrowed(&mlp, neurons)?;
            if let Some(down) = refits
                .map(|refits| refits.load(layer, at))
                .transpose()?
                .flatten()
            {
                let like = mlp.down.weight()?;
                let down = down.to_dtype(like.dtype())?.to_device(like.device())?;
                mlp.down.set_weight(down);
            }
        }
        let factors = &self.factors[at];
        if !factors.is_empty() {
            mlp.down = scaled(&mlp.down, factors)?;
        }
        Ok(mlp)
    }
}

impl LayerExperts {
    /// The expert at `kept[at]`, merged where it is, with all its neurons and without factors.
    pub(crate) fn whole(&self, decoder: &Decoder<'_>, layer: usize, at: usize) -> Result<Mlp> {
        if !self.members[at].is_empty() {
            return merge::merged(decoder, layer, self.kept[at], &self.members[at]);
        }
        let mlp = decoder.expert(layer, self.kept[at])?;
        decoder.release_expert(layer, self.kept[at]);
        Ok(mlp)
    }
}

/// An MLP with some of its neurons.
pub(crate) fn narrowed(mlp: &Mlp, neurons: &[usize]) -> Result<Mlp> {
    let ids = neurons.iter().map(|&neuron| neuron as u32);
    let ids = Tensor::from_iter(ids, mlp.up.weight()?.device())?;
    let select = |linear: &Linear, dim: usize| -> Result<Linear> {
        let weight = linear.weight()?.contiguous()?.index_select(&ids, dim)?;
        Ok(Linear::new(weight, linear.bias().cloned()))
    };
    Ok(Mlp {
        gate: mlp.gate.as_ref().map(|gate| select(gate, 0)).transpose()?,
        up: select(&mlp.up, 0)?,
        down: select(&mlp.down, 1)?,
        activation: mlp.activation,
    })
}

/// Rows of a weight times factors: one for all, or one for each.
fn scaled(linear: &Linear, factors: &[f64]) -> Result<Linear> {
    let like = linear.weight()?;
    let (rows, columns) = like.dims2()?;
    let mut weights = values(&like)?;
    for (row, weights) in weights.chunks_mut(columns).enumerate() {
        let factor = factors.get(row).or(factors.first()).copied().unwrap_or(1.0);
        weights
            .iter_mut()
            .for_each(|w| *w = (f64::from(*w) * factor) as f32);
    }
    let weight = Tensor::from_vec(weights, (rows, columns), like.device())?;
    let weight = weight.to_dtype(like.dtype())?;
    Ok(Linear::new(weight, linear.bias().cloned()))
}

impl Default for ExpertPlan {
    fn default() -> Self {
        Self {
            method: None,
            compensation: compensation::NoExpertCompensation.into(),
            chosen: None,
            layers: vec![],
        }
    }
}
