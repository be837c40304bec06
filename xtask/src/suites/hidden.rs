//! How many directions the hidden states of a text use.

use anyhow::{Context, Result};
use candle_core::DType;
use causal_lm::{Decoder, NoProgress, NoTap, Windows, run_blocks};
use eval_report::Row;
use lowrank_eora::metrics::{SpectralMetrics, mean};
use serde_json::json;

/// Measures the states that the head reads, window by window, and adds the means to the row: `mnn`, the published
/// Matrix Nuclear-Norm, `nuclear` and `entropy`.
pub(crate) fn hidden_metrics(
    decoder: &Decoder<'_>,
    windows: &Windows,
    row: &mut Row,
) -> Result<()> {
    let norm = decoder.final_norm()?;
    let mut all = Vec::with_capacity(windows.count());
    // In groups, so that the states of a long text need not be held at once.
    for group in windows.groups(64) {
        let hidden = run_blocks(decoder, &group, &mut NoTap, &NoProgress)?;
        for batch in hidden.batches() {
            let states = norm.forward(batch)?.to_dtype(DType::F32)?;
            for window in 0..states.dim(0)? {
                let metrics = SpectralMetrics::of_tensor(&states.get(window)?);
                all.push(metrics.context("hidden states")?);
            }
        }
    }
    let mut add = |name: &str, get: fn(&SpectralMetrics) -> f64| {
        row.extra
            .insert(name.into(), json!(mean(all.iter().map(get))));
    };
    add("mnn", |metrics| metrics.mnn);
    add("nuclear", |metrics| metrics.nuclear);
    add("entropy", |metrics| metrics.entropy);
    Ok(())
}
