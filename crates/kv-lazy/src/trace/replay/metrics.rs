//! What a policy loses against the full cache, per head.
//!
//! With S the resident tokens, a the full-cache weights and A = Σ_S a the retained mass, the outputs of the full and of the evicting
//! cache differ by exactly o − o_S = u − (1 − A)·o_S with u = Σ_{i∉S} a_i v_i: what the lost values would have added, and what
//! renormalisation adds in their place. Mass alone hides values of large norm. The error of the output is measured on what the cache gave, so that it has what quantised
//! storage adds.

use super::ReplayOptions;
use crate::trace::LayerTrace;
use serde::Serialize;
use std::time::Duration;

/// Amounts by age in powers of two: bucket b holds ages 2^b to 2^(b+1) − 1.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct AgeHistogram {
    /// One amount per bucket.
    pub buckets: Vec<f64>,
}

impl AgeHistogram {
    fn add(&mut self, age: usize, amount: f64) {
        let bucket = age.max(1).ilog2() as usize;
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, 0.0);
        }
        self.buckets[bucket] += amount;
    }

    /// The sum over all ages.
    pub fn total(&self) -> f64 {
        self.buckets.iter().sum()
    }
}

/// Means over the decode steps of one KV head; over the group's query heads where they differ.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct HeadReport {
    /// KV head.
    pub head: usize,
    /// A: full-cache attention on resident tokens.
    pub retained_mass: f64,
    /// A of the best set of the same size at each step: an upper bound for any policy.
    pub ideal_mass: f64,
    /// Share of the k most attended tokens that are resident.
    pub recall: f64,
    /// Share of recurring activations whose token is still resident; none if there were none.
    pub recurring_hit_rate: Option<f64>,
    /// Activations after more inactive steps than [`super::ReplayOptions::gap`].
    pub recurring: u64,
    /// Mass lost on evicted tokens per step, by steps since their eviction.
    pub regret: AgeHistogram,
    /// Evicted tokens by the steps they were resident.
    pub residency: AgeHistogram,
    /// ‖o − ô‖ / ‖o‖ with ô what the cache gave; o_S where nothing is quantised.
    pub output_error: f64,
    /// ‖u‖ / ‖o‖: the part of the error from the lost values.
    pub lost_values: f64,
    /// (1 − A)·‖o_S‖ / ‖o‖: the part from renormalisation.
    pub renormalisation: f64,
    /// Cosine between u and o_S where something was lost: near 1, the two parts cancel.
    pub cosine: f64,
}

/// One layer's replay.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// Layer index.
    pub layer: usize,
    /// KV heads.
    pub heads: Vec<HeadReport>,
    /// Decode steps replayed.
    pub steps: usize,
    /// Most tokens that a head held at a step's attention.
    pub peak_tokens: usize,
    /// Tokens held at a step's attention on average; over the heads where they differ.
    pub mean_tokens: f64,
    /// Tokens times steps; over the heads where they differ.
    pub footprint: u64,
    /// Most bytes of keys and values, all heads: what the configured storage occupied, or what was attended as 16-bit numbers where none is configured.
    pub kv_bytes: usize,
    /// Bytes of all tokens' keys and values as 16-bit numbers.
    pub kv_bytes_full: usize,
    /// Most bytes of the policy's state and queries.
    pub state_bytes: usize,
    /// Seconds spent in the policy.
    pub policy_seconds: f64,
}

impl LayerReport {
    /// Mean of a figure over the heads.
    pub fn mean(&self, figure: impl Fn(&HeadReport) -> f64) -> f64 {
        self.heads.iter().map(figure).sum::<f64>() / self.heads.len().max(1) as f64
    }

    /// Mass that `oracle`, replayed within the same budget, retains beyond this policy.
    pub fn oracle_gap(&self, oracle: &Self) -> f64 {
        oracle.mean(|h| h.retained_mass) - self.mean(|h| h.retained_mass)
    }
}

/// A figure over the heads of several layers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// Mean.
    pub mean: f64,
    /// Smallest.
    pub min: f64,
    /// Lower decile.
    pub p10: f64,
    /// Median.
    pub median: f64,
    /// Upper decile.
    pub p90: f64,
    /// Largest.
    pub max: f64,
}

impl Summary {
    /// Mean and quantiles (nearest rank) of a figure over all heads of `reports`; none without heads.
    pub fn of(reports: &[LayerReport], figure: impl Fn(&HeadReport) -> f64) -> Option<Self> {
        let mut all: Vec<f64> = reports
            .iter()
            .flat_map(|report| report.heads.iter().map(&figure))
            .collect();
        all.sort_by(f64::total_cmp);
        let last = all.len().checked_sub(1)?;
        let at = |p: f64| all[(p * last as f64).round() as usize];
        Some(Self {
            mean: all.iter().sum::<f64>() / all.len() as f64,
            min: all[0],
            p10: at(0.1),
            median: at(0.5),
            p90: at(0.9),
            max: all[last],
        })
    }
}

/// Per-position knowledge of one head.
struct Positions {
    /// Last step of activity under the full cache.
    active: Vec<usize>,
    /// Position at which the token was evicted.
    evicted: Vec<Option<usize>>,
    resident: Vec<bool>,
    held: usize,
}

/// Gathers the metrics of a run.
pub(super) struct Observer {
    options: ReplayOptions,
    group: usize,
    head_dim: usize,
    values: Vec<Vec<f32>>,
    heads: Vec<(HeadReport, Positions, Sums)>,
    tokens: usize,
    steps: usize,
    peak: usize,
    /// Most tokens of all heads together.
    most: usize,
    footprint: u64,
    state: usize,
}

#[derive(Default)]
struct Sums {
    hits: u64,
    cosines: u64,
}

impl Observer {
    pub(super) fn new(data: &LayerTrace, prompt: usize, options: ReplayOptions) -> Self {
        let head = |head| {
            let positions = Positions {
                // A prompt token's last activity is the end of the prompt, another's its birth.
                active: (0..data.tokens).map(|id| id.max(prompt - 1)).collect(),
                evicted: vec![None; data.tokens],
                resident: vec![false; data.tokens],
                held: 0,
            };
            (
                HeadReport {
                    head,
                    ..HeadReport::default()
                },
                positions,
                Sums::default(),
            )
        };
        Self {
            options,
            group: data.group(),
            head_dim: data.head_dim,
            values: (0..data.kv_heads)
                .map(|head| data.values(head).to_vec())
                .collect(),
            heads: (0..data.kv_heads).map(head).collect(),
            tokens: data.tokens,
            steps: 0,
            peak: 0,
            most: 0,
            footprint: 0,
            state: 0,
        }
    }

    /// Takes in what each head holds when the next token is at `now`; what it held before and does not hold now was evicted.
    pub(super) fn hold<'b>(&mut self, held: impl Fn(usize) -> &'b [u32], now: usize) {
        for (head, (report, positions, _)) in self.heads.iter_mut().enumerate() {
            let ids = held(head);
            let before = std::mem::replace(&mut positions.resident, vec![false; self.tokens]);
            for &id in ids {
                positions.resident[id as usize] = true;
            }
            positions.held = ids.len();
            let pairs = before.iter().zip(&positions.resident).enumerate();
            for (id, _) in pairs.filter(|(_, (before, now))| **before && !**now) {
                positions.evicted[id] = Some(now);
                report.residency.add(now - id, 1.0);
            }
        }
    }

    /// Takes in the bytes of the policy's state.
    pub(super) fn state(&mut self, bytes: usize) {
        self.state = self.state.max(bytes);
    }

    /// Measures the step at position `t` over what was [held](Self::hold) last: full-cache weights and output per query head, and the outputs `[query heads, d]` of the cache.
    pub(super) fn step(&mut self, t: usize, attention: &[(Vec<f32>, Vec<f32>)], outputs: &[f32]) {
        self.steps += 1;
        let held = || self.heads.iter().map(|(_, positions, _)| positions.held);
        let all: usize = held().sum();
        self.peak = self.peak.max(held().max().unwrap_or(0));
        self.most = self.most.max(all);
        self.footprint += (all / self.heads.len().max(1)) as u64;
        let width = self.group * self.head_dim;
        for head in 0..self.heads.len() {
            let queries = &attention[head * self.group..(head + 1) * self.group];
            let outputs = outputs[head * width..(head + 1) * width].chunks_exact(self.head_dim);
            for (query, output) in queries.iter().zip(outputs) {
                self.query(head, query, output);
            }
            self.recurrence(head, t, queries);
        }
    }

    /// Mass, recall, regret and output error of one query.
    fn query(&mut self, head: usize, (weights, out): &(Vec<f32>, Vec<f32>), output: &[f32]) {
        let (report, positions, sums) = &mut self.heads[head];
        let (t, held) = (weights.len() - 1, positions.held);
        let share = 1.0 / self.group as f64;
        let d = self.head_dim;
        let (mut kept, mut lost) = (vec![0.0f64; d], vec![0.0f64; d]);
        let mut mass = 0.0;
        for (id, &weight) in weights.iter().enumerate() {
            let weight = f64::from(weight);
            let into = if positions.resident[id] {
                mass += weight;
                &mut kept
            } else {
                if let Some(evicted) = positions.evicted[id] {
                    report.regret.add(t + 1 - evicted, weight * share);
                }
                &mut lost
            };
            for (sum, &v) in into
                .iter_mut()
                .zip(&self.values[head][id * d..(id + 1) * d])
            {
                *sum += weight * f64::from(v);
            }
        }
        report.retained_mass += mass * share;

        let mut sorted: Vec<(f32, usize)> = weights.iter().copied().zip(0..).collect();
        sorted.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        report.ideal_mass += share
            * sorted[..held.min(sorted.len())]
                .iter()
                .map(|x| f64::from(x.0))
                .sum::<f64>();
        let top = &sorted[..self.options.top.min(sorted.len())];
        let found = top.iter().filter(|x| positions.resident[x.1]).count();
        report.recall += share * found as f64 / top.len() as f64;

        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let full: Vec<f64> = out.iter().map(|&x| f64::from(x)).collect();
        let size = norm(&full).max(f64::MIN_POSITIVE);
        let here: Vec<f64> = kept
            .iter()
            .map(|x| x / mass.max(f64::MIN_POSITIVE))
            .collect();
        let given = output.iter().map(|&x| f64::from(x));
        let error: Vec<f64> = full.iter().zip(given).map(|(o, x)| o - x).collect();
        report.output_error += share * norm(&error) / size;
        report.lost_values += share * norm(&lost) / size;
        report.renormalisation += share * (1.0 - mass).max(0.0) * norm(&here) / size;
        let product = norm(&lost) * norm(&here);
        if product > 0.0 {
            let dot: f64 = lost.iter().zip(&here).map(|(u, s)| u * s).sum();
            report.cosine += dot / product;
            sums.cosines += 1;
        }
    }

    /// Recurring activations: is the token still resident?
    fn recurrence(&mut self, head: usize, t: usize, queries: &[(Vec<f32>, Vec<f32>)]) {
        let (report, positions, sums) = &mut self.heads[head];
        let mut largest = vec![0.0f32; t + 1];
        for (weights, _) in queries {
            largest
                .iter_mut()
                .zip(weights)
                .for_each(|(max, w)| *max = max.max(*w));
        }
        let level = self.options.threshold.level(&largest);
        for (id, &weight) in largest.iter().enumerate() {
            if weight > level {
                if t - positions.active[id].min(t) > self.options.gap {
                    report.recurring += 1;
                    sums.hits += u64::from(positions.resident[id]);
                }
                positions.active[id] = t;
            }
        }
    }

    /// The report; `occupied` are the bytes that a configured storage took at most.
    pub(super) fn report(
        self,
        layer: usize,
        policy: Duration,
        occupied: Option<usize>,
    ) -> LayerReport {
        let steps = self.steps.max(1) as f64;
        let heads: Vec<HeadReport> = self
            .heads
            .into_iter()
            .map(|(mut report, _, sums)| {
                for mean in [
                    &mut report.retained_mass,
                    &mut report.ideal_mass,
                    &mut report.recall,
                    &mut report.output_error,
                    &mut report.lost_values,
                    &mut report.renormalisation,
                ] {
                    *mean /= steps;
                }
                report.regret.buckets.iter_mut().for_each(|x| *x /= steps);
                report.cosine /= sums.cosines.max(1) as f64;
                report.recurring_hit_rate =
                    (report.recurring > 0).then(|| sums.hits as f64 / report.recurring as f64);
                report
            })
            .collect();
        let bytes = |tokens: usize| tokens * self.head_dim * 2 * 2;
        LayerReport {
            layer,
            steps: self.steps,
            peak_tokens: self.peak,
            mean_tokens: self.footprint as f64 / steps,
            footprint: self.footprint,
            kv_bytes: occupied.unwrap_or_else(|| bytes(self.most)),
            kv_bytes_full: bytes(self.tokens * heads.len()),
            state_bytes: self.state,
            policy_seconds: policy.as_secs_f64(),
            heads,
        }
    }
}
