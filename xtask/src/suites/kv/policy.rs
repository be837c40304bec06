//! Policies by name, budgets by tokens, and caches whose sequences know their place in the whole run.

use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, Result, ensure};
use causal_lm::{Model, ModelConfig};
use clap::ValueEnum;
use kv_lazy::policy::tri_attention::QueryStatistics;
use kv_lazy::policy::{Budget, Evicts, Phase, Policy, Threshold, full};
use kv_lazy::{CacheConfig, CacheSet, NumberFormat, Pairs, PolicyConfig, Prompt, Rotary};

use super::rows::FULL;
use crate::suites::perplexity::file_name;

/// Prefix of a policy that evicts at windows of the same length as LazyEviction's.
const LAGGED: &str = "lagged-";

/// The weight from which a token counts as active in the LazyEviction paper, for most models.
pub const ALPHA: f32 = 1e-4;

/// A policy as the command line names it and what it stores keys and values as, or a configuration of caches in a file.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Name, prefix and storage included; that of the file.
    pub name: String,
    /// All but what follows from the budget of a cell, unless it is `fixed`.
    config: Box<CacheConfig>,
    lagged: bool,
    /// Whether the configuration has a budget of its own.
    fixed: bool,
}

/// What happens to the prompt under every policy of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PromptRule {
    /// Each policy's own rule: random, raas and lazy-guarded keep it
    Own,
    /// Every policy keeps it
    Keep,
    /// Every policy may evict it
    Evict,
}

impl PromptRule {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            PromptRule::Own => "own",
            PromptRule::Keep => "keep",
            PromptRule::Evict => "evict",
        }
    }

    /// The protocol's word for it.
    pub(crate) fn label(self) -> &'static str {
        match self {
            PromptRule::Own => "kept by random, raas and lazy-guarded, evictable for the others",
            PromptRule::Keep => "kept by every policy",
            PromptRule::Evict => "evictable for every policy",
        }
    }
}

impl Choice {
    /// All names: the crate's policies, and lagged variants of those that evict at every step or only after the prompt.
    pub fn known() -> &'static [String] {
        static NAMES: LazyLock<Vec<String>> = LazyLock::new(|| {
            let names = kv_lazy::policy::NAMES.iter();
            let lagged = names.clone().filter(|name| {
                // What evicts every W steps by itself needs no other W.
                let evicts = name.parse::<PolicyConfig>().map(|policy| policy.evicts());
                match evicts {
                    Ok(Evicts::Nothing) | Err(_) => false,
                    Ok(Evicts::AfterPrompt) => true,
                    Ok(_) => evicts_every_step(name),
                }
            });
            let lagged = lagged.map(|name| format!("{LAGGED}{name}"));
            names.map(|name| (*name).to_owned()).chain(lagged).collect()
        });
        &NAMES
    }

    /// What runs where nothing is asked for: all but the full cache, which runs anyway, and the oracle only where the `future` is known.
    pub fn names(future: bool) -> impl Iterator<Item = &'static str> {
        let names = Self::known().iter().map(String::as_str);
        names.filter(move |&name| name != "full" && (future || name != "oracle"))
    }

    /// The policy of a name out of [`Choice::known`]; `alpha` is the weight from which those policies take a token as active that ask.
    pub fn named(name: &str, prompt: PromptRule, alpha: f32) -> Option<Self> {
        let (base, lagged) = match name.strip_prefix(LAGGED) {
            Some(base) => (base, true),
            None => (name, false),
        };
        let mut policy: PolicyConfig = base.parse().ok()?;
        if let Some(threshold) = policy.threshold_mut() {
            *threshold = Threshold::Absolute(alpha);
        }
        let mut config = CacheConfig::new(policy, Budget::Ratio(1.0));
        config.prompt = match prompt {
            PromptRule::Own => None,
            PromptRule::Keep => Some(Prompt::Keep),
            PromptRule::Evict => Some(Prompt::Evictable),
        };
        Some(Choice {
            name: Self::known().iter().find(|known| *known == name)?.clone(),
            config: Box::new(config),
            lagged,
            fixed: false,
        })
    }

    /// A configuration of caches in a file of JSON, such as the cache.json beside a plan: budgets, storage and all else are the file's.
    ///
    /// # Errors
    /// A file that cannot be read or holds something else.
    pub fn of_file(file: &Path) -> Result<Self> {
        let text = tensor_io::read_text(file);
        let text = text.with_context(|| format!("--cache {}", file.display()))?;
        let config = serde_json::from_str(&text).with_context(|| {
            format!(
                "--cache {}: expected a configuration of kv-lazy's caches, such as the cache.json beside a plan of eval frontier",
                file.display()
            )
        })?;
        Ok(Choice {
            name: file_name(file),
            config,
            lagged: false,
            fixed: true,
        })
    }

    /// The full cache.
    pub(crate) fn full() -> Self {
        let policy = PolicyConfig::Full(full::Settings::default());
        Choice {
            name: FULL.into(),
            config: Box::new(CacheConfig::new(policy, Budget::Ratio(1.0))),
            lagged: false,
            fixed: false,
        }
    }

    /// The same with keys and values stored as `preset`, which becomes part of the name unless it is the `first` of a run.
    ///
    /// # Errors
    /// No such preset.
    pub fn stored_as(mut self, preset: &str, first: bool) -> Result<Self> {
        self.config.storage = preset.parse()?;
        if !first {
            self.name = format!("{}+{preset}", self.name);
        }
        Ok(self)
    }

    /// What keys and values are stored as, where the model computes in `dtype`.
    pub(crate) fn stored(&self, dtype: candle_core::DType) -> String {
        let (keys, values) = (self.config.storage.keys, self.config.storage.values);
        let name = |format: Option<NumberFormat>| match format {
            Some(format) => format!("{format:?}"),
            None => format!("{dtype:?}"),
        };
        match (name(keys), name(values)) {
            (keys, values) if keys == values => keys,
            (keys, values) => format!("{keys} keys, {values} values"),
        }
    }

    /// The same with the first and newest tokens kept.
    pub(crate) fn protecting(mut self, sinks: usize, recent: usize) -> Self {
        (self.config.sinks, self.config.recent) = (sinks, recent);
        self
    }

    /// The same with statistics of the model's queries, where the policy uses them.
    pub(crate) fn calibrated(mut self, statistics: &QueryStatistics) -> Self {
        for policy in policies(&mut self.config) {
            if let Some(calibration) = policy.calibration_mut() {
                calibration.get_or_insert_with(|| statistics.clone());
            }
        }
        self
    }

    /// Whether the policy can use statistics of the model's queries, and has none.
    pub(crate) fn takes_calibration(&self) -> bool {
        let mut config = self.config.clone();
        policies(&mut config).any(|policy| matches!(policy.calibration_mut(), Some(None)))
    }

    /// The policy within some budget.
    fn built(&self) -> kv_lazy::Result<Box<dyn Policy>> {
        self.config.build(Budget::Tokens(64))
    }

    /// Whether the policy must know how the model rotates keys.
    pub(crate) fn needs_rotary(&self) -> bool {
        let consecutive = self.config.positions == kv_lazy::Positions::Consecutive;
        consecutive || self.built().is_ok_and(|policy| policy.needs().rotary)
    }

    /// When the policy evicts, in words.
    pub(crate) fn evicts(&self) -> &'static str {
        let at = self.config.decode.evicts();
        let cut = self.config.prefill.as_ref().map(PolicyConfig::evicts);
        match (at, cut.unwrap_or(Evicts::Nothing)) {
            (Evicts::Nothing, Evicts::Nothing) => "never",
            (Evicts::Nothing, _) => "after the prompt",
            (Evicts::AfterPrompt, _) if !self.lagged && self.config.evict_every.is_none() => {
                "after the prompt"
            }
            _ => "while decoding",
        }
    }

    /// Whether nothing is evicted.
    pub(crate) fn is_full(&self) -> bool {
        self.config.keeps_all()
    }

    /// Whether both keep everything in the same storage.
    pub(crate) fn stores_all_as(&self, other: &Self) -> bool {
        self.is_full() && other.is_full() && self.config.storage == other.config.storage
    }

    /// Whether it has a budget of its own.
    pub(crate) fn is_fixed(&self) -> bool {
        self.fixed
    }

    /// The budget of its own, where it has one for all layers.
    pub(crate) fn own_budget(&self) -> Option<eval_report::Budget> {
        if !self.fixed || self.is_full() || !self.config.layer_budgets.is_empty() {
            return None;
        }
        match self.config.budget {
            Budget::Tokens(tokens) => Some(eval_report::Budget::Tokens(tokens as u64)),
            Budget::Ratio(share) => Some(eval_report::Budget::Share(share)),
            _ => None,
        }
    }

    /// Whether the policy needs the future.
    pub(crate) fn is_oracle(&self) -> bool {
        matches!(self.config.decode, PolicyConfig::Oracle(_))
    }

    /// Whether it is the control that draws alone.
    pub(crate) fn is_random(&self) -> bool {
        matches!(self.config.decode, PolicyConfig::Random(_))
    }

    /// Whether the policy draws, from a seed that is not its own.
    pub(crate) fn draws(&self) -> bool {
        !self.fixed && self.config.decode.clone().seed_mut().is_some()
    }

    /// The configuration within `budget` tokens, or in its own budget. Draws come from `seed`; the window of a lagged policy is the one that LazyEviction
    /// has by default.
    pub(crate) fn cache(&self, budget: usize, seed: u64) -> CacheConfig {
        let mut config = CacheConfig::clone(&self.config);
        if self.fixed {
            return config;
        }
        config.budget = Budget::Tokens(budget);
        if let Some(own) = config.decode.seed_mut() {
            *own = seed;
        }
        config.evict_every = self.lagged.then(|| lag(budget));
        config
    }

    /// Whether the prompt stays.
    pub(crate) fn keeps_prompt(&self) -> bool {
        self.built().is_ok_and(|policy| {
            matches!(
                policy.rule(Phase::Decode).prompt,
                Prompt::Keep | Prompt::KeepBeside
            )
        })
    }

    /// The flags that an error about this policy at this budget is about.
    pub(crate) fn flags(&self, budget: Option<eval_report::Budget>) -> String {
        match budget {
            _ if self.fixed => format!("--cache {}", self.name),
            Some(budget) => format!("--policy {} --budget {}", self.name, label(budget)),
            None => format!("--policy {}", self.name),
        }
    }

    /// The most tokens at which this holds no more bytes than the budget's share of `reference`, which keeps a window of `window`, or than `reference` holds at the
    /// budget's tokens, of a `model`: keys, values, positions and the policy's state.
    pub(crate) fn tokens_in_bytes_of(
        &self,
        reference: &Choice,
        budget: eval_report::Budget,
        window: usize,
        model: &Model<'_>,
    ) -> Result<usize> {
        let (layers, dtype) = (model.cache_shapes(), model.decoder().dtype());
        let all = |tokens| {
            let config = reference.cache(tokens, 0);
            config.bytes_of(&layers, dtype, tokens)
        };
        let bytes = match budget {
            eval_report::Budget::Tokens(_) => all(tokens(budget, window))?,
            eval_report::Budget::Share(share) => (share * all(window)? as f64) as usize,
        };
        let fit = self.tokens_in_bytes(bytes, window, model);
        fit.with_context(|| self.flags(Some(budget)))
    }

    /// The most tokens, up to `window`, at which this holds no more than `bytes` for one sequence of a `model`.
    pub(crate) fn tokens_in_bytes(
        &self,
        bytes: usize,
        window: usize,
        model: &Model<'_>,
    ) -> Result<usize> {
        let (layers, dtype) = (model.cache_shapes(), model.decoder().dtype());
        let of = |tokens| {
            let mut config = self.cache(tokens, 0);
            if self.is_oracle() {
                // What it knows of the future is no state of a cache; random has none.
                config.decode = PolicyConfig::Random(Default::default());
                config.evict_every = Some(lag(tokens));
            }
            config
        };
        Ok(CacheConfig::budget_within(
            bytes, window, &layers, dtype, of,
        )?)
    }
}

/// The policies of a configuration.
fn policies(config: &mut CacheConfig) -> impl Iterator<Item = &mut PolicyConfig> {
    std::iter::once(&mut config.decode).chain(&mut config.prefill)
}

/// Whether a policy evicts at every decode step.
fn evicts_every_step(name: &str) -> bool {
    let policy = name.parse::<PolicyConfig>();
    let policy = policy.and_then(|policy| policy.build(Budget::Tokens(64)));
    policy.is_ok_and(|policy| {
        policy.rule(Phase::Decode).decode == kv_lazy::policy::Trigger::EveryStep
    })
}

/// How a model rotates the keys of each layer; nothing where that depends on the length of the text, so that no policy can undo it.
pub(crate) fn rotary(config: &ModelConfig) -> Vec<Option<Rotary>> {
    if config.ropes.iter().any(|rope| rope.long.is_some()) {
        return Vec::new();
    }
    let of = |attention: &causal_lm::config::AttentionConfig| {
        let Some(rotation) = attention.rotation else {
            return Some(Rotary::new(Vec::new(), Pairs::Halves));
        };
        let rope = &config.ropes[rotation];
        let pairs = match rope.pairs {
            causal_lm::Pairs::Halves => Pairs::Halves,
            causal_lm::Pairs::Neighbours => Pairs::Neighbours,
        };
        Some(Rotary::new(rope.inv_freq.clone(), pairs))
    };
    config.attention.iter().map(of).collect()
}

/// LazyEviction's window by default: a quarter of the budget, at most 128.
pub(crate) fn lag(budget: usize) -> usize {
    (budget / 4).clamp(1, 128)
}

/// A budget as the command line says it.
pub(crate) fn label(budget: eval_report::Budget) -> String {
    match budget {
        eval_report::Budget::Tokens(tokens) => tokens.to_string(),
        eval_report::Budget::Share(share) => format!("{share:?}"),
    }
}

/// A budget in tokens of a window of `window`, at least one.
pub(crate) fn tokens(budget: eval_report::Budget, window: usize) -> usize {
    match budget {
        eval_report::Budget::Tokens(tokens) => usize::try_from(tokens).unwrap_or(usize::MAX),
        eval_report::Budget::Share(share) => ((share * window as f64).round() as usize).max(1),
    }
}

/// Checks every policy but the oracle at every budget by building its cache, so that a run of hours fails at its start.
pub(crate) fn check(
    model: &Model<'_>,
    choices: &[Choice],
    budgets: &[eval_report::Budget],
    window: usize,
) -> Result<()> {
    let rotated = !rotary(model.decoder().config()).is_empty();
    for choice in choices.iter().filter(|choice| !choice.is_oracle()) {
        ensure!(
            rotated || !choice.needs_rotary(),
            "{}: it must know how keys are rotated, which in this model depends on the length of the text (LongRoPE)",
            choice.flags(None)
        );
        let budgets = match choice.is_fixed() || choice.is_full() {
            true => vec![choice.own_budget()],
            false => budgets.iter().copied().map(Some).collect(),
        };
        for budget in budgets {
            let held = budget.map_or(window, |budget| tokens(budget, window));
            caches(model, Some(&choice.cache(held, 0)), 0, 1)
                .with_context(|| choice.flags(budget))?;
        }
    }
    Ok(())
}

/// Whether the heads of a model can be stored as `preset`.
///
/// # Errors
/// No such preset, and a full cache that fails otherwise.
pub(crate) fn admits(model: &Model<'_>, preset: &str) -> Result<bool> {
    let stored = Choice::full().stored_as(preset, true)?;
    match caches(model, Some(&stored.cache(1, 0)), 0, 1) {
        Ok(_) => Ok(true),
        Err(e) => match e.downcast_ref() {
            Some(kv_lazy::Error::Setting { .. }) => Ok(false),
            _ => Err(e),
        },
    }
}

/// Caches for the sequences `first..first + batch` of a run.
pub(crate) fn caches(
    model: &Model<'_>,
    config: Option<&CacheConfig>,
    first: usize,
    batch: usize,
) -> Result<CacheSet> {
    let Some(config) = config else {
        return Ok(model.full_cache(batch)?);
    };
    let mut config = config.clone();
    if config.rotary.is_none() && config.layer_rotary.is_empty() {
        config.layer_rotary = rotary(model.decoder().config());
    }
    let (dtype, device) = (model.decoder().dtype(), model.decoder().device());
    let caches = CacheSet::new(&model.cache_shapes(), batch, dtype, device, &config)?;
    // Draws do not depend on how sequences are batched.
    Ok(caches.numbered_from(first)?)
}
