//! Adam (Kingma and Ba 2015) with clipping of the global gradient norm, under masks.

use crate::{error::Result, mask::MaskSet, params::ParamSet};

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.999;
const EPSILON: f32 = 1e-8;

pub(crate) struct Adam {
    first: ParamSet,
    second: ParamSet,
    step: i32,
}

impl Adam {
    pub(crate) fn new(params: &ParamSet) -> Self {
        Self {
            first: params.zeros_like(),
            second: params.zeros_like(),
            step: 0,
        }
    }

    /// One step. The masks go over the gradients, both moments and the updated weights: a moment left alone would bring
    /// pruned weights back.
    pub(crate) fn update(
        &mut self,
        params: &mut ParamSet,
        gradients: &mut ParamSet,
        rate: f32,
        clip: f32,
        masks: &MaskSet,
    ) -> Result<()> {
        masks.apply(gradients)?;
        let squares: f64 = gradients
            .iter()
            .flat_map(|g| &g.data)
            .map(|g| f64::from(*g) * f64::from(*g))
            .sum();
        let norm = squares.sqrt() as f32;
        let scale = if norm > clip { clip / norm } else { 1.0 };
        self.step += 1;
        let rate = rate * (1.0 - BETA2.powi(self.step)).sqrt() / (1.0 - BETA1.powi(self.step));
        let moments = self.first.iter_mut().zip(self.second.iter_mut());
        for ((p, g), (m, v)) in params.iter_mut().zip(gradients.iter()).zip(moments) {
            for (((p, g), m), v) in p
                .data
                .iter_mut()
                .zip(&g.data)
                .zip(&mut m.data)
                .zip(&mut v.data)
            {
                let g = g * scale;
                *m = BETA1 * *m + (1.0 - BETA1) * g;
                *v = BETA2 * *v + (1.0 - BETA2) * g * g;
                *p -= rate * *m / (v.sqrt() + EPSILON);
            }
        }
        masks.apply(&mut self.first)?;
        masks.apply(&mut self.second)?;
        masks.apply(params)
    }
}
