//! How far the predictions of a pruned mixture are from the dense model's.

use super::plan::ExpertPlan;
use super::select::run_pruned;
use super::{ExpertOptions, ExpertRefits};
use crate::Result;
use crate::tensor::values;
use candle_core::Tensor;
use causal_lm::{Decoder, Head, Hidden, NoTap, Progress, Windows, run_blocks};
use rayon::prelude::*;

/// Logits that are held at once.
const LOGITS: usize = 8 << 20;

/// Hidden states of the dense model behind its last block, to compare pruned ones with.
pub(crate) struct Reference<'a> {
    decoder: &'a Decoder<'a>,
    windows: &'a Windows,
    head: Head,
    hidden: Hidden,
}

impl<'a> Reference<'a> {
    /// Runs the dense model; a step of `progress` is a layer.
    pub(crate) fn new(
        decoder: &'a Decoder<'a>,
        windows: &'a Windows,
        progress: &dyn Progress,
    ) -> Result<Self> {
        Ok(Self {
            decoder,
            windows,
            head: decoder.head()?,
            hidden: run_blocks(decoder, windows, &mut NoTap, progress)?,
        })
    }

    /// KL divergence of the model that a plan leaves from the dense one, mean over all positions, in nats.
    pub(crate) fn of(
        &self,
        pruned: (&ExpertPlan, Option<&ExpertRefits>),
        progress: &dyn Progress,
    ) -> Result<f64> {
        let hidden = run_pruned(self.decoder, self.windows, pruned, progress)?;
        let (mut sum, mut rows) = (0.0, 0);
        for (dense, pruned) in self.hidden.batches().iter().zip(hidden.batches()) {
            let (dense, pruned) = (dense.flatten_to(1)?, pruned.flatten_to(1)?);
            let count = dense.dim(0)?;
            let at_once = (LOGITS / self.head.vocab_size()).max(1);
            for first in (0..count).step_by(at_once) {
                let len = at_once.min(count - first);
                let logits = |x: &Tensor| -> Result<Vec<f32>> {
                    values(&self.head.forward(&x.narrow(0, first, len)?.contiguous()?)?)
                };
                sum += divergence(&logits(&dense)?, &logits(&pruned)?, self.head.vocab_size());
            }
            rows += count;
        }
        Ok(sum / rows.max(1) as f64)
    }
}

/// Σ over rows of KL(softmax(p) ‖ softmax(q)).
fn divergence(p: &[f32], q: &[f32], width: usize) -> f64 {
    let of_row = |(p, q): (&[f32], &[f32])| {
        let log_sum = |row: &[f32]| {
            let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
            max + sum.ln()
        };
        let (of_p, of_q) = (log_sum(p), log_sum(q));
        let terms = p.iter().zip(q).map(|(&p, &q)| {
            let log = f64::from(p) - of_p;
            log.exp() * (log - (f64::from(q) - of_q))
        });
        terms.sum::<f64>()
    };
    // Collected before they are added: the sum does not depend on the threads.
    let rows: Vec<f64> = p
        .par_chunks(width)
        .zip(q.par_chunks(width))
        .map(of_row)
        .collect();
    rows.iter().sum()
}

impl ExpertOptions {
    /// The same with another number of experts.
    pub(crate) fn keeping(self, keep: super::Keep) -> Self {
        Self { keep, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_of_two_coins_is_the_known_one() {
        let (p, q) = ([0.5f32.ln(), 0.5f32.ln()], [0.25f32.ln(), 0.75f32.ln()]);
        let expected = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((divergence(&p, &q, 2) - expected).abs() < 1e-7);
        assert!(divergence(&p, &p, 2).abs() < 1e-12);
    }
}
