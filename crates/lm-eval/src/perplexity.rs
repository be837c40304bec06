//! Perplexity: the exponential of the mean cross-entropy over all targets.

use std::f64::consts::LN_2;
use std::time::Instant;

use candle_core::Tensor;
use causal_lm::{Decoder, Head, Hidden, NoTap, cross_entropy, run_blocks};
use tensor_io::Progress;

use crate::Result;
use crate::memory::{HIDDEN_BYTES, LOGITS};
use crate::scored::{ScoredWindows, Targets, TextSize};

/// How well a model predicts a text.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Perplexity {
    /// Mean cross-entropy of each window, in nats per target.
    pub window_nll: Vec<f64>,
    /// Targets of each window.
    pub window_targets: Vec<usize>,
    /// Positions that went through the model.
    pub tokens: usize,
    /// Wall time of the measurement, loading of blocks included.
    pub seconds: f64,
    /// Size of the text, where the targets are all of it.
    pub text: Option<TextSize>,
}

impl Perplexity {
    /// Measures `decoder` on `windows`; a step of `progress` is one block, or the head, over one group of windows.
    ///
    /// One block's weights are in memory at a time.
    ///
    /// # Errors
    /// What loading or running the model reports, and [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn measure(
        decoder: &Decoder<'_>,
        windows: &ScoredWindows,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let start = Instant::now();
        progress.begin("perplexity", steps(decoder, windows));
        let head = decoder.head()?;
        let mut window_nll = Vec::with_capacity(windows.count());
        for (inputs, targets) in windows.groups(windows_per_group(decoder, windows)) {
            let hidden = run_blocks(decoder, &inputs, &mut NoTap, progress)?;
            window_nll.extend(score(&head, &hidden, targets)?);
            progress.advance(1)?;
        }
        if let Some(window) = window_nll.iter().position(|nll| !nll.is_finite()) {
            return Err(causal_lm::Error::NonFinite {
                stage: "the logits".into(),
                window,
                position: 0,
            }
            .into());
        }
        Ok(Self {
            window_nll,
            window_targets: windows.scored().map(|(_, tokens)| tokens.len()).collect(),
            tokens: windows.count() * windows.inputs().window_len(),
            seconds: start.elapsed().as_secs_f64(),
            text: windows.text_size(),
        })
    }

    /// Targets in all.
    pub fn targets(&self) -> usize {
        self.window_targets.iter().sum()
    }

    /// Minus the log-likelihood of all targets, in nats.
    pub fn total_nll(&self) -> f64 {
        let windows = self.window_nll.iter().zip(&self.window_targets);
        windows.map(|(nll, &targets)| nll * targets as f64).sum()
    }

    /// Mean cross-entropy in nats per target.
    pub fn nll(&self) -> f64 {
        self.total_nll() / self.targets() as f64
    }

    /// exp of the mean cross-entropy.
    pub fn perplexity(&self) -> f64 {
        self.nll().exp()
    }

    /// exp of the cross-entropy per word of the text, where the targets are all of it.
    pub fn word_perplexity(&self) -> Option<f64> {
        let text = self.text?;
        Some((self.total_nll() / text.words as f64).exp())
    }

    /// exp of the cross-entropy per byte of the text, where the targets are all of it.
    pub fn byte_perplexity(&self) -> Option<f64> {
        let text = self.text?;
        Some((self.total_nll() / text.bytes as f64).exp())
    }

    /// Bits per byte of the text, where the targets are all of it.
    pub fn bits_per_byte(&self) -> Option<f64> {
        let text = self.text?;
        Some(self.total_nll() / text.bytes as f64 / LN_2)
    }

    /// Positions per second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

fn steps(decoder: &Decoder<'_>, windows: &ScoredWindows) -> u64 {
    let groups = windows
        .count()
        .div_ceil(windows_per_group(decoder, windows));
    (groups * (decoder.config().layers() + 1)) as u64
}

fn windows_per_group(decoder: &Decoder<'_>, windows: &ScoredWindows) -> usize {
    let length = windows.inputs().window_len();
    let bytes = length * decoder.config().hidden * decoder.dtype().size_in_bytes();
    (HIDDEN_BYTES / bytes).max(1)
}

/// Mean cross-entropy of each window.
fn score(head: &Head, hidden: &Hidden, targets: &[Targets]) -> Result<Vec<f64>> {
    let mut means = Vec::with_capacity(targets.len());
    let mut windows = targets.iter();
    let step = (LOGITS / head.vocab_size()).max(1);
    for batch in hidden.batches() {
        let (count, length, _) = batch.dims3()?;
        let batch = batch.flatten_to(1)?;
        let windows: Vec<&Targets> = windows.by_ref().take(count).collect();
        // Each target with the row of the batch whose logits predict it.
        let targets = windows.iter().enumerate().flat_map(|(window, targets)| {
            let rows = (window * length + targets.from) as u32..;
            rows.zip(targets.tokens.iter().copied())
        });
        let (rows, tokens): (Vec<u32>, Vec<u32>) = targets.unzip();
        let mut nll = Vec::with_capacity(tokens.len());
        for (rows, tokens) in rows.chunks(step).zip(tokens.chunks(step)) {
            let rows = batch.index_select(&Tensor::new(rows, batch.device())?, 0)?;
            nll.extend(cross_entropy(&head.forward(&rows)?, tokens)?);
        }
        let mut nll = nll.into_iter();
        for window in windows {
            let count = window.tokens.len();
            means.push(nll.by_ref().take(count).sum::<f64>() / count as f64);
        }
    }
    Ok(means)
}
