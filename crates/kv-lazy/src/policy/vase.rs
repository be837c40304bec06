//! VaSE (arXiv 2606.03928): values that stand out are kept, the rest is drawn.
//!
//! Every B steps, with the newest B tokens untouched. *AttnV* reserves a share of the slots for the values of largest range; the others are drawn without
//! replacement in proportion to the attention of the last B queries over the older tokens, averaged over queries, pooled over five tokens and averaged over the
//! group (Gumbel top-k: the largest of ln ᾱ − ln(−ln u)). The paper reserves by range alone, the reference code puts the first four tokens among the reserved; `sinks` does,
//! for DKV too, where the paper keeps one.
//! *DKV* keeps the largest ‖Gᵀk‖² · ‖Gᵀv‖² with a random G of 20 columns, drawn anew at each eviction.

use super::config::quarter;
use super::draw::Draw;
use super::snapkv::Pooling;
use super::value_guard::{Outlier, ValueNumbers, largest};
use super::window::WindowLogits;
use super::{Budget, Clock, Needs, Phase, Place, Policy, Rows, Rule, Score, Tunable, count};
use crate::attention::products::{products, softmax};
use crate::error::{Error, Result};
use crate::store::{Layout, Relocation};
use serde::{Deserialize, Serialize};

/// Settings of [`VaseAttention`] and [`VaseProducts`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// B, steps between evictions, newest tokens kept and, for AttnV, queries observed; unset: 64, a quarter of the budget where that is less.
    pub buffer: Option<usize>,
    /// First tokens kept; 4.
    pub sinks: usize,
    /// Share of the older tokens' slots that AttnV reserves for values of large range, sinks included; 0.25.
    pub reserved: f64,
    /// Seed of the draws; 0.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            buffer: None,
            sinks: 4,
            reserved: 0.25,
            seed: 0,
        }
    }
}

impl Tunable for Settings {
    fn seed(&mut self) -> Option<&mut u64> {
        Some(&mut self.seed)
    }
}

impl Settings {
    /// The settings with B decided.
    fn checked(&self, budget: Budget) -> Result<(Self, usize)> {
        let buffer = self.buffer.unwrap_or_else(|| quarter(budget, 64));
        if buffer == 0 {
            return Err(Error::ZeroWindow { name: "buffer" });
        }
        if !(0.0..=1.0).contains(&self.reserved) {
            return Err(Error::Setting {
                name: "reserved",
                value: self.reserved.to_string(),
                expected: "a share in [0, 1]",
            });
        }
        Ok((self.clone(), buffer))
    }
}

pub(super) fn build_attention(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    let (settings, buffer) = settings.checked(budget)?;
    Ok(Box::new(VaseAttention {
        settings,
        buffer,
        budget,
        place: Place::default(),
        ranges: ValueNumbers::new(Outlier::Range),
    }))
}

pub(super) fn build_products(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    let (settings, buffer) = settings.checked(budget)?;
    Ok(Box::new(VaseProducts {
        settings,
        buffer,
        place: Place::default(),
    }))
}

/// VaSE-AttnV: values of large range, the rest drawn by attention.
#[derive(Debug, Clone)]
pub struct VaseAttention {
    settings: Settings,
    buffer: usize,
    budget: Budget,
    place: Place,
    ranges: ValueNumbers,
}

/// Attention of the window's queries over the first `prefix` tokens alone, mean over queries, pooled, mean over the group.
fn attention(window: WindowLogits<'_>, prefix: usize) -> Vec<f32> {
    let WindowLogits {
        mut logits,
        group,
        positions,
        len,
        ..
    } = window;
    let mut means = vec![0.0f32; group * prefix];
    for (i, row) in logits.chunks_exact_mut(len.max(1)).enumerate() {
        let row = &mut row[..prefix];
        softmax(row);
        let mean = &mut means[i % group * prefix..][..prefix];
        mean.iter_mut()
            .zip(&*row)
            .for_each(|(mean, w)| *mean += w / positions as f32);
    }
    let mut all = vec![0.0; prefix];
    for mean in means.chunks_exact(prefix.max(1)) {
        for (sum, x) in all.iter_mut().zip(Pooling::Mean.apply(mean, 5)) {
            *sum += x / group as f32;
        }
    }
    all
}

/// Slots reserved among the first `prefix` tokens: the first positions, then the largest ranges.
fn reserved(ids: &[u32], prefix: usize, sinks: usize, ranges: &[f32], slots: usize) -> Vec<usize> {
    let first = ids[..prefix].partition_point(|&id| (id as usize) < sinks);
    let mut reserved: Vec<usize> = (0..first).collect();
    reserved.extend(largest(ranges, first..prefix, slots.saturating_sub(first)));
    reserved
}

/// ln ᾱ − ln(−ln u): the largest are a sample without replacement in proportion to ᾱ.
fn gumbel(attention: f32, uniform: f64) -> f32 {
    (f64::from(attention).ln() - (-uniform.ln()).ln()) as f32
}

impl Policy for VaseAttention {
    fn name(&self) -> &'static str {
        "vase-attnv"
    }
    // Drawn by shares of a softmax, in every head over the tokens before the newest.
    fn comparable(&self) -> bool {
        true
    }
    fn needs(&self) -> Needs {
        Needs::keys().with_new_values().with_queries(self.buffer)
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            // Attention is pooled over neighbours.
            layout: Layout::Compact,
            ..Rule::periodic(self.settings.sinks, self.buffer, self.buffer)
        }
    }
    fn start(&mut self, place: Place) {
        self.place = place;
        self.ranges.start(place);
    }
    fn joined(&mut self, rows: &dyn Rows) -> Result<()> {
        self.ranges.joined(rows)
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        out: &mut [Score],
    ) -> Result<()> {
        let ids = rows.ids(head);
        let from = clock.next.saturating_sub(count(self.buffer));
        let prefix = ids.partition_point(|&id| id < from);
        let kept = self
            .budget
            .tokens(clock.next as usize)
            .saturating_sub(self.buffer);
        let slots = (self.settings.reserved * kept as f64) as usize;
        let draw = Draw::new(self.settings.seed, self.place, head, clock);
        let attention = attention(WindowLogits::of(rows, head)?, prefix);
        for ((score, &weight), &id) in out.iter_mut().zip(&attention).zip(ids) {
            score.value = gumbel(weight, draw.uniform(id));
        }
        let ranges = self.ranges.of(head);
        for slot in reserved(ids, prefix, self.settings.sinks, ranges, slots) {
            out[slot].value = f32::INFINITY;
        }
        Ok(())
    }
    fn relocate(&mut self, head: usize, moves: &Relocation) {
        self.ranges.relocate(head, moves);
    }
    fn state_bytes(&self) -> usize {
        self.ranges.bytes()
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}

/// Columns of G.
const COLUMNS: usize = 20;

/// VaSE-DKV: the largest products of random projections of key and value.
#[derive(Debug, Clone)]
pub struct VaseProducts {
    settings: Settings,
    buffer: usize,
    place: Place,
}

/// Tokens projected together: they stay in the first cache while the columns pass.
const BLOCK: usize = 64;

/// ‖Gᵀx‖² of each row; `columns` is Gᵀ `[20, d]`.
fn projected(rows: &[f32], d: usize, columns: &[f32]) -> Vec<f32> {
    let mut sums = vec![0.0; rows.len() / d];
    for (sums, rows) in sums.chunks_mut(BLOCK).zip(rows.chunks(BLOCK * d)) {
        for column in products(columns, rows, d).chunks_exact(sums.len()) {
            for (sum, x) in sums.iter_mut().zip(column) {
                *sum += x * x;
            }
        }
    }
    sums
}

/// ‖Gᵀk‖² · ‖Gᵀv‖² of each token; `projection` is G `[d, 20]`. The paper divides by the sum, which changes no order.
fn sizes(keys: &[f32], values: &[f32], d: usize, projection: &[f64]) -> Vec<f32> {
    let column = |c: usize| projection.iter().skip(c).step_by(COLUMNS);
    let columns: Vec<f32> = (0..COLUMNS).flat_map(column).map(|&x| x as f32).collect();
    let keys = projected(keys, d, &columns);
    let values = projected(values, d, &columns);
    keys.iter().zip(&values).map(|(k, v)| k * v).collect()
}

impl Policy for VaseProducts {
    fn name(&self) -> &'static str {
        "vase-dkv"
    }
    fn needs(&self) -> Needs {
        Needs::keys().with_values()
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule::periodic(self.settings.sinks, self.buffer, self.buffer)
    }
    fn start(&mut self, place: Place) {
        self.place = place;
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        out: &mut [Score],
    ) -> Result<()> {
        let d = rows.head_dim();
        let mut draw = Draw::new(self.settings.seed, self.place, head, clock);
        let projection = draw.normals(d * COLUMNS, 1.0 / COLUMNS as f64);
        let sizes = sizes(&rows.keys(head, 0)?, &rows.values(head, 0)?, d, &projection);
        for (score, value) in out.iter_mut().zip(sizes) {
            score.value = value;
        }
        Ok(())
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{self, D, TOKENS};

    #[test]
    fn attnv_keeps_the_golden_tokens() {
        let rows = golden::Observed::new();
        let prefix = TOKENS - 8;
        let attention = attention(WindowLogits::of(&rows, 0).unwrap(), prefix);
        let values = golden::all_values();
        let ranges: Vec<f32> = values
            .chunks_exact(D)
            .map(|v| Outlier::Range.of(v))
            .collect();
        let mut held = reserved(rows.ids(0), prefix, 4, &ranges, 6);
        held.sort_unstable();
        assert_eq!(held, [0, 1, 2, 3, 7, 36]);
        let uniforms = golden::uniform("kv2.gumbel", TOKENS);
        let keys: Vec<f32> = attention
            .iter()
            .zip(&uniforms)
            .map(|(&a, &e)| gumbel(a, (f64::from(e) + 1.0) / 2.0))
            .collect();
        let others = (0..prefix).filter(|slot| !held.contains(slot));
        let drawn = largest(&keys, others, 10);
        held.extend(drawn);
        held.sort_unstable();
        assert_eq!(
            held,
            [0, 1, 2, 3, 4, 7, 9, 12, 15, 23, 26, 27, 29, 32, 35, 36]
        );
    }

    #[test]
    fn rows_beyond_a_block_are_projected_as_those_of_one() {
        let rows = golden::uniform("rows", (BLOCK + 37) * D);
        let columns = golden::uniform("columns", COLUMNS * D);
        let mut want = vec![0.0f64; BLOCK + 37];
        for column in columns.chunks_exact(D) {
            for (want, row) in want.iter_mut().zip(rows.chunks_exact(D)) {
                let terms = column.iter().zip(row);
                let product: f64 = terms.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                *want += product * product;
            }
        }
        golden::close(&projected(&rows, D, &columns), &want, 1e-5);
    }

    #[test]
    fn dkv_s_products_are_in_golden_proportion() {
        let projection: Vec<f64> = golden::uniform("kv2.gauss", D * COLUMNS)
            .iter()
            .map(|&e| f64::from(e) * (3.0f64 / 20.0).sqrt())
            .collect();
        let got = sizes(&golden::all_keys(), &golden::all_values(), D, &projection);
        // The golden numbers are shares of a sum.
        let ratio = f64::from(got[4]) / f64::from(got[5]);
        let want = 0.038_583_461_5 / 0.005_761_766_24;
        assert!((ratio / want - 1.0).abs() < 1e-5, "{ratio} {want}");
        // It is that of the tokens before the newest eight; the four sinks have 1 in place of theirs.
        let sum: f64 = got[..TOKENS - 8].iter().map(|&x| f64::from(x)).sum();
        let shares: Vec<f32> = got[4..6]
            .iter()
            .map(|&x| (f64::from(x) / sum) as f32)
            .collect();
        golden::close(&shares, &[0.038_583_461_5, 0.005_761_766_24], 1e-5);
    }

    #[test]
    fn tokens_are_drawn_in_proportion_to_their_attention() {
        let share = |weight: f32| {
            let wins = (0..20_000u32).filter(|&event| {
                let clock = Clock {
                    next: event,
                    step: 1,
                    tokens: 1,
                    prompt: 0,
                    phase: Phase::Decode,
                };
                let draw = Draw::new(3, Place::default(), 0, &clock);
                gumbel(weight, draw.uniform(0)) > gumbel(1.0 - weight, draw.uniform(1))
            });
            wins.count() as f64 / 20_000.0
        };
        assert!((share(0.5) - 0.5).abs() < 0.02 && (share(0.9) - 0.9).abs() < 0.02);
    }
}
