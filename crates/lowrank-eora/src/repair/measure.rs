//! What is left of the errors of a linear.

use super::Energy;
use super::inputs::Statistics;
use super::state::RepairedLayer;
use crate::Result;
use crate::solve::Weighting;
use faer::Mat;
use linalg::{dot, product};

/// Squared norms on one set of tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    pub(super) energy: Energy,
    /// Against what the dense model computes.
    pub(super) drift: Option<Energy>,
    /// ‖(W − W_c') X‖² of a merge by requantisation.
    pub(super) requantised: Option<f64>,
}

/// W, W − W_c, and where they exist W − W_c − B A and W − W_c'.
pub(super) fn errors(
    weight: Mat<f64>,
    compressed: Mat<f64>,
    layer: &RepairedLayer,
) -> Result<Vec<Mat<f64>>> {
    let d = &weight - compressed;
    let after = layer
        .factors
        .as_ref()
        .map(|factors| factors.error(d.as_ref()));
    let requantised = match &layer.requantised {
        Some(stored) => Some(&weight - stored.matrix()?),
        None => None,
    };
    Ok([weight, d]
        .into_iter()
        .chain(after)
        .chain(requantised)
        .collect())
}

impl Measured {
    /// From ‖E X‖² of all [`errors`].
    pub(super) fn new(layer: &RepairedLayer, energies: &[f64]) -> Self {
        let mut energies = energies.iter().map(|energy| energy.max(0.0));
        let mut next = || energies.next().unwrap_or(0.0);
        let (target, before) = (next(), next());
        let after = match layer.factors {
            Some(_) => next(),
            None => before,
        };
        Self {
            energy: Energy {
                target,
                before,
                after,
            },
            drift: None,
            requantised: layer.requantised.as_ref().map(|_| next()),
        }
    }

    /// From the [`errors`] and H.
    pub(super) fn by_gram(
        layer: &RepairedLayer,
        errors: &[Mat<f64>],
        statistics: &Statistics,
    ) -> Result<Self> {
        let h = statistics.gram()?;
        let energies = errors.iter().map(|error| h.energy(error.as_ref()));
        let energies: Vec<f64> = energies.collect::<Result<_>>()?;
        let after = if layer.factors.is_some() { 2 } else { 1 };
        let drift = match errors {
            [weight, before, ..] => drift(weight, (before, &errors[after]), statistics)?,
            _ => None,
        };
        Ok(Self {
            drift,
            ..Self::new(layer, &energies)
        })
    }
}

/// ‖W X − V X̂‖² = tr(W H Wᵀ) − 2 tr(W K Vᵀ) + tr(V Ĥ Vᵀ) for V = W − E.
fn drift(
    weight: &Mat<f64>,
    (before, after): (&Mat<f64>, &Mat<f64>),
    statistics: &Statistics,
) -> Result<Option<Energy>> {
    let (Some(teacher), Some(cross)) = (&statistics.teacher, &statistics.inputs.cross) else {
        return Ok(None);
    };
    let target = Weighting::Gram(teacher.matrix()).energy(weight.as_ref())?;
    let wk = product(weight.as_ref(), cross.as_ref());
    let energy = |error: &Mat<f64>| -> Result<f64> {
        let v = weight - error;
        let own = statistics.gram()?.energy(v.as_ref())?;
        Ok((target - 2.0 * dot(wk.as_ref(), v.as_ref()) + own).max(0.0))
    };
    Ok(Some(Energy {
        target,
        before: energy(before)?,
        after: energy(after)?,
    }))
}
