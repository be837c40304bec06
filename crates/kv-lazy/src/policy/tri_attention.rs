//! TriAttention: how much a head's *typical* query will attend to a key, over the next positions.
//!
//! Before rotation, the queries of a head cluster around a fixed vector. With c(x) the pairs of x as complex numbers, m = E c(q), a = E |c(q)| and ω the model's
//! frequencies, a key k at position p scores, at length t and mean over the offsets δ = 1, 2, 4 … 65536,
//! Σ |m||k| cos(ω(t + δ − p) + arg(m·k̄)) + Σ (a − |m|)·|k|. The first sum is Re Σ u·c̄(k) of the key as it is cached, with u = m · mean e^{iω(t+δ)}: one vector per query head
//! and eviction, one product a key. Scores are standardised per query head over the tokens that may leave; the maximum over the group decides.
//!
//! m and a come from a calibration text ([`QueryStatistics`]) or from the sequence's own last queries. Keys and the model's rotation suffice with
//! the former. Elements that the model does not rotate enter by their product with the mean query.

use super::config::quarter;
use super::periodic::Periodic;
use super::{Budget, Clock, Needs, Phase, Place, Policy, Rows, Rule, Score, Tunable};
use crate::LayerShape;
use crate::attention::products::products;
use crate::error::{Error, Result};
use crate::rotary::Rotary;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Means of a query head before rotation.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct HeadStatistics {
    /// Mean of each element.
    pub mean: Vec<f32>,
    /// Mean absolute value of each rotated pair.
    pub magnitude: Vec<f32>,
}

/// Statistics of all layers' queries; the module `calibrate` takes them from traces.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct QueryStatistics {
    /// Query heads of each layer.
    pub layers: BTreeMap<usize, Vec<HeadStatistics>>,
    /// How the model rotated the queries of each layer; another rotation is refused where this is known.
    #[serde(default)]
    pub rotary: BTreeMap<usize, Rotary>,
    /// Hash of the model's weights, for callers that know models.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_hash: Option<String>,
}

/// Settings of [`TriAttention`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// First tokens kept; 4.
    pub sinks: usize,
    /// Newest tokens kept; unset: 64, a quarter of the budget where that is less.
    pub recent: Option<usize>,
    /// Steps between evictions; unset: 128, a quarter of the budget where that is less.
    pub every: Option<usize>,
    /// Last queries that join the statistics at each eviction where there is no calibration; unset: 64, a quarter of the budget where that is less.
    pub queries: Option<usize>,
    /// Statistics of the model's queries; unset: those of the sequence itself.
    pub calibration: Option<QueryStatistics>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sinks: 4,
            recent: None,
            every: None,
            queries: None,
            calibration: None,
        }
    }
}

impl Tunable for Settings {
    fn calibration(&mut self) -> Option<&mut Option<QueryStatistics>> {
        Some(&mut self.calibration)
    }
}

pub(super) fn build(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    let queries = settings.queries.unwrap_or_else(|| quarter(budget, 64));
    if queries == 0 {
        return Err(Error::ZeroWindow { name: "queries" });
    }
    Ok(Box::new(TriAttention {
        periods: Periodic::within(
            budget,
            settings.sinks,
            (settings.recent, 64),
            (settings.every, 128),
        ),
        queries,
        calibration: settings.calibration.clone().map(Arc::new),
        own: Vec::new(),
        place: Place::default(),
    }))
}

/// Keeps the keys that typical queries will attend to.
#[derive(Debug, Clone)]
pub struct TriAttention {
    periods: Periodic,
    queries: usize,
    calibration: Option<Arc<QueryStatistics>>,
    /// Per KV head, where there is no calibration.
    own: Vec<Own>,
    place: Place,
}

/// Sums over a sequence's own queries.
#[derive(Debug, Clone, Default)]
struct Own {
    /// Per query head of the group: elements, then magnitudes of pairs.
    sums: Vec<Vec<f64>>,
    queries: usize,
    /// The position after the last query counted.
    next: u32,
}

impl Own {
    /// Counts the queries of `head` that are new.
    fn observe(&mut self, rows: &dyn Rows, head: usize, rotary: &Rotary) {
        let recent = rows.queries(head);
        let d = rows.head_dim();
        let group = (recent.queries.len() / d)
            .checked_div(recent.positions.len())
            .unwrap_or(0);
        self.sums
            .resize(group, vec![0.0; d + rotary.frequencies.len()]);
        let mut unrotated = vec![0.0; d];
        let mut last = self.next;
        let step = rotary.turns(-1);
        let (mut turned, mut turns) = (None, Vec::new());
        for (heads, &position) in recent
            .queries
            .chunks_exact((group * d).max(1))
            .zip(recent.positions)
        {
            if position < self.next {
                continue;
            }
            last = last.max(position + 1);
            self.queries += 1;
            // Queries follow each other as a rule: a turn by one more position takes no new angles.
            if turned.is_some_and(|before: u32| before + 1 == position) {
                for (turn, step) in turns.iter_mut().zip(&step) {
                    *turn = both(*turn, *step);
                }
            } else {
                turns = rotary.turns(-i64::from(position));
            }
            turned = Some(position);
            for (sums, query) in self.sums.iter_mut().zip(heads.chunks_exact(d)) {
                unrotated.copy_from_slice(query);
                rotary.turn(&mut unrotated, &turns);
                add(sums, &unrotated, rotary);
            }
        }
        self.next = last;
    }

    fn statistics(&self, d: usize) -> Vec<HeadStatistics> {
        self.sums
            .iter()
            .map(|sums| mean(sums, self.queries, d))
            .collect()
    }
}

/// Sine and cosine of the sum of two angles.
fn both((a, b): (f64, f64), (c, d): (f64, f64)) -> (f64, f64) {
    (a * d + b * c, b * d - a * c)
}

/// Adds an unrotated query to sums of elements and of pairs' magnitudes.
pub(crate) fn add(sums: &mut [f64], query: &[f32], rotary: &Rotary) {
    let (elements, magnitudes) = sums.split_at_mut(query.len());
    for (sum, &x) in elements.iter_mut().zip(query) {
        *sum += f64::from(x);
    }
    for (f, sum) in magnitudes.iter_mut().enumerate() {
        let (i, j) = rotary.pair(f);
        // Squares of numbers in f32 are within the range of f64.
        let (a, b) = (f64::from(query[i]), f64::from(query[j]));
        *sum += (a * a + b * b).sqrt();
    }
}

/// Means of such sums over `count` queries.
pub(crate) fn mean(sums: &[f64], count: usize, d: usize) -> HeadStatistics {
    let mean = |sums: &[f64]| {
        sums.iter()
            .map(|x| (x / count.max(1) as f64) as f32)
            .collect()
    };
    HeadStatistics {
        mean: mean(&sums[..d]),
        magnitude: mean(&sums[d..]),
    }
}

/// Offsets of future queries: powers of two.
const OFFSETS: u32 = 17;

/// The mean over offsets of the rotation at length `t`, as sine and cosine of each pair.
fn futures(rotary: &Rotary, t: u32) -> Vec<(f64, f64)> {
    let future = |(now, step): ((f64, f64), (f64, f64))| {
        let (mut sum, mut offset) = ((0.0, 0.0), step);
        for _ in 0..OFFSETS {
            let (sin, cos) = both(now, offset);
            sum = (sum.0 + sin, sum.1 + cos);
            offset = both(offset, offset);
        }
        (sum.0 / f64::from(OFFSETS), sum.1 / f64::from(OFFSETS))
    };
    let steps = rotary.turns(1);
    rotary
        .turns(t.into())
        .into_iter()
        .zip(steps)
        .map(future)
        .collect()
}

/// What an element of a key and the magnitude of each of its pairs are multiplied by for one query head: `[d + pairs]`.
fn weights(head: &HeadStatistics, rotary: &Rotary, futures: &[(f64, f64)]) -> Vec<f32> {
    let d = head.mean.len();
    let mut weights = vec![0.0f32; d + rotary.frequencies.len()];
    let (product, magnitude) = weights.split_at_mut(d);
    for (f, (sin, cos)) in futures.iter().enumerate() {
        let (i, j) = rotary.pair(f);
        let (re, im) = (f64::from(head.mean[i]), f64::from(head.mean[j]));
        product[i] = (re * cos - im * sin) as f32;
        product[j] = (re * sin + im * cos) as f32;
        magnitude[f] = (f64::from(head.magnitude[f]) - re.hypot(im)) as f32;
    }
    let rest = rotary.rotated();
    product[rest..].copy_from_slice(&head.mean[rest..]);
    weights
}

/// Keys scored together: what is written for them stays in the first caches.
const BLOCK: usize = 64;

/// Scores `[heads, n]` of keys `[n, d]`, as cached, for each query head at length `t`. The magnitudes of a key's pairs are the same for all heads.
fn scores(keys: &[f32], heads: &[HeadStatistics], rotary: &Rotary, t: u32) -> Vec<f32> {
    let Some(d) = heads.first().map(|head| head.mean.len()) else {
        return Vec::new();
    };
    let wide = d + rotary.frequencies.len();
    let futures = futures(rotary, t);
    let weights = heads
        .iter()
        .flat_map(|head| weights(head, rotary, &futures));
    let weights: Vec<f32> = weights.collect();
    let n = keys.len() / d;
    let mut scores = vec![0.0; heads.len() * n];
    let mut block = vec![0.0f32; BLOCK * wide];
    for (first, keys) in (0..n).step_by(BLOCK).zip(keys.chunks(BLOCK * d)) {
        let count = keys.len() / d;
        let block = &mut block[..count * wide];
        for (key, wide) in keys.chunks_exact(d).zip(block.chunks_exact_mut(wide)) {
            let (elements, magnitudes) = wide.split_at_mut(d);
            elements.copy_from_slice(key);
            rotary.magnitudes(key, magnitudes);
        }
        let products = products(&weights, block, wide);
        for (all, products) in scores.chunks_exact_mut(n).zip(products.chunks_exact(count)) {
            all[first..first + count].copy_from_slice(products);
        }
    }
    scores
}

/// Standardises by the mean and deviation of the slots in `free`.
fn standardise(scores: &mut [f32], free: &[bool]) {
    let own = || {
        scores
            .iter()
            .zip(free)
            .filter(|(_, free)| **free)
            .map(|(&x, _)| f64::from(x))
    };
    let count = own().count().max(1) as f64;
    let mean = own().sum::<f64>() / count;
    let deviation = (own().map(|x| (x - mean).powi(2)).sum::<f64>() / count).sqrt();
    let factor = if deviation > 0.0 {
        1.0 / deviation
    } else {
        0.0
    };
    scores
        .iter_mut()
        .for_each(|x| *x = ((f64::from(*x) - mean) * factor) as f32);
}

impl TriAttention {
    /// The statistics of the queries that read a KV head.
    fn statistics(&mut self, rows: &dyn Rows, head: usize, rotary: &Rotary) -> Vec<HeadStatistics> {
        let Some(calibration) = &self.calibration else {
            let own = &mut self.own[head];
            own.observe(rows, head, rotary);
            return own.statistics(rows.head_dim());
        };
        let heads = calibration
            .layers
            .get(&self.place.layer)
            .map_or(&[][..], Vec::as_slice);
        let group = heads.len() / self.place.kv_heads.max(1);
        let first = (self.place.first_head + head) * group;
        heads.get(first..first + group).unwrap_or_default().to_vec()
    }
}

impl Policy for TriAttention {
    fn name(&self) -> &'static str {
        "tri-attention"
    }
    fn needs(&self) -> Needs {
        let needs = Needs::keys().with_rotary();
        match self.calibration {
            Some(_) => needs,
            None => needs.with_queries(self.queries),
        }
    }
    fn rule(&self, _: Phase) -> Rule {
        self.periods.rule()
    }
    fn admits(&self, layer: usize, shape: &LayerShape) -> Result<()> {
        let Some(calibration) = &self.calibration else {
            return Ok(());
        };
        let heads = calibration
            .layers
            .get(&layer)
            .map_or(&[][..], Vec::as_slice);
        let fits = |head: &HeadStatistics| {
            let finite = |numbers: &[f32]| numbers.iter().all(|x| x.is_finite());
            head.mean.len() == shape.head_dim
                && 2 * head.magnitude.len() <= shape.head_dim
                && finite(&head.mean)
                && finite(&head.magnitude)
        };
        if heads.len() == shape.query_heads && heads.iter().all(fits) {
            return Ok(());
        }
        Err(Error::Setting {
            name: "calibration",
            value: format!(
                "statistics of {} query heads for layer {layer}",
                heads.len()
            ),
            expected: "finite statistics of each of the layer's query heads",
        })
    }
    fn admits_rotary(&self, layer: usize, rotary: &Rotary) -> Result<()> {
        let Some(calibration) = &self.calibration else {
            return Ok(());
        };
        let heads = calibration.layers.get(&layer).into_iter().flatten();
        let pairs = rotary.frequencies.len();
        let counts = heads.map(|head| head.magnitude.len());
        let other = calibration.rotary.get(&layer);
        if counts.into_iter().all(|count| count == pairs)
            && other.is_none_or(|other| other.is_like(rotary))
        {
            return Ok(());
        }
        Err(Error::Setting {
            name: "calibration",
            value: format!("statistics of layer {layer} under another rotation"),
            expected: "statistics under the cache's own rotation",
        })
    }
    fn start(&mut self, place: Place) {
        self.place = place;
        self.own = vec![Own::default(); place.heads];
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        out: &mut [Score],
    ) -> Result<()> {
        let Some(rotary) = rows.rotary() else {
            return Err(Error::NeedUnavailable {
                policy: self.name().into(),
                need: "the model's rotation",
                path: "this cache",
            });
        };
        self.admits_rotary(self.place.layer, rotary)?;
        let statistics = self.statistics(rows, head, rotary);
        let free = rows.candidates();
        let free: Vec<bool> = rows.ids(head).iter().map(|id| free.contains(id)).collect();
        let keys = rows.keys(head, 0)?;
        for score in out.iter_mut() {
            score.value = f32::NEG_INFINITY;
        }
        let mut all = scores(&keys, &statistics, rotary, clock.next);
        for own in all.chunks_exact_mut(free.len().max(1)) {
            standardise(own, &free);
            for (score, &x) in out.iter_mut().zip(&*own) {
                score.value = score.value.max(x);
            }
        }
        Ok(())
    }
    fn state_bytes(&self) -> usize {
        // The sums of one query head: elements, and pairs of them.
        let sums = self.place.head_dim + self.place.head_dim / 2;
        match self.calibration {
            Some(_) => 0,
            None => self.own.len() * self.place.group * sums * 8,
        }
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{self, D, TOKENS};
    use crate::rotary::Pairs;

    /// Statistics of the golden calibration queries of one head.
    fn statistics(head: usize, rotary: &Rotary) -> HeadStatistics {
        let queries = golden::uniform("kv2.cal", 2 * 40 * D);
        let mut sums = vec![0.0; D + D / 2];
        for query in queries[head * 40 * D..(head + 1) * 40 * D].chunks_exact(D) {
            let query: Vec<f32> = query.iter().map(|x| x + 0.5).collect();
            add(&mut sums, &query, rotary);
        }
        mean(&sums, 40, D)
    }

    #[test]
    fn scores_of_rotated_keys_equal_golden_values_of_unrotated_ones() {
        let rotary = Rotary::plain(10_000.0, D);
        let keys = golden::rotated_keys();
        let heads = [0, 1].map(|head| statistics(head, &rotary));
        let length = |f: usize| {
            let HeadStatistics { mean, magnitude } = &heads[0];
            mean[f].hypot(mean[f + D / 2]) / magnitude[f]
        };
        let want = [0.770_526_993, 0.694_876_58, 0.761_870_83, 0.744_863_633];
        golden::close(&[0, 1, 2, 3].map(length), &want, 1e-6);
        let mut all = scores(&keys, &heads, &rotary, TOKENS as u32);
        let want = [
            9.238_042_9,
            6.418_547_48,
            10.414_764_4,
            7.719_735_69,
            7.939_729_76,
            7.550_615_72,
        ];
        golden::close(&all[..6], &want, 1e-5);
        for own in all.chunks_exact_mut(TOKENS) {
            standardise(own, &[true; TOKENS]);
        }
        let z: Vec<f32> = (0..TOKENS).map(|i| all[i].max(all[TOKENS + i])).collect();
        let want = [
            1.142_438_15,
            -0.425_515_373,
            1.928_456_87,
            0.128_249_279,
            0.619_140_559,
            0.015_281_628_7,
        ];
        golden::close(&z[..6], &want, 1e-4);
        let mut order: Vec<usize> = (0..TOKENS).collect();
        order.sort_by(|&a, &b| z[a].total_cmp(&z[b]));
        order.truncate(5);
        order.sort_unstable();
        assert_eq!(order, [17, 20, 32, 40, 41]);
    }

    #[test]
    fn for_a_head_whose_queries_are_all_alike_a_score_is_the_mean_of_the_logits_to_come() {
        for pairs in [Pairs::Halves, Pairs::Neighbours] {
            // The last 16 elements are not rotated.
            let rotary = Rotary::new(Rotary::plain(10_000.0, D - 16).frequencies, pairs);
            let query = golden::keys(3);
            let mut sums = vec![0.0; D + rotary.frequencies.len()];
            add(&mut sums, &query, &rotary);
            add(&mut sums, &query, &rotary);
            let head = mean(&sums, 2, D);
            let at = |row: &[f32], position: i64| {
                let mut row = row.to_vec();
                rotary.rotate(&mut row, position);
                row
            };
            for position in [0, 7, 90] {
                let key = at(&golden::keys(5), position);
                let logits = (0..OFFSETS).map(|offset| {
                    let query = at(&query, 100 + (1 << offset));
                    let products = query.iter().zip(&key);
                    products
                        .map(|(&q, &k)| f64::from(q) * f64::from(k))
                        .sum::<f64>()
                });
                let want = logits.sum::<f64>() / f64::from(OFFSETS);
                let got = scores(&key, std::slice::from_ref(&head), &rotary, 100)[0];
                assert!(
                    (f64::from(got) - want).abs() < 1e-4,
                    "{pairs:?} {position}: {got} {want}"
                );
            }
        }
    }

    #[test]
    fn keys_beyond_a_block_score_as_they_do_alone() {
        let rotary = Rotary::plain(10_000.0, D);
        let heads = [0, 1].map(|head| statistics(head, &rotary));
        let keys = golden::uniform("keys", (BLOCK + 37) * D);
        let all = scores(&keys, &heads, &rotary, 300);
        for (at, key) in keys.chunks_exact(D).enumerate() {
            let alone = scores(key, &heads, &rotary, 300);
            let together = [all[at], all[BLOCK + 37 + at]];
            let want: Vec<f64> = alone.iter().map(|&x| x.into()).collect();
            golden::close(&together, &want, 1e-5);
        }
    }

    #[test]
    fn a_sequence_s_own_queries_give_the_statistics_that_a_calibration_of_them_would() {
        let rotary = Rotary::plain(10_000.0, D);
        let rows = golden::Observed::new();
        let mut own = Own::default();
        own.observe(&rows, 0, &rotary);
        let again = own.queries;
        own.observe(&rows, 0, &rotary);
        assert_eq!((own.queries, again), (8, 8), "each query is counted once");
        let mut sums = vec![0.0; D + D / 2];
        for (t, query) in golden::queries()[..8 * D].chunks_exact(D).enumerate() {
            let mut query: Vec<f32> = query.iter().map(|x| x / 8.0).collect();
            rotary.rotate(&mut query, -(40 + t as i64));
            add(&mut sums, &query, &rotary);
        }
        let (got, want) = (&own.statistics(D)[0], mean(&sums, 8, D));
        let wide = |numbers: &[f32]| numbers.iter().map(|&x| x.into()).collect::<Vec<f64>>();
        golden::close(&got.mean, &wide(&want.mean), 1e-6);
        golden::close(&got.magnitude, &wide(&want.magnitude), 1e-6);
    }
}
