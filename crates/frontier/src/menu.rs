//! The treatments that each site may get.

use crate::bytes::Counter;
use crate::cache::{Cache, CacheFormat, Caching};
use crate::error::Result;
use crate::make::Maker;
use crate::options::Options;
use crate::site::Site;
use crate::treatment::{Format, Treatment};
use candle_core::Tensor;
use causal_lm::Block;
use causal_lm::block::{Mlp, TokenMixer};
use prune_structured::Ranking;
use prune_structured::divergence::{Half, Place, Sites};
use std::sync::{Arc, Mutex};

/// A treatment of a menu.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item {
    pub(crate) treatment: Treatment,
    /// Bytes of weights and cache; `None` where the target cannot store it, or as well with more bits.
    pub(crate) bytes: Option<u64>,
    /// Bytes of the cache among them.
    pub(crate) cache: u64,
    /// Weights that stay.
    pub(crate) weights: u64,
    /// The same with factors.
    pub(crate) parameters: u64,
    /// Seconds that its matrices take for a decoded token; 0 where speed is free.
    pub(crate) seconds: f64,
    /// Place of its format among those that are chosen from.
    pub(crate) format: usize,
    /// Place of its width among those that are chosen from, narrowest first.
    pub(crate) level: usize,
    /// Bytes that it takes less where the experts of all blocks are floats, and one tensor of a block holds them.
    pub(crate) fused: u64,
    /// Place of its cache among those that are chosen from; 0 for that of the model.
    pub(crate) cache_level: usize,
}

/// What a treatment's parameters and seconds count as, in nats; 0 where they are free.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Price {
    /// Of a parameter.
    pub(crate) parameter: f64,
    /// Of a second that decoding a token takes.
    pub(crate) second: f64,
}

impl Price {
    pub(crate) fn of(self, item: &Item) -> f64 {
        self.parameter * item.parameters as f64 + self.second * item.seconds
    }
}

/// What a site may get.
#[derive(Clone, Debug)]
pub(crate) struct Menu {
    pub(crate) site: Site,
    /// By width from the narrowest, then by format from most bits, then by rank; the last width's first is the dense one. The
    /// last width has mixes besides.
    pub(crate) items: Vec<Item>,
    /// Place of the dense treatment.
    pub(crate) dense: usize,
    /// Number of widths.
    pub(crate) levels: usize,
    /// Number of formats that are chosen from; those behind them are mixes, which are taken by all sites or none.
    pub(crate) formats: usize,
    /// The caches that are chosen from, that of the model first; none where there is nothing to choose.
    pub(crate) caches: Vec<Cache>,
}

impl Menu {
    /// All treatments of a site.
    pub(crate) fn new(
        maker: &Maker<'_>,
        counter: &Counter<'_>,
        options: &Options,
        site: Site,
    ) -> Result<Self> {
        let formats = options.formats()?;
        let ranks = options.ranks(maker.decoder.config().hidden);
        let widths = widths(maker, options, site)?;
        let caches = match site {
            // A delta net has no keys and values.
            Site::Attention(layer) if maker.decoder.config().widths[layer].heads > 0 => {
                options.caches()
            }
            _ => Vec::new(),
        };
        let mixes = options.target.mixes(maker.decoder);
        let mut items = Vec::new();
        for (level, &width) in widths.iter().enumerate() {
            let mixes = match level + 1 == widths.len() {
                true => mixes.as_slice(),
                false => &[],
            };
            let plain = |format: &Format| -> Result<Option<u64>> {
                let format = maker.format_at(site, *format)?;
                let treatment = Treatment {
                    width,
                    format,
                    rank: 0,
                    cache: None,
                };
                counter.of(site, treatment)
            };
            let sizes = formats.iter().map(plain).collect::<Result<Vec<_>>>()?;
            let worthless = take_as_much_as_more_bits(&sizes);
            for (at, &format) in formats.iter().chain(mixes).enumerate() {
                let matrix = site.half().is_none();
                if matrix && format != Format::Stored && !options.target.quantises_matrices() {
                    continue;
                }
                let few_bits = (1..formats.len()).contains(&at);
                let corrected = few_bits && formats.len() - at <= options.corrected;
                // Where all ranks are equal, any format is corrected; the model's own has nothing to correct.
                let corrected = corrected || options.target.needs_equal_ranks();
                // No adapter holds corrections of single experts.
                let experts = matches!(site, Site::Experts(_));
                let ranks = match corrected && !matrix && !experts {
                    true => ranks.as_slice(),
                    false => &[],
                };
                for rank in std::iter::once(0).chain(ranks.iter().copied()) {
                    let plain = Treatment {
                        width,
                        format: maker.format_at(site, format)?,
                        rank,
                        cache: None,
                    };
                    let uncorrected = Treatment { rank: 0, ..plain };
                    let weight_bytes = match worthless.get(at) {
                        Some(true) => None,
                        _ => counter.of(site, plain)?,
                    };
                    let weights = counter.parameters(site, uncorrected)?;
                    let parameters = counter.parameters(site, plain)?;
                    let fused = counter.saved_by_fusing(site, plain)?;
                    for cache_level in 0..caches.len().max(1) {
                        let cache = caches.get(cache_level).copied();
                        let of_cache = counter.cache_of(site, width, cache);
                        items.push(Item {
                            treatment: Treatment { cache, ..plain },
                            bytes: weight_bytes.zip(of_cache).map(|(w, c)| w + c),
                            cache: of_cache.unwrap_or(0),
                            weights,
                            parameters,
                            seconds: 0.0,
                            format: at,
                            level,
                            fused,
                            cache_level,
                        });
                    }
                }
            }
        }
        let dense = Treatment {
            cache: caches.first().copied(),
            ..maker.dense(site)
        };
        let dense = items.iter().position(|item| item.treatment == dense);
        Ok(Self {
            site,
            items,
            dense: dense.expect("the whole width as it is stored is a treatment"),
            levels: widths.len(),
            formats: formats.len(),
            caches,
        })
    }

    /// Place of the cache that keeps every token in 16 bits, where that can be chosen; else of the model's.
    pub(crate) fn usual_cache(&self) -> usize {
        let usual = |cache: &Cache| cache.share == 1.0 && cache.format == CacheFormat::F16;
        self.caches.iter().position(usual).unwrap_or(0)
    }

    /// Whether an item is one that all sites take or none; such are measured as whole plans.
    pub(crate) fn is_mix(&self, item: &Item) -> bool {
        item.format >= self.formats
    }

    /// Place of a treatment.
    pub(crate) fn position(&self, treatment: Treatment) -> Option<usize> {
        self.items
            .iter()
            .position(|item| item.treatment == treatment)
    }
}

/// Which of the formats, from most bits to fewest, take exactly the bytes of one with more bits: types that fall back to the
/// same blocks where rows are no whole blocks. What takes more may still lose less, as smaller groups do.
fn take_as_much_as_more_bits(sizes: &[Option<u64>]) -> Vec<bool> {
    let before = |(at, size): (usize, &Option<u64>)| size.is_some() && sizes[..at].contains(size);
    sizes.iter().enumerate().map(before).collect()
}

/// Numbers of units that may stay, ascending, the whole number last.
fn widths(maker: &Maker<'_>, options: &Options, site: Site) -> Result<Vec<usize>> {
    let mut widths = match (site, maker.ranking(site)) {
        (Site::Experts(layer), _) => maker.expert_widths(layer, &options.widths)?,
        (Site::Attention(_), _) if options.target.keeps_heads(maker.decoder) => Vec::new(),
        (_, Some(ranking)) => widths_of(ranking, options),
        (_, None) => Vec::new(),
    };
    widths.push(maker.units(site));
    widths.sort_unstable();
    widths.dedup();
    Ok(widths)
}

/// Numbers of units at the shares of the options.
fn widths_of(ranking: &Ranking, options: &Options) -> Vec<usize> {
    let steps = ranking.steps().len();
    let of = |share: &f64| {
        let kept = (share * steps as f64).round() as usize;
        ranking.units_in(kept.clamp(ranking.protected.max(1), steps))
    };
    options.widths.iter().map(of).collect()
}

/// The menus of all sites, as what candidates choose from.
pub(crate) struct Choices<'a> {
    maker: &'a Maker<'a>,
    menus: &'a [Menu],
    /// What caches have in common, and the tokens of a window.
    caching: (Option<Caching>, usize),
    places: Vec<Place>,
    /// The matrix that was decoded last: candidates with one embedding follow each other.
    matrix: Mutex<Option<((usize, usize), Tensor)>>,
}

impl<'a> Choices<'a> {
    pub(crate) fn new(
        maker: &'a Maker<'a>,
        menus: &'a [Menu],
        caching: (Option<Caching>, usize),
    ) -> Self {
        Self {
            maker,
            menus,
            caching,
            places: menus.iter().map(|menu| menu.site.place()).collect(),
            matrix: Mutex::new(None),
        }
    }
}

impl Sites for Choices<'_> {
    fn places(&self) -> &[Place] {
        &self.places
    }

    fn half(&self, block: &Block, site: usize, choice: usize) -> prune_structured::Result<Half> {
        let menu = &self.menus[site];
        let treatment = menu.items[choice].treatment;
        let mut half = self.maker.half(block, menu.site, treatment)?;
        if let (Half::Attention(half), Some(cache)) = (&mut half, treatment.cache)
            && let Some(attention) = half.body.as_mut().and_then(TokenMixer::attention_mut)
            && let (Some(caching), len) = self.caching
        {
            attention.cache = caching.within(cache, len).map(Arc::new);
        }
        Ok(half)
    }

    fn holds_experts(&self, site: usize) -> bool {
        matches!(self.menus[site].site, Site::Experts(_))
    }

    fn expert(
        &self,
        layer: usize,
        site: usize,
        choice: usize,
        expert: usize,
    ) -> prune_structured::Result<Mlp> {
        let treatment = self.menus[site].items[choice].treatment;
        Ok(self.maker.expert(layer, treatment, expert)?)
    }

    fn matrix(&self, site: usize, choice: usize) -> prune_structured::Result<Option<Tensor>> {
        let menu = &self.menus[site];
        let mut kept = match self.matrix.lock() {
            Ok(kept) => kept,
            Err(poisoned) => poisoned.into_inner(),
        };
        if let Some((key, matrix)) = &*kept
            && *key == (site, choice)
        {
            return Ok(Some(matrix.clone()));
        }
        let stored = self.maker.matrix(menu.site, menu.items[choice].treatment)?;
        let Some(stored) = stored else {
            return Ok(None);
        };
        let matrix = stored.matrix().map_err(crate::Error::from)?;
        let dtype = self.maker.decoder.dtype();
        let matrix = crate::matrix::to_tensor(matrix.as_ref(), dtype)?;
        *kept = Some(((site, choice), matrix.clone()));
        Ok(Some(matrix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_that_take_as_much_as_one_with_more_bits_are_found() {
        let sizes = [
            Some(64),
            Some(34),
            Some(34),
            None,
            Some(20),
            Some(22),
            Some(18),
            Some(18),
        ];
        let expected = [false, false, true, false, false, false, false, true];
        assert_eq!(take_as_much_as_more_bits(&sizes), expected);
    }
}
