//! Plans that need more than statistics: searched widths, and curves measured on whole models.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use causal_lm::{Decoder, Windows};
use prune_structured::rate_distortion::{self, Measure};
use prune_structured::tyr::{self, Data, Found, Options, Run, Start};
use prune_structured::{Allocation, Calibration, Plan, Ranking, Recipe};
use serde::{Deserialize, Serialize};

use crate::bar::Bar;

/// Windows that the candidates of a search are compared on.
pub const SEARCHED: usize = 256;
/// Windows that curves are measured on. A divergence has far less noise than a loss: eight windows place the widths of the
/// bundled model as well as 256 do, and those of a model of 7 million parameters as well as 16.
pub const MEASURED: usize = 8;

/// How searches and measured curves are run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Sizes of the search; its seed is the first of several.
    pub options: Options,
    /// Windows that whole models are compared on; by default [`SEARCHED`], or [`MEASURED`] where only curves need them.
    pub samples: Option<usize>,
    /// The method whose widths a search starts from; the same share of every sublayer without one, as in the paper.
    pub start: Option<Recipe>,
    /// Folder that keeps the state of searches.
    pub resume: Option<PathBuf>,
    /// Whether rd-dp adds up measured divergences of the whole model.
    pub measured: bool,
}

impl Config {
    /// The defaults, with this seed.
    pub fn new(seed: u64) -> Self {
        let mut options = Options::default();
        options.seed = seed;
        Self {
            options,
            samples: None,
            start: None,
            resume: None,
            measured: true,
        }
    }

    /// How curves are measured.
    pub(super) fn measure(&self) -> Measure {
        let mut options = Measure::default();
        options.top_k = self.options.top_k;
        options
    }

    /// How many windows whole models are compared on for these methods.
    pub(crate) fn compared(&self, recipes: &[Recipe]) -> usize {
        let by_default = if recipes.iter().any(searches) {
            SEARCHED
        } else {
            MEASURED
        };
        self.samples.unwrap_or(by_default)
    }

    /// Whether any of these methods compares whole models.
    pub(super) fn compares(&self, recipes: &[Recipe]) -> bool {
        let compares = |recipe| searches(recipe) || self.measures_for(recipe).is_some();
        recipes.iter().any(compares)
    }

    /// The method that a search by this recipe starts from, for the same units and compensation.
    pub(super) fn start_of(&self, recipe: &Recipe) -> Option<Recipe> {
        let mut start = self.start.clone()?;
        start.shape = recipe.shape.clone();
        start.compensation = recipe.compensation;
        Some(start)
    }

    /// The method that measured curves are for: the recipe itself or the one that its search starts from.
    pub(super) fn measures_for(&self, recipe: &Recipe) -> Option<Recipe> {
        let allocates = match recipe.allocation {
            Allocation::Searched(_) => self.start_of(recipe)?,
            _ => recipe.clone(),
        };
        let by_curves = matches!(allocates.allocation, Allocation::RdDp(_));
        (by_curves && self.measured).then_some(allocates)
    }
}

/// Whether a method compares candidates of the whole model.
pub(crate) fn searches(recipe: &Recipe) -> bool {
    matches!(recipe.allocation, Allocation::Searched(_))
}

/// What plans are made from.
pub(super) struct Maker<'a> {
    pub(super) decoder: &'a Decoder<'a>,
    pub(super) config: &'a Config,
    /// Windows that `calibration` was collected on.
    pub(super) windows: &'a Windows,
    /// Windows that whole models are compared on.
    pub(super) search: &'a Windows,
    pub(super) calibration: &'a Calibration,
}

impl Maker<'_> {
    /// A plan without a search.
    pub(super) fn plan(
        &self,
        recipe: &Recipe,
        curves: Option<&Curves>,
        ratio: f64,
        bar: &Bar,
    ) -> Result<Plan> {
        Ok(match curves {
            Some(curves) => Plan::allocate(self.decoder, &curves.rankings, recipe, ratio)?,
            None => {
                let bar = bar.nested("planning", 0);
                Plan::make(self.decoder, self.calibration, recipe, ratio, &bar)?
            }
        })
    }

    /// Searches with one seed, in `dir`, from widths that `curves` give where they start it.
    pub(super) fn search(
        &self,
        recipe: &Recipe,
        curves: Option<&Curves>,
        (ratio, seed): (f64, u64),
        dir: &Path,
        bar: &Bar,
    ) -> Result<Found> {
        let mut options = self.config.options.clone();
        options.seed = seed;
        let data = Data {
            calibration: self.windows,
            search: self.search,
        };
        let plan;
        let start = match self.config.start_of(recipe) {
            None => Start::Uniform(ratio),
            Some(first) => {
                plan = self.plan(&first, curves, ratio, bar)?;
                Start::Plan(&plan)
            }
        };
        let bar = bar.nested(format!("search, seed {seed}"), 0);
        let run = Run {
            options: &options,
            dir,
        };
        Ok(tyr::search(self.decoder, &data, recipe, start, run, &bar)?)
    }

    /// Curves of the whole model's divergence, measured in `dir`, for any ratio.
    pub(super) fn curves(&self, recipe: &Recipe, dir: &Path, bar: &Bar) -> Result<Curves> {
        let start = Instant::now();
        let options = self.config.measure();
        let data = rate_distortion::Data {
            windows: self.search,
            dir,
            options,
        };
        let rankings = measured(self.decoder, self.calibration, recipe, data, bar)?;
        Ok(Curves {
            rankings,
            seconds: start.elapsed().as_secs_f64(),
        })
    }
}

/// The rankings of a method with measured curves, from which [`Plan::allocate`] makes plans of any ratio.
pub(crate) fn measured(
    decoder: &Decoder<'_>,
    calibration: &Calibration,
    recipe: &Recipe,
    data: rate_distortion::Data<'_>,
    bar: &Bar,
) -> Result<Vec<Ranking>> {
    let bar = bar.nested("measuring curves", 0);
    let (score, shape) = (recipe.score, &recipe.shape);
    let mut rankings = score.rank(decoder, calibration, shape, &bar)?;
    rate_distortion::measure(decoder, calibration, recipe, &mut rankings, data, &bar)?;
    bar.finish();
    Ok(rankings)
}

/// Measured curves of every sublayer, and the time they took.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Curves {
    pub(super) rankings: Vec<Ranking>,
    pub(super) seconds: f64,
}

impl Curves {
    /// Whether all numbers have a form in JSON.
    pub(super) fn is_finite(&self) -> bool {
        let finite = |ranking: &Ranking| {
            let scores = ranking.steps().iter().map(|step| step.score);
            let errors = ranking.errors.iter().flatten().copied();
            ranking.energy.is_finite() && scores.chain(errors).all(f64::is_finite)
        };
        self.rankings.iter().all(finite)
    }
}
