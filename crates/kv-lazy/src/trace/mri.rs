//! Recurrence of attention: how long tokens stay below the threshold between two activations.
//!
//! A token's maximum recurrence interval (MRI) is the longest interval between two decode steps at which its full-cache weight passed the
//! threshold. LazyEviction pays off where most tokens have an MRI above 1, and its window is the 80th percentile.

use super::{LayerTrace, Trace};
use crate::attention::Reduce;
use crate::error::Result;
use crate::policy::Threshold;
use crate::policy::lazy::History;
use rayon::prelude::*;
use tensor_io::Progress;

/// How often each MRI occurs among tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MriHistogram {
    /// Tokens by MRI; index 0 counts tokens never active after birth.
    pub counts: Vec<u64>,
}

impl MriHistogram {
    /// Counts one token.
    pub fn add(&mut self, mri: u32) {
        let mri = mri as usize;
        if self.counts.len() <= mri {
            self.counts.resize(mri + 1, 0);
        }
        self.counts[mri] += 1;
    }

    /// Adds another histogram.
    pub fn merge(&mut self, other: &Self) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        self.counts
            .iter_mut()
            .zip(&other.counts)
            .for_each(|(sum, x)| *sum += x);
    }

    /// All tokens.
    pub fn tokens(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Tokens active at least once after birth.
    pub fn active(&self) -> u64 {
        self.counts.iter().skip(1).sum()
    }

    /// Share of the active tokens with an MRI above 1; 0 if none is active.
    pub fn recurring_share(&self) -> f64 {
        let above: u64 = self.counts.iter().skip(2).sum();
        if above == 0 {
            0.0
        } else {
            above as f64 / self.active() as f64
        }
    }

    /// The smallest MRI that at least a share `p` of the active tokens does not exceed; none if no token is active.
    pub fn percentile(&self, p: f64) -> Option<u32> {
        let wanted = (p * self.active() as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        self.counts
            .iter()
            .enumerate()
            .skip(1)
            .find_map(|(mri, count)| {
                seen += count;
                (seen >= wanted).then_some(mri as u32)
            })
    }
}

/// The histogram of each KV head of a layer, over the decode steps after a prompt of `prompt` positions.
///
/// Reports a step of `progress` for each head and position.
///
/// # Errors
/// Weights that are not finite; a cancelled `progress`.
pub fn of_layer(
    layer: &LayerTrace,
    prompt: usize,
    scale: f64,
    threshold: Threshold,
    reduce: Reduce,
    progress: &dyn Progress,
) -> Result<Vec<MriHistogram>> {
    (0..layer.kv_heads)
        .into_par_iter()
        .map(|head| {
            let mut history = History::default();
            history.append(prompt, 0);
            for t in prompt..layer.tokens {
                let step = (t - prompt + 1) as u32;
                history.append(1, step);
                let weights = group_weights(layer, head, t, scale, reduce)?;
                let level = threshold.level(&weights);
                history.record(step, &weights, |w| w > level);
                progress.advance(1)?;
            }
            history.fold();
            let mut histogram = MriHistogram::default();
            history.mri().iter().for_each(|&mri| histogram.add(mri));
            Ok(histogram)
        })
        .collect()
}

/// Full-cache weights of positions 0..=t, reduced over a KV head's group.
fn group_weights(
    layer: &LayerTrace,
    head: usize,
    t: usize,
    scale: f64,
    reduce: Reduce,
) -> Result<Vec<f32>> {
    let group = layer.group();
    let mut reduced = vec![0.0; t + 1];
    for query_head in head * group..(head + 1) * group {
        let (weights, _) = layer.attention(query_head, t, scale)?;
        reduce.accumulate(&mut reduced, &weights, group);
    }
    Ok(reduced)
}

/// The steps that [`of_layer`] reports for all layers of a trace.
pub(crate) fn steps(trace: &Trace) -> u64 {
    let decoded = trace.tokens.len().saturating_sub(trace.meta.prompt_len);
    let heads: usize = trace.layers.values().map(|layer| layer.kv_heads).sum();
    (heads * decoded) as u64
}

/// The histogram of all heads of all layers together.
///
/// # Errors
/// Weights that are not finite; a cancelled `progress`.
pub fn of_trace(
    trace: &Trace,
    threshold: Threshold,
    reduce: Reduce,
    progress: &dyn Progress,
) -> Result<MriHistogram> {
    let mut all = MriHistogram::default();
    progress.begin("recurrence", steps(trace));
    for layer in trace.layers.values() {
        for head in of_layer(
            layer,
            trace.meta.prompt_len,
            trace.meta.scale,
            threshold,
            reduce,
            progress,
        )? {
            all.merge(&head);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_count_active_tokens_only() {
        let mut histogram = MriHistogram::default();
        [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
            .into_iter()
            .for_each(|m| histogram.add(m));
        assert_eq!(histogram.percentile(0.8), Some(8));
        assert_eq!(histogram.percentile(1.0), Some(10));
        assert!((histogram.recurring_share() - 0.9).abs() < 1e-12);
        assert_eq!(MriHistogram::default().percentile(0.8), None);
    }
}
