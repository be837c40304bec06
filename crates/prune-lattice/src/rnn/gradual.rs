//! Pruning while training: the sparsity rises along a cubic and the masks are chosen anew every few steps (Zhu and Gupta,
//! arXiv 1710.01878).

use super::model::Rnn;
use crate::{
    error::{Error, Result},
    mask::MaskSet,
    names::with,
    params::ParamSet,
    prune::{PruneConfig, PruneContext, prune_in},
};
use serde::{Deserialize, Serialize};

/// When and how weights are pruned while training. The sparsity at step `t` is
/// `s (1 - (1 - (t - start) / (stop - start))³)`; after `stop` the masks stay as they are. Densities of gates fall from 1 in the
/// same way. Early stopping chooses among the weights after `stop` only.
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

    /// The share of what is to be removed that is removed at a step.
    fn share(&self, step: u64) -> f64 {
        let done = step.saturating_sub(self.start) as f64 / (self.stop - self.start) as f64;
        1.0 - (1.0 - done.min(1.0)).powi(3)
    }

    /// Sparsity at a step.
    pub fn sparsity(&self, step: u64) -> f64 {
        self.prune.sparsity * self.share(step)
    }

    /// The method at a step.
    fn at(&self, step: u64) -> PruneConfig {
        let share = self.share(step);
        self.prune.clone().with(|c| {
            c.sparsity *= share;
            for density in c.densities.iter_mut().flatten() {
                *density += (1.0 - share) * (1.0 - *density);
            }
        })
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
    /// For a run of `updates` steps at most.
    pub(super) fn new(
        config: &'a Gradual,
        rnn: &Rnn,
        given: &MaskSet,
        updates: u64,
    ) -> Result<Self> {
        if config.start >= config.stop || config.every == 0 || config.stop > updates {
            return Err(Error::Setting {
                setting: "gradual pruning",
                reason: format!(
                    "from step {} to step {} every {} steps, in a run of {updates}",
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

    /// Whether the masks after `step` updates are the last ones.
    pub(super) fn is_final(&self, step: u64) -> bool {
        step >= self.config.stop
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
        // Budgets count the entries that exist under the masks that were given.
        let context = match self.given.is_empty() {
            true => PruneContext::default(),
            false => PruneContext::default().within(&self.given),
        };
        let (masks, _) = prune_in(rnn, &context, &self.config.at(step))?;
        self.masks = masks;
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
        let by_gate = g.prune.clone().with(|c| c.densities = Some(vec![0.3, 0.5]));
        let g = Gradual::new(10, 110, 30, by_gate);
        assert_eq!(g.at(10).densities, Some(vec![1.0, 1.0]));
        // Half way, 7/8 of what is to go is gone.
        let half = g.at(60).densities.unwrap();
        assert!((half[0] - (1.0 - 0.875 * 0.7)).abs() < 1e-12);
        assert_eq!(g.at(110).densities, Some(vec![0.3, 0.5]));
    }
}
