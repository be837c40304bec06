//! Policies and caches as data: what a command line or a file says.

#[cfg(feature = "trace")]
use super::oracle;
use super::tri_attention::QueryStatistics;
use super::{
    Budget, EvictEvery, Outlier, PerPhase, Policy, Prompt, Protect, Threshold, Trigger, Tunable,
    ValueGuard, dropkv, full, h2o, keydiff, knorm, lagkv, lazy, r_kv, raas, random, scissorhands,
    snapkv, streaming, tova, tri_attention, vase,
};
use crate::error::{Error, Result};
use crate::quantise::StorageConfig;
use crate::rotary::Rotary;
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// The policies: everything that depends on which there are follows from these lines.
macro_rules! policies {
    ($($(#[cfg($cfg:meta)])? $variant:ident = $name:literal, $settings:ty, $build:path, $what:literal;)+) => {
        /// A policy and its settings. In a file: `{"policy": "lazy", "window": 64}`; settings that are left out have their defaults.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "policy")]
        #[non_exhaustive]
        pub enum PolicyConfig {
            $($(#[cfg($cfg)])? #[doc = concat!("`", $name, "`: ", $what, ".")] #[serde(rename = $name)] $variant($settings),)+
        }

        /// Names of all policies, as used on the command line and in files.
        pub const NAMES: &[&str] = &[$($(#[cfg($cfg)])? $name,)+];

        impl FromStr for PolicyConfig {
            type Err = Error;

            /// A policy by its name, with default settings.
            fn from_str(name: &str) -> Result<Self> {
                match name {
                    $($(#[cfg($cfg)])? $name => Ok(Self::$variant(Default::default())),)+
                    _ => Err(Error::UnknownPolicy { name: name.into(), known: NAMES.join(", ") }),
                }
            }
        }

        impl PolicyConfig {
            /// The policy's name.
            pub fn name(&self) -> &'static str {
                match self {
                    $($(#[cfg($cfg)])? Self::$variant(_) => $name,)+
                }
            }

            /// What the policy does, in a few words.
            pub fn summary(&self) -> &'static str {
                match self {
                    $($(#[cfg($cfg)])? Self::$variant(_) => $what,)+
                }
            }

            fn tunable(&mut self) -> &mut dyn Tunable {
                match self {
                    $($(#[cfg($cfg)])? Self::$variant(settings) => settings,)+
                }
            }

            /// The policy, with unset settings derived from `budget`.
            ///
            /// # Errors
            /// Settings out of range; the oracle, which only a replay can build.
            pub fn build(&self, budget: Budget) -> Result<Box<dyn Policy>> {
                match self {
                    $($(#[cfg($cfg)])? Self::$variant(settings) => $build(settings, budget),)+
                }
            }
        }
    };
}

policies! {
    Full = "full", full::Settings, full::build, "keeps every token";
    Streaming = "streaming", streaming::Settings, streaming::build, "keeps the first tokens and the newest";
    H2o = "h2o", h2o::Settings, h2o::build, "evicts the token with the least attention received so far";
    Tova = "tova", tova::Settings, tova::build, "evicts the token that the last query attends to least";
    Scissorhands = "scissorhands", scissorhands::Settings, scissorhands::build, "evicts tokens that were most often below the uniform weight, in bulk";
    Raas = "raas", raas::Settings, raas::build, "evicts the least recently attended token, keeps the prompt";
    Snapkv = "snapkv", snapkv::Settings, snapkv::build, "cuts the prompt to what its last queries attend to";
    RKv = "r-kv", r_kv::Settings, r_kv::build, "evicts unimportant or redundant keys";
    KeyNorm = "knorm", knorm::Settings, knorm::build, "evicts the largest keys; a baseline";
    KeyDiff = "keydiff", keydiff::Settings, keydiff::build, "evicts keys close to the mean direction of all keys";
    TriAttention = "tri-attention", tri_attention::Settings, tri_attention::build, "evicts keys that typical queries will attend to least";
    LagKv = "lagkv", lagkv::Settings, lagkv::build, "evicts tokens whose channels spread little against the chunk before";
    DropKv = "dropkv", dropkv::Settings, dropkv::build, "evicts tokens without which the last queries' outputs would move least";
    VaseAttention = "vase-attnv", vase::Settings, vase::build_attention, "keeps values of large range, draws the rest by attention";
    VaseProducts = "vase-dkv", vase::Settings, vase::build_products, "keeps large products of randomly projected keys and values";
    Random = "random", random::Settings, random::build, "evicts at random, keeps the prompt; a baseline";
    Lazy = "lazy", lazy::Settings, lazy::build_paper, "LazyEviction as in the paper";
    LazyReference = "lazy-reference", lazy::Settings, lazy::build_reference, "LazyEviction as in the reference code";
    LazyGuarded = "lazy-guarded", lazy::Settings, lazy::build_guarded, "LazyEviction with a fixed importance, sinks and the prompt kept";
    #[cfg(feature = "trace")] Oracle = "oracle", oracle::Settings, oracle::build, "keeps what will be attended most; in replay only";
}

/// When a policy evicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Evicts {
    /// Never.
    Nothing,
    /// Once, when the prompt has been read: a prefill compressor. What is generated afterwards is all kept.
    AfterPrompt,
    /// While decoding, and after the prompt.
    WhileDecoding,
}

impl PolicyConfig {
    /// When the policy evicts; the oracle while decoding.
    pub fn evicts(&self) -> Evicts {
        let Ok(policy) = self.build(Budget::Tokens(64)) else {
            return Evicts::WhileDecoding;
        };
        let rule = policy.rule(super::Phase::Decode);
        match rule.decode {
            Trigger::Never if !rule.after_prefill => Evicts::Nothing,
            Trigger::Never => Evicts::AfterPrompt,
            _ => Evicts::WhileDecoding,
        }
    }

    /// The seed, of a policy that draws.
    pub fn seed_mut(&mut self) -> Option<&mut u64> {
        self.tunable().seed()
    }

    /// The weight from which a token counts as active, of a policy that has one.
    pub fn threshold_mut(&mut self) -> Option<&mut Threshold> {
        self.tunable().threshold()
    }

    /// Statistics of the model's queries, of a policy that uses them.
    pub fn calibration_mut(&mut self) -> Option<&mut Option<QueryStatistics>> {
        self.tunable().calibration()
    }
}

impl std::fmt::Display for PolicyConfig {
    /// The policy's name.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Window and recent tokens by default where the budget is a ratio.
pub(super) const RATIO_WINDOW: usize = 32;

/// A quarter of a fixed budget, at most `most`; of a budget that grows, [`RATIO_WINDOW`].
pub(crate) fn quarter(budget: Budget, most: usize) -> usize {
    match budget {
        Budget::Tokens(tokens) => (tokens / 4).clamp(1, most),
        Budget::Ratio(_) => RATIO_WINDOW.min(most),
    }
}

/// Which positions cached tokens have for new queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Positions {
    /// Their own: distances are those of the text.
    #[default]
    Keep,
    /// Consecutive ones, as in StreamingLLM: the sinks move up to the oldest of the newest tokens, so that no distance exceeds what the cache holds. For `streaming`
    /// alone, where it equals the ranks of the cached tokens exactly: the newest tokens are consecutive already. Needs `rotary`; on the CPU.
    Consecutive,
}

/// Everything a cache is built from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub struct CacheConfig {
    /// The policy while decoding, and for the prompt unless `prefill` is set.
    pub decode: PolicyConfig,
    /// Tokens per layer, sequence and KV head. Of a cache that keeps every token: what its storage has room for; it grows beyond.
    pub budget: Budget,
    /// Budgets per layer in place of `budget`; empty for none.
    #[serde(default)]
    pub layer_budgets: Vec<Budget>,
    /// What keys and values are stored as.
    #[serde(default)]
    pub storage: StorageConfig,
    /// Storage per layer in place of `storage`; empty for none.
    #[serde(default)]
    pub layer_storage: Vec<StorageConfig>,
    /// Another policy for the prompt.
    #[serde(default)]
    pub prefill: Option<PolicyConfig>,
    /// First tokens protected, in addition to the policy's own.
    #[serde(default)]
    pub sinks: usize,
    /// Newest tokens protected, in addition to the policy's own.
    #[serde(default)]
    pub recent: usize,
    /// What happens to the prompt, in place of the policy's rule.
    #[serde(default)]
    pub prompt: Option<Prompt>,
    /// Evict every so many steps, whatever the policy does by itself; that many newest tokens are then protected.
    #[serde(default, alias = "lag")]
    pub evict_every: Option<usize>,
    /// Tokens per head kept because their values stand out.
    #[serde(default)]
    pub guard_values: usize,
    /// What makes a value stand out.
    #[serde(default)]
    pub guard_by: Outlier,
    /// Heads of a layer share their budgets (AdaKV, arXiv 2407.11550): the best tokens of all heads stay, and each head keeps at least this share of its own budget; 0.2
    /// is usual. For policies whose scores are comparable between heads, on the CPU.
    #[serde(default)]
    pub shared_budget: Option<f64>,
    /// Which positions the cached tokens have for new queries.
    #[serde(default)]
    pub positions: Positions,
    /// How the model rotates keys, for policies that need to know.
    #[serde(default)]
    pub rotary: Option<Rotary>,
    /// Rotation per layer in place of `rotary`; empty for none.
    #[serde(default)]
    pub layer_rotary: Vec<Option<Rotary>>,
}

impl Default for CacheConfig {
    /// What the [guide](crate::guide) recommends where nothing is known of the task: every token in 8 bits.
    fn default() -> Self {
        Self {
            storage: StorageConfig::int8(),
            ..Self::new(PolicyConfig::Full(full::Settings {}), Budget::Ratio(1.0))
        }
    }
}

impl CacheConfig {
    /// `policy` within `budget`, all else by default; the fields can be set afterwards.
    pub fn new(policy: PolicyConfig, budget: Budget) -> Self {
        Self {
            decode: policy,
            budget,
            layer_budgets: Vec::new(),
            storage: StorageConfig::default(),
            layer_storage: Vec::new(),
            prefill: None,
            sinks: 0,
            recent: 0,
            prompt: None,
            evict_every: None,
            guard_values: 0,
            guard_by: Outlier::Norm,
            shared_budget: None,
            positions: Positions::Keep,
            rotary: None,
            layer_rotary: Vec::new(),
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

    /// The storage of one layer.
    ///
    /// # Errors
    /// Storage per layer that does not reach this layer.
    pub fn storage_of(&self, layer: usize) -> Result<&StorageConfig> {
        if self.layer_storage.is_empty() {
            return Ok(&self.storage);
        }
        self.layer_storage.get(layer).ok_or_else(|| Error::Setting {
            name: "layer-storage",
            value: format!("storage of {} layers", self.layer_storage.len()),
            expected: "one for each layer",
        })
    }

    /// The same for one layer alone, without lists per layer.
    ///
    /// # Errors
    /// As [`layer_budget`](Self::layer_budget) and [`storage_of`](Self::storage_of).
    pub fn of_layer(&self, layer: usize) -> Result<Self> {
        Ok(Self {
            budget: self.layer_budget(layer)?,
            layer_budgets: Vec::new(),
            storage: *self.storage_of(layer)?,
            layer_storage: Vec::new(),
            rotary: self.rotary_of(layer).cloned(),
            layer_rotary: Vec::new(),
            ..self.clone()
        })
    }

    /// Tokens that a layer's storage has room for where nothing is evicted, `usize::MAX` where that is not said.
    pub(crate) fn expected(&self, layer: usize) -> usize {
        match self.layer_budget(layer) {
            Ok(Budget::Tokens(tokens)) if self.keeps_all() => tokens,
            _ => usize::MAX,
        }
    }

    /// The rotation of one layer; none beyond the layers that were named.
    pub fn rotary_of(&self, layer: usize) -> Option<&Rotary> {
        if self.layer_rotary.is_empty() {
            return self.rotary.as_ref();
        }
        self.layer_rotary.get(layer).and_then(Option::as_ref)
    }

    /// Whether every token is kept.
    pub fn keeps_all(&self) -> bool {
        matches!(self.decode, PolicyConfig::Full(_)) && self.prefill.is_none()
    }

    /// Refuses settings that a cache of every token would not heed.
    ///
    /// # Errors
    /// A prompt to be cut, values to be guarded or budgets to be shared where nothing is evicted.
    pub(crate) fn check(&self) -> Result<()> {
        let unheeded = match self.prompt {
            Some(Prompt::CompressOnce(_)) => Some("prompt"),
            _ if self.guard_values > 0 => Some("guard-values"),
            _ if self.shared_budget.is_some() => Some("shared-budget"),
            _ => None,
        };
        match unheeded {
            Some(name) if self.keeps_all() => Err(Error::Setting {
                name,
                value: "under the policy `full`".into(),
                expected: "a policy that evicts",
            }),
            _ => Ok(()),
        }
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
        if let Some(prefill) = &self.prefill {
            policy = Box::new(PerPhase::new(prefill.build(budget)?, policy));
        }
        if let Some(window) = self.evict_every {
            policy = Box::new(EvictEvery::new(policy, window));
        }
        if self.guard_values > 0 {
            policy = Box::new(ValueGuard::new(policy, self.guard_by, self.guard_values));
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
        for name in NAMES.iter().copied() {
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
        let error = "lru".parse::<PolicyConfig>().unwrap_err().to_string();
        assert!(
            error.contains("lru") && error.contains("lazy-guarded"),
            "{error}"
        );
    }

    #[test]
    fn by_default_every_token_is_kept_in_8_bits() {
        let config = CacheConfig::default();
        assert!(config.keeps_all() && config.storage == StorageConfig::int8());
    }

    #[test]
    fn policies_say_when_they_evict_and_what_can_be_set() {
        let evicts = |name: &str| name.parse::<PolicyConfig>().unwrap().evicts();
        assert_eq!(evicts("full"), Evicts::Nothing);
        assert_eq!(evicts("snapkv"), Evicts::AfterPrompt);
        for &name in NAMES
            .iter()
            .filter(|name| !matches!(**name, "full" | "snapkv"))
        {
            assert_eq!(evicts(name), Evicts::WhileDecoding, "{name}");
        }
        for name in ["random", "vase-attnv", "vase-dkv"] {
            let mut policy: PolicyConfig = name.parse().unwrap();
            *policy.seed_mut().unwrap() = 7;
            assert!(
                serde_json::to_string(&policy)
                    .unwrap()
                    .contains("\"seed\":7"),
                "{name}"
            );
        }
        let mut lazy: PolicyConfig = "lazy".parse().unwrap();
        assert!(lazy.threshold_mut().is_some() && lazy.seed_mut().is_none());
        let keys = "keydiff".parse::<PolicyConfig>().unwrap();
        assert_eq!(
            keys.build(Budget::Tokens(64)).unwrap().needs().describe(),
            "keys"
        );
    }

    #[test]
    fn a_cache_configuration_reads_from_json() {
        let config: CacheConfig = serde_json::from_str(
            r#"{"decode": {"policy": "lazy", "window": 8, "threshold": {"uniform": 0.1}},
                "budget": {"tokens": 32}, "prefill": {"policy": "snapkv"}, "prompt": {"compress-once": 16}, "lag": 4}"#,
        )
        .unwrap();
        assert_eq!(config.evict_every, Some(4), "the old name of a setting");
        assert_eq!(config.budget, Budget::Tokens(32));
        assert_eq!(config.prompt, Some(Prompt::CompressOnce(16)));
        assert_eq!(config.build(config.budget).unwrap().name(), "lazy");
        assert!(
            serde_json::from_str::<CacheConfig>(r#"{"decode": {"policy": "lazy"}, "budgets": 3}"#)
                .is_err()
        );
    }
}
