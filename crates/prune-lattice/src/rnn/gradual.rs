//! Pruning while training: the sparsity rises along a cubic and the masks are chosen anew every few steps (Zhu and Gupta,
//! arXiv 1710.01878).

use super::model::Rnn;
use crate::{
    error::{Error, Result},
    mask::MaskSet,
    names::with,
    params::ParamSet,
    prune::{PruneConfig, prune},
};
use serde::{Deserialize, Serialize};

/// When and how weights are pruned while training. The sparsity at step `t` is
/// `s (1 - (1 - (t - start) / (stop - start))³)`; after `stop` the masks stay as they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Gradual {
    /// First step at which masks are chosen.
    pub start: u64,
    /// Step of the final sparsity.
    pub stop: u64,
    /// Steps between two choices.
    pub every: u64,
    /// The method and the final sparsity. A method that needs a calibration cannot be used.
    pub prune: PruneConfig,
}

with!(Gradual);

impl Gradual {
    /// Masks chosen every `every` steps from `start` to `stop`.
    pub fn new(start: u64, stop: u64, every: u64, prune: PruneConfig) -> Self {
        Self {
            start,
            stop,
            every,
            prune,
        }
    }

    /// Sparsity at a step.
    pub fn sparsity(&self, step: u64) -> f64 {
        let done = step.saturating_sub(self.start) as f64 / (self.stop - self.start) as f64;
        self.prune.sparsity * (1.0 - (1.0 - done.min(1.0)).powi(3))
    }

    fn chooses_at(&self, step: u64) -> bool {
        let inside = (self.start..=self.stop).contains(&step);
        inside && ((step - self.start).is_multiple_of(self.every) || step == self.stop)
    }
}

/// The masks of a run so far, and the values that pruned weights had: a weight can come back.
pub(super) struct GradualState<'a> {
    config: &'a Gradual,
    given: MaskSet,
    masks: MaskSet,
    values: ParamSet,
}

impl<'a> GradualState<'a> {
    pub(super) fn new(config: &'a Gradual, rnn: &Rnn, given: &MaskSet) -> Result<Self> {
        if config.start >= config.stop || config.every == 0 {
            return Err(Error::Setting {
                setting: "gradual pruning",
                reason: format!(
                    "from step {} to step {} every {} steps",
                    config.start, config.stop, config.every
                ),
            });
        }
        Ok(Self {
            config,
            given: given.clone(),
            masks: given.clone(),
            values: rnn.params().clone(),
        })
    }

    /// New masks where this step chooses some; pruned weights compete with the values they had.
    pub(super) fn masks_at(&mut self, step: u64, rnn: &mut Rnn) -> Result<Option<MaskSet>> {
        if !self.config.chooses_at(step) {
            return Ok(None);
        }
        for (kept, p) in self.values.iter_mut().zip(rnn.params().iter()) {
            match self.masks.get(&p.name) {
                None => kept.data.copy_from_slice(&p.data),
                Some(mask) => mask.merge_kept(&mut kept.data, &p.data),
            }
        }
        *rnn.params_mut() = self.values.clone();
        let config = self.config.prune.clone();
        let sparsity = self.config.sparsity(step);
        let (masks, _) = prune(rnn, &config.with(|c| c.sparsity = sparsity))?;
        self.masks = masks.intersection(&self.given);
        Ok(Some(self.masks.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prune::Method;

    #[test]
    fn the_sparsity_rises_from_zero_to_its_final_value_and_masks_are_chosen_at_both_ends() {
        let g = Gradual::new(10, 110, 30, PruneConfig::new(Method::Magnitude, 0.8));
        assert_eq!(g.sparsity(0), 0.0);
        assert!((g.sparsity(60) - 0.8 * (1.0 - 0.125)).abs() < 1e-12);
        assert!((g.sparsity(500) - 0.8).abs() < 1e-12);
        let steps: Vec<u64> = (0..200).filter(|&t| g.chooses_at(t)).collect();
        assert_eq!(steps, [10, 40, 70, 100, 110]);
    }
}
