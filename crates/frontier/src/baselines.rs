//! What a budget buys when it is spent along one axis: the plans to compare a joint one with.

use crate::divide::Choice;
use crate::driver::Frontier;
use crate::error::{Error, Result};
use crate::menu::{Item, Menu, Price};
use crate::plan::{Plan, Round};
use crate::site::Site;
use causal_lm::Progress;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Most candidates of a baseline that are measured, the best ones by the sum of their sites.
const MEASURED: usize = 4;
/// Most mixes of llama.cpp that are measured, the largest that fit.
const MIXES: usize = 2;
/// The share of the blocks at either end that a mix gives more bits.
const ENDS: usize = 8;

/// A way to spend a budget that treats all sites alike, or divides one axis only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Baseline {
    /// Every site in one format.
    UniformFormat,
    /// Every half at one share of its units, in one format.
    UniformWidth,
    /// One format, and the next better one for the first and the last eighth of the blocks and the embedding.
    Mix,
    /// One of the mixes of block types that llama.cpp's quantiser offers, which give more bits to values, down projections and
    /// the first and the last blocks, with codes by GPTQ.
    KQuantMix,
    /// Widths alone, divided by measured curves (rd-dp); weights as the model stores them.
    Widths,
    /// Formats alone, divided by measured curves.
    Bits,
    /// One format, and ranks divided by measured curves.
    Ranks,
    /// Caches alone, divided by measured curves; weights as the model stores them.
    Caches,
}

impl Baseline {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::UniformFormat,
        Self::UniformWidth,
        Self::Mix,
        Self::KQuantMix,
        Self::Widths,
        Self::Bits,
        Self::Ranks,
        Self::Caches,
    ];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::UniformFormat => "one format",
            Self::UniformWidth => "one width, one format",
            Self::Mix => "mix of two formats",
            Self::KQuantMix => "k-quant mix",
            Self::Widths => "widths alone",
            Self::Bits => "bits alone",
            Self::Ranks => "ranks alone",
            Self::Caches => "caches alone",
        }
    }
}

impl fmt::Display for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Frontier<'_> {
    /// The best plan of a baseline for a budget, measured; `None` where none fits.
    ///
    /// # Errors
    /// [`Error::Cancelled`], and what making and measuring report.
    pub fn baseline(
        &mut self,
        baseline: Baseline,
        budget: u64,
        progress: &dyn Progress,
    ) -> Result<Option<Plan>> {
        let candidates = self.candidates(baseline, budget)?;
        if candidates.is_empty() {
            return Ok(None);
        }
        let items: Vec<Vec<usize>> = candidates.into_iter().map(|c| c.items).collect();
        let measured = self.measure_plans(&items, progress)?;
        let best = (0..items.len()).min_by(|&a, &b| measured[a].mean.total_cmp(&measured[b].mean));
        Ok(best.map(|best| {
            let (items, measured) = (&items[best], measured[best]);
            let round = Round {
                predicted: self.predicted_of(items),
                measured,
                kept: true,
            };
            self.to_plan(budget, items, measured, vec![round])
        }))
    }

    /// What other ways to spend a budget offer beside the joint division: the best choice along each axis by the sum of its
    /// sites, and the mixes of block types, whose sites have no sum.
    pub(crate) fn alternatives(&self, budget: u64) -> Result<Vec<Choice>> {
        let mut found = Vec::new();
        for baseline in [
            Baseline::Bits,
            Baseline::Ranks,
            Baseline::Widths,
            Baseline::Caches,
        ] {
            found.extend(self.candidates(baseline, budget)?.into_iter().next());
        }
        found.extend(self.candidates(Baseline::KQuantMix, budget)?);
        Ok(found)
    }

    /// The choices of a baseline that fit a budget, the best by the sum of their sites first.
    fn candidates(&self, baseline: Baseline, budget: u64) -> Result<Vec<Choice>> {
        let formats = self.options.formats()?.len();
        // Caches are kept whole in 16 bits where they are not what is divided.
        let usual_caches: Vec<(Site, usize)> = self
            .menus
            .iter()
            .map(|menu| (menu.site, menu.usual_cache()))
            .collect();
        let usual = |site: Site, item: &Item| usual_caches.contains(&(site, item.cache_level));
        let mut candidates = match baseline {
            Baseline::UniformFormat => {
                let of = |format| self.uniform(|_, menu| (menu.levels - 1, format));
                (0..formats).filter_map(of).collect()
            }
            Baseline::UniformWidth => {
                let levels = self.menus.iter().filter(|menu| menu.site.half().is_some());
                let levels = levels.map(|menu| menu.levels).min().unwrap_or(1);
                let pairs = (0..levels).flat_map(|below| (0..formats).map(move |f| (below, f)));
                let of = |(below, format): (usize, usize)| {
                    self.uniform(|_, menu| match menu.site.half() {
                        Some(_) => (menu.levels - 1 - below, format),
                        None => (menu.levels - 1, format),
                    })
                };
                pairs.filter_map(of).collect()
            }
            Baseline::Mix => {
                let layers = self.decoder.config().layers();
                let end = layers.div_ceil(ENDS);
                let of = |format: usize| {
                    self.uniform(|_, menu| {
                        let inner = menu.site.half().is_some_and(|(layer, _)| {
                            (end..layers.saturating_sub(end)).contains(&layer)
                        });
                        let better = format.saturating_sub(1);
                        (menu.levels - 1, if inner { format } else { better })
                    })
                };
                (0..formats).filter_map(of).collect()
            }
            Baseline::KQuantMix => {
                let mixes = self.mixes(budget)?.into_iter();
                mixes.map(|items| self.only(items)).collect()
            }
            Baseline::Widths => {
                let stored = |site: Site, item: &Item| {
                    item.format == 0 && item.treatment.rank == 0 && usual(site, item)
                };
                self.divided(budget, &stored)?.into_iter().collect()
            }
            Baseline::Bits => {
                let tops: Vec<(Site, usize)> = self.tops();
                let whole = |site: Site, item: &Item| {
                    let top = tops.contains(&(site, item.level));
                    item.treatment.rank == 0 && top && usual(site, item)
                };
                self.divided(budget, &whole)?.into_iter().collect()
            }
            Baseline::Ranks => {
                let tops: Vec<(Site, usize)> = self.tops();
                let mut candidates = Vec::new();
                for format in 1..formats {
                    let ranks = |site: Site, item: &Item| {
                        let top = tops.contains(&(site, item.level));
                        item.format == format && top && usual(site, item)
                    };
                    candidates.extend(self.divided(budget, &ranks)?);
                }
                candidates
            }
            Baseline::Caches if self.menus.iter().all(|menu| menu.caches.len() < 2) => vec![],
            Baseline::Caches => {
                let tops: Vec<(Site, usize)> = self.tops();
                let dense = |site: Site, item: &Item| {
                    let top = tops.contains(&(site, item.level));
                    item.format == 0 && item.treatment.rank == 0 && top
                };
                self.divided(budget, &dense)?.into_iter().collect()
            }
        };
        candidates.retain(|choice: &Choice| {
            self.bytes(&choice.items).is_some_and(|b| b <= budget) && self.meets(&choice.items)
        });
        candidates.sort_by(|a, b| a.predicted.total_cmp(&b.predicted));
        candidates.dedup_by(|a, b| a.items == b.items);
        candidates.truncate(MEASURED);
        Ok(candidates)
    }

    /// The mixes of block types that a budget allows.
    fn mixes(&self, budget: u64) -> Result<Vec<Vec<usize>>> {
        let formats = self.options.formats()?.len();
        let mixes = self.options.target.mixes(self.decoder).len();
        let of = |mix: usize| self.everywhere(formats + mix);
        let fits = |items: &Vec<usize>| {
            self.bytes(items).is_some_and(|bytes| bytes <= budget) && self.meets(items)
        };
        // Their sites are not measured by themselves; the largest are the best as a rule.
        let mut mixes: Vec<Vec<usize>> = (0..mixes).filter_map(of).filter(fits).collect();
        mixes.sort_by_key(|items| std::cmp::Reverse(self.bytes_of(items)));
        mixes.truncate(MIXES);
        Ok(mixes)
    }

    /// The widest place of each site.
    fn tops(&self) -> Vec<(Site, usize)> {
        self.menus
            .iter()
            .map(|menu| (menu.site, menu.levels - 1))
            .collect()
    }

    /// A choice by width and format for each site, in the next better format where one cannot be stored; `None` where
    /// none can.
    fn uniform(&self, wanted: impl Fn(usize, &Menu) -> (usize, usize)) -> Option<Choice> {
        let of = |(i, menu): (usize, &Menu)| {
            let (level, format) = wanted(i, menu);
            (0..=format).rev().find_map(|format| {
                let wanted = (level, format, 0, menu.usual_cache());
                let found = crate::curves::find(menu, wanted)?;
                menu.items[found].bytes.map(|_| found)
            })
        };
        let items: Option<Vec<usize>> = self.menus.iter().enumerate().map(of).collect();
        items.map(|items| self.only(items))
    }

    /// A choice beside which there is no other.
    fn only(&self, items: Vec<usize>) -> Choice {
        Choice {
            predicted: self.sum(&items),
            envelopes: items.iter().map(|&item| vec![item]).collect(),
            price: Price::default(),
            items,
        }
    }

    /// A choice of one format at the whole width for each site; `None` where one cannot be stored.
    fn everywhere(&self, format: usize) -> Option<Vec<usize>> {
        let of = |menu: &Menu| {
            let wanted = (menu.levels - 1, format, 0, menu.usual_cache());
            let found = crate::curves::find(menu, wanted)?;
            menu.items[found].bytes.map(|_| found)
        };
        self.menus.iter().map(of).collect()
    }

    /// The best choice under a restriction; `None` where none fits.
    fn divided(
        &self,
        budget: u64,
        allowed: &dyn Fn(Site, &Item) -> bool,
    ) -> Result<Option<Choice>> {
        match self.choose(budget, allowed) {
            Ok(choice) => Ok(Some(choice)),
            Err(Error::Budget { .. } | Error::Speed { .. } | Error::Parameters { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// `None` where a treatment cannot be stored.
    fn bytes(&self, items: &[usize]) -> Option<u64> {
        let mut chosen = self.menus.iter().zip(items);
        let stored = chosen.all(|(menu, &item)| menu.items[item].bytes.is_some());
        stored.then(|| self.bytes_of(items))
    }

    /// Sum of the divergences of single sites, where all were measured.
    pub(crate) fn predicted_of(&self, items: &[usize]) -> Option<f64> {
        Some(self.sum(items)).filter(|sum| sum.is_finite())
    }

    /// Sum of the divergences of single sites; infinite with one that was not measured.
    pub(crate) fn sum(&self, items: &[usize]) -> f64 {
        let of = |site: usize| self.distortions[site].of(&self.menus[site], items[site]);
        (0..items.len()).map(of).sum()
    }
}
