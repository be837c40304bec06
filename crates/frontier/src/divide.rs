//! Dividing a budget: one treatment for each site, the least sum of divergences, never more bytes than the budget.
//!
//! The dynamic programme is [`Knapsack`], which solves for all budgets at once. Where all blocks must have the same widths
//! or all linears the same rank, each combination of these is divided by itself and the best one counts.

use crate::curves::Distortions;
use crate::menu::{Item, Menu, Price};
use crate::site::Site;
use prune_structured::rate_distortion::{Knapsack, Point};

/// What restricts a division.
pub(crate) struct Rules<'r> {
    /// All attention halves at one width, and all MLPs.
    pub(crate) equal_widths: bool,
    /// One rank for all linears.
    pub(crate) equal_ranks: bool,
    /// What a site may get besides.
    pub(crate) allowed: &'r dyn Fn(Site, &Item) -> bool,
    /// What parameters and seconds count as.
    pub(crate) price: Price,
}

/// The divisions of every budget up to a largest one.
pub(crate) struct Division {
    classes: Vec<Class>,
    /// Bytes that no treatment changes.
    fixed: u64,
    /// The least budget of the classes, those beyond the largest budget among them.
    smallest: Option<u64>,
    /// What parameters and seconds count as.
    price: Price,
}

/// A division within which widths and ranks are as the rules have it.
struct Class {
    /// For each site the places in its menu that are worth their bytes, from few bytes to many.
    envelopes: Vec<Vec<usize>>,
    distortions: Vec<Vec<f64>>,
    /// What their parameters and seconds count as.
    prices: Vec<Vec<f64>>,
    knapsack: Knapsack,
}

/// A choice for every site.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Choice {
    /// Places in the menus.
    pub(crate) items: Vec<usize>,
    /// Sum of divergences.
    pub(crate) predicted: f64,
    /// What the sites could have got instead under the same rules, from few bytes to many.
    pub(crate) envelopes: Vec<Vec<usize>>,
    /// What parameters and seconds counted as.
    pub(crate) price: Price,
}

impl Division {
    /// Divides `largest` bytes and all below.
    pub(crate) fn new(
        menus: &[Menu],
        distortions: &[Distortions],
        (fixed, largest): (u64, u64),
        rules: &Rules<'_>,
    ) -> Self {
        let mut division = Self {
            classes: Vec::new(),
            fixed,
            smallest: None,
            price: rules.price,
        };
        for (attention, mlp) in widths(menus, rules.equal_widths) {
            for rank in ranks(menus, rules.equal_ranks) {
                let allowed = |menu: &Menu, item: &Item| {
                    let level = match menu.site {
                        Site::Attention(_) => attention,
                        Site::Mlp(_) | Site::Experts(_) => mlp,
                        _ => None,
                    };
                    let is_matrix = menu.site.half().is_none();
                    level.is_none_or(|level| item.level == level)
                        && (is_matrix || rank.is_none_or(|rank| item.treatment.rank == rank))
                        && (rules.allowed)(menu.site, item)
                };
                division.add(menus, distortions, (largest, rules.price), &allowed);
            }
        }
        division
    }

    fn add(
        &mut self,
        menus: &[Menu],
        distortions: &[Distortions],
        (largest, price): (u64, Price),
        allowed: &dyn Fn(&Menu, &Item) -> bool,
    ) {
        let envelopes: Vec<Vec<usize>> = menus
            .iter()
            .zip(distortions)
            .map(|(menu, of)| of.envelope(menu, price, &|item| allowed(menu, &menu.items[item])))
            .collect();
        if envelopes.iter().any(Vec::is_empty) {
            return;
        }
        let curve = |((menu, of), envelope): ((&Menu, &Distortions), &Vec<usize>)| -> Vec<Point> {
            let point = |&item: &usize| Point {
                cost: menu.items[item].bytes.unwrap_or(0),
                distortion: of.of(menu, item) + price.of(&menu.items[item]),
            };
            envelope.iter().map(point).collect()
        };
        let curves: Vec<Vec<Point>> = menus
            .iter()
            .zip(distortions)
            .zip(&envelopes)
            .map(curve)
            .collect();
        let cheapest: u64 = curves.iter().map(|curve| curve[0].cost).sum();
        let smallest = self.fixed + cheapest;
        self.smallest = Some(self.smallest.map_or(smallest, |least| least.min(smallest)));
        let Some(knapsack) = Knapsack::new(&curves, largest.saturating_sub(self.fixed)) else {
            return;
        };
        let values = |((menu, of), envelope): ((&Menu, &Distortions), &Vec<usize>)| {
            envelope.iter().map(|&item| of.of(menu, item)).collect()
        };
        let values = menus.iter().zip(distortions).zip(&envelopes).map(values);
        let prices = |(menu, envelope): (&Menu, &Vec<usize>)| {
            let of = |&item: &usize| price.of(&menu.items[item]);
            envelope.iter().map(of).collect()
        };
        self.classes.push(Class {
            distortions: values.collect(),
            prices: menus.iter().zip(&envelopes).map(prices).collect(),
            envelopes,
            knapsack,
        });
    }

    /// The best choice for a budget; `None` below the smallest.
    pub(crate) fn at(&self, budget: u64) -> Option<Choice> {
        let spare = budget.checked_sub(self.fixed)?;
        let of_class = |class: &Class| -> Option<(f64, Choice)> {
            let taken = class.knapsack.at(spare)?;
            let sum = |of: &[Vec<f64>]| -> f64 { taken.iter().zip(of).map(|(&i, d)| d[i]).sum() };
            let predicted = sum(&class.distortions);
            let items = taken.iter().zip(&class.envelopes).map(|(&i, e)| e[i]);
            let choice = Choice {
                items: items.collect(),
                predicted,
                envelopes: class.envelopes.clone(),
                price: self.price,
            };
            Some((predicted + sum(&class.prices), choice))
        };
        let choices = self.classes.iter().filter_map(of_class);
        let best = choices.min_by(|a, b| a.0.total_cmp(&b.0));
        best.map(|(_, choice)| choice)
    }

    /// The largest unit in which costs are counted, in bytes.
    pub(crate) fn unit(&self) -> u64 {
        let units = self
            .classes
            .iter()
            .map(|class| class.knapsack.rounding() + 1);
        units.max().unwrap_or(1)
    }

    /// The least budget that any choice fits; `None` where the rules leave a site without a treatment.
    pub(crate) fn smallest(&self) -> Option<u64> {
        self.smallest
    }
}

/// Pairs of widths, or no restriction.
fn widths(menus: &[Menu], equal: bool) -> Vec<(Option<usize>, Option<usize>)> {
    if !equal {
        return vec![(None, None)];
    }
    let levels = |attention: bool| {
        let of = menus.iter().filter(|menu| match menu.site {
            Site::Attention(_) => attention,
            Site::Mlp(_) | Site::Experts(_) => !attention,
            _ => false,
        });
        of.map(|menu| menu.levels).min().unwrap_or(1)
    };
    let mlp = levels(false);
    (0..levels(true))
        .flat_map(|a| (0..mlp).map(move |m| (Some(a), Some(m))))
        .collect()
}

/// Ranks that all linears may have, or no restriction.
fn ranks(menus: &[Menu], equal: bool) -> Vec<Option<usize>> {
    if !equal {
        return vec![None];
    }
    let items = menus.iter().flat_map(|menu| &menu.items);
    let mut ranks: Vec<Option<usize>> = items.map(|item| Some(item.treatment.rank)).collect();
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::treatment::{Format, Treatment};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Up to six sites with up to six treatments, at random; the last treatment is the dense one.
    fn instance(rng: &mut ChaCha8Rng) -> (Vec<Menu>, Vec<Distortions>) {
        let sites = rng.random_range(1..=6);
        let site = |layer| -> (Menu, Distortions) {
            let count = rng.random_range(1..=6);
            let items: Vec<Item> = (0..count)
                .map(|level| Item {
                    treatment: Treatment {
                        width: level,
                        format: Format::Stored,
                        rank: 0,
                        cache: None,
                    },
                    bytes: Some(rng.random_range(1..400)),
                    cache: 0,
                    weights: 0,
                    parameters: 0,
                    seconds: 0.0,
                    format: 0,
                    level,
                    fused: 0,
                    cache_level: 0,
                })
                .collect();
            let menu = Menu {
                site: Site::Mlp(layer),
                dense: count - 1,
                items,
                levels: count,
                formats: 1,
                caches: Vec::new(),
            };
            let mut distortions = Distortions::new(&menu, vec![1.0; count]);
            for item in 0..count - 1 {
                distortions.set(item, rng.random_range(0.0..3.0));
            }
            (menu, distortions)
        };
        (0..sites).map(site).unzip()
    }

    /// The least sum of divergences within a budget over all choices.
    fn brute_force(menus: &[Menu], distortions: &[Distortions], budget: u64) -> Option<f64> {
        let (Some((menu, menus)), Some((of, distortions))) =
            (menus.split_first(), distortions.split_first())
        else {
            return Some(0.0);
        };
        (0..menu.items.len())
            .filter_map(|item| {
                let left = budget.checked_sub(menu.items[item].bytes?)?;
                Some(of.of(menu, item) + brute_force(menus, distortions, left)?)
            })
            .min_by(f64::total_cmp)
    }

    fn rules(equal_widths: bool) -> Rules<'static> {
        Rules {
            equal_widths,
            equal_ranks: false,
            allowed: &|_, _| true,
            price: Price::default(),
        }
    }

    fn bytes(menus: &[Menu], items: &[usize]) -> u64 {
        let of = menus.iter().zip(items);
        of.map(|(menu, &item)| menu.items[item].bytes.unwrap())
            .sum()
    }

    #[test]
    fn a_thousand_random_budgets_are_divided_as_by_trying_every_choice() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut below = 0;
        for _ in 0..1000 {
            let (menus, distortions) = instance(&mut rng);
            let least = |menu: &Menu| menu.items.iter().filter_map(|item| item.bytes).min();
            let cheapest: u64 = menus.iter().filter_map(least).sum();
            let most: u64 = menus
                .iter()
                .flat_map(|menu| &menu.items)
                .filter_map(|i| i.bytes)
                .sum();
            let fixed = rng.random_range(0..1000);
            // One programme serves every budget of the run.
            let division =
                Division::new(&menus, &distortions, (fixed, fixed + most), &rules(false));
            assert_eq!(division.smallest(), Some(fixed + cheapest));
            let drawn = rng.random_range(0..=most);
            for budget in [cheapest, most, drawn, cheapest.saturating_sub(1)] {
                let best = brute_force(&menus, &distortions, budget);
                let found = division.at(fixed + budget);
                match (found, best) {
                    (None, None) => below += 1,
                    (Some(choice), Some(best)) => {
                        assert!(bytes(&menus, &choice.items) <= budget);
                        assert!((choice.predicted - best).abs() < 1e-9, "{choice:?} {best}");
                        let sum: f64 = (0..menus.len())
                            .map(|i| distortions[i].of(&menus[i], choice.items[i]))
                            .sum();
                        assert!((sum - best).abs() < 1e-9);
                    }
                    (found, best) => panic!("{found:?} against {best:?} at {budget}"),
                }
            }
        }
        assert!(below >= 1000);
    }

    #[test]
    fn priced_seconds_are_divided_as_by_trying_every_choice_and_get_fewer_as_they_get_dearer() {
        let mut rng = ChaCha8Rng::seed_from_u64(13);
        for _ in 0..200 {
            let (mut menus, distortions) = instance(&mut rng);
            for item in menus.iter_mut().flat_map(|menu| &mut menu.items) {
                item.seconds = rng.random_range(0.0..1.0);
            }
            let budget = rng.random_range(400..2400);
            let seconds = |items: &[usize]| -> f64 {
                let of = menus.iter().zip(items);
                of.map(|(menu, &item)| menu.items[item].seconds).sum()
            };
            let mut last = f64::INFINITY;
            for second in [0.0, 0.3, 1.0, 5.0, 1e3] {
                let price = Price {
                    second,
                    ..Price::default()
                };
                let rules = Rules {
                    price,
                    ..rules(false)
                };
                let division = Division::new(&menus, &distortions, (0, budget), &rules);
                let Some(found) = division.at(budget) else {
                    break;
                };
                // Priced distortions as the brute force sees them.
                let priced: Vec<Distortions> = menus
                    .iter()
                    .zip(&distortions)
                    .map(|(menu, of)| {
                        let mut priced = of.clone();
                        for item in 0..menu.items.len() {
                            priced.set(item, of.of(menu, item) + price.of(&menu.items[item]));
                        }
                        priced
                    })
                    .collect();
                let best = brute_force(&menus, &priced, budget).unwrap();
                let sum = found.predicted + second * seconds(&found.items);
                assert!((sum - best).abs() < 1e-6 * best.max(1.0), "{sum} {best}");
                assert!(seconds(&found.items) <= last + 1e-9);
                last = seconds(&found.items);
            }
        }
    }

    #[test]
    fn equal_widths_are_equal_and_the_best_of_them_all() {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        for _ in 0..200 {
            let (menus, distortions) = instance(&mut rng);
            let most = 6 * 400;
            let division = Division::new(&menus, &distortions, (0, most), &rules(true));
            let budget = rng.random_range(0..most);
            let levels = menus.iter().map(|menu| menu.levels).min().unwrap();
            let of_level = |level: usize| -> Option<f64> {
                let items = vec![level; menus.len()];
                let sum = (0..menus.len())
                    .map(|i| distortions[i].of(&menus[i], level))
                    .sum();
                (bytes(&menus, &items) <= budget).then_some(sum)
            };
            let best = (0..levels).filter_map(of_level).min_by(f64::total_cmp);
            let found = division.at(budget);
            assert_eq!(found.is_some(), best.is_some());
            if let (Some(found), Some(best)) = (found, best) {
                assert!(found.items.iter().all(|item| *item == found.items[0]));
                assert!((found.predicted - best).abs() < 1e-9);
            }
        }
    }
}
