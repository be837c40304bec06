//! Open-loop replay: a policy runs on a recorded full-cache run, and what it would have lost is measured.
//!
//! The recorded queries, keys and values of a layer run through a cache of the configuration, with its policy, storage, positions and budgets; beside it each decode step's
//! attention is recomputed over all tokens. This is exact for one layer given the recorded hidden states; in a live model the loss would feed
//! back, so the ranking is cheap here and decided there. The oracle sees the trace as its future.

mod future;
mod metrics;

pub use future::FutureAttention;
pub use metrics::{AgeHistogram, HeadReport, LayerReport, Summary};

use super::{LayerTrace, Trace};
use crate::error::{Error, Result};
use crate::policy::oracle::Oracle;
use crate::policy::{CacheConfig, Policy, PolicyConfig, Threshold, quarter};
use crate::quantise::StorageConfig;
use crate::{CacheSet, LayerShape};
use candle_core::{Device, Tensor};
use metrics::Observer;
use rayon::prelude::*;
use std::sync::Arc;
use tensor_io::Progress;

/// What is measured beside the losses themselves.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct ReplayOptions {
    /// k of recall@k.
    pub top: usize,
    /// When a token counts as active, for the recurring hit-rate.
    pub threshold: Threshold,
    /// An activation after more than this many inactive steps is recurring.
    pub gap: usize,
}

impl Default for ReplayOptions {
    fn default() -> Self {
        Self {
            top: 32,
            threshold: Threshold::Absolute(1e-4),
            gap: 64,
        }
    }
}

impl ReplayOptions {
    /// k of recall@k.
    #[must_use]
    pub fn with_top(mut self, top: usize) -> Self {
        self.top = top;
        self
    }

    /// When a token counts as active.
    #[must_use]
    pub fn with_threshold(mut self, threshold: Threshold) -> Self {
        self.threshold = threshold;
        self
    }

    /// Inactive steps after which an activation is recurring.
    #[must_use]
    pub fn with_gap(mut self, gap: usize) -> Self {
        self.gap = gap;
        self
    }
}

/// Windows that an oracle without a horizon looks ahead, in turn.
const HORIZONS: [usize; 4] = [1, 2, 4, 8];

/// Replays one layer of `trace` under `config`. An oracle without a horizon is replayed with one, two, four and eight windows, and the run that
/// retains the most mass is reported: seeing further is not always better, because tokens still to come will want the slots.
///
/// # Errors
/// A layer that the trace does not have; settings that cannot be; weights that are not finite; a cancelled `progress`.
pub fn replay(
    trace: &Trace,
    layer: usize,
    config: &CacheConfig,
    options: &ReplayOptions,
    progress: &dyn Progress,
) -> Result<LayerReport> {
    progress.begin("replay", steps(trace, config));
    replay_layer(trace, layer, config, options, progress)
}

/// Replays every layer of `trace`.
///
/// # Errors
/// As [`replay`].
pub fn replay_all(
    trace: &Trace,
    config: &CacheConfig,
    options: &ReplayOptions,
    progress: &dyn Progress,
) -> Result<Vec<LayerReport>> {
    let layers = trace.layers.len() as u64;
    progress.begin("replay", layers * steps(trace, config));
    trace
        .layers
        .keys()
        .map(|&layer| replay_layer(trace, layer, config, options, progress))
        .collect()
}

/// Decode steps that the replay of a layer takes.
fn steps(trace: &Trace, config: &CacheConfig) -> u64 {
    let runs = match &config.decode {
        PolicyConfig::Oracle(oracle) if oracle.horizon.is_none() => HORIZONS.len(),
        _ => 1,
    };
    (runs * trace.tokens.len().saturating_sub(trace.meta.prompt_len)) as u64
}

fn replay_layer(
    trace: &Trace,
    layer: usize,
    config: &CacheConfig,
    options: &ReplayOptions,
    progress: &dyn Progress,
) -> Result<LayerReport> {
    let data = trace.layers.get(&layer).ok_or_else(|| Error::Trace {
        path: trace.meta.model.clone(),
        problem: format!("no layer {layer}"),
    })?;
    if options.top == 0 {
        return Err(Error::Setting {
            name: "top",
            value: "0".into(),
            expected: "at least 1",
        });
    }
    let run = |config: &CacheConfig| {
        let mut cache = build(config, data, trace.meta.scale, layer)?;
        cache.measure_policies();
        let run = Run {
            data,
            scale: trace.meta.scale,
            cache,
            observer: Observer::new(data, trace.meta.prompt_len, *options),
        };
        let stored = *config.storage_of(layer)? != StorageConfig::default();
        run.finish(layer, trace.meta.prompt_len, stored, progress)
    };
    let oracle = match &config.decode {
        PolicyConfig::Oracle(oracle) if oracle.horizon.is_none() => oracle,
        _ => return run(config),
    };
    let window = match oracle.window {
        Some(window) => window,
        None => quarter(config.layer_budget(layer)?, 128),
    };
    let mut best: Option<LayerReport> = None;
    for windows in HORIZONS {
        let mut oracle = oracle.clone();
        oracle.window = Some(window);
        oracle.horizon = Some(window.saturating_mul(windows));
        let report = run(&CacheConfig {
            decode: PolicyConfig::Oracle(oracle),
            ..config.clone()
        })?;
        let mass = |report: &LayerReport| report.mean(|h| h.retained_mass);
        if best.as_ref().is_none_or(|best| mass(&report) > mass(best)) {
            best = Some(report);
        }
    }
    Ok(best.expect("four horizons were replayed"))
}

/// The cache that a layer of a trace runs through.
fn build(
    config: &CacheConfig,
    data: &Arc<LayerTrace>,
    scale: f64,
    layer: usize,
) -> Result<CacheSet> {
    let shape = LayerShape {
        query_heads: data.query_heads,
        kv_heads: data.kv_heads,
        head_dim: data.head_dim,
        sliding_window: None,
    };
    let oracle = match &config.decode {
        PolicyConfig::Oracle(oracle) => {
            let budget = config.layer_budget(layer)?;
            let window = oracle.window.unwrap_or_else(|| quarter(budget, 128));
            let horizon = oracle.horizon.unwrap_or(window.saturating_mul(4));
            let future = Arc::new(FutureAttention::new(data.clone(), scale));
            Some(Oracle::new(window, horizon, future))
        }
        _ => None,
    };
    let policy = oracle.as_ref().map(|oracle| oracle as &dyn Policy);
    CacheSet::replaying(layer, shape, config, policy)
}

/// The replay of one layer.
struct Run<'a> {
    data: &'a LayerTrace,
    scale: f64,
    cache: CacheSet,
    observer: Observer,
}

impl Run<'_> {
    /// Replays all steps; `stored` says whether the configuration names what keys and values are stored as.
    fn finish(
        mut self,
        layer: usize,
        prompt: usize,
        stored: bool,
        progress: &dyn Progress,
    ) -> Result<LayerReport> {
        self.cache.begin_prompt(prompt)?;
        self.attend(0, prompt)?;
        for t in prompt..self.data.tokens {
            self.cache.begin(1)?;
            self.attend(t, 1)?;
            progress.advance(1)?;
        }
        let occupied = stored.then(|| self.cache.peak_bytes());
        let spent = self.cache.policy_time();
        Ok(self.observer.report(layer, spent, occupied))
    }

    /// A step of `count` positions from `first` on; the first step is the prompt.
    fn attend(&mut self, first: usize, count: usize) -> Result<()> {
        let (data, scale, d) = (self.data, self.scale, self.data.head_dim);
        let part = |numbers: &[f32], heads: usize| -> Result<Tensor> {
            let head = |head: usize| {
                let from = (head * data.tokens + first) * d;
                &numbers[from..from + count * d]
            };
            let step: Vec<f32> = (0..heads).flat_map(head).copied().collect();
            Ok(Tensor::from_vec(step, (1, heads, count, d), &Device::Cpu)?)
        };
        let (q, k, v) = (
            part(&data.q, data.query_heads)?,
            part(&data.k, data.kv_heads)?,
            part(&data.v, data.kv_heads)?,
        );
        let observer = &mut self.observer;
        let joined = |cache: &CacheSet| {
            observer.hold(|head| cache.positions(0, 0, head), first);
            observer.state(cache.state_bytes());
        };
        let out = self
            .cache
            .attend_shown(0, [&q, &k, &v], scale.into(), joined)?;
        if first > 0 {
            let attention: Vec<(Vec<f32>, Vec<f32>)> = (0..data.query_heads)
                .into_par_iter()
                .map(|head| data.attention(head, first, scale))
                .collect::<Result<_>>()?;
            let out = out.flatten_all()?.to_vec1::<f32>()?;
            self.observer.step(first, &attention, &out);
        }
        let cache = &self.cache;
        self.observer
            .hold(|head| cache.positions(0, 0, head), first + count);
        Ok(())
    }
}
