//! Caches as treatments: how many tokens of a context a layer keeps, and what keys and values are stored as.
//!
//! Where every layer keeps all tokens nothing is evicted. Where layers may keep fewer, all have the policy `keydiff`, which
//! the guide of kv-lazy recommends for contexts that are read once, each with a budget of its own. Bytes are those that
//! kv-lazy allocates: keys, values, scales, positions and room for the tokens until the next eviction.

use crate::error::{Error, Result};
use crate::plan::SitePlan;
use crate::site::Site;
use candle_core::{DType, Device, Tensor};
use kv_lazy::{Budget, CacheConfig, CacheSet, LayerShape, StorageConfig};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Names of [`CacheFormat`]s beside that of the model.
pub const CACHE_FORMATS: [&str; 4] = ["f16", "int8", "k8v4", "int4"];
/// Tokens that a layer keeps at least: the first and the newest, which the policy protects, and some to choose from.
pub(crate) const LEAST: usize = 8;

/// What keys and values are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum CacheFormat {
    /// As the model computes.
    Stored,
    /// 16-bit floats.
    F16,
    /// 8-bit keys and values.
    Int8,
    /// 8-bit keys, 4-bit values.
    K8v4,
    /// 4-bit keys and values.
    Int4,
}

impl CacheFormat {
    /// Its name; those of integers are presets of kv-lazy.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::F16 => CACHE_FORMATS[0],
            Self::Int8 => CACHE_FORMATS[1],
            Self::K8v4 => CACHE_FORMATS[2],
            Self::Int4 => CACHE_FORMATS[3],
        }
    }

    fn storage(self) -> StorageConfig {
        match self {
            Self::Stored => StorageConfig::default(),
            Self::F16 => StorageConfig::new(kv_lazy::NumberFormat::F16, kv_lazy::NumberFormat::F16),
            Self::Int8 => StorageConfig::int8(),
            Self::K8v4 => StorageConfig::k8v4(),
            Self::Int4 => StorageConfig::int4(),
        }
    }
}

impl fmt::Display for CacheFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CacheFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let all = [Self::F16, Self::Int8, Self::K8v4, Self::Int4];
        let found = all.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| Error::Name {
            what: "format of a cache",
            name: name.to_string(),
            expected: "f16, int8, k8v4 or int4",
        })
    }
}

/// The cache of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cache {
    /// Share of the context's tokens that stay.
    pub share: f64,
    /// The same as tokens per sequence and key/value head.
    pub tokens: usize,
    /// What they are stored as.
    pub format: CacheFormat,
}

impl Cache {
    /// Whether every token stays, stored as the model computes.
    pub fn is_dense(self) -> bool {
        self.share == 1.0 && self.format == CacheFormat::Stored
    }
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.share < 1.0 {
            write!(f, "{} % of tokens ", 100.0 * self.share)?;
        }
        write!(f, "{}", self.format)
    }
}

/// What the caches of a run have in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Caching {
    /// Tokens of a context.
    pub(crate) context: usize,
    /// Sequences.
    pub(crate) batch: usize,
    /// Whether a layer may keep fewer tokens than the context has.
    pub(crate) evicts: bool,
}

impl Caching {
    /// The cache of this share of the context.
    pub(crate) fn cache(self, share: f64, format: CacheFormat) -> Cache {
        Cache {
            share,
            tokens: tokens(share, self.context),
            format,
        }
    }

    fn config(self, budget: usize) -> CacheConfig {
        let policy = if self.evicts { "keydiff" } else { "full" };
        let policy = policy.parse().expect("a policy of kv-lazy");
        CacheConfig::new(policy, Budget::Tokens(budget))
    }

    /// One layer's cache, with the same share of `len` tokens; `None` where it is as in the model.
    pub(crate) fn within(self, cache: Cache, len: usize) -> Option<CacheConfig> {
        if cache.is_dense() {
            return None;
        }
        let mut config = self.config(tokens(cache.share, len));
        config.storage = cache.format.storage();
        Some(config)
    }

    /// Bytes that kv-lazy allocates for a layer; `None` where heads have a width that the format does not fit.
    pub(crate) fn bytes(self, cache: Cache, shape: LayerShape, dtype: DType) -> Option<u64> {
        if shape.kv_heads == 0 {
            return Some(0);
        }
        let held = cache.tokens.min(shape.sliding_window.unwrap_or(usize::MAX));
        let mut config = self.config(held);
        config.storage = cache.format.storage();
        let bytes = config.bytes(0, shape, dtype, held).ok()?;
        Some((bytes * self.batch) as u64)
    }

    /// The caches of a plan's sites in a model of so many layers.
    pub(crate) fn of_plan(self, layers: usize, sites: &[SitePlan]) -> CacheConfig {
        let mut config = self.config(self.context);
        config.layer_storage = vec![StorageConfig::default(); layers];
        if self.evicts {
            config.layer_budgets = vec![config.budget; layers];
        }
        for site in sites {
            if let (Site::Attention(layer), Some(cache)) = (site.site, site.treatment.cache) {
                config.layer_storage[layer] = cache.format.storage();
                if self.evicts {
                    config.layer_budgets[layer] = Budget::Tokens(cache.tokens);
                }
            }
        }
        config
    }
}

/// A plan's caches with the same shares of `len` tokens in place of the context's; `None` where all are as in the model.
pub(crate) fn within(config: &CacheConfig, sites: &[SitePlan], len: usize) -> Option<CacheConfig> {
    let caches = || {
        sites
            .iter()
            .filter_map(|site| Some((site, site.treatment.cache?)))
    };
    if caches().all(|(_, cache)| cache.is_dense()) {
        return None;
    }
    let mut config = config.clone();
    config.budget = Budget::Tokens(len);
    for (site, cache) in caches() {
        let Site::Attention(layer) = site.site else {
            continue;
        };
        if let Some(budget) = config.layer_budgets.get_mut(layer) {
            *budget = Budget::Tokens(tokens(cache.share, len));
        }
    }
    Some(config)
}

/// The tokens of a share of `len`.
fn tokens(share: f64, len: usize) -> usize {
    match share < 1.0 {
        true => ((share * len as f64).ceil() as usize)
            .max(LEAST)
            .min(len.max(LEAST)),
        false => len,
    }
}

/// The most bytes that caches of `config` take while `context` tokens are decoded in each of `batch` sequences, measured: keys,
/// values, positions and what the policy remembers, as they are allocated. `shapes` are those of the layers, as
/// [`Model::cache_shapes`](causal_lm::Model::cache_shapes) gives them; keys and values are random.
///
/// # Errors
/// What the cache reports.
pub fn allocated(
    shapes: &[LayerShape],
    dtype: DType,
    config: &CacheConfig,
    (context, batch): (usize, usize),
) -> Result<u64> {
    let mut set = CacheSet::new(shapes, batch, dtype, &Device::Cpu, config)?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut most = 0;
    for _ in 0..context {
        set.begin(1)?;
        for (layer, shape) in shapes.iter().enumerate() {
            if shape.kv_heads == 0 {
                continue;
            }
            let mut random = |heads: usize| -> Result<Tensor> {
                let count = batch * heads * shape.head_dim;
                let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
                let values =
                    Tensor::from_vec(values, (batch, heads, 1, shape.head_dim), &Device::Cpu)?;
                Ok(values.to_dtype(dtype)?)
            };
            let (q, k, v) = (
                random(shape.query_heads)?,
                random(shape.kv_heads)?,
                random(shape.kv_heads)?,
            );
            set.feed(layer, &q, &k, &v, 1.0)?;
        }
        most = most.max(set.bytes() + set.position_bytes() + set.state_bytes());
    }
    Ok(most as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: LayerShape = LayerShape {
        query_heads: 4,
        kv_heads: 2,
        head_dim: 16,
        sliding_window: None,
    };
    const FORMATS: [CacheFormat; 5] = [
        CacheFormat::Stored,
        CacheFormat::F16,
        CacheFormat::Int8,
        CacheFormat::K8v4,
        CacheFormat::Int4,
    ];

    #[test]
    fn the_bytes_of_a_cache_are_those_that_decoding_its_context_allocates() {
        for evicts in [false, true] {
            let caching = Caching {
                context: 300,
                batch: 2,
                evicts,
            };
            for share in if evicts {
                vec![1.0, 0.5, 0.1]
            } else {
                vec![1.0]
            } {
                for format in FORMATS {
                    let cache = caching.cache(share, format);
                    let bytes = caching.bytes(cache, SHAPE, DType::F32).unwrap();
                    let mut config = caching.config(cache.tokens);
                    config.storage = format.storage();
                    let found = allocated(&[SHAPE], DType::F32, &config, (300, 2)).unwrap();
                    assert!(found <= bytes, "{evicts} {cache}: {found} of {bytes}");
                    // Where all tokens stay there is no room for an eviction that never comes.
                    let used = found as f64 / bytes as f64;
                    assert!(used > if evicts { 0.8 } else { 0.98 }, "{cache}: {used}");
                }
            }
        }
    }

    #[test]
    fn fewer_tokens_and_fewer_bits_take_fewer_bytes_and_heads_that_do_not_fit_are_refused() {
        let caching = Caching {
            context: 4096,
            batch: 1,
            evicts: true,
        };
        let bytes = |share, format| caching.bytes(caching.cache(share, format), SHAPE, DType::F32);
        for share in [1.0, 0.5, 0.25] {
            let of: Vec<u64> = FORMATS.iter().map(|&f| bytes(share, f).unwrap()).collect();
            assert!(of.windows(2).all(|pair| pair[1] < pair[0]), "{of:?}");
        }
        assert!(bytes(0.5, CacheFormat::F16) < bytes(1.0, CacheFormat::F16));
        let odd = LayerShape {
            head_dim: 12,
            ..SHAPE
        };
        let cache = caching.cache(1.0, CacheFormat::Int8);
        assert_eq!(caching.bytes(cache, odd, DType::F32), None);
    }

    #[test]
    fn names_of_formats_come_back() {
        for name in CACHE_FORMATS {
            let format: CacheFormat = name.parse().unwrap();
            assert_eq!(format.to_string(), name);
            assert_eq!(
                serde_json::to_string(&format).unwrap(),
                format!("\"{name}\"")
            );
        }
        assert!("int3".parse::<CacheFormat>().is_err());
    }
}
