//! What is chosen from, and how carefully it is measured.

use crate::cache::{Cache, CacheFormat, Caching, LEAST};
use crate::error::{Error, Result};
use crate::target::Target;
use crate::treatment::Format;
use serde::{Deserialize, Serialize};

/// Most tokens of all contexts together.
const MOST_TOKENS: usize = 1_000_000_000;

/// How a model is measured and divided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Options {
    /// Who loads the result.
    pub target: Target,
    /// Shares of the units of a half that may stay, each above 0 and at most 1; 1 is always among them.
    pub widths: Vec<f64>,
    /// Formats besides that of the model; by default those of the target.
    pub formats: Option<Vec<Format>>,
    /// Ranks of corrections beside 0; by default a 64th and a 16th of the hidden width.
    pub ranks: Option<Vec<usize>>,
    /// Formats that may be corrected: this many with the fewest bits.
    pub corrected: usize,
    /// Tokens on which predictions are compared: the dense model's most likely ones, and all others as one more.
    pub top_k: usize,
    /// Tokens that curves are measured on.
    pub coarse_tokens: usize,
    /// Tokens that plans are measured on.
    pub fine_tokens: usize,
    /// Share of the combined treatments that is measured to check their prediction.
    pub sample: f64,
    /// Most rounds of measuring around a plan.
    pub rounds: usize,
    /// A round that gains less than this share of the divergence is the last.
    pub gain: f64,
    /// Steps of a curve that a site may move in a round.
    pub reach: usize,
    /// Tokens of a context for which keys and values count in the budget; 0 where only weights do.
    pub context: usize,
    /// Sequences for which they count.
    pub batch: usize,
    /// What keys and values may be stored as, besides as the model computes; for [`Target::Here`].
    pub cache_formats: Vec<CacheFormat>,
    /// Shares of the context's tokens that a layer's cache may keep, each above 0 and at most 1; 1 is always among them. With
    /// others layers evict, by the policy `keydiff`.
    pub cache_shares: Vec<f64>,
    /// Most parameters of the result, factors included.
    pub max_parameters: Option<u64>,
    /// Fewest tokens per second of decoding one sequence, by a table of what each treatment takes on this machine with
    /// weights as they are stored; at short contexts.
    pub tokens_per_second: Option<f64>,
    /// Generations of drawn exchanges after the rounds.
    pub refine: usize,
    /// Bytes of hidden states held at once.
    pub memory: usize,
    /// Seed of draws.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            target: Target::Here,
            widths: vec![0.25, 0.5, 0.75, 1.0],
            formats: None,
            ranks: None,
            corrected: 2,
            top_k: 512,
            coarse_tokens: 2048,
            fine_tokens: 8192,
            sample: 0.05,
            rounds: 3,
            gain: 0.01,
            reach: 2,
            context: 0,
            batch: 1,
            cache_formats: vec![
                CacheFormat::F16,
                CacheFormat::Int8,
                CacheFormat::K8v4,
                CacheFormat::Int4,
            ],
            cache_shares: vec![1.0],
            max_parameters: None,
            tokens_per_second: None,
            refine: 0,
            memory: 1 << 30,
            seed: 0,
        }
    }
}

impl Options {
    /// For this target, all else by default.
    pub fn new(target: Target) -> Self {
        Self {
            target,
            ..Self::default()
        }
    }

    /// The formats that are chosen from: that of the model, then from most bits to fewest.
    ///
    /// # Errors
    /// [`Error::Format`] for one that the target does not store, by itself or beside the others.
    pub fn formats(&self) -> Result<Vec<Format>> {
        let Some(formats) = &self.formats else {
            return Ok(self.target.formats());
        };
        let mut all = vec![Format::Stored];
        for &format in formats {
            self.target.check(format)?;
            if !all.contains(&format) {
                all.push(format);
            }
        }
        all.sort_by_key(|format| std::cmp::Reverse(format.size()));
        let group = all.iter().find_map(|format| format.group());
        let other = |format: &&Format| format.group().is_some() && format.group() != group;
        match all.iter().find(other) {
            Some(other) if self.target == Target::Vllm => Err(Error::Format {
                target: self.target.name(),
                format: other.to_string(),
                reason: "all its groups have one size",
            }),
            _ => Ok(all),
        }
    }

    /// What the caches of a run have in common; `None` where they do not count.
    pub(crate) fn caching(&self) -> Option<Caching> {
        let chosen = self.target == Target::Here;
        (self.context > 0).then(|| Caching {
            context: self.context,
            batch: self.batch,
            evicts: chosen && self.cache_shares.iter().any(|share| *share < 1.0),
        })
    }

    /// The caches that a layer may have, that of the model first; none where they do not count.
    pub(crate) fn caches(&self) -> Vec<Cache> {
        let Some(caching) = self.caching() else {
            return Vec::new();
        };
        let (mut formats, mut shares) = (vec![CacheFormat::Stored], vec![1.0]);
        if self.target == Target::Here {
            formats.extend(&self.cache_formats);
            shares.extend(self.cache_shares.iter().filter(|share| **share < 1.0));
        }
        let mut caches = Vec::new();
        for share in shares {
            for &format in &formats {
                let cache = caching.cache(share, format);
                if !caches.contains(&cache) {
                    caches.push(cache);
                }
            }
        }
        caches
    }

    /// Checks that shares of the caches are the same in the context and in the windows that they are measured on: a cache keeps
    /// some tokens at least.
    pub(crate) fn check_shares(&self, window: usize) -> Result<()> {
        if self.context == 0 {
            return Ok(());
        }
        let shortest = window.min(self.context);
        let fits = |share: &&f64| **share * shortest as f64 >= LEAST as f64 || **share == 1.0;
        match self.cache_shares.iter().find(|share| !fits(share)) {
            None => Ok(()),
            Some(share) => Err(Error::Option {
                option: "cache_shares",
                value: format!("{share} of {shortest} tokens"),
                expected: "a cache keeps 8 tokens at least: take longer windows or a larger share",
            }),
        }
    }

    /// Ranks beside 0, ascending.
    pub fn ranks(&self, hidden: usize) -> Vec<usize> {
        let mut ranks = match &self.ranks {
            Some(ranks) => ranks.clone(),
            None => vec![(hidden / 64).max(2), (hidden / 16).max(4)],
        };
        ranks.retain(|&rank| rank > 0);
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }

    /// Checks that every number is in its range.
    ///
    /// # Errors
    /// [`Error::Option`] with the first that is not.
    pub fn check(&self) -> Result<()> {
        let refuse = |option, value: String, expected| {
            Err(Error::Option {
                option,
                value,
                expected,
            })
        };
        if let Some(width) = self.widths.iter().find(|w| !(**w > 0.0 && **w <= 1.0)) {
            return refuse(
                "widths",
                width.to_string(),
                "a share is above 0 and at most 1",
            );
        }
        let in_all = self.context.checked_mul(self.batch);
        if in_all.is_none_or(|tokens| tokens > MOST_TOKENS) {
            return refuse(
                "context",
                format!("{} in {} sequences", self.context, self.batch),
                "at most 1,000,000,000 tokens in all",
            );
        }
        if let Some(share) = self
            .cache_shares
            .iter()
            .find(|s| !(**s > 0.0 && **s <= 1.0))
        {
            return refuse(
                "cache_shares",
                share.to_string(),
                "a share is above 0 and at most 1",
            );
        }
        let default = Self::default();
        let chosen = [
            (
                "cache_formats",
                self.cache_formats != default.cache_formats,
                list(&self.cache_formats),
            ),
            (
                "cache_shares",
                self.cache_shares != default.cache_shares,
                list(&self.cache_shares),
            ),
        ];
        let mut chosen = chosen.into_iter().filter(|(_, is_chosen, _)| *is_chosen);
        if let (true, Some((option, _, value))) = (self.target != Target::Here, chosen.next()) {
            return refuse(
                option,
                value,
                "runtimes other than `here` keep every token in 16 bits",
            );
        }
        if !(0.0..=1.0).contains(&self.sample) {
            return refuse(
                "sample",
                self.sample.to_string(),
                "it is a share from 0 to 1",
            );
        }
        if let Some(speed) = self
            .tokens_per_second
            .filter(|s| !(*s > 0.0 && s.is_finite()))
        {
            return refuse("tokens_per_second", speed.to_string(), "it is above 0");
        }
        if !(self.gain >= 0.0 && self.gain.is_finite()) {
            return refuse("gain", self.gain.to_string(), "it is a share, at least 0");
        }
        for (option, value) in [
            ("top_k", self.top_k),
            ("coarse_tokens", self.coarse_tokens),
            ("fine_tokens", self.fine_tokens),
            ("reach", self.reach),
            ("batch", self.batch),
        ] {
            if value == 0 {
                return refuse(option, value.to_string(), "at least 1 is needed");
            }
        }
        self.formats().map(|_| ())
    }
}

/// Values as they are written in a list.
fn list<T: ToString>(values: &[T]) -> String {
    let values: Vec<String> = values.iter().map(T::to_string).collect();
    values.join(",")
}
