//! Policies by name, budgets by tokens, and caches whose sequences know their place in the whole run.

use std::sync::LazyLock;

use anyhow::{Context, Result};
use causal_lm::Model;
use clap::ValueEnum;
use kv_lazy::policy::{Budget, Phase, Threshold, Trigger, full};
use kv_lazy::{CacheConfig, CacheSet, PolicyConfig, Prompt};

/// Prefix of a policy that evicts at windows of the same length as LazyEviction's.
const LAGGED: &str = "lagged-";

/// The weight from which a token counts as active in the LazyEviction paper, for most models.
pub const ALPHA: f32 = 1e-4;

/// A policy as the command line names it.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Name, prefix included.
    pub name: String,
    policy: PolicyConfig,
    lagged: bool,
    prompt: PromptRule,
    alpha: f32,
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
    pub(crate) fn said(self) -> &'static str {
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
                let policy = name.parse::<PolicyConfig>();
                let policy = policy.and_then(|policy| policy.build(Budget::Tokens(64)));
                policy.is_ok_and(|policy| {
                    let rule = policy.rule(Phase::Decode);
                    rule.after_prefill && !matches!(rule.decode, Trigger::Every(_))
                })
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

    /// The policy of a name out of [`Choice::known`]; `alpha` is the weight from which LazyEviction and RaaS take a token as active.
    pub fn named(name: &str, prompt: PromptRule, alpha: f32) -> Option<Self> {
        let (base, lagged) = match name.strip_prefix(LAGGED) {
            Some(base) => (base, true),
            None => (name, false),
        };
        Some(Choice {
            name: Self::known().iter().find(|known| *known == name)?.clone(),
            policy: base.parse().ok()?,
            lagged,
            prompt,
            alpha,
        })
    }

    /// The full cache.
    pub(crate) fn full() -> Self {
        Choice {
            name: "full".into(),
            policy: PolicyConfig::Full(full::Settings::default()),
            lagged: false,
            prompt: PromptRule::Own,
            alpha: ALPHA,
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

    /// Whether the policy draws.
    pub(crate) fn is_random(&self) -> bool {
        matches!(self.policy, PolicyConfig::Random(_))
    }

    /// The configuration within `budget` tokens. Draws come from `seed`; the window of a lagged policy is the one that LazyEviction
    /// has by default.
    pub(crate) fn cache(&self, budget: usize, seed: u64) -> CacheConfig {
        let mut config = CacheConfig::new(self.policy.clone(), Budget::Tokens(budget));
        match &mut config.decode {
            PolicyConfig::Random(random) => random.seed = seed,
            PolicyConfig::Raas(raas) => raas.threshold = Threshold::Absolute(self.alpha),
            PolicyConfig::Lazy(settings)
            | PolicyConfig::LazyReference(settings)
            | PolicyConfig::LazyGuarded(settings) => {
                settings.threshold = Threshold::Absolute(self.alpha);
            }
            // Without this it only cuts the prompt.
            PolicyConfig::Snapkv(snapkv) if self.lagged => snapkv.every = Some(lag(budget)),
            _ => {}
        }
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
        let own = matches!(
            self.policy,
            PolicyConfig::Random(_) | PolicyConfig::Raas(_) | PolicyConfig::LazyGuarded(_)
        );
        self.prompt == PromptRule::Keep || self.prompt == PromptRule::Own && own
    }

    /// The flags that an error about this policy at this budget is about.
    pub(crate) fn flags(&self, budget: eval_report::Budget) -> String {
        format!("--policy {} --budget {}", self.name, said(budget))
    }
}

/// LazyEviction's window where nothing is said: a quarter of the budget, at most 128.
pub(crate) fn lag(budget: usize) -> usize {
    (budget / 4).clamp(1, 128)
}

/// A budget as the command line says it.
pub(crate) fn said(budget: eval_report::Budget) -> String {
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
            caches(model, Some(&config), 0, 1).with_context(|| choice.flags(budget))?;
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
    let Some(config) = config.filter(|config| !matches!(config.decode, PolicyConfig::Full(_)))
    else {
        return Ok(model.full_cache(batch)?);
    };
    let (dtype, device) = (model.decoder().dtype(), model.decoder().device());
    let caches = CacheSet::new(&model.cache_shapes(), batch, dtype, device, config)?;
    // Draws do not depend on how sequences are batched.
    Ok(caches.numbered_from(first)?)
}
