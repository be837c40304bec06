//! From scores to plans: the one place where tokens are chosen.
//!
//! When an eviction is due and a layer holds more than its budget, what the rule protects stays, the rest are ranked
//! by score, and the slots of the lowest are the plan. All heads keep the same number of tokens.

use super::lowest::{jointly, lowest};
use super::{
    Budget, Clock, Needs, Phase, Place, Policy, Prompt, RecentQueries, Rows, Rule, Score, Seen,
    Trigger, count,
};
use crate::LayerShape;
use crate::error::{Error, Result};
use crate::rotary::Rotary;
use crate::store::Relocation;
use std::borrow::Cow;
use std::ops::Range;

/// The slots whose tokens leave, ascending, for each KV head of one sequence; the same number for all, except where heads share their budgets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// `[heads][evicted]`.
    pub evict: Vec<Vec<u32>>,
}

impl Plan {
    /// Tokens that leave each head.
    pub fn evicted(&self) -> usize {
        self.evict.first().map_or(0, Vec::len)
    }

    /// Checks that the plan fits the rows of heads that may differ in length.
    pub(crate) fn check_each(&self, rows: &dyn Rows) -> Result<()> {
        for (head, evict) in self.evict.iter().enumerate() {
            let alone = Self {
                evict: vec![evict.clone()],
            };
            alone.check(rows.len(head))?;
        }
        Ok(())
    }

    /// Checks that the plan fits heads of `len` tokens.
    ///
    /// # Errors
    /// Slots out of range or order, or heads that lose different numbers.
    pub fn check(&self, len: usize) -> Result<()> {
        for (head, evict) in self.evict.iter().enumerate() {
            let problem = if evict.len() != self.evicted() {
                let (here, first) = (evict.len(), self.evicted());
                format!("loses {here} tokens where head 0 loses {first}")
            } else if evict.windows(2).any(|pair| pair[0] >= pair[1]) {
                "slots are not ascending".into()
            } else if evict.last().is_some_and(|&slot| slot as usize >= len) {
                format!("slot out of {len}")
            } else {
                continue;
            };
            return Err(Error::Plan {
                what: format!("head {head}"),
                problem,
            });
        }
        Ok(())
    }
}

/// A policy and its budget for one layer of one sequence.
#[derive(Debug, Clone)]
pub struct Evictor {
    policy: Box<dyn Policy>,
    budget: Budget,
    place: Place,
    /// Where the heads of a layer share their budgets: the share of its own that each keeps at least.
    floor: Option<f64>,
    scores: Vec<Score>,
}

impl Evictor {
    /// `policy` within `budget`.
    ///
    /// # Errors
    /// A budget below sinks + recent + 1, a window of zero, settings out of range.
    pub fn new(mut policy: Box<dyn Policy>, budget: Budget, place: Place) -> Result<Self> {
        for phase in [Phase::Prefill, Phase::Decode] {
            let rule = policy.rule(phase);
            check(&rule)?;
            if rule.decode == Trigger::Never && !rule.after_prefill {
                continue;
            }
            budget.check(rule.sinks, rule.recent)?;
            if let Prompt::CompressOnce(tokens) = rule.prompt {
                // The first tokens stay when the prompt is cut.
                Budget::Tokens(tokens).check(rule.sinks, 0)?;
                if let Budget::Tokens(budget) = budget
                    && tokens.saturating_add(rule.recent) >= budget
                {
                    return Err(Error::BudgetTooSmall {
                        budget,
                        sinks: tokens,
                        recent: rule.recent,
                    });
                }
            }
        }
        let queries = policy.needs().queries;
        if u32::try_from(queries).is_err() {
            return Err(Error::Setting {
                name: "queries",
                value: queries.to_string(),
                expected: "at most 4294967295",
            });
        }
        policy.start(place);
        Ok(Self {
            policy,
            budget,
            place,
            floor: None,
            scores: Vec::new(),
        })
    }

    /// The same for heads that share their budgets: the best tokens of all heads stay, and each head keeps at least a share `floor` of its own budget.
    ///
    /// # Errors
    /// A policy whose scores cannot be compared between heads or that evicts ahead; a share outside [0, 1].
    pub fn sharing(mut self, floor: f64) -> Result<Self> {
        let ahead = [Phase::Prefill, Phase::Decode].map(|phase| self.policy.rule(phase).ahead);
        if !self.policy.comparable() || ahead.contains(&true) {
            return Err(Error::Setting {
                name: "shared-budget",
                value: format!("policy {}", self.policy.name()),
                expected: "a policy whose scores are comparable between heads: snapkv, dropkv, vase-attnv, or h2o with `normalise: mean`",
            });
        }
        if !(0.0..=1.0).contains(&floor) {
            return Err(Error::Setting {
                name: "shared-budget",
                value: floor.to_string(),
                expected: "a share in [0, 1]",
            });
        }
        self.floor = Some(floor);
        Ok(self)
    }

    /// Whether its heads may hold different numbers of tokens.
    pub(crate) fn shares(&self) -> bool {
        self.floor.is_some()
    }

    /// One evictor per sequence and KV head of a layer, in this order; per sequence where the policy needs all heads together.
    pub(crate) fn for_batch(
        policy: &dyn Policy,
        budget: Budget,
        layer: usize,
        batch: usize,
        shape: &LayerShape,
        shared: Option<f64>,
    ) -> Result<Vec<Self>> {
        policy.admits(layer, shape)?;
        let kv_heads = shape.kv_heads;
        let heads = if policy.needs().all_heads || shared.is_some() {
            kv_heads
        } else {
            1
        };
        (0..batch * kv_heads / heads)
            .map(|part| {
                let row = part * heads;
                let place = Place {
                    layer,
                    sequence: row / kv_heads,
                    first_head: row % kv_heads,
                    heads,
                    kv_heads,
                    group: shape.query_heads / kv_heads,
                    head_dim: shape.head_dim,
                };
                let evictor = Self::new(policy.boxed_clone(), budget, place)?;
                match shared {
                    Some(floor) => evictor.sharing(floor),
                    None => Ok(evictor),
                }
            })
            .collect()
    }

    /// Tells the policy that its sequence has another number; before the first token.
    pub(crate) fn renumber(&mut self, sequence: usize) {
        self.place.sequence = sequence;
        self.policy.start(self.place);
    }

    /// Whether the policy fits the rotation of its layer's keys.
    ///
    /// # Errors
    /// Settings made for another rotation.
    pub(crate) fn admits_rotary(&self, rotary: &Rotary) -> Result<()> {
        self.policy.admits_rotary(self.place.layer, rotary)
    }

    /// What the policy must be given.
    pub fn needs(&self) -> Needs {
        self.policy.needs()
    }

    /// The newest tokens that the policy protects or whose queries it observes.
    pub(crate) fn recent(&self) -> usize {
        let rules = [Phase::Prefill, Phase::Decode].map(|phase| self.policy.rule(phase).recent);
        rules[0].max(rules[1]).max(self.policy.needs().queries)
    }

    /// The newest tokens that it never evicts.
    pub(crate) fn protected(&self) -> usize {
        let newest = [Phase::Prefill, Phase::Decode].map(|p| self.policy.rule(p).newest(p));
        newest[0].min(newest[1])
    }

    /// The budget at a clock.
    pub(crate) fn budget(&self, clock: &Clock) -> usize {
        self.budget.tokens(clock.next as usize)
    }

    /// Tokens that a row is to hold at most: the budget and those that join until the next eviction; `usize::MAX` where the budget grows or what is
    /// generated stays.
    pub(crate) fn most(&self) -> usize {
        let rule = self.policy.rule(Phase::Decode);
        match self.budget {
            Budget::Tokens(budget) if rule.decode != Trigger::Never => {
                budget.saturating_add(rule.headroom())
            }
            _ => usize::MAX,
        }
    }

    /// Whether the budget grows with the text.
    pub(crate) fn grows(&self) -> bool {
        matches!(self.budget, Budget::Ratio(_))
    }

    /// What distinguishes it from an evictor with other rules, needs or budget.
    pub(crate) fn describe(&self) -> String {
        let rules = [Phase::Prefill, Phase::Decode].map(|phase| self.policy.rule(phase));
        let (name, needs) = (self.policy.name(), self.policy.needs());
        format!(
            "{name} {rules:?} {needs:?} {:?} {:?}",
            self.budget, self.floor
        )
    }

    /// The rule that holds in a phase.
    pub fn rule(&self, phase: Phase) -> Rule {
        self.policy.rule(phase)
    }

    /// `clock.tokens` tokens joined.
    pub fn append(&mut self, clock: &Clock) {
        self.policy.append(clock);
    }

    /// The tokens that joined are stored.
    ///
    /// # Errors
    /// Values that could not be read.
    pub fn joined(&mut self, rows: &dyn Rows) -> Result<()> {
        self.policy.joined(rows)
    }

    /// Shows one head's weights to the policy.
    ///
    /// # Errors
    /// Weights that are not finite.
    pub fn observe(&mut self, head: usize, seen: Seen<'_>, clock: &Clock) -> Result<()> {
        if seen.weights.iter().any(|w| !w.is_finite()) {
            let Place {
                layer,
                sequence,
                first_head,
                ..
            } = self.place;
            return Err(Error::NonFinite {
                layer,
                sequence,
                head: first_head + head,
            });
        }
        self.observe_finite(head, seen, clock);
        Ok(())
    }

    /// As [`observe`](Self::observe), for weights of a softmax that is known to be finite.
    pub(crate) fn observe_finite(&mut self, head: usize, seen: Seen<'_>, clock: &Clock) {
        debug_assert!(self.policy.needs().of(clock.phase).contains(seen.kind));
        self.policy.observe(head, seen, clock);
    }

    /// The plan of an eviction after a step, if one is due.
    ///
    /// # Errors
    /// Keys, values or queries that the policy could not read.
    pub fn plan(&mut self, rows: &dyn Rows, clock: &Clock) -> Result<Option<Plan>> {
        if !self.due(clock) {
            return Ok(None);
        }
        let rule = self.policy.rule(clock.phase);
        self.choose(&rule, rows, clock, 0)
    }

    /// Whether [`plan`](Self::plan) looks at the cache after the step of `clock`.
    pub fn due(&self, clock: &Clock) -> bool {
        let rule = self.policy.rule(clock.phase);
        match clock.phase {
            Phase::Prefill => rule.after_prefill || matches!(rule.prompt, Prompt::CompressOnce(_)),
            Phase::Decode => match rule.decode {
                Trigger::Never => false,
                Trigger::EveryStep => true,
                Trigger::Every(w) => {
                    let w = count(w);
                    clock.step / w > (clock.step - clock.tokens.min(clock.step)) / w
                }
            },
        }
    }

    /// The plan that makes room before `clock.tokens` tokens are appended; `clock` is that of the step that begins.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn plan_ahead(&mut self, rows: &dyn Rows, clock: &Clock) -> Result<Option<Plan>> {
        let rule = self.policy.rule(clock.phase);
        if !rule.ahead || clock.phase == Phase::Prefill || rule.decode == Trigger::Never {
            return Ok(None);
        }
        self.choose(&rule, rows, clock, clock.tokens as usize)
    }

    /// Chooses survivors so that with `coming` more tokens the budget holds.
    fn choose(
        &mut self,
        rule: &Rule,
        rows: &dyn Rows,
        clock: &Clock,
        coming: usize,
    ) -> Result<Option<Plan>> {
        let len = rows.len(0);
        let prompt_stays = match rule.prompt {
            Prompt::Evictable => false,
            Prompt::Keep | Prompt::KeepBeside => true,
            Prompt::CompressOnce(_) => clock.phase == Phase::Decode,
        };
        let mut budget = match (rule.prompt, clock.phase) {
            (Prompt::CompressOnce(tokens), Phase::Prefill) => tokens,
            _ => self.budget.tokens(clock.next as usize),
        };
        let heads = 0..self.place.heads;
        let most = |of: &dyn Fn(&[u32]) -> usize| {
            let heads = heads.clone();
            heads.map(|head| of(rows.ids(head))).max().unwrap_or(0)
        };
        if rule.prompt == Prompt::KeepBeside {
            let prompt = most(&|ids| ids.iter().filter(|&&id| id < clock.prompt).count());
            budget = budget.saturating_add(prompt);
        }
        // What is never evicted is a prefix and a suffix of the positions.
        let prompt = if prompt_stays { clock.prompt } else { 0 };
        let newest = count(rule.newest(clock.phase));
        let free = prompt.max(count(rule.sinks))..clock.next.saturating_sub(newest);
        if let Some(floor) = self.floor {
            return self.choose_jointly((budget, rule.release, floor), &free, rows, clock);
        }
        if len.saturating_add(coming) <= budget {
            return Ok(None);
        }
        let held = most(&|ids| ids.iter().filter(|&id| !free.contains(id)).count());
        let limit = budget
            .saturating_sub(coming)
            .max(held + usize::from(coming == 0));
        if len <= limit {
            return Ok(None);
        }
        let released = (rule.release * budget as f64) as usize;
        let leaving = len - limit.saturating_sub(released).max(held);
        let rows: &dyn Rows = &Ranked { rows, free: &free };
        let mut evict = Vec::with_capacity(heads.len());
        for head in heads {
            self.scores.clear();
            self.scores.resize(len, Score::default());
            self.policy.score(head, rows, clock, &mut self.scores)?;
            evict.push(lowest(&self.scores, rows.ids(head), &free, leaving));
        }
        Ok(Some(Plan { evict }))
    }

    /// Chooses survivors among all heads, which together hold their `budget`s less what is released; each keeps at least a share of its own.
    fn choose_jointly(
        &mut self,
        (budget, release, floor): (usize, f64, f64),
        free: &Range<u32>,
        rows: &dyn Rows,
        clock: &Clock,
    ) -> Result<Option<Plan>> {
        let heads = self.place.heads;
        let held: usize = (0..heads).map(|head| rows.len(head)).sum();
        if held <= heads.saturating_mul(budget) {
            return Ok(None);
        }
        let rows: &dyn Rows = &Ranked { rows, free };
        let mut scores = Vec::with_capacity(heads);
        for head in 0..heads {
            let mut own = vec![Score::default(); rows.len(head)];
            self.policy.score(head, rows, clock, &mut own)?;
            scores.push(own);
        }
        let ids: Vec<&[u32]> = (0..heads).map(|head| rows.ids(head)).collect();
        let released = (release * budget as f64) as usize;
        let limit = heads * (budget - released.min(budget));
        let least = (floor * budget as f64) as usize;
        let evict = jointly(&scores, &ids, free, limit, least);
        let any = evict.iter().any(|slots| !slots.is_empty());
        Ok(any.then_some(Plan { evict }))
    }

    /// The policy's state of one head follows its tokens.
    pub fn relocate(&mut self, head: usize, moves: &Relocation) {
        self.policy.relocate(head, moves);
    }

    /// Bytes of per-token state.
    pub fn state_bytes(&self) -> usize {
        self.policy.state_bytes()
    }
}

/// Rows of which some tokens may leave.
struct Ranked<'a> {
    rows: &'a dyn Rows,
    free: &'a Range<u32>,
}

impl Rows for Ranked<'_> {
    fn head_dim(&self) -> usize {
        self.rows.head_dim()
    }
    fn ids(&self, head: usize) -> &[u32] {
        self.rows.ids(head)
    }
    fn candidates(&self) -> Range<u32> {
        self.free.clone()
    }
    fn keys(&self, head: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        self.rows.keys(head, from)
    }
    fn values(&self, head: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        self.rows.values(head, from)
    }
    fn queries(&self, head: usize) -> RecentQueries<'_> {
        self.rows.queries(head)
    }
    fn rotary(&self) -> Option<&Rotary> {
        self.rows.rotary()
    }
}

/// A rule within what positions can count.
fn check(rule: &Rule) -> Result<()> {
    let window = match rule.decode {
        Trigger::Every(0) => return Err(Error::ZeroWindow { name: "window" }),
        Trigger::Every(window) => window,
        Trigger::EveryStep | Trigger::Never => 0,
    };
    for (name, value) in [
        ("window", window),
        ("sinks", rule.sinks),
        ("recent", rule.recent),
    ] {
        if u32::try_from(value).is_err() {
            return Err(Error::Setting {
                name,
                value: value.to_string(),
                expected: "at most 4294967295",
            });
        }
    }
    if !(0.0..1.0).contains(&rule.release) {
        return Err(Error::Setting {
            name: "release",
            value: rule.release.to_string(),
            expected: "a share in [0, 1)",
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::policy::Protect;
    use std::sync::{Arc, Mutex};

    /// Notes which tokens it is told may leave.
    #[derive(Debug, Clone, Default)]
    struct Told(Arc<Mutex<Vec<Range<u32>>>>);

    impl Policy for Told {
        fn name(&self) -> &'static str {
            "told"
        }
        fn rule(&self, _: Phase) -> Rule {
            Rule::periodic(2, 5, 1)
        }
        fn score(&mut self, _: usize, rows: &dyn Rows, _: &Clock, _: &mut [Score]) -> Result<()> {
            self.0.lock().unwrap().push(rows.candidates());
            Ok(())
        }
        fn boxed_clone(&self) -> Box<dyn Policy> {
            Box::new(self.clone())
        }
    }

    #[test]
    fn policies_are_told_which_tokens_may_leave_under_all_settings() {
        let told = Told::default();
        let rows = golden::Observed::new();
        let len = golden::TOKENS as u32;
        let place = Place {
            heads: 1,
            kv_heads: 1,
            group: 2,
            head_dim: golden::D,
            ..Place::default()
        };
        let budget = Budget::Tokens(24);
        let clock = |phase, step| Clock {
            next: len,
            step,
            tokens: 1,
            prompt: 10,
            phase,
        };
        for (sinks, recent, prompt) in [
            (0, 0, Prompt::Evictable),
            (4, 9, Prompt::Evictable),
            (4, 9, Prompt::Keep),
            (4, 9, Prompt::CompressOnce(8)),
        ] {
            let policy = Protect::new(told.clone(), sinks, recent, Some(prompt));
            let mut evictor = Evictor::new(Box::new(policy), budget, place).unwrap();
            for clock in [clock(Phase::Prefill, 0), clock(Phase::Decode, 1)] {
                evictor.plan(&rows, &clock).unwrap().unwrap();
            }
        }
        // Of a prompt that is cut to 8 tokens, four are sinks and three the newest.
        let want = [
            2..len - 5,
            2..len - 5,
            4..len - 9,
            4..len - 9,
            10..len - 9,
            10..len - 9,
            4..len - 3,
            10..len - 9,
        ];
        assert_eq!(*told.0.lock().unwrap(), want);
    }
}
