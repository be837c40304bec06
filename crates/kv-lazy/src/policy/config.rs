//! Policies and caches as data: what a command line or a file says.

use super::lazy::{Combine, Importance, Lazy, Mode};
use super::{
    Budget, Full, H2o, Lagged, Normalise, PerPhase, Policy, Pooling, Prompt, Protect, RKv, Raas,
    Random, Scissorhands, SnapKv, Streaming, Threshold, Tova, ValueNormGuard,
};
use crate::attention::Reduce;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// Names of all policies, as used on the command line and in files.
pub const POLICY_NAMES: [&str; 13] = [
    "full",
    "streaming",
    "h2o",
    "tova",
    "scissorhands",
    "raas",
    "snapkv",
    "r-kv",
    "random",
    "lazy",
    "lazy-reference",
    "lazy-guarded",
    "oracle",
];

/// Settings of the three LazyEviction modes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub struct LazySettings {
    /// W, steps between evictions and newest tokens protected. Unset: a quarter of the budget, at most 128; 32 for a ratio. The paper uses the 80th percentile
    /// of the MRI, measured by [`calibrate`](crate::calibrate).
    pub window: Option<usize>,
    /// When a token counts as active; α = 1e-4 in the paper for most models.
    pub threshold: Threshold,
    /// How weights are reduced over a group before they are compared with the threshold.
    pub reduce: Reduce,
    /// How H1 and H2 combine; unset: the mode's.
    pub combine: Option<Combine>,
    /// Smallest MRI that earns H2; unset: 1.
    pub h2_min_mri: Option<u32>,
}

impl Default for LazySettings {
    fn default() -> Self {
        Self {
            window: None,
            threshold: Threshold::Absolute(1e-4),
            reduce: Reduce::Max,
            combine: None,
            h2_min_mri: None,
        }
    }
}

/// A policy and its settings. In a file: `{"policy": "lazy", "window": 64}`; whatever is not said has the default.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "policy", rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum PolicyConfig {
    /// [`Full`].
    Full,
    /// [`Streaming`].
    Streaming {
        /// First tokens kept; 4.
        #[serde(default = "four")]
        sinks: usize,
    },
    /// [`H2o`].
    H2o {
        /// Newest tokens kept; unset: half the budget.
        #[serde(default)]
        recent: Option<usize>,
        /// Sum or mean of the attention received.
        #[serde(default)]
        normalise: Normalise,
    },
    /// [`Tova`].
    Tova,
    /// [`Scissorhands`].
    Scissorhands {
        /// Steps of history; 400.
        #[serde(default = "four_hundred")]
        history: usize,
        /// Newest tokens kept; unset: 10, less in a budget below 40.
        #[serde(default)]
        recent: Option<usize>,
        /// Share of the budget dropped at once; 0.5.
        #[serde(default = "half")]
        drop: f64,
    },
    /// [`Raas`].
    Raas {
        /// When a token counts as used; α = 1e-4.
        #[serde(default = "alpha")]
        threshold: Threshold,
    },
    /// [`SnapKv`].
    Snapkv {
        /// Last queries observed; unset: 32, less in a budget below 128.
        #[serde(default)]
        window: Option<usize>,
        /// Tokens pooled; 5.
        #[serde(default = "five")]
        kernel: usize,
        /// Mean or maximum.
        #[serde(default)]
        pooling: Pooling,
        /// Repeat every so many decode steps; unset: only after the prompt.
        #[serde(default)]
        every: Option<usize>,
    },
    /// [`RKv`].
    RKv {
        /// Last queries observed; 8.
        #[serde(default = "eight")]
        window: usize,
        /// Steps between evictions; unset: 128 as in the paper, a quarter of the budget where that is less.
        #[serde(default)]
        every: Option<usize>,
        /// Tokens pooled; 7.
        #[serde(default = "seven")]
        kernel: usize,
        /// Weight of importance; 0.1.
        #[serde(default = "tenth")]
        lambda: f32,
    },
    /// [`Random`].
    Random {
        /// Seed of the draw; 0.
        #[serde(default)]
        seed: u64,
        /// Whether the prompt stays; it does.
        #[serde(default = "yes")]
        protect_prompt: bool,
    },
    /// [`Lazy`] by the paper.
    Lazy(LazySettings),
    /// [`Lazy`] by the authors' program.
    LazyReference(LazySettings),
    /// [`Lazy`] with repairs.
    LazyGuarded(LazySettings),
    /// [`Oracle`](super::Oracle), in replay only.
    Oracle {
        /// Steps between evictions; unset: a quarter of the budget, at most 128.
        #[serde(default)]
        window: Option<usize>,
        /// Steps looked ahead; unset: the best of one, two, four and eight windows.
        #[serde(default)]
        horizon: Option<usize>,
    },
}

/// Window and recent tokens by default where the budget is a ratio.
const RATIO_WINDOW: usize = 32;

// Defaults for serde, which wants functions.
fn four() -> usize {
    4
}
fn five() -> usize {
    5
}
fn seven() -> usize {
    7
}
fn eight() -> usize {
    8
}
fn four_hundred() -> usize {
    400
}
fn half() -> f64 {
    0.5
}
fn tenth() -> f32 {
    0.1
}
fn yes() -> bool {
    true
}
fn alpha() -> Threshold {
    Threshold::Absolute(1e-4)
}

/// A quarter of a fixed budget, at most `most`; of a budget that grows, [`RATIO_WINDOW`].
pub(crate) fn quarter(budget: Budget, most: usize) -> usize {
    match budget {
        Budget::Tokens(tokens) => (tokens / 4).clamp(1, most),
        Budget::Ratio(_) => RATIO_WINDOW.min(most),
    }
}

impl FromStr for PolicyConfig {
    type Err = Error;

    /// A policy by its name, with default settings.
    fn from_str(name: &str) -> Result<Self> {
        let lazy = LazySettings::default();
        Ok(match name {
            "full" => Self::Full,
            "streaming" => Self::Streaming { sinks: four() },
            "h2o" => Self::H2o {
                recent: None,
                normalise: Normalise::Sum,
            },
            "tova" => Self::Tova,
            "scissorhands" => Self::Scissorhands {
                history: four_hundred(),
                recent: None,
                drop: half(),
            },
            "raas" => Self::Raas { threshold: alpha() },
            "snapkv" => Self::Snapkv {
                window: None,
                kernel: five(),
                pooling: Pooling::Mean,
                every: None,
            },
            "r-kv" => Self::RKv {
                window: eight(),
                every: None,
                kernel: seven(),
                lambda: tenth(),
            },
            "random" => Self::Random {
                seed: 0,
                protect_prompt: true,
            },
            "lazy" => Self::Lazy(lazy),
            "lazy-reference" => Self::LazyReference(lazy),
            "lazy-guarded" => Self::LazyGuarded(lazy),
            "oracle" => Self::Oracle {
                window: None,
                horizon: None,
            },
            other => {
                return Err(Error::Setting {
                    name: "policy",
                    value: other.into(),
                    expected: "full, streaming, h2o, tova, scissorhands, raas, snapkv, r-kv, random, lazy, lazy-reference, lazy-guarded or oracle",
                });
            }
        })
    }
}

impl std::fmt::Display for PolicyConfig {
    /// The policy's name.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Full => "full",
            Self::Streaming { .. } => "streaming",
            Self::H2o { .. } => "h2o",
            Self::Tova => "tova",
            Self::Scissorhands { .. } => "scissorhands",
            Self::Raas { .. } => "raas",
            Self::Snapkv { .. } => "snapkv",
            Self::RKv { .. } => "r-kv",
            Self::Random { .. } => "random",
            Self::Lazy(_) => "lazy",
            Self::LazyReference(_) => "lazy-reference",
            Self::LazyGuarded(_) => "lazy-guarded",
            Self::Oracle { .. } => "oracle",
        })
    }
}

impl PolicyConfig {
    /// The policy, with unset settings derived from `budget`.
    ///
    /// # Errors
    /// Settings out of range; the oracle, which only a replay can build.
    pub fn build(&self, budget: Budget) -> Result<Box<dyn Policy>> {
        Ok(match *self {
            Self::Full => Box::new(Full),
            Self::Streaming { sinks } => Box::new(Streaming { sinks }),
            Self::H2o { recent, normalise } => {
                let half = match budget {
                    Budget::Tokens(tokens) => tokens / 2,
                    Budget::Ratio(_) => RATIO_WINDOW,
                };
                Box::new(H2o::new(recent.unwrap_or(half), normalise))
            }
            Self::Tova => Box::<Tova>::default(),
            Self::Scissorhands {
                history,
                recent,
                drop,
            } => {
                if history == 0 {
                    return Err(Error::ZeroWindow { name: "history" });
                }
                if !(0.0..1.0).contains(&drop) {
                    return Err(Error::Setting {
                        name: "drop",
                        value: drop.to_string(),
                        expected: "a share in [0, 1)",
                    });
                }
                let recent = recent.unwrap_or_else(|| quarter(budget, 10));
                Box::new(Scissorhands::new(history, recent, drop))
            }
            Self::Raas { threshold } => {
                threshold.check()?;
                Box::new(Raas::new(threshold))
            }
            Self::Snapkv {
                window,
                kernel,
                pooling,
                every,
            } => {
                let window = window.unwrap_or_else(|| quarter(budget, 32));
                Box::new(SnapKv::new(window, kernel, pooling, every)?)
            }
            Self::RKv {
                window,
                every,
                kernel,
                lambda,
            } => {
                let every = every.unwrap_or_else(|| quarter(budget, 128));
                Box::new(RKv::new(window, every, kernel, lambda)?)
            }
            Self::Random {
                seed,
                protect_prompt,
            } => Box::new(Random::new(seed, protect_prompt)),
            Self::Lazy(settings) => lazy(Mode::Paper, settings, budget)?,
            Self::LazyReference(settings) => lazy(Mode::Reference, settings, budget)?,
            Self::LazyGuarded(settings) => lazy(Mode::Guarded, settings, budget)?,
            Self::Oracle { .. } => {
                return Err(Error::NeedUnavailable {
                    policy: "oracle".into(),
                    need: "the attention of the future",
                    path: "anything but the replay of a trace",
                });
            }
        })
    }
}

fn lazy(mode: Mode, settings: LazySettings, budget: Budget) -> Result<Box<dyn Policy>> {
    let window = settings.window.unwrap_or_else(|| quarter(budget, 128));
    let mut importance = Importance::of(mode);
    importance.combine = settings.combine.unwrap_or(importance.combine);
    importance.h2_min_mri = settings.h2_min_mri.unwrap_or(importance.h2_min_mri);
    let lazy = Lazy::new(mode, window, settings.threshold, settings.reduce)?;
    Ok(Box::new(lazy.with_importance(importance)))
}

/// Everything a cache is built from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CacheConfig {
    /// The policy while decoding, and for the prompt unless `prefill` is set.
    pub decode: PolicyConfig,
    /// Tokens per layer, sequence and KV head.
    pub budget: Budget,
    /// Budgets per layer in place of `budget`; empty for none.
    #[serde(default)]
    pub layer_budgets: Vec<Budget>,
    /// Another policy for the prompt.
    #[serde(default)]
    pub prefill: Option<PolicyConfig>,
    /// First tokens protected, beside what the policy protects.
    #[serde(default)]
    pub sinks: usize,
    /// Newest tokens protected, beside what the policy protects.
    #[serde(default)]
    pub recent: usize,
    /// What happens to the prompt, in place of the policy's rule.
    #[serde(default)]
    pub prompt: Option<Prompt>,
    /// Judge every so many steps, whatever the policy does by itself.
    #[serde(default)]
    pub lag: Option<usize>,
    /// Tokens of largest value norm spared per head.
    #[serde(default)]
    pub guard_values: usize,
}

impl CacheConfig {
    /// `policy` within `budget`, all else by default.
    pub fn new(policy: PolicyConfig, budget: Budget) -> Self {
        Self {
            decode: policy,
            budget,
            layer_budgets: Vec::new(),
            prefill: None,
            sinks: 0,
            recent: 0,
            prompt: None,
            lag: None,
            guard_values: 0,
        }
    }

    /// The budget of one layer.
    ///
    /// # Errors
    /// Budgets per layer that do not reach this layer.
    pub fn layer_budget(&self, layer: usize) -> Result<Budget> {
        if self.layer_budgets.is_empty() {
            return Ok(self.budget);
        }
        self.layer_budgets
            .get(layer)
            .copied()
            .ok_or_else(|| Error::Setting {
                name: "layer-budgets",
                value: format!("{} budgets", self.layer_budgets.len()),
                expected: "one for each layer",
            })
    }

    /// The policy of a layer with `budget`, combined as configured.
    ///
    /// # Errors
    /// Settings out of range.
    pub fn build(&self, budget: Budget) -> Result<Box<dyn Policy>> {
        self.combine(self.decode.build(budget)?, budget)
    }

    /// Puts the configured combinators around `policy`.
    pub(crate) fn combine(
        &self,
        mut policy: Box<dyn Policy>,
        budget: Budget,
    ) -> Result<Box<dyn Policy>> {
        if let Some(prefill) = self.prefill {
            policy = Box::new(PerPhase::new(prefill.build(budget)?, policy));
        }
        if let Some(window) = self.lag {
            policy = Box::new(Lagged::new(policy, window));
        }
        if self.guard_values > 0 {
            policy = Box::new(ValueNormGuard::new(policy, self.guard_values));
        }
        if self.sinks > 0 || self.recent > 0 || self.prompt.is_some() {
            policy = Box::new(Protect::new(policy, self.sinks, self.recent, self.prompt));
        }
        Ok(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_parsing_printing_and_serde() {
        for name in POLICY_NAMES {
            let config: PolicyConfig = name.parse().unwrap();
            assert_eq!(config.to_string(), name);
            let json = serde_json::to_string(&config).unwrap();
            assert!(json.contains(&format!("\"policy\":\"{name}\"")), "{json}");
            assert_eq!(serde_json::from_str::<PolicyConfig>(&json).unwrap(), config);
            let short = format!("{{\"policy\":\"{name}\"}}");
            assert_eq!(
                serde_json::from_str::<PolicyConfig>(&short).unwrap(),
                config
            );
            if name != "oracle" {
                assert_eq!(config.build(Budget::Tokens(64)).unwrap().name(), name);
            }
        }
        assert!("lru".parse::<PolicyConfig>().is_err());
    }

    #[test]
    fn a_cache_configuration_reads_from_json() {
        let config: CacheConfig = serde_json::from_str(
            r#"{"decode": {"policy": "lazy", "window": 8, "threshold": {"uniform": 0.1}},
                "budget": {"tokens": 32}, "prefill": {"policy": "snapkv"}, "prompt": {"compress-once": 16}, "lag": 4}"#,
        )
        .unwrap();
        assert_eq!(config.budget, Budget::Tokens(32));
        assert_eq!(config.prompt, Some(Prompt::CompressOnce(16)));
        assert_eq!(config.build(config.budget).unwrap().name(), "lazy");
        assert!(
            serde_json::from_str::<CacheConfig>(r#"{"decode": {"policy": "lazy"}, "budgets": 3}"#)
                .is_err()
        );
    }
}
