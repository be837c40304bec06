//! Policies by name, budgets by tokens, and caches whose sequences know their place in the whole run.

use std::sync::LazyLock;

use anyhow::{Context, Result};
use causal_lm::{Model, ModelConfig};
use clap::ValueEnum;
use kv_lazy::policy::tri_attention::QueryStatistics;
use kv_lazy::policy::{Budget, Evicts, Phase, Threshold, full};
use kv_lazy::{
    CacheConfig, CacheSet, NumberFormat, Pairs, PolicyConfig, Prompt, Rotary, StorageConfig,
};

use super::rows::FULL;

/// Prefix of a policy that evicts at windows of the same length as LazyEviction's.
const LAGGED: &str = "lagged-";

/// The weight from which a token counts as active in the LazyEviction paper, for most models.
pub const ALPHA: f32 = 1e-4;

/// A policy as the command line names it, and what it stores keys and values as.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Name, prefix and storage included.
    pub name: String,
    policy: PolicyConfig,
    lagged: bool,
    prompt: PromptRule,
    storage: StorageConfig,
    /// First and newest tokens that are kept whatever the policy.
    protected: (usize, usize),
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
        Some(Choice {
            name: Self::known().iter().find(|known| *known == name)?.clone(),
            policy,
            lagged,
            prompt,
            storage: StorageConfig::default(),
            protected: (0, 0),
        })
    }

    /// The full cache.
    pub(crate) fn full() -> Self {
        Choice {
            name: FULL.into(),
            policy: PolicyConfig::Full(full::Settings::default()),
            lagged: false,
            prompt: PromptRule::Own,
            storage: StorageConfig::default(),
            protected: (0, 0),
        }
    }

    /// The same with keys and values stored as `preset`, which becomes part of the name unless it is the `first` of a run.
    ///
    /// # Errors
    /// No such preset.
    pub fn stored_as(mut self, preset: &str, first: bool) -> Result<Self> {
        self.storage = preset.parse()?;
        if !first {
            self.name = format!("{}+{preset}", self.name);
        }
        Ok(self)
    }

    /// What keys and values are stored as, where the model computes in `dtype`.
    pub(crate) fn stored(&self, dtype: candle_core::DType) -> String {
        let StorageConfig { keys, values, .. } = self.storage;
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
        self.protected = (sinks, recent);
        self
    }

    /// The same with statistics of the model's queries, where the policy uses them.
    pub(crate) fn calibrated(mut self, statistics: &QueryStatistics) -> Self {
        if let Some(calibration) = self.policy.calibration_mut() {
            *calibration = Some(statistics.clone());
        }
        self
    }

    /// Whether the policy can use statistics of the model's queries.
    pub(crate) fn takes_calibration(&self) -> bool {
        self.policy.clone().calibration_mut().is_some()
    }

    /// Whether the policy must know how the model rotates keys.
    pub(crate) fn needs_rotary(&self) -> bool {
        let policy = self.policy.build(Budget::Tokens(64));
        policy.is_ok_and(|policy| policy.needs().rotary)
    }

    /// When the policy evicts, in words.
    pub(crate) fn evicts(&self) -> &'static str {
        match self.policy.evicts() {
            Evicts::Nothing => "never",
            Evicts::AfterPrompt if !self.lagged => "after the prompt",
            _ => "while decoding",
        }
    }

    /// Whether nothing is evicted.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self.policy, PolicyConfig::Full(_))
    }

    /// Whether the policy needs the future.
    pub(crate) fn is_oracle(&self) -> bool {
        matches!(self.policy, PolicyConfig::Oracle(_))
    }

    /// Whether it is the control that draws alone.
    pub(crate) fn is_random(&self) -> bool {
        matches!(self.policy, PolicyConfig::Random(_))
    }

    /// Whether the policy draws.
    pub(crate) fn draws(&self) -> bool {
        self.policy.clone().seed_mut().is_some()
    }

    /// The configuration within `budget` tokens. Draws come from `seed`; the window of a lagged policy is the one that LazyEviction
    /// has by default.
    pub(crate) fn cache(&self, budget: usize, seed: u64) -> CacheConfig {
        let mut config = CacheConfig::new(self.policy.clone(), Budget::Tokens(budget));
        if let Some(own) = config.decode.seed_mut() {
            *own = seed;
        }
        config.storage = self.storage;
        (config.sinks, config.recent) = self.protected;
        config.evict_every = self.lagged.then(|| lag(budget));
        config.prompt = match self.prompt {
            PromptRule::Own => None,
            PromptRule::Keep => Some(Prompt::Keep),
            PromptRule::Evict => Some(Prompt::Evictable),
        };
        config
    }

    /// Whether the prompt stays.
    pub(crate) fn keeps_prompt(&self) -> bool {
        let policy = self.policy.build(Budget::Tokens(64));
        let own = policy.is_ok_and(|policy| {
            matches!(
                policy.rule(Phase::Decode).prompt,
                Prompt::Keep | Prompt::KeepBeside
            )
        });
        self.prompt == PromptRule::Keep || self.prompt == PromptRule::Own && own
    }

    /// The flags that an error about this policy at this budget is about.
    pub(crate) fn flags(&self, budget: Option<eval_report::Budget>) -> String {
        match budget {
            Some(budget) => format!("--policy {} --budget {}", self.name, label(budget)),
            None => format!("--policy {}", self.name),
        }
    }

    /// The most tokens at which this holds no more bytes than `reference` holds at `tokens`, of a `model` and windows of `window`: keys, values, positions and the
    /// policy's state.
    pub(crate) fn tokens_in_bytes_of(
        &self,
        reference: &Choice,
        tokens: usize,
        window: usize,
        model: &Model<'_>,
    ) -> Result<usize> {
        let shapes = model.cache_shapes();
        let own = |shape: &&kv_lazy::LayerShape| shape.kv_heads > 0;
        let shape = *shapes
            .iter()
            .find(own)
            .context("the model has no KV heads")?;
        let dtype = model.decoder().dtype();
        let rotary = Rotary::plain(1e4, shape.head_dim / 2 * 2);
        let config = |choice: &Choice, tokens: usize| {
            let mut config = choice.cache(tokens, 0);
            config.rotary = Some(rotary.clone());
            // One layer's calibration would be asked for; it takes no bytes of the cache.
            if let Some(calibration) = config.decode.calibration_mut()
                && let Some(statistics) = calibration
            {
                let first = statistics.layers.values().next().cloned();
                statistics.layers = first.map(|layer| (0, layer)).into_iter().collect();
            }
            config
        };
        let bytes = config(reference, tokens).bytes(0, shape, dtype, tokens)?;
        let of = |tokens| config(self, tokens);
        Ok(CacheConfig::budget_within(bytes, window, shape, dtype, of)?)
    }
}

/// Whether a policy evicts at every decode step.
fn evicts_every_step(name: &str) -> bool {
    let policy = name.parse::<PolicyConfig>();
    let policy = policy.and_then(|policy| policy.build(Budget::Tokens(64)));
    policy.is_ok_and(|policy| {
        policy.rule(Phase::Decode).decode == kv_lazy::policy::Trigger::EveryStep
    })
}

/// How a model rotates the keys of each layer.
pub(crate) fn rotary(config: &ModelConfig) -> Vec<Option<Rotary>> {
    let of = |attention: &causal_lm::config::AttentionConfig| {
        let rope = &config.ropes[attention.rotation?];
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
    for choice in choices.iter().filter(|choice| !choice.is_oracle()) {
        for &budget in budgets {
            let config = choice.cache(tokens(budget, window), 0);
            caches(model, Some(&config), 0, 1).with_context(|| choice.flags(Some(budget)))?;
        }
    }
    Ok(())
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
    config.layer_rotary = rotary(model.decoder().config());
    let (dtype, device) = (model.decoder().dtype(), model.decoder().device());
    let caches = CacheSet::new(&model.cache_shapes(), batch, dtype, device, &config)?;
    // Draws do not depend on how sequences are batched.
    Ok(caches.numbered_from(first)?)
}
