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
use crate::attention::Reduce;
use crate::error::{Error, Result};
use crate::policy::{
    CacheConfig, Clock, Evictor, Needs, Oracle, Phase, Place, Plan, PolicyConfig, PrefillNeed,
    Seen, Threshold,
};
use crate::store::Relocation;
use metrics::Observer;
use rayon::prelude::*;
use rows::TraceRows;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is measured beside the losses themselves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReplayOptions {
    /// k of recall@k.
    pub top: usize,
    /// When a token counts as active, for the recurring hit-rate.
    pub threshold: Threshold,
    /// A recurring activation comes after more than this many silent steps.
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

/// Replays one layer of `trace` under `config`. An oracle without a horizon is replayed with one, two, four and eight windows, and the run that
/// retains the most mass is reported: seeing further is not always better, because tokens still to come will want the slots.
///
/// # Errors
/// A layer that the trace does not have; settings that cannot be; weights that are not finite.
pub fn replay(
    trace: &Trace,
    layer: usize,
    config: &CacheConfig,
    options: &ReplayOptions,
) -> Result<LayerReport> {
    let data = trace.layers.get(&layer).ok_or_else(|| Error::Trace {
        path: trace.meta.model.clone(),
        problem: format!("no layer {layer}"),
    })?;
    let run = |config: &CacheConfig| {
        let evictor = build(config, data, trace.meta.scale, layer)?;
        Run::new(data, trace, evictor, layer, *options).finish()
    };
    let PolicyConfig::Oracle {
        window,
        horizon: None,
    } = config.decode
    else {
        return run(config);
    };
    let window = window.unwrap_or(crate::policy::quarter(config.layer_budget(layer)?, 128));
    let mut best: Option<LayerReport> = None;
    for windows in [1, 2, 4, 8] {
        let horizon = Some(windows * window);
        let decode = PolicyConfig::Oracle {
            window: Some(window),
            horizon,
        };
        let report = run(&CacheConfig {
            decode,
            ..config.clone()
        })?;
        let mass = |report: &LayerReport| report.mean(|h| h.retained_mass);
        if best.as_ref().is_none_or(|best| mass(&report) > mass(best)) {
            best = Some(report);
        }
    }
    Ok(best.expect("four horizons were replayed"))
}

/// Replays every layer of `trace`.
///
/// # Errors
/// As [`replay`].
pub fn replay_all(
    trace: &Trace,
    config: &CacheConfig,
    options: &ReplayOptions,
) -> Result<Vec<LayerReport>> {
    trace
        .layers
        .keys()
        .map(|&layer| replay(trace, layer, config, options))
        .collect()
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
        ..Place::default()
    };
    let policy = match config.decode {
        PolicyConfig::Oracle { window, horizon } => {
            let window = window.unwrap_or_else(|| crate::policy::quarter(budget, 128));
            let future = Arc::new(FutureAttention::new(data.clone(), scale));
            let oracle = Oracle::new(window, horizon.unwrap_or(4 * window), future);
            config.combine(Box::new(oracle), budget)?
        }
        _ => config.build(budget)?,
    };
    Evictor::new(policy, budget, place)
}

/// One layer's replay under way.
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
        evictor: Evictor,
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
            rows: TraceRows::new(data, trace.meta.scale, needs.queries),
            observer: Observer::new(data, trace.meta.prompt_len, options),
            policy_time: Duration::ZERO,
            peak_state: 0,
        }
    }

    fn finish(mut self) -> Result<LayerReport> {
        self.prefill()?;
        for t in self.prompt..self.data.tokens {
            self.step(t)?;
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
        let first = match self.needs.prefill {
            PrefillNeed::Nothing => self.prompt,
            PrefillNeed::LastQuery => self.prompt - 1,
            PrefillNeed::Columns => 0,
        };
        let columns = self.needs.prefill == PrefillNeed::Columns;
        let reduce = if columns {
            Reduce::Sum
        } else {
            self.needs.weights.unwrap_or_default()
        };
        for head in 0..self.data.kv_heads {
            if first == self.prompt {
                break;
            }
            let mut sum = vec![0.0; self.prompt];
            for t in first..self.prompt {
                for g in 0..self.data.group() {
                    let (weights, _) =
                        self.data
                            .attention(head * self.data.group() + g, t, self.scale)?;
                    reduce.accumulate(&mut sum[..=t], &weights, self.data.group());
                }
            }
            let seen = if columns {
                Seen::Columns(&sum)
            } else {
                Seen::Weights(&sum)
            };
            self.evictor.observe(head, seen, &clock)?;
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
        self.policy_time += started.elapsed();

        let (data, scale) = (self.data, self.scale);
        let attention: Vec<(Vec<f32>, Vec<f32>)> = (0..data.query_heads)
            .into_par_iter()
            .map(|head| data.attention(head, t, scale))
            .collect::<Result<_>>()?;
        self.observer.step(t, &self.rows, &attention);
        if let Some(reduce) = self.needs.weights {
            let group = data.group();
            for head in 0..data.kv_heads {
                let ids = self.rows.ids_of(head);
                let mut seen = vec![0.0; ids.len()];
                for (weights, _) in &attention[head * group..(head + 1) * group] {
                    let held: Vec<f32> = ids.iter().map(|&id| weights[id as usize]).collect();
                    let mass: f32 = held.iter().sum();
                    let renormalised: Vec<f32> = held
                        .iter()
                        .map(|w| w / mass.max(f32::MIN_POSITIVE))
                        .collect();
                    reduce.accumulate(&mut seen, &renormalised, group);
                }
                let started = Instant::now();
                self.evictor.observe(head, Seen::Weights(&seen), &clock)?;
                self.policy_time += started.elapsed();
            }
        }
        self.evict(&clock)
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
