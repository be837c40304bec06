//! What each treatment of a site does to the model: measured along the axes, combined in between.
//!
//! With all other sites as they are, a site is measured at each width with its weights as stored, and in each format with
//! each rank at the widest width that the format fits. A combination is predicted by
//! `d(w, f, r) = d(w) + κ(w) / κ(a) · (d(a, f, r) − d(a))`, with a the width of the axis and κ the share of the site's
//! output energy that stays. A cache adds κ(w) times what it does with the weights as they are, where fewer tokens and fewer
//! bits add up. A draw of the combinations is measured to see whether that ranks them rightly; where it does
//! not, all formats are measured at all widths.

use crate::cache::CacheFormat;
use crate::menu::{Item, Menu, Price};
use crate::site::Site;
use crate::treatment::Treatment;
use serde::{Deserialize, Serialize};

/// Spearman's correlation below which combinations are measured instead of predicted.
pub(crate) const RELIABLE: f64 = 0.9;
/// What a treatment other than the dense one costs at least, so that the dense one is never replaced.
const LEAST: f64 = 1e-12;

/// A treatment of a site, with what it takes and what it does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// What is done.
    pub treatment: Treatment,
    /// Bytes of weights, and of the cache where it counts.
    pub bytes: u64,
    /// KL divergence of the model with this site alone treated, in nats per token.
    pub distortion: f64,
    /// Whether that was measured, not predicted.
    pub measured: bool,
}

/// The treatments of a site that are worth their bytes: more bytes, less distortion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// The site.
    pub site: Site,
    /// From few bytes to many.
    pub points: Vec<Point>,
}

/// How well combinations are predicted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Combined treatments that were measured for it.
    pub sampled: usize,
    /// Spearman's correlation of predicted and measured divergences.
    pub rho: f64,
    /// Median of predicted over measured.
    pub ratio: f64,
    /// Whether all formats were measured at all widths after it.
    pub widened: bool,
}

/// Where an item is in a menu: its width, format, rank and cache.
type Address = (usize, usize, usize, usize);

/// Divergences of the items of a menu.
#[derive(Clone, Debug)]
pub(crate) struct Distortions {
    measured: Vec<Option<f64>>,
    /// κ of each width.
    shares: Vec<f64>,
}

impl Distortions {
    pub(crate) fn new(menu: &Menu, shares: Vec<f64>) -> Self {
        let mut measured = vec![None; menu.items.len()];
        measured[menu.dense] = Some(0.0);
        Self { measured, shares }
    }

    /// Before anything is measured: as if no treatment did anything.
    pub(crate) fn unknown(menu: &Menu) -> Self {
        let chosen_from = |item: &Item| (!menu.is_mix(item)).then_some(0.0);
        Self {
            measured: menu.items.iter().map(chosen_from).collect(),
            shares: vec![1.0; menu.levels],
        }
    }

    pub(crate) fn set(&mut self, item: usize, value: f64) {
        self.measured[item] = Some(value.max(LEAST));
    }

    pub(crate) fn is_measured(&self, item: usize) -> bool {
        self.measured[item].is_some()
    }

    /// Measured where it was, predicted elsewhere; infinite for what no axis reaches.
    pub(crate) fn of(&self, menu: &Menu, item: usize) -> f64 {
        self.measured[item].unwrap_or_else(|| self.predicted(menu, item))
    }

    /// What the combination rule says.
    pub(crate) fn predicted(&self, menu: &Menu, item: usize) -> f64 {
        let wanted = menu.items[item];
        if wanted.cache_level > 0 {
            let (level, format, rank, _) = address(menu, item);
            let weights = find(menu, (level, format, rank, 0));
            let weights = weights.map_or(f64::INFINITY, |weights| self.of(menu, weights));
            let cache = self.of_cache(menu, wanted.cache_level);
            return (weights + self.shares[level] * cache).max(LEAST);
        }
        let at = |level, format, rank| -> Option<f64> {
            let found = find(menu, (level, format, rank, 0))?;
            self.measured[found]
        };
        // What stays as it is has no error to correct.
        let rank = match wanted.format {
            0 => 0,
            _ => wanted.treatment.rank,
        };
        let value = || -> Option<f64> {
            let base = at(wanted.level, 0, 0)?;
            if wanted.format == 0 {
                return Some(base);
            }
            let axis = axis(menu, wanted.format)?;
            let axis_base = at(axis, 0, 0)?;
            let corrected = (at(axis, wanted.format, rank)? - axis_base).max(0.0);
            // A format that was measured at this width tells more than one at another width.
            if let Some(here) = at(wanted.level, wanted.format, 0).filter(|_| rank > 0) {
                let plain = (at(axis, wanted.format, 0)? - axis_base).max(0.0);
                let left = if plain > 0.0 { corrected / plain } else { 1.0 };
                return Some(base + (here - base).max(0.0) * left);
            }
            let share = self.shares[wanted.level] / self.shares[axis].max(f64::MIN_POSITIVE);
            Some(base + share * corrected)
        };
        value().map_or(f64::INFINITY, |value| value.max(LEAST))
    }

    /// Of a cache with the weights as they are: measured, or the sum of what fewer tokens and the format do.
    fn of_cache(&self, menu: &Menu, level: usize) -> f64 {
        let at = |level: usize| -> Option<f64> {
            self.measured[find(menu, (menu.levels - 1, 0, 0, level))?]
        };
        if let Some(found) = at(level) {
            return found;
        }
        let wanted = menu.caches[level];
        let place = |share: f64, format: CacheFormat| {
            let mut caches = menu.caches.iter();
            caches.position(|cache| (cache.share, cache.format) == (share, format))
        };
        let fewer = place(wanted.share, CacheFormat::Stored).and_then(at);
        let stored = place(1.0, wanted.format).and_then(at);
        fewer.zip(stored).map_or(f64::INFINITY, |(a, b)| a + b)
    }

    /// The treatments worth their bytes among those that `allowed` says, as places in the menu, from few bytes to many.
    /// What parameters and seconds count as is in `price`.
    pub(crate) fn envelope(
        &self,
        menu: &Menu,
        price: Price,
        allowed: &dyn Fn(usize) -> bool,
    ) -> Vec<usize> {
        let cost = |item: usize| self.of(menu, item) + price.of(&menu.items[item]);
        let mut all: Vec<(u64, f64, usize)> = (0..menu.items.len())
            .filter(|&item| allowed(item))
            .filter_map(|item| Some((menu.items[item].bytes?, cost(item), item)))
            .filter(|(_, distortion, _)| distortion.is_finite())
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)));
        let mut kept: Vec<(f64, usize)> = Vec::new();
        for (_, distortion, item) in all {
            if kept.last().is_none_or(|(best, _)| distortion < *best) {
                kept.push((distortion, item));
            }
        }
        kept.into_iter().map(|(_, item)| item).collect()
    }

    /// The curve of a site.
    pub(crate) fn curve(&self, menu: &Menu) -> Curve {
        let point = |item: usize| Point {
            treatment: menu.items[item].treatment,
            bytes: menu.items[item].bytes.unwrap_or(0),
            distortion: self.of(menu, item),
            measured: self.is_measured(item),
        };
        Curve {
            site: menu.site,
            points: self
                .envelope(menu, Price::default(), &|_| true)
                .into_iter()
                .map(point)
                .collect(),
        }
    }
}

fn address(menu: &Menu, item: usize) -> Address {
    let item = &menu.items[item];
    (
        item.level,
        item.format,
        item.treatment.rank,
        item.cache_level,
    )
}

/// Place of an item by its width, format, rank and cache.
pub(crate) fn find(menu: &Menu, wanted: Address) -> Option<usize> {
    (0..menu.items.len()).find(|&item| address(menu, item) == wanted)
}

/// The widest width at which a format can be stored.
fn axis(menu: &Menu, format: usize) -> Option<usize> {
    let fits = |level: &usize| {
        let item = find(menu, (*level, format, 0, 0)).map(|item| menu.items[item]);
        item.is_some_and(|item| item.bytes.is_some())
    };
    (0..menu.levels).rev().find(fits)
}

/// Whether an item has the model's weights.
fn has_dense_weights(menu: &Menu, item: usize) -> bool {
    let (level, format, rank, _) = address(menu, item);
    (level, format, rank) == (menu.levels - 1, 0, 0)
}

/// The items that are measured: each width as stored, each format and rank at its widest width, and with the model's weights
/// each number of cached tokens as stored and each format of all of them.
pub(crate) fn axes(menu: &Menu) -> Vec<usize> {
    let on_axis = |item: &usize| {
        let of = menu.items[*item];
        if of.cache_level > 0 {
            let cache = menu.caches[of.cache_level];
            let on_axis = cache.share == 1.0 || cache.format == CacheFormat::Stored;
            return on_axis && has_dense_weights(menu, *item) && of.bytes.is_some();
        }
        match of.format {
            0 => of.treatment.rank == 0,
            format => !menu.is_mix(&of) && axis(menu, format) == Some(of.level),
        }
    };
    (0..menu.items.len())
        .filter(|&item| item != menu.dense)
        .filter(on_axis)
        .collect()
}

/// The combinations: what can be stored and is on no axis. Treated weights with a treated cache are not among them, as these
/// two add up as those of two sites do; neither are weights as they are with a rank, which corrects nothing.
pub(crate) fn combinations(menu: &Menu) -> Vec<usize> {
    let axes = axes(menu);
    let either =
        |item: &usize| menu.items[*item].cache_level == 0 || has_dense_weights(menu, *item);
    (0..menu.items.len())
        .filter(|item| *item != menu.dense && menu.items[*item].bytes.is_some())
        .filter(either)
        .filter(|&item| menu.items[item].format > 0 || menu.items[item].treatment.rank == 0)
        .filter(|&item| !menu.is_mix(&menu.items[item]))
        .filter(|item| !axes.contains(item))
        .collect()
}

/// Spearman's rank correlation; 1 for fewer than two pairs.
pub fn spearman(a: &[f64], b: &[f64]) -> f64 {
    if a.len() < 2 {
        return 1.0;
    }
    let (a, b) = (ranks(a), ranks(b));
    let mean = (a.len() as f64 - 1.0) / 2.0;
    let (mut both, mut of_a, mut of_b) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(&b) {
        both += (x - mean) * (y - mean);
        of_a += (x - mean).powi(2);
        of_b += (y - mean).powi(2);
    }
    match of_a * of_b > 0.0 {
        true => both / (of_a * of_b).sqrt(),
        // All values of one side are equal.
        false => 0.0,
    }
}

/// Places in ascending order, equal values sharing the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    while first < order.len() {
        let equal = order[first..].iter();
        let count = equal
            .take_while(|&&i| values[i] == values[order[first]])
            .count();
        for &i in &order[first..first + count] {
            ranks[i] = first as f64 + (count as f64 - 1.0) / 2.0;
        }
        first += count;
    }
    ranks
}

/// The middle value; of an even number the mean of the two in the middle, 1 of none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 1.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Cache;
    use crate::treatment::Format;

    /// Two widths and three formats, the last with a correction; the second format does not fit the whole width.
    fn menu() -> Menu {
        let mut items = Vec::new();
        for (level, width) in [4, 8].into_iter().enumerate() {
            for (format, name) in ["stored", "q8_0", "q4_0"].into_iter().enumerate() {
                for rank in [0, 2] {
                    if rank > 0 && format < 2 {
                        continue;
                    }
                    let bytes = (width * [16, 8, 4][format] + 4 * rank) as u64;
                    items.push(Item {
                        treatment: Treatment {
                            width,
                            format: name.parse::<Format>().unwrap(),
                            rank,
                            cache: None,
                        },
                        bytes: (level == 0 || format != 1).then_some(bytes),
                        cache: 0,
                        weights: 0,
                        parameters: 0,
                        seconds: 0.0,
                        format,
                        level,
                        fused: 0,
                        cache_level: 0,
                    });
                }
            }
        }
        Menu {
            site: Site::Mlp(0),
            dense: 4,
            items,
            levels: 2,
            formats: 3,
            caches: Vec::new(),
        }
    }

    fn measured(menu: &Menu, values: &[((usize, usize, usize), f64)]) -> Distortions {
        let mut distortions = Distortions::new(menu, vec![0.5, 1.0]);
        for &((level, format, rank), value) in values {
            distortions.set(find(menu, (level, format, rank, 0)).unwrap(), value);
        }
        distortions
    }

    const AXES: [((usize, usize, usize), f64); 4] = [
        ((0, 0, 0), 2.0),
        ((0, 1, 0), 2.25),
        ((1, 2, 0), 1.0),
        ((1, 2, 2), 0.5),
    ];

    #[test]
    fn axes_are_each_width_as_stored_and_each_format_where_it_fits_at_its_widest() {
        let menu = menu();
        let named = |items: Vec<usize>| -> Vec<(usize, usize, usize)> {
            let of = |i: usize| menu.items[i];
            let name = |i| (of(i).level, of(i).format, of(i).treatment.rank);
            items.into_iter().map(name).collect()
        };
        assert_eq!(named(axes(&menu)), AXES.map(|(name, _)| name));
        assert_eq!(named(combinations(&menu)), [(0, 2, 0), (0, 2, 2)]);
    }

    #[test]
    fn combinations_add_the_share_of_the_energy_that_stays() {
        let menu = menu();
        let distortions = measured(&menu, &AXES);
        let of = |level, format, rank| {
            distortions.of(&menu, find(&menu, (level, format, rank, 0)).unwrap())
        };
        // Half of the energy stays: 2 + ½ · 1 and 2 + ½ · ½.
        assert_eq!((of(0, 2, 0), of(0, 2, 2)), (2.5, 2.25));
        assert_eq!((of(0, 1, 0), of(1, 0, 0)), (2.25, 0.0));
        // Once a format is measured at a width, corrections there keep the share of its loss that they leave.
        let widened = measured(&menu, &[&AXES[..], &[((0, 2, 0), 3.0)]].concat());
        assert_eq!(widened.of(&menu, find(&menu, (0, 2, 2, 0)).unwrap()), 2.5);
    }

    /// The same with the caches of two shares in two formats.
    fn with_caches() -> Menu {
        let plain = menu();
        let mut caches = Vec::new();
        for share in [1.0, 0.5] {
            for format in [CacheFormat::Stored, CacheFormat::Int8] {
                let tokens = (share * 100.0) as usize;
                caches.push(Cache {
                    share,
                    tokens,
                    format,
                });
            }
        }
        let with = |item: &Item| -> Vec<Item> {
            let with = |(cache_level, cache): (usize, &Cache)| {
                let bytes = 10 * (4 - cache_level as u64);
                Item {
                    treatment: Treatment {
                        cache: Some(*cache),
                        ..item.treatment
                    },
                    bytes: item.bytes.map(|weights| weights + bytes),
                    cache: bytes,
                    cache_level,
                    ..*item
                }
            };
            caches.iter().enumerate().map(with).collect()
        };
        Menu {
            items: plain.items.iter().flat_map(with).collect(),
            dense: 4 * plain.dense,
            site: Site::Attention(0),
            caches,
            ..plain
        }
    }

    #[test]
    fn caches_are_measured_with_the_weights_as_they_are_and_add_to_what_is_done_to_them() {
        let menu = with_caches();
        let addresses = |items: Vec<usize>| -> Vec<Address> {
            items.into_iter().map(|item| address(&menu, item)).collect()
        };
        let of_caches = addresses(axes(&menu)).into_iter().filter(|at| at.3 > 0);
        assert_eq!(of_caches.collect::<Vec<_>>(), [(1, 0, 0, 1), (1, 0, 0, 2)]);
        assert_eq!(
            addresses(combinations(&menu)),
            [(0, 2, 0, 0), (0, 2, 2, 0), (1, 0, 0, 3)]
        );
        let mut distortions = Distortions::new(&menu, vec![0.5, 1.0]);
        let values = [
            ((0, 0, 0, 0), 2.0),
            ((1, 0, 0, 1), 0.25),
            ((1, 0, 0, 2), 0.5),
        ];
        for (at, value) in values {
            distortions.set(find(&menu, at).unwrap(), value);
        }
        let of = |at: Address| distortions.of(&menu, find(&menu, at).unwrap());
        assert_eq!((of((1, 0, 0, 0)), of((1, 0, 0, 3))), (0.0, 0.75));
        // Half of the energy stays: 2 + ½ · ¼ and 2 + ½ · ¾.
        assert_eq!((of((0, 0, 0, 1)), of((0, 0, 0, 3))), (2.125, 2.375));
        assert!(of((1, 2, 0, 1)).is_infinite());
    }

    #[test]
    fn what_takes_more_bytes_and_does_more_harm_is_dropped_and_the_dense_treatment_never() {
        let menu = menu();
        let distortions = measured(&menu, &AXES);
        let curve = distortions.curve(&menu);
        let points: Vec<(u64, f64)> = curve
            .points
            .iter()
            .map(|p| (p.bytes, p.distortion))
            .collect();
        // The narrow half takes 16, 24, 32 and 64 bytes, the whole one 32, 40 and 128.
        assert_eq!(
            points,
            [(16, 2.5), (24, 2.25), (32, 1.0), (40, 0.5), (128, 0.0)]
        );
        assert!(curve.points.windows(2).all(|p| p[0].bytes < p[1].bytes));
        let lossless = measured(
            &menu,
            &[((0, 0, 0), 0.0), ((1, 2, 0), -1e-9), ((1, 2, 2), 0.0)],
        );
        let last = *lossless.curve(&menu).points.last().unwrap();
        assert_eq!((last.treatment.width, last.distortion), (8, 0.0));
    }

    #[test]
    fn the_rank_correlation_is_that_of_ranks_with_ties_shared() {
        assert_eq!(spearman(&[1.0, 2.0, 30.0], &[0.1, 5.0, 6.0]), 1.0);
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]), -1.0);
        // Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 / √(4.5 · 5).
        let tied = spearman(&[1.0, 2.0, 2.0, 4.0], &[1.0, 2.0, 3.0, 4.0]);
        assert!((tied - 4.5 / (4.5f64 * 5.0).sqrt()).abs() < 1e-12);
        assert_eq!(median(vec![3.0, 1.0, 2.0, 10.0]), 2.5);
    }
}
