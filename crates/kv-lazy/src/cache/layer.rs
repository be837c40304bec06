//! One layer's step: make room, append, attend, show the policy its weights, evict.

use super::LayerShape;
use super::queries::QueryRing;
use super::sinks::MovingSinks;
use crate::attention::Scores;
use crate::error::{Error, Result};
use crate::policy::{Clock, Evictor, Needs, Phase, Plan, RecentQueries, Rows, Seen};
use crate::quantise::{self, StorageConfig};
use crate::rotary::Rotary;
use crate::store::{self, Call, Layout, Relocation, Store};
use candle_core::Tensor;
use rayon::prelude::*;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tokens that left a sliding window are dropped once they are this many.
const DEAD: usize = 64;

/// Tokens of a decode step up to which policies see each query's weights.
const SHOWN: usize = 16;

/// Tokens from which a second thread pays for the bookkeeping, some 100 µs of work; with more threads fewer will do.
const PARALLEL_FROM: usize = 1 << 17;

/// Whether `tokens` of a layer are looked after in parallel; results do not depend on it.
fn in_parallel(tokens: usize) -> bool {
    let threads = rayon::current_num_threads();
    threads > 1 && tokens >= 2 * PARALLEL_FROM / threads
}

/// Storage of a layer and its policies; none for the full cache.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) shape: LayerShape,
    pub(super) store: Box<dyn Store>,
    pub(super) attended: bool,
    /// What a layer without KV heads carries from token to token; empty where it carries nothing.
    pub(super) state: Vec<f32>,
    pub(super) index: usize,
    /// What distinguishes the layer from one with another policy or storage.
    configuration: String,
    /// Bytes of the storage when they were last looked at.
    pub(super) bytes: usize,
    /// Each for `heads` consecutive rows.
    evictors: Vec<Evictor>,
    heads: usize,
    fresh: Vec<Evictor>,
    needs: Needs,
    queries: Option<QueryRing>,
    rotary: Option<Arc<Rotary>>,
    sinks: Option<MovingSinks>,
    /// Time spent in the policies; none where it is not measured.
    spent: Option<Duration>,
}

/// A sequence's rows of a layer, as policies see them.
struct SequenceRows<'a> {
    layer: &'a dyn Store,
    queries: Option<&'a QueryRing>,
    rotary: Option<&'a Rotary>,
    first: usize,
    head_dim: usize,
}

impl Rows for SequenceRows<'_> {
    fn head_dim(&self) -> usize {
        self.head_dim
    }
    fn ids(&self, head: usize) -> &[u32] {
        self.layer.ids(self.first + head)
    }
    fn keys(&self, head: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        self.layer.keys(self.first + head, from)
    }
    fn values(&self, head: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        self.layer.values(self.first + head, from)
    }
    fn queries(&self, head: usize) -> RecentQueries<'_> {
        self.queries
            .map_or_else(RecentQueries::default, |q| q.row(self.first + head))
    }
    fn rotary(&self) -> Option<&Rotary> {
        self.rotary
    }
}

impl Layer {
    pub(super) fn new(
        index: usize,
        shape: LayerShape,
        store: Box<dyn Store>,
        layout: quantise::Layout,
        evictors: Vec<Evictor>,
    ) -> Self {
        let needs = evictors.first().map_or_else(Needs::default, Evictor::needs);
        let rows = store.rows();
        let queries = (needs.queries > 0 && shape.kv_heads > 0).then(|| {
            let group = shape.query_heads / shape.kv_heads;
            QueryRing::new(needs.queries, rows, group, shape.head_dim)
        });
        let policy = evictors.first().map(Evictor::describe);
        Self {
            shape,
            configuration: format!("{policy:?} {layout:?}"),
            store,
            attended: true,
            state: Vec::new(),
            index,
            bytes: 0,
            fresh: evictors.clone(),
            heads: rows.checked_div(evictors.len()).unwrap_or(1),
            evictors,
            needs,
            queries,
            rotary: None,
            sinks: None,
            spent: None,
        }
    }

    /// Measures the time that the policies take from now on.
    #[cfg(feature = "trace")]
    pub(super) fn measure_policy(&mut self) {
        self.spent = Some(Duration::ZERO);
    }

    /// The time that the policies took while it was measured.
    #[cfg(feature = "trace")]
    pub(super) fn policy_time(&self) -> Duration {
        self.spent.unwrap_or_default()
    }

    /// The time at which the policies begin something, where it is measured.
    fn policy_begins(&self) -> Option<Instant> {
        self.spent.map(|_| Instant::now())
    }

    /// The policies have done what they began.
    fn policy_ends(&mut self, begun: Option<Instant>) {
        if let (Some(spent), Some(begun)) = (&mut self.spent, begun) {
            *spent += begun.elapsed();
        }
    }

    /// Lets the policy's sinks move up to the newest tokens.
    pub(super) fn move_sinks(&mut self, storage: &StorageConfig) -> Result<()> {
        if self.shape.kv_heads == 0 {
            return Ok(());
        }
        if self.rotary.is_none() {
            return Err(Error::NeedUnavailable {
                policy: format!("of layer {}", self.index),
                need: "the model's rotation (`rotary`), for consecutive positions",
                path: "this configuration",
            });
        }
        let count = self
            .evictors
            .first()
            .map_or(0, |e| e.rule(Phase::Decode).sinks);
        if storage.is_quantised() && storage.sinks < count {
            return Err(Error::Setting {
                name: "sinks",
                value: format!("{} of the storage", storage.sinks),
                expected: "at least the policy's, which are not quantised where they move",
            });
        }
        let sinks = MovingSinks::new(count, self.store.rows(), self.shape.head_dim);
        self.configuration += " consecutive";
        self.sinks = Some(sinks);
        Ok(())
    }

    /// Tells the layer how the model rotates its keys.
    pub(super) fn set_rotary(&mut self, rotary: Option<&Rotary>) -> Result<()> {
        match rotary {
            Some(rotary) => {
                rotary.check(self.shape.head_dim)?;
                if let Some(evictor) = self.evictors.first() {
                    evictor.admits_rotary(rotary)?;
                }
            }
            None if self.needs.rotary => {
                return Err(Error::NeedUnavailable {
                    policy: format!("of layer {}", self.index),
                    need: "the model's rotation (`rotary`)",
                    path: "this configuration",
                });
            }
            None => {}
        }
        self.rotary = rotary.cloned().map(Arc::new);
        Ok(())
    }

    /// Tokens held per sequence and head.
    pub(super) fn physical_len(&self) -> usize {
        if self.shares() {
            let lens = (0..self.store.rows()).map(|row| self.store.len(row));
            return lens.max().unwrap_or(0);
        }
        if self.store.rows() == 0 {
            return 0;
        }
        self.store.len(0)
    }

    /// Whether heads may hold different numbers of tokens.
    fn shares(&self) -> bool {
        self.evictors.first().is_some_and(Evictor::shares)
    }

    /// Whether `other` has the same policy, budget and storage.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        self.configuration == other.configuration
    }

    /// Refuses a policy that needs what attention computed elsewhere cannot give; `policy` names it.
    pub(super) fn check_elsewhere(&self, policy: impl FnOnce() -> String) -> Result<()> {
        match self.needs.attention() {
            None => Ok(()),
            Some(need) => Err(Error::NeedUnavailable {
                policy: policy(),
                need,
                path: "attention computed elsewhere",
            }),
        }
    }

    /// Numbers the sequences from `first` on; before the first token.
    pub(super) fn number_from(&mut self, first: usize, batch: usize) {
        let per_sequence = (self.evictors.len() / batch.max(1)).max(1);
        for (part, evictor) in self.evictors.iter_mut().enumerate() {
            evictor.renumber(first + part / per_sequence);
        }
        self.fresh.clone_from(&self.evictors);
    }

    /// Attends what was appended; the policy sees the weights.
    pub(super) fn attend(&mut self, q: &Tensor, scores: Scores, clock: &Clock) -> Result<Tensor> {
        let position = clock.next - clock.tokens;
        if let Some(queries) = &mut self.queries {
            queries.push(q, scores, position)?;
        }
        let weights = self.needs.of(clock.phase);
        let call = Call {
            scores,
            position,
            sliding_window: self.shape.sliding_window,
            weights,
            queries: match clock.phase {
                _ if !weights.single() => 0,
                Phase::Decode if clock.tokens as usize <= SHOWN => clock.tokens as usize,
                _ => 1,
            },
        };
        let kv_heads = self.shape.kv_heads;
        let out = self
            .store
            .attend(q, &call)?
            .map_err(|row| Error::NonFinite {
                layer: self.index,
                sequence: row / kv_heads,
                head: row % kv_heads,
            })?;
        if !weights.is_empty() {
            self.observe(clock);
        }
        Ok(out)
    }

    /// Shows the policy what it needs of the attention of what was appended, whose output is not wanted.
    pub(super) fn feed(&mut self, q: &Tensor, scores: Scores, clock: &Clock) -> Result<()> {
        let weights = self.needs.of(clock.phase);
        let tokens = clock.tokens as usize;
        let last_alone = !weights.columns() && (clock.phase == Phase::Prefill || tokens > SHOWN);
        if weights.is_empty() || !last_alone {
            if !weights.is_empty() {
                return self.attend(q, scores, clock).map(|_| ());
            }
            if let Some(queries) = &mut self.queries {
                queries.push(q, scores, clock.next - clock.tokens)?;
            }
            return Ok(());
        }
        if let Some(queries) = &mut self.queries {
            queries.push(q, scores, clock.next - clock.tokens)?;
        }
        let call = Call {
            scores,
            position: clock.next - 1,
            sliding_window: self.shape.sliding_window,
            weights,
            queries: 1,
        };
        let last = q.narrow(2, tokens - 1, 1)?.contiguous()?;
        let kv_heads = self.shape.kv_heads;
        self.store
            .attend(&last, &call)?
            .map_err(|row| Error::NonFinite {
                layer: self.index,
                sequence: row / kv_heads,
                head: row % kv_heads,
            })?;
        self.observe(clock);
        Ok(())
    }

    /// Shows the policies the weights of the attention just computed.
    fn observe(&mut self, clock: &Clock) {
        let begun = self.policy_begins();
        let (heads, exported) = (self.heads, self.store.exported());
        let observe = |(part, evictor): (usize, &mut Evictor)| {
            for block in 0..exported.blocks() {
                for head in 0..heads {
                    let (query, kind, weights) = exported.block(part * heads + head, block);
                    let after = exported.queries().saturating_sub(query + 1) as u32;
                    let clock = Clock {
                        next: clock.next - after,
                        step: clock.step.saturating_sub(after),
                        ..*clock
                    };
                    evictor.observe_finite(head, Seen { kind, weights }, &clock);
                }
            }
        };
        if in_parallel(exported.len()) {
            self.evictors.par_iter_mut().enumerate().for_each(observe);
        } else {
            self.evictors.iter_mut().enumerate().for_each(observe);
        }
        self.policy_ends(begun);
    }

    /// Appends the step's keys and values, after making room where the policy evicts ahead.
    pub(super) fn append(&mut self, k: &Tensor, v: &Tensor, clock: &Clock) -> Result<()> {
        let position = clock.next - clock.tokens;
        let overwrite = self.make_room(clock)?;
        let kv_heads = self.shape.kv_heads;
        self.store
            .append(k, v, position, &overwrite)?
            .map_err(|(row, what)| Error::Quantise {
                layer: self.index,
                sequence: row / kv_heads,
                head: row % kv_heads,
                what,
            })?;
        let tokens = clock.tokens as usize;
        let begun = self.policy_begins();
        for (part, evictor) in self.evictors.iter_mut().enumerate() {
            evictor.append(clock);
            for head in 0..self.heads {
                if let Some(slots) = overwrite.get(part * self.heads + head) {
                    let grown = self.store.len(0) + slots.len();
                    evictor.relocate(head, &Relocation::overwrite(slots, grown, tokens));
                }
            }
        }
        if self.needs.new_values {
            self.joined()?;
        }
        self.policy_ends(begun);
        if let (Some(sinks), Some(rotary)) = (&mut self.sinks, &self.rotary) {
            sinks.append(k, position, rotary)?;
            sinks.place(self.store.as_mut(), rotary)?;
        }
        Ok(())
    }

    /// Shows the policies the tokens that were just stored.
    fn joined(&mut self) -> Result<()> {
        let (store, heads, head_dim) = (self.store.as_ref(), self.heads, self.shape.head_dim);
        for (part, evictor) in self.evictors.iter_mut().enumerate() {
            let rows = SequenceRows {
                layer: store,
                queries: None,
                rotary: None,
                first: part * heads,
                head_dim,
            };
            evictor.joined(&rows)?;
        }
        Ok(())
    }

    /// Evicts what an ahead-of-time policy gives up. The slots are returned, to be overwritten, where a single new token can take the
    /// place of a single old one.
    fn make_room(&mut self, clock: &Clock) -> Result<Vec<Vec<u32>>> {
        let rule = self.evictors.first().map(|first| first.rule(clock.phase));
        let Some(rule) = rule.filter(|rule| rule.ahead) else {
            return Ok(Vec::new());
        };
        let Some(plans) = self.plans(|evictor, rows| evictor.plan_ahead(rows, clock))? else {
            return Ok(Vec::new());
        };
        let single = clock.tokens == 1 && plans[0].evicted() == 1;
        if rule.layout == Layout::SinkRing && single && self.store.overwrites() {
            return Ok(plans.into_iter().flat_map(|plan| plan.evict).collect());
        }
        let room = self.room(&plans[0], clock, clock.tokens as usize);
        self.apply(plans, Layout::Compact, room)?;
        Ok(Vec::new())
    }

    /// Evicts what the policy gives up after a step, and what no later query can see.
    pub(super) fn evict(&mut self, clock: &Clock) -> Result<()> {
        // Not a thread is asked where nothing is due.
        let due = self.evictors.first().is_some_and(|first| first.due(clock));
        if due && let Some(plans) = self.plans(|evictor, rows| evictor.plan(rows, clock))? {
            let rule = self.evictors[0].rule(clock.phase);
            let layout = match clock.phase {
                // One bulk eviction, after which physical order is chronological.
                Phase::Prefill => Layout::Compact,
                Phase::Decode => rule.layout,
            };
            let room = self.room(&plans[0], clock, 0);
            self.apply(plans, layout, room)?;
        }
        self.drop_unreachable(clock)
    }

    /// One plan per evictor, or none if no eviction is due.
    fn plans(
        &mut self,
        plan: impl Fn(&mut Evictor, &dyn Rows) -> Result<Option<Plan>> + Sync,
    ) -> Result<Option<Vec<Plan>>> {
        let begun = self.policy_begins();
        let (store, queries) = (self.store.as_ref(), self.queries.as_ref());
        let rotary = self.rotary.as_deref();
        let (heads, head_dim, len) = (self.heads, self.shape.head_dim, self.physical_len());
        let shares = self.shares();
        // Reading a few elements takes as long as ranking a token.
        let reads = self.needs.keys || self.needs.values || self.needs.queries > 0;
        let each = if reads { 1 + head_dim / 4 } else { 1 };
        let plan_of = |(part, evictor): (usize, &mut Evictor)| {
            let rows = SequenceRows {
                layer: store,
                queries,
                rotary,
                first: part * heads,
                head_dim,
            };
            let plan = plan(evictor, &rows)?;
            match &plan {
                Some(plan) if shares => plan.check_each(&rows)?,
                Some(plan) => plan.check(len)?,
                None => {}
            }
            Ok(plan)
        };
        let evictors = &mut self.evictors;
        let plans: Vec<Option<Plan>> = if in_parallel(evictors.len() * heads * len * each) {
            evictors
                .par_iter_mut()
                .enumerate()
                .map(plan_of)
                .collect::<Result<_>>()?
        } else {
            evictors
                .iter_mut()
                .enumerate()
                .map(plan_of)
                .collect::<Result<_>>()?
        };
        self.policy_ends(begun);
        if shares {
            let any = plans.iter().any(Option::is_some);
            let none = || Plan {
                evict: vec![Vec::new(); heads],
            };
            let all = plans.into_iter().map(|plan| plan.unwrap_or_else(none));
            return Ok(any.then(|| all.collect()));
        }
        let plans: Vec<Plan> = plans.into_iter().flatten().collect();
        match plans.first().map(Plan::evicted) {
            None => Ok(None),
            Some(first)
                if plans.len() == self.evictors.len()
                    && plans.iter().all(|plan| plan.evicted() == first) =>
            {
                Ok(Some(plans))
            }
            Some(_) => Err(Error::Plan {
                what: format!("layer {}", self.index),
                problem: "its heads keep different numbers of tokens".into(),
            }),
        }
    }

    /// Tokens that may join after `plan` until the next eviction, of which `coming` join at once.
    fn room(&self, plan: &Plan, clock: &Clock, coming: usize) -> usize {
        let evictor = &self.evictors[0];
        let headroom = evictor.rule(Phase::Decode).headroom();
        let room = headroom.saturating_add(coming);
        if self.shares() {
            return room;
        }
        // Some plans go below the budget, to which the row grows again.
        let held = self.physical_len().saturating_sub(plan.evicted()) + coming;
        let room = room.saturating_add(evictor.budget(clock).saturating_sub(held));
        match evictor.grows() {
            // The row outgrows any room for its present budget within some steps.
            true => room.saturating_add(store::growth(held)),
            false => room,
        }
    }

    fn apply(&mut self, plans: Vec<Plan>, layout: Layout, room: usize) -> Result<()> {
        let evict: Vec<Vec<u32>> = plans.into_iter().flat_map(|plan| plan.evict).collect();
        self.evict_slots(&evict, layout, room)
    }

    /// Evicts slots of every row from the store and from the policies' state.
    fn evict_slots(&mut self, evict: &[Vec<u32>], layout: Layout, room: usize) -> Result<()> {
        let moves = self.store.evict(evict, layout, room)?;
        let begun = self.policy_begins();
        for (row, moves) in moves.iter().enumerate() {
            if let Some(evictor) = self.evictors.get_mut(row / self.heads) {
                evictor.relocate(row % self.heads, moves);
            }
        }
        self.policy_ends(begun);
        Ok(())
    }

    /// Quantises what is due; returns the most bytes that keys and values took meanwhile.
    pub(super) fn settle(&mut self) -> Result<usize> {
        self.store.settle()
    }

    /// Drops tokens that have left the layer's sliding window for good, in bulk; every row drops the same number.
    fn drop_unreachable(&mut self, clock: &Clock) -> Result<()> {
        let Some(window) = self.shape.sliding_window else {
            return Ok(());
        };
        let room = DEAD.max(window / 4);
        if self.physical_len() < window.saturating_add(room) {
            return Ok(());
        }
        let rows = self.store.rows();
        let dead = |id: u32| (id as usize).saturating_add(window) <= clock.next as usize;
        let count = (0..rows)
            .map(|row| self.store.ids(row).iter().filter(|&&id| dead(id)).count())
            .min()
            .unwrap_or(0);
        if count < DEAD {
            return Ok(());
        }
        let gone: Vec<Vec<u32>> = (0..rows)
            .map(|row| {
                let ids = (0u32..).zip(self.store.ids(row));
                let gone = ids.filter(|&(_, &id)| dead(id)).map(|(slot, _)| slot);
                gone.take(count).collect()
            })
            .collect();
        self.evict_slots(&gone, Layout::Compact, room)
    }

    pub(super) fn state_bytes(&self) -> usize {
        self.evictors
            .iter()
            .map(Evictor::state_bytes)
            .sum::<usize>()
            + self.queries.as_ref().map_or(0, QueryRing::bytes)
            + self.sinks.as_ref().map_or(0, MovingSinks::bytes)
            + size_of_val(self.state.as_slice())
    }

    pub(super) fn reset(&mut self) {
        self.store.clear();
        self.evictors.clone_from(&self.fresh);
        if let Some(queries) = &mut self.queries {
            queries.clear();
        }
        if let Some(sinks) = &mut self.sinks {
            sinks.clear();
        }
        self.state = Vec::new();
        self.attended = true;
        self.bytes = 0;
    }
}
