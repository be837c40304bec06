//! Measuring a model and dividing budgets over it.

use crate::bytes::Counter;
use crate::curves::{Check, Curve, Distortions};
use crate::divide::{Division, Rules};
use crate::error::{Error, Result};
use crate::make::Maker;
use crate::measure::{Divergence, Measurer};
use crate::menu::{Item, Menu, Price};
use crate::options::Options;
use crate::plan::{Plan, Round, SitePlan};
use crate::site::Site;
use crate::target::Target;
use crate::treatment::Format;
use causal_lm::{Decoder, Progress, Windows};
use prune_structured::divergence::{Teacher, TopK};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use tensor_io::{ContentHash, Hasher};

/// Layout of the folder of a run; folders of another one are not read.
const VERSION: u64 = 4;

/// The windows that a division reads; evaluation should see others.
#[derive(Clone, Copy, Debug)]
pub struct Data<'a> {
    /// Those that pruning, quantising and correcting are fitted to.
    pub calibration: &'a Windows,
    /// Those on which models are compared with the dense one.
    pub comparison: &'a Windows,
}

/// A measured model: budgets can be divided over it.
pub struct Frontier<'a> {
    pub(crate) decoder: &'a Decoder<'a>,
    pub(crate) options: Options,
    pub(crate) maker: Maker<'a>,
    pub(crate) menus: Vec<Menu>,
    pub(crate) distortions: Vec<Distortions>,
    /// Bytes that no treatment changes.
    pub(crate) fixed: u64,
    /// Bytes of a copy of the embedding as head, which the dense model alone keeps.
    copy: u64,
    caches_in_16_bits: u64,
    /// Seconds of a decoded token that no treatment changes; 0 where speed is free.
    pub(crate) fixed_seconds: f64,
    /// Parameters that no treatment changes.
    pub(crate) fixed_parameters: u64,
    /// The dense treatment of each site.
    pub(crate) dense: Vec<usize>,
    pub(crate) measurer: Measurer<'a>,
    pub(crate) comparison: Windows,
    pub(crate) check: Check,
}

/// About how many whole plans are measured for a budget besides those of rounds.
const TRIED: f64 = 5.0;

/// A calibrated model of which nothing is measured yet.
pub struct Prepared<'a> {
    frontier: Frontier<'a>,
    dir: PathBuf,
}

impl<'a> Prepared<'a> {
    /// Measures what each treatment of each site does.
    ///
    /// # Errors
    /// As [`Frontier::measure`].
    pub fn measure(self, progress: &dyn Progress) -> Result<Frontier<'a>> {
        let Self { mut frontier, dir } = self;
        if frontier.options.tokens_per_second.is_some() {
            frontier.measure_seconds(&dir, progress)?;
        }
        frontier.measure_curves(progress)?;
        Ok(frontier)
    }

    /// The least budget that a plan fits.
    pub fn smallest(&self) -> Option<u64> {
        self.frontier.smallest()
    }

    /// Tokens that [`measure`](Self::measure) passes through the whole model; candidates that share their first blocks count in part.
    pub fn tokens_of_curves(&self) -> f64 {
        self.frontier.tokens_of_curves()
    }

    /// About how many tokens more a plan takes: a round moves each site up and down, and whole plans are tried.
    pub fn tokens_of_plan(&self) -> f64 {
        let rounds = self.frontier.options.rounds.min(1) as f64;
        let sites = self.frontier.menus.len() as f64;
        let (coarse, fine) = self.frontier.tokens();
        rounds * sites * coarse as f64 + TRIED * fine as f64
    }

    /// Bytes of the dense model, and of its cache where it counts.
    pub fn dense_bytes(&self) -> u64 {
        self.frontier.dense_bytes()
    }

    /// Bytes of the dense model's keys and values, where the cache counts.
    pub fn dense_cache_bytes(&self) -> u64 {
        self.frontier.dense_cache_bytes()
    }

    /// Bytes of the whole model's caches with every token in 16 bits, where they count.
    pub fn caches_in_16_bits(&self) -> u64 {
        self.frontier.caches_in_16_bits()
    }
}

impl<'a> Frontier<'a> {
    /// Measures what each treatment of each site does. `dir` keeps what is made and measured: another call with the same
    /// model and windows goes on where one was stopped, and finds what it shares with other options.
    ///
    /// # Errors
    /// [`Error::Option`] for options out of range and windows that are in both sets, [`Error::Experts`] for mixtures that the
    /// target cannot store, causal-lm's error for those whose router rows share experts, [`Error::Cancelled`], and what running the
    /// model and writing files report.
    pub fn measure(
        decoder: &'a Decoder<'a>,
        data: Data<'a>,
        options: Options,
        dir: impl AsRef<Path>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        Self::prepare(decoder, data, options, dir, progress)?.measure(progress)
    }

    /// The first part of [`measure`](Self::measure): calibration, and what there is to choose from with its bytes. It takes a
    /// small part of the time, and says which budgets can be met.
    ///
    /// # Errors
    /// As for `measure`.
    pub fn prepare(
        decoder: &'a Decoder<'a>,
        data: Data<'a>,
        options: Options,
        dir: impl AsRef<Path>,
        progress: &dyn Progress,
    ) -> Result<Prepared<'a>> {
        options.check()?;
        options.check_shares(data.comparison.window_len())?;
        options.target.check_model(decoder)?;
        disjoint(data)?;
        let sites = Site::of(decoder);
        let ranks = options.ranks(decoder.config().hidden);
        let largest_rank = ranks.last().copied().unwrap_or(0);
        let hash = decoder.checkpoint().content_hash()?;
        let dir = folder(
            (decoder, hash),
            data,
            (options.top_k, largest_rank),
            dir.as_ref(),
        )?;
        let calibration = data.calibration;
        let drawn = (options.seed, largest_rank);
        let maker = Maker::new(decoder, calibration, drawn, &dir, progress)?;
        let tokens = options.coarse_tokens.max(options.fine_tokens);
        let count = tokens.div_ceil(data.comparison.window_len());
        let comparison = data.comparison.first(count);
        let place = (&dir, hash);
        let top_k = TopK::with_rest(options.top_k);
        let teacher = Teacher::new(decoder, &comparison, top_k, place, progress)?;
        let (menus, fixed, copy, caches_in_16_bits) = {
            let counter = Counter::new(&maker, options.target, &sites, options.caching(), &dir)?;
            let menu = |&site: &Site| Menu::new(&maker, &counter, &options, site);
            let menus = sites.iter().map(menu).collect::<Result<Vec<Menu>>>()?;
            let caches = counter.caches_in_16_bits(&sites);
            (menus, counter.fixed, counter.copy()?, caches)
        };
        let measurer = Measurer::new(
            decoder,
            comparison.clone(),
            teacher,
            options.memory,
            dir.join("divergences.json"),
        )?;
        let unknown = menus.iter().map(Distortions::unknown).collect();
        let of_sites: u64 = menus.iter().map(|m| m.items[m.dense].parameters).sum();
        let frontier = Self {
            decoder,
            options,
            dense: menus.iter().map(|menu| menu.dense).collect(),
            distortions: unknown,
            fixed_parameters: parameters(decoder).saturating_sub(of_sites),
            maker,
            menus,
            fixed,
            copy,
            caches_in_16_bits,
            fixed_seconds: 0.0,
            measurer,
            comparison,
            check: Check {
                sampled: 0,
                rho: 1.0,
                ratio: 1.0,
                widened: false,
            },
        };
        frontier.check_parameters()?;
        Ok(Prepared { frontier, dir })
    }

    /// Refuses a number of parameters that not even the narrowest sites have.
    fn check_parameters(&self) -> Result<()> {
        let Some(wanted) = self.options.max_parameters else {
            return Ok(());
        };
        let fewest = |menu: &Menu| {
            let stored = menu.items.iter().filter(|item| item.bytes.is_some());
            stored.map(|item| item.parameters).min().unwrap_or(0)
        };
        let fewest = self.fixed_parameters + self.menus.iter().map(fewest).sum::<u64>();
        match wanted < fewest {
            true => Err(Error::Parameters { wanted, fewest }),
            false => Ok(()),
        }
    }

    /// Tokens of the windows on which models are compared.
    pub fn window_len(&self) -> usize {
        self.comparison.window_len()
    }

    pub(crate) fn windows(&self, tokens: usize) -> usize {
        self.measurer.windows_for(tokens)
    }

    /// A choice with another item at one site.
    pub(crate) fn with(&self, choice: &[usize], site: usize, item: usize) -> Vec<usize> {
        let mut choice = choice.to_vec();
        choice[site] = item;
        choice
    }

    /// What each treatment is worth, by site.
    pub fn curves(&self) -> Vec<Curve> {
        let curve = |(menu, of): (&Menu, &Distortions)| of.curve(menu);
        self.menus
            .iter()
            .zip(&self.distortions)
            .map(curve)
            .collect()
    }

    /// How well combined treatments were predicted.
    pub fn check(&self) -> Check {
        self.check
    }

    /// Passes of the whole model over the windows of comparison in this run.
    pub fn passes(&self) -> f64 {
        self.measurer.passes
    }

    /// Tokens that curves and plans are measured on.
    pub fn tokens(&self) -> (usize, usize) {
        let len = self.window_len();
        let Options {
            coarse_tokens,
            fine_tokens,
            ..
        } = self.options;
        (
            self.windows(coarse_tokens) * len,
            self.windows(fine_tokens) * len,
        )
    }

    /// The options of the run.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Bytes of the dense model, and of its cache where it counts.
    pub fn dense_bytes(&self) -> u64 {
        self.bytes_of(&self.dense) + self.copy
    }

    /// Bytes of the dense model's files of weights.
    pub(crate) fn dense_weight_bytes(&self) -> u64 {
        self.dense_bytes() - self.dense_cache_bytes()
    }

    /// Bytes of the dense model's keys and values, where the cache counts.
    pub fn dense_cache_bytes(&self) -> u64 {
        let of = self.menus.iter().map(|menu| menu.items[menu.dense].cache);
        of.sum()
    }

    /// Bytes of the whole model's caches with every token in 16 bits, where they count.
    pub fn caches_in_16_bits(&self) -> u64 {
        self.caches_in_16_bits
    }

    /// The least budget that a plan fits.
    pub fn smallest(&self) -> Option<u64> {
        self.divide(self.dense_bytes(), Price::default(), &|_, _| true)
            .smallest()
    }

    pub(crate) fn bytes_of(&self, items: &[usize]) -> u64 {
        let chosen = || {
            self.menus
                .iter()
                .zip(items)
                .map(|(menu, &i)| (menu, menu.items[i]))
        };
        let bytes: u64 = chosen().map(|(_, item)| item.bytes.unwrap_or(0)).sum();
        // Experts stay in tensors that hold all of a block as long as none is quantised.
        let quantised = |(menu, item): (&Menu, Item)| {
            matches!(menu.site, Site::Experts(_)) && item.treatment.format != Format::Stored
        };
        let fused = match chosen().any(quantised) {
            true => 0,
            false => chosen().map(|(_, item)| item.fused).sum(),
        };
        self.fixed + bytes - fused
    }

    pub(crate) fn divide(
        &self,
        largest: u64,
        price: Price,
        allowed: &dyn Fn(Site, &Item) -> bool,
    ) -> Division {
        let rules = Rules {
            equal_widths: self.options.target.needs_equal_widths(self.decoder),
            equal_ranks: self.options.target.needs_equal_ranks(),
            allowed,
            price,
        };
        Division::new(
            &self.menus,
            &self.distortions,
            (self.fixed, largest),
            &rules,
        )
    }

    /// The unit in bytes in which the division counts up to the dense model's, where bytes would be too many states: each site's are
    /// rounded up to it, so that a plan leaves at most so much unspent for every site.
    pub fn unit(&self) -> u64 {
        let dense = self.dense_bytes();
        self.divide(dense, Price::default(), &|_, _| true).unit()
    }

    /// The predicted divergences that budgets up to the dense model's buy, by one dynamic programme: bytes and nats per
    /// token, of `points` budgets.
    pub fn predicted(&self, points: usize) -> Vec<(u64, f64)> {
        let dense = self.dense_bytes();
        let division = self.divide(dense, Price::default(), &|_, _| true);
        let Some(smallest) = division.smallest() else {
            return Vec::new();
        };
        let budget = |i: usize| {
            let share = i as f64 / (points.max(2) - 1) as f64;
            smallest + (dense.saturating_sub(smallest) as f64 * share) as u64
        };
        let mut found: Vec<(u64, f64)> = (0..points)
            .filter_map(|i| division.at(budget(i)))
            .map(|choice| (self.bytes_of(&choice.items), choice.predicted))
            .collect();
        found.dedup();
        found
    }

    pub(crate) fn to_plan(
        &self,
        budget: u64,
        items: &[usize],
        measured: Divergence,
        rounds: Vec<Round>,
    ) -> Plan {
        let mut cache_bytes = 0;
        let site = |(menu, &item): (&Menu, &usize)| {
            let item = menu.items[item];
            let units = self.maker.units(menu.site);
            cache_bytes += item.cache;
            let bytes = item.bytes.unwrap_or(0) - item.cache;
            SitePlan {
                site: menu.site,
                treatment: item.treatment,
                share: item.treatment.width as f64 / units as f64,
                bytes,
                cache_bytes: item.cache,
                parameters: item.weights,
                bits: 8.0 * bytes as f64 / item.weights.max(1) as f64,
            }
        };
        let sites: Vec<SitePlan> = self.menus.iter().zip(items).map(site).collect();
        let caching = self
            .options
            .caching()
            .filter(|_| self.options.target == Target::Here);
        let layers = self.decoder.config().layers();
        let mut plan = Plan {
            cache: caching.map(|caching| caching.of_plan(layers, &sites)),
            target: self.options.target,
            budget,
            weight_bytes: self.bytes_of(items) - cache_bytes,
            parameters: self.parameters_of(items),
            cache_bytes,
            predicted: self.predicted_of(items),
            measured,
            rounds,
            sites,
            seconds: self
                .options
                .tokens_per_second
                .map(|_| self.seconds_of(items)),
        };
        if plan.is_dense() && plan.bytes() + self.copy <= budget {
            plan.weight_bytes += self.copy;
        }
        plan
    }

    /// Divergence of another decoder, such as one that was written and opened again, on the windows of plans. A plan's caches
    /// are those of the decoder, by [`Decoder::decoding`] with [`Plan::cache_within`].
    ///
    /// # Errors
    /// What running it reports.
    pub fn divergence(&self, decoder: &Decoder<'_>, progress: &dyn Progress) -> Result<Divergence> {
        let windows: Vec<usize> = (0..self.windows(self.options.fine_tokens)).collect();
        let teacher = &self.measurer.teacher;
        let found = teacher.divergence(decoder, &self.comparison, &windows, progress)?;
        Ok(Divergence::of(&found))
    }
}

/// Parameters of a model; a copy of the embedding as head is none.
fn parameters(decoder: &Decoder<'_>) -> u64 {
    let (checkpoint, config) = (decoder.checkpoint(), decoder.config());
    let head = config.names.head();
    let copy = match config.tied && checkpoint.contains(head) {
        true => checkpoint
            .info(head)
            .map_or(0, |info| info.elements() as u64),
        false => 0,
    };
    checkpoint.parameters().saturating_sub(copy)
}

/// No window may be in both sets.
fn disjoint(data: Data<'_>) -> Result<()> {
    let fitted: HashSet<&[u32]> = data.calibration.iter().collect();
    match data
        .comparison
        .iter()
        .position(|window| fitted.contains(window))
    {
        None => Ok(()),
        Some(window) => Err(Error::Option {
            option: "comparison windows",
            value: format!("window {window} of calibration text"),
            expected: "what is compared on must not be what was fitted to",
        }),
    }
}

/// The folder of everything that depends on this model and these windows.
fn folder(
    (decoder, hash): (&Decoder<'_>, ContentHash),
    data: Data<'_>,
    (top_k, largest_rank): (usize, usize),
    dir: &Path,
) -> Result<PathBuf> {
    let mut hasher = Hasher::new();
    hasher.part(&VERSION.to_le_bytes());
    hasher.part(hash.as_bytes());
    hasher.part(decoder.dtype().as_str().as_bytes());
    // The same weights compute something else with another base of rotations, or another epsilon.
    hasher.part(format!("{:?}", decoder.config()).as_bytes());
    hasher.part(&(top_k as u64).to_le_bytes());
    hasher.part(&(largest_rank as u64).to_le_bytes());
    for windows in [data.calibration, data.comparison] {
        hasher.part(&(windows.window_len() as u64).to_le_bytes());
        for window in windows.iter() {
            hasher.tokens(window);
        }
    }
    let name: String = hasher.finish().to_string().chars().take(16).collect();
    let dir = dir.join(name);
    std::fs::create_dir_all(&dir).map_err(tensor_io::Error::io("create", &dir))?;
    Ok(dir)
}
