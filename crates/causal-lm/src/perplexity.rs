//! Perplexity: the exponential of the mean cross-entropy over all targets.
//!
//! Every position but the first of a window is a target, predicted from the positions before it in
//! the same window.

use crate::decoder::{Decoder, Head};
use crate::ops;
use crate::stream::{Hidden, run_blocks};
use crate::tap::NoTap;
use crate::windows::Windows;
use crate::{Error, Result};
use std::time::Instant;
use tensor_io::Progress;

/// Bytes of hidden states held at once; a longer text goes through the model in several groups.
pub(crate) const HIDDEN_BYTES: usize = 512 << 20;
/// Logits held at once.
pub(crate) const LOGITS: usize = 32 << 20;

/// How well a model predicts a text.
#[derive(Clone, Debug)]
pub struct Perplexity {
    /// Mean cross-entropy of each window, in nats per target.
    pub window_nll: Vec<f64>,
    /// Targets in all.
    pub targets: usize,
    /// Positions that went through the model.
    pub tokens: usize,
    /// Wall time of the measurement, loading of blocks included.
    pub seconds: f64,
}

impl Perplexity {
    /// Measures `decoder` on `windows`; a step of `progress` is one block, or the head, over one group of windows.
    ///
    /// # Errors
    /// What loading or running the model reports, and [`Error::Cancelled`].
    pub fn measure(
        decoder: &Decoder<'_>,
        windows: &Windows,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let start = Instant::now();
        progress.begin("perplexity", steps(decoder, windows));
        let head = decoder.head()?;
        let mut window_nll = Vec::with_capacity(windows.count());
        for group in windows.groups(windows_per_group(decoder, windows)) {
            let hidden = run_blocks(decoder, &group, &mut NoTap, progress)?;
            window_nll.extend(score(&head, &hidden, &group)?);
            progress.advance(1)?;
        }
        if let Some(window) = window_nll.iter().position(|nll| !nll.is_finite()) {
            return Err(Error::NonFinite {
                stage: "the logits".into(),
                window,
                position: 0,
            });
        }
        Ok(Self {
            window_nll,
            targets: windows.targets(),
            tokens: windows.count() * windows.window_len(),
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// Mean cross-entropy in nats per target.
    pub fn nll(&self) -> f64 {
        // Windows have equally many targets, so the mean of means is the mean.
        self.window_nll.iter().sum::<f64>() / self.window_nll.len() as f64
    }

    /// exp of the mean cross-entropy.
    pub fn perplexity(&self) -> f64 {
        self.nll().exp()
    }

    /// Positions per second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

fn steps(decoder: &Decoder<'_>, windows: &Windows) -> u64 {
    let groups = windows
        .count()
        .div_ceil(windows_per_group(decoder, windows));
    (groups * (decoder.config().layers() + 1)) as u64
}

fn windows_per_group(decoder: &Decoder<'_>, windows: &Windows) -> usize {
    let bytes = windows.window_len() * decoder.config().hidden * decoder.dtype().size_in_bytes();
    (HIDDEN_BYTES / bytes).max(1)
}

/// Mean cross-entropy of each window.
fn score(head: &Head, hidden: &Hidden, windows: &Windows) -> Result<Vec<f64>> {
    let len = windows.window_len();
    let mut nll = Vec::with_capacity(windows.targets());
    let mut windows = windows.iter();
    for batch in hidden.batches() {
        let (count, _, width) = batch.dims3()?;
        let rows = batch
            .narrow(1, 0, len - 1)?
            .reshape((count * (len - 1), width))?;
        let targets: Vec<u32> = windows
            .by_ref()
            .take(count)
            .flat_map(|w| &w[1..])
            .copied()
            .collect();
        let step = (LOGITS / head.vocab_size()).max(1);
        for start in (0..targets.len()).step_by(step) {
            let rows = rows.narrow(0, start, step.min(targets.len() - start))?;
            nll.extend(ops::cross_entropy(
                &head.forward(&rows)?,
                &targets[start..][..rows.dim(0)?],
            )?);
        }
    }
    Ok(nll
        .chunks_exact(len - 1)
        .map(|w| w.iter().sum::<f64>() / w.len() as f64)
        .collect())
}
