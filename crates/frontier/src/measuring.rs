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

    pub(crate) fn measure_curves(&mut self, progress: &dyn Progress) -> Result<()> {
        let axes: Vec<Vec<usize>> = self.menus.iter().map(curves::axes).collect();
        let combinations: Vec<Vec<usize>> = self.menus.iter().map(curves::combinations).collect();
        let all: usize = combinations.iter().map(Vec::len).sum();
        let wanted = (all as f64 * self.options.sample).ceil() as usize;
        let wanted = match self.options.sample > 0.0 {
            true => wanted.max(FEWEST_CHECKED).min(all),
            false => 0,
        };
        let places: Vec<(usize, usize)> = (0..self.menus.len())
            .flat_map(|site| combinations[site].iter().map(move |&item| (site, item)))
            .collect();
        let mut rng = ChaCha8Rng::seed_from_u64(self.options.seed);
        let mut drawn = index::sample(&mut rng, all, wanted).into_vec();
        drawn.sort_unstable();
        let drawn: Vec<(usize, usize)> = drawn.into_iter().map(|i| places[i]).collect();
        let on_axes: Vec<(usize, usize)> = (0..self.menus.len())
            .flat_map(|site| axes[site].iter().map(move |&item| (site, item)))
            .collect();
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
            let plain = |&(site, item): &(usize, usize)| {
                self.menus[site].items[item].treatment.rank == 0
                    && !self.distortions[site].is_measured(item)
            };
            let more: Vec<(usize, usize)> = places.iter().copied().filter(plain).collect();
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

    /// Says what measuring will take before it begins.
    fn state_cost(&self, items: &[(usize, usize)], progress: &dyn Progress) {
        let tokens = self.windows(self.options.coarse_tokens) * self.window_len();
        let of = |&(site, item): &(usize, usize)| {
            passes(
                self.decoder,
                &self.menus,
                &self.with(&self.dense, site, item),
                &self.dense,
            )
        };
        let passes: f64 = items.iter().map(of).sum();
        progress.message(&format!(
            "{} treatments: {passes:.0} passes of {tokens} tokens",
            items.len()
        ));
    }

    /// Divergences with one site treated and all others dense.
    fn measure_alone(
        &mut self,
        items: &[(usize, usize)],
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
