//! W and α for LazyEviction, measured on traces.
//!
//! The window is the 80th percentile of the MRI over all layers and heads, as in the paper (arXiv 2506.15969, Sec. 4). The paper gives α per model
//! without a rule; here it is the largest of a grid for which 95 % of the active tokens have an MRI above 1, which is the condition
//! under which the importance function can tell recurring tokens from stale ones. Where no α meets it, the best is taken and
//! `recurring_share` says how far off it is. Statistics belong to the task they were taken from.

use crate::attention::Reduce;
use crate::error::{Error, Result};
use crate::policy::Threshold;
use crate::trace::Trace;
use crate::trace::mri::{self, MriHistogram};
use std::collections::BTreeMap;
use tensor_io::Progress;

/// Share of tokens whose MRI the window covers.
pub const WINDOW_PERCENTILE: f64 = 0.8;
/// Share of active tokens that should have an MRI above 1.
pub const RECURRING_SHARE: f64 = 0.95;
/// Thresholds tried, largest first.
pub const ALPHAS: [f32; 9] = [1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 1e-5];

/// What calibration found.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// W: the 80th percentile of the MRI.
    pub window: usize,
    /// α.
    pub alpha: f32,
    /// Share of active tokens with an MRI above 1 under α.
    pub recurring_share: f64,
    /// Histograms of the KV heads of each layer under α.
    pub layers: BTreeMap<usize, Vec<MriHistogram>>,
}

/// Measures W and α over `traces`, trying each α of `alphas` from the largest.
///
/// # Errors
/// No traces or thresholds; no token active under any; weights that are not finite; a cancelled `progress`.
pub fn calibrate(
    traces: &[Trace],
    alphas: &[f32],
    reduce: Reduce,
    progress: &dyn Progress,
) -> Result<Calibration> {
    let mut best: Option<Calibration> = None;
    for &alpha in alphas {
        let candidate = at(traces, alpha, reduce, progress)?;
        let Some(candidate) = candidate else { continue };
        let enough = candidate.recurring_share >= RECURRING_SHARE;
        if best
            .as_ref()
            .is_none_or(|b| candidate.recurring_share > b.recurring_share)
        {
            best = Some(candidate);
        }
        if enough {
            break;
        }
    }
    best.ok_or_else(|| Error::Setting {
        name: "alphas",
        value: format!("{alphas:?} over {} traces", traces.len()),
        expected: "a threshold that some token passes after its birth",
    })
}

/// The statistics under one α; none if no token is ever active.
fn at(
    traces: &[Trace],
    alpha: f32,
    reduce: Reduce,
    progress: &dyn Progress,
) -> Result<Option<Calibration>> {
    progress.begin(
        &format!("recurrence at α = {alpha}"),
        traces.iter().map(mri::steps).sum(),
    );
    let mut layers: BTreeMap<usize, Vec<MriHistogram>> = BTreeMap::new();
    let mut all = MriHistogram::default();
    for trace in traces {
        let threshold = Threshold::Absolute(alpha);
        for (&index, layer) in &trace.layers {
            let (prompt, scale) = (trace.meta.prompt_len, trace.meta.scale);
            let heads = mri::of_layer(layer, prompt, scale, threshold, reduce, progress)?;
            let held = layers.entry(index).or_default();
            held.resize(held.len().max(heads.len()), MriHistogram::default());
            for (held, head) in held.iter_mut().zip(&heads) {
                held.merge(head);
                all.merge(head);
            }
        }
    }
    Ok(all.percentile(WINDOW_PERCENTILE).map(|window| Calibration {
        window: window as usize,
        alpha,
        recurring_share: all.recurring_share(),
        layers,
    }))
}
