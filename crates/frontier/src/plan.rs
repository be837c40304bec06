//! Plans: one treatment for each site, as plain data.

use crate::cache;
use crate::error::{Error, Result};
use crate::measure::Divergence;
use crate::site::Site;
use crate::target::Target;
use crate::treatment::Treatment;
use kv_lazy::CacheConfig;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What a site gets.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SitePlan {
    /// The site.
    pub site: Site,
    /// What is done to it.
    pub treatment: Treatment,
    /// Share of its units that stays.
    pub share: f64,
    /// Bytes of its weights in the files.
    pub bytes: u64,
    /// Bytes of its cache, where caches count.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cache_bytes: u64,
    /// Its weights that stay, without factors.
    pub parameters: u64,
    /// Bits per weight that stays, everything counted.
    pub bits: f64,
}

/// A whole plan that was measured: the division, what a round of measuring around the plan moved, the best choice along one
/// axis, or a mix.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Divergence that was predicted: the sum over sites, of a round what the moves were to change. `None` where
    /// treatments were not measured by themselves, and where the changes add up to more than the divergence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted: Option<f64>,
    /// Divergence of the whole plan.
    pub measured: Divergence,
    /// Whether it was better than the plan before.
    pub kept: bool,
}

/// One treatment for each site of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Who loads the result.
    pub target: Target,
    /// The budget in bytes.
    pub budget: u64,
    /// Sites in the order of the data.
    pub sites: Vec<SitePlan>,
    /// Bytes that the files of weights take at most.
    pub weight_bytes: u64,
    /// Parameters, factors included.
    pub parameters: u64,
    /// Bytes of the caches, where they count: keys and values with their scales and positions.
    pub cache_bytes: u64,
    /// The caches of all layers for the context, where they are chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheConfig>,
    /// Sum of the divergences of single sites, in nats per token; `None` where not all of them were measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted: Option<f64>,
    /// Divergence of the whole plan from the dense model.
    pub measured: Divergence,
    /// The division and what was measured after it, of drawn exchanges those that were kept.
    pub rounds: Vec<Round>,
    /// Seconds of a decoded token by the table of what treatments take, where speed counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

/// A plan in a few numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Share of the weights of the blocks that is pruned.
    pub pruned: f64,
    /// Mean bits per weight that stays, embedding and factors included.
    pub bits: f64,
    /// Mean rank over the sites of the blocks.
    pub rank: f64,
    /// Weights of sites that stay.
    pub parameters: u64,
}

impl Plan {
    /// Whether all weights stay as they are.
    pub fn is_dense(&self) -> bool {
        let dense = |site: &SitePlan| {
            let Treatment { format, rank, .. } = site.treatment;
            site.share == 1.0 && format == crate::Format::Stored && rank == 0
        };
        self.sites.iter().all(dense)
    }

    /// Bytes that count against the budget.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.cache_bytes
    }

    /// The caches with the same shares of the tokens of windows of `len`, for [`Decoder::decoding`](causal_lm::Decoder::decoding);
    /// `None` where all are as in the model.
    pub fn cache_within(&self, len: usize) -> Option<CacheConfig> {
        cache::within(self.cache.as_ref()?, &self.sites, len)
    }

    /// The plan in a few numbers.
    pub fn summary(&self) -> Summary {
        let blocks = || self.sites.iter().filter(|site| site.site.half().is_some());
        let kept: f64 = blocks().map(|site| site.parameters as f64).sum();
        let dense: f64 = blocks()
            .map(|site| site.parameters as f64 / site.share)
            .sum();
        let parameters: u64 = self.sites.iter().map(|site| site.parameters).sum();
        let bits: f64 = self.sites.iter().map(|site| 8.0 * site.bytes as f64).sum();
        let ranks: usize = blocks().map(|site| site.treatment.rank).sum();
        Summary {
            pruned: 1.0 - kept / dense.max(1.0),
            bits: bits / parameters.max(1) as f64,
            rank: ranks as f64 / blocks().count().max(1) as f64,
            parameters,
        }
    }

    /// Reads a plan from JSON.
    ///
    /// # Errors
    /// When there is no such file, or it is no plan.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let found = tensor_io::atomic::read_json(path)?;
        found.ok_or_else(|| Error::PlanMismatch(format!("there is no plan {}", path.display())))
    }

    /// Writes it as JSON, whole or not at all.
    ///
    /// # Errors
    /// What writing reports.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        Ok(tensor_io::atomic::write_json(path.as_ref(), self)?)
    }
}
