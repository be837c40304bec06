//! How fast one sequence is read and continued, in alternation with the dense model.

use anyhow::{Context, Result};
use causal_lm::{Model, Windows};
use eval_report::{ROUNDS, Rounds, Row};
use kv_lazy::CacheConfig;

use crate::suites::kv::perplexity::prompt;
use crate::suites::kv::policy;

/// Tokens that are decoded at most.
const DECODED: usize = 96;

/// Names of the columns of prefill: tokens per second, and those divided by the dense model's.
pub(super) const PREFILL: &str = "prefill_tokens_per_second";
pub(super) const PREFILL_RATIO: &str = "prefill_speedup";

/// Fills the speeds of a model under its caches.
pub(super) fn fill(
    row: &mut Row,
    own: (&Model<'_>, Option<&CacheConfig>),
    dense: Option<&Model<'_>>,
    windows: &Windows,
) -> Result<()> {
    let tokens = windows.iter().next().context("no windows")?;
    let runs: Vec<_> = [Some(own), dense.map(|dense| (dense, None))]
        .into_iter()
        .flatten()
        .collect();
    let decoded = decode(&runs, tokens)?;
    let read = prefill(&runs, tokens)?;
    match &decoded[..] {
        [own, dense] => own.fill_beside(dense, row),
        [own] => own.fill(row),
        _ => {}
    }
    let mut prefilled = Row::new("", "");
    match &read[..] {
        [own, dense] => own.fill_beside(dense, &mut prefilled),
        [own] => own.fill(&mut prefilled),
        _ => {}
    }
    for (name, value) in [
        (PREFILL, prefilled.tokens_per_second),
        (PREFILL_RATIO, prefilled.speedup),
    ] {
        if let Some(value) = value {
            row.extra.insert(name.into(), value.into());
        }
    }
    Ok(())
}

/// Models with their caches, one token each in turn.
fn decode(runs: &[(&Model<'_>, Option<&CacheConfig>)], tokens: &[u32]) -> Result<Vec<Rounds>> {
    let (prompt, rest) = tokens.split_at(prompt(tokens.len()));
    let mut caches = Vec::new();
    for (model, config) in runs {
        let mut cache = policy::caches(model, *config, 0, 1)?;
        model.forward(&[prompt], &mut cache)?;
        caches.push(cache);
    }
    let mut rounds = vec![Rounds::default(); runs.len()];
    for token in rest.chunks(1).take(DECODED) {
        for ((rounds, (model, _)), cache) in rounds.iter_mut().zip(runs).zip(&mut caches) {
            rounds.time(1.0, || model.forward(&[token], cache))?;
        }
    }
    Ok(rounds)
}

/// Models that read a window at once, in turn.
fn prefill(runs: &[(&Model<'_>, Option<&CacheConfig>)], tokens: &[u32]) -> Result<Vec<Rounds>> {
    let mut rounds = vec![Rounds::default(); runs.len()];
    for _ in 0..ROUNDS {
        for (rounds, (model, config)) in rounds.iter_mut().zip(runs) {
            let mut cache = policy::caches(model, *config, 0, 1)?;
            rounds.time(tokens.len() as f64, || model.forward(&[tokens], &mut cache))?;
        }
    }
    Ok(rounds)
}
