//! Open-loop replay: a policy runs on a recorded full-cache run, and what it would have lost is measured.
//!
//! Each recorded decode step's attention is recomputed, restricted to what the policy still holds and renormalised; the policy sees those
//! weights and evicts. This is exact for one layer given the recorded hidden states; in a live model the loss would feed
//! back, so the ranking is cheap here and decided there. The oracle sees the trace as its future.

mod future;
mod metrics;
mod rows;

pub use future::FutureAttention;
pub use metrics::{AgeHistogram, HeadReport, LayerReport, Summary};

use super::{LayerTrace, Trace};
use crate::LayerShape;
use crate::attention::{Reduce, WeightKind};
use crate::error::{Error, Result};
use crate::policy::oracle::Oracle;
use crate::policy::{
    CacheConfig, Clock, Evictor, Needs, Phase, Place, Plan, PolicyConfig, Seen, Threshold, quarter,
};
use crate::rotary::Rotary;
use crate::store::Relocation;
use metrics::Observer;
use rayon::prelude::*;
use rows::TraceRows;
use std::sync::Arc;
use std::time::{Duration, Instant};
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
        let evictor = build(config, data, trace.meta.scale, layer)?;
        let rotary = config.rotary_of(layer);
        Run::new(data, trace, (evictor, rotary), layer, *options).finish(progress)
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

fn build(
    config: &CacheConfig,
    data: &Arc<LayerTrace>,
    scale: f64,
    layer: usize,
) -> Result<Evictor> {
    let budget = config.layer_budget(layer)?;
    let place = Place {
        layer,
        heads: data.kv_heads,
        kv_heads: data.kv_heads,
        group: data.query_heads / data.kv_heads.max(1),
        head_dim: data.head_dim,
        ..Place::default()
    };
    let policy = match &config.decode {
        PolicyConfig::Oracle(oracle) => {
            let window = oracle.window.unwrap_or_else(|| quarter(budget, 128));
            let horizon = oracle.horizon.unwrap_or(window.saturating_mul(4));
            let future = Arc::new(FutureAttention::new(data.clone(), scale));
            config.combine(Box::new(Oracle::new(window, horizon, future)), budget)?
        }
        _ => config.build(budget)?,
    };
    let shape = LayerShape {
        query_heads: data.query_heads,
        kv_heads: data.kv_heads,
        head_dim: data.head_dim,
        sliding_window: None,
    };
    policy.admits(layer, &shape)?;
    match config.rotary_of(layer) {
        Some(rotary) => rotary.check(data.head_dim)?,
        None if policy.needs().rotary => {
            return Err(Error::NeedUnavailable {
                policy: policy.name().into(),
                need: "the model's rotation (`rotary`)",
                path: "this configuration",
            });
        }
        None => {}
    }
    Evictor::new(policy, budget, place)
}

/// The replay of one layer.
struct Run<'a> {
    data: &'a LayerTrace,
    scale: f64,
    prompt: usize,
    layer: usize,
    evictor: Evictor,
    needs: Needs,
    rows: TraceRows<'a>,
    observer: Observer,
    policy_time: Duration,
    peak_state: usize,
}

impl<'a> Run<'a> {
    fn new(
        data: &'a LayerTrace,
        trace: &Trace,
        (evictor, rotary): (Evictor, Option<&'a Rotary>),
        layer: usize,
        options: ReplayOptions,
    ) -> Self {
        let needs = evictor.needs();
        Self {
            data,
            scale: trace.meta.scale,
            prompt: trace.meta.prompt_len,
            layer,
            evictor,
            needs,
            rows: TraceRows::new(data, trace.meta.scale, needs.queries, rotary),
            observer: Observer::new(data, trace.meta.prompt_len, options),
            policy_time: Duration::ZERO,
            peak_state: 0,
        }
    }

    fn finish(mut self, progress: &dyn Progress) -> Result<LayerReport> {
        self.prefill()?;
        for t in self.prompt..self.data.tokens {
            self.step(t)?;
            progress.advance(1)?;
        }
        let Self {
            layer,
            observer,
            policy_time,
            peak_state,
            ..
        } = self;
        Ok(observer.report(layer, policy_time, peak_state))
    }

    fn prefill(&mut self) -> Result<()> {
        let prompt = self.prompt as u32;
        let clock = Clock {
            next: prompt,
            step: 0,
            tokens: prompt,
            prompt,
            phase: Phase::Prefill,
        };
        self.rows.append(0, self.prompt);
        self.evictor.append(&clock);
        self.joined()?;
        let wanted = self.needs.prefill;
        for kind in wanted.iter() {
            let (first, reduce) = match kind {
                WeightKind::Columns => (0, Reduce::Sum),
                WeightKind::Last(reduce) => (self.prompt - 1, reduce),
            };
            for head in 0..self.data.kv_heads {
                let group = self.data.group();
                let mut sum = vec![0.0; self.prompt];
                for t in first..self.prompt {
                    for query_head in head * group..(head + 1) * group {
                        let (weights, _) = self.data.attention(query_head, t, self.scale)?;
                        reduce.accumulate(&mut sum[..=t], &weights, group);
                    }
                }
                let seen = Seen {
                    kind,
                    weights: &sum,
                };
                self.evictor.observe(head, seen, &clock)?;
            }
        }
        self.evict(&clock)
    }

    fn step(&mut self, t: usize) -> Result<()> {
        let clock = Clock {
            next: t as u32 + 1,
            step: (t - self.prompt + 1) as u32,
            tokens: 1,
            prompt: self.prompt as u32,
            phase: Phase::Decode,
        };
        let started = Instant::now();
        if let Some(plan) = self.evictor.plan_ahead(&self.rows, &clock)? {
            self.apply(&plan, t)?;
        }
        self.rows.append(t, 1);
        self.evictor.append(&clock);
        self.joined()?;
        self.policy_time += started.elapsed();

        let (data, scale) = (self.data, self.scale);
        let attention: Vec<(Vec<f32>, Vec<f32>)> = (0..data.query_heads)
            .into_par_iter()
            .map(|head| data.attention(head, t, scale))
            .collect::<Result<_>>()?;
        self.observer.step(t, &self.rows, &attention);
        let group = data.group();
        for kind in self.needs.decode.iter() {
            let reduce = match kind {
                // With one query per step the column sums are its weights, summed over the group.
                WeightKind::Columns => Reduce::Sum,
                WeightKind::Last(reduce) => reduce,
            };
            for head in 0..data.kv_heads {
                let ids = self.rows.ids_of(head);
                let mut sum = vec![0.0; ids.len()];
                for (weights, _) in &attention[head * group..(head + 1) * group] {
                    let held: Vec<f32> = ids.iter().map(|&id| weights[id as usize]).collect();
                    let mass: f32 = held.iter().sum();
                    let renormalised: Vec<f32> = held
                        .iter()
                        .map(|w| w / mass.max(f32::MIN_POSITIVE))
                        .collect();
                    reduce.accumulate(&mut sum, &renormalised, group);
                }
                let started = Instant::now();
                let seen = Seen {
                    kind,
                    weights: &sum,
                };
                self.evictor.observe(head, seen, &clock)?;
                self.policy_time += started.elapsed();
            }
        }
        self.evict(&clock)
    }

    fn joined(&mut self) -> Result<()> {
        if self.needs.new_values {
            self.evictor.joined(&self.rows)?;
        }
        Ok(())
    }

    fn evict(&mut self, clock: &Clock) -> Result<()> {
        self.peak_state = self.peak_state.max(self.evictor.state_bytes());
        let started = Instant::now();
        let plan = self.evictor.plan(&self.rows, clock)?;
        self.policy_time += started.elapsed();
        match plan {
            Some(plan) => self.apply(&plan, clock.next as usize),
            None => Ok(()),
        }
    }

    fn apply(&mut self, plan: &Plan, now: usize) -> Result<()> {
        let len = self.rows.ids_of(0).len();
        plan.check(len)?;
        for (head, evict) in plan.evict.iter().enumerate() {
            let moves = Relocation::compact(evict, len);
            let ids = self.rows.ids_of(head);
            self.observer
                .evicted(head, evict.iter().map(|&slot| ids[slot as usize]), now);
            self.rows.relocate(head, &moves);
            let started = Instant::now();
            self.evictor.relocate(head, &moves);
            self.policy_time += started.elapsed();
        }
        Ok(())
    }
}
