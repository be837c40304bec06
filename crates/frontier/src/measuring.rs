//! What is measured of a model: seconds of treatments, curves of single sites with a check of their combinations, plans.

use crate::curves::{self, Check, Distortions, RELIABLE, median, spearman};
use crate::driver::Frontier;
use crate::error::Result;
use crate::measure::{Divergence, passes};
use crate::menu::{Choices, Menu};
use crate::timing::Timer;
use crate::treatment::Treatment;
use causal_lm::Progress;
use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Fewest combinations that are measured to check their prediction, where there are as many.
const FEWEST_CHECKED: usize = 8;

/// A site and an item of its menu, by their numbers.
type Treated = (usize, usize);

impl Frontier<'_> {
    /// Fills in what each treatment takes for a decoded token.
    pub(crate) fn measure_seconds(&mut self, dir: &Path, progress: &dyn Progress) -> Result<()> {
        let mut timer = Timer::new(&self.maker, dir)?;
        progress.begin("seconds of treatments", self.menus.len() as u64);
        for menu in &mut self.menus {
            for item in &mut menu.items {
                if item.bytes.is_some() {
                    item.seconds = timer.seconds(menu.site, item.treatment)?;
                }
            }
            progress.advance(1)?;
        }
        timer.save()?;
        let dense = self.menus.iter().map(|menu| menu.items[menu.dense].seconds);
        self.fixed_seconds = timer.rest(&self.comparison, dense.sum(), progress)?;
        timer.save()
    }

    /// Sites with the items of their menus that `of` chooses.
    fn sites_with(&self, of: impl Fn(&Menu) -> Vec<usize>) -> Vec<Treated> {
        let sites = self.menus.iter().enumerate();
        let with = |(site, menu)| of(menu).into_iter().map(move |item| (site, item));
        sites.flat_map(with).collect()
    }

    /// Sites with the treatments along one axis that are measured, and with the combinations that are drawn to check predictions.
    fn to_measure(&self) -> (Vec<Treated>, Vec<Treated>) {
        let places = self.sites_with(curves::combinations);
        let all = places.len();
        let wanted = (all as f64 * self.options.sample).ceil() as usize;
        let wanted = match self.options.sample > 0.0 {
            true => wanted.max(FEWEST_CHECKED).min(all),
            false => 0,
        };
        let mut rng = ChaCha8Rng::seed_from_u64(self.options.seed);
        let mut drawn = index::sample(&mut rng, all, wanted).into_vec();
        drawn.sort_unstable();
        let drawn = drawn.into_iter().map(|i| places[i]).collect();
        (self.sites_with(curves::axes), drawn)
    }

    /// Tokens that measuring curves passes through the model, in part where candidates share their first blocks.
    pub(crate) fn tokens_of_curves(&self) -> f64 {
        let (on_axes, drawn) = self.to_measure();
        let passes = self.passes_of(&[on_axes, drawn].concat());
        passes * self.coarse_tokens() as f64
    }

    /// Tokens on which single sites are measured.
    pub(crate) fn coarse_tokens(&self) -> usize {
        self.windows(self.options.coarse_tokens) * self.window_len()
    }

    pub(crate) fn measure_curves(&mut self, progress: &dyn Progress) -> Result<()> {
        let (on_axes, drawn) = self.to_measure();
        let mut shares = Vec::with_capacity(self.menus.len());
        progress.begin("energy of widths", self.menus.len() as u64);
        for menu in &self.menus {
            let mut of_menu = vec![1.0; menu.levels];
            for item in &menu.items {
                let plain = item.format == 0 && item.treatment.rank == 0;
                if plain && item.cache_level == 0 {
                    let width = item.treatment.width;
                    of_menu[item.level] = self.maker.energy_share(menu.site, width)?;
                }
            }
            shares.push(of_menu);
            progress.advance(1)?;
        }
        let new = |(menu, shares): (&Menu, Vec<f64>)| Distortions::new(menu, shares);
        self.distortions = self.menus.iter().zip(shares).map(new).collect();

        let both = [&on_axes[..], &drawn[..]].concat();
        self.state_cost(&both, progress);
        let measured = self.measure_alone(&both, progress)?;
        let (of_axes, of_drawn) = measured.split_at(on_axes.len());
        for (&(site, item), kl) in on_axes.iter().zip(of_axes) {
            self.distortions[site].set(item, kl.mean);
        }
        let predicted: Vec<f64> = drawn
            .iter()
            .map(|&(site, item)| self.distortions[site].predicted(&self.menus[site], item))
            .collect();
        let of_drawn: Vec<f64> = of_drawn.iter().map(|kl| kl.mean).collect();
        let ratio = predicted
            .iter()
            .zip(&of_drawn)
            .map(|(p, m)| p / m.max(1e-12));
        self.check = Check {
            sampled: drawn.len(),
            rho: spearman(&predicted, &of_drawn),
            ratio: median(ratio.collect()),
            widened: false,
        };
        for (&(site, item), &kl) in drawn.iter().zip(&of_drawn) {
            self.distortions[site].set(item, kl);
        }
        if self.check.rho < RELIABLE {
            self.check.widened = true;
            let plain = |&(site, item): &Treated| {
                self.menus[site].items[item].treatment.rank == 0
                    && !self.distortions[site].is_measured(item)
            };
            let mut more = self.sites_with(curves::combinations);
            more.retain(plain);
            progress
                .message("combinations are badly predicted: measuring all formats at all widths");
            self.state_cost(&more, progress);
            let measured = self.measure_alone(&more, progress)?;
            for ((site, item), kl) in more.into_iter().zip(measured) {
                self.distortions[site].set(item, kl.mean);
            }
        }
        Ok(())
    }

    /// Passes of the model that single sites take with these items.
    fn passes_of(&self, items: &[Treated]) -> f64 {
        let of = |&(site, item): &Treated| {
            passes(
                self.decoder,
                &self.menus,
                &self.with(&self.dense, site, item),
                &self.dense,
            )
        };
        items.iter().map(of).sum()
    }

    /// Says what measuring will take before it begins.
    fn state_cost(&self, items: &[Treated], progress: &dyn Progress) {
        let passes = self.passes_of(items);
        progress.message(&format!(
            "{} treatments: {passes:.0} passes of {} tokens",
            items.len(),
            self.coarse_tokens()
        ));
    }

    /// Divergences with one site treated and all others dense.
    fn measure_alone(
        &mut self,
        items: &[Treated],
        progress: &dyn Progress,
    ) -> Result<Vec<Divergence>> {
        let candidates: Vec<Vec<usize>> = items
            .iter()
            .map(|&(site, item)| self.with(&self.dense, site, item))
            .collect();
        let (base, tokens) = (self.dense.clone(), self.options.coarse_tokens);
        self.divergences("measuring curves", &candidates, &base, tokens, progress)
    }

    /// Divergences of choices, made where they are not made yet.
    pub(crate) fn divergences(
        &mut self,
        stage: &str,
        candidates: &[Vec<usize>],
        base: &[usize],
        tokens: usize,
        progress: &dyn Progress,
    ) -> Result<Vec<Divergence>> {
        let mut treated: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for (site, &item) in candidates.iter().flat_map(|c| c.iter().enumerate()) {
            treated.entry(site).or_default().insert(item);
        }
        let count: usize = treated.values().map(BTreeSet::len).sum();
        progress.begin("making treatments", count as u64);
        for (site, items) in treated {
            let menu = &self.menus[site];
            let treatments = items.into_iter().map(|item| menu.items[item].treatment);
            let treatments: Vec<Treatment> = treatments.collect();
            self.maker.make_all(menu.site, &treatments, progress)?;
        }
        progress.begin(stage, candidates.len() as u64);
        let count = self.windows(tokens);
        let caching = (self.options.caching(), self.window_len());
        let choices = Choices::new(&self.maker, &self.menus, caching);
        let of = (&choices, self.menus.as_slice());
        self.measurer.of(of, (candidates, base), count, progress)
    }

    /// Divergences of whole plans, on many tokens.
    pub(crate) fn measure_plans(
        &mut self,
        plans: &[Vec<usize>],
        progress: &dyn Progress,
    ) -> Result<Vec<Divergence>> {
        let (base, tokens) = (self.dense.clone(), self.options.fine_tokens);
        self.divergences("measuring plans", plans, &base, tokens, progress)
    }
}
