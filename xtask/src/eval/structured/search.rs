//! Plans that need more than statistics: searched widths, and curves measured on whole models.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use causal_lm::{Decoder, Windows};
use prune_structured::rate_distortion::{self, Measure};
use prune_structured::tyr::{self, Data, Found, Options, Start};
use prune_structured::{Allocation, Calibration, Compensation, Plan, Ranking, Recipe, Score};

use crate::progress::Progress;

/// How searches and measured curves are run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Sizes of the search; its seed is the first of several.
    pub options: Options,
    /// Windows that whole models are compared on.
    pub samples: usize,
    /// The method whose widths a search starts from; the same share of every sublayer without one, as in the paper.
    pub start: Option<Recipe>,
    /// Folder that keeps the state of searches.
    pub resume: Option<PathBuf>,
    /// Whether rd-dp adds up measured divergences of the whole model.
    pub measured: bool,
}

impl Config {
    /// The method that a search by this recipe starts from, for the same units and compensation.
    fn start_of(&self, recipe: &Recipe) -> Option<Recipe> {
        self.start.clone().map(|start| Recipe {
            shape: recipe.shape.clone(),
            compensation: recipe.compensation,
            ..start
        })
    }

    /// The method that measured curves are for: the recipe itself or the one that its search starts from.
    pub(super) fn measures_for(&self, recipe: &Recipe) -> Option<Recipe> {
        let allocates = match recipe.allocation {
            Allocation::Searched => self.start_of(recipe)?,
            _ => recipe.clone(),
        };
        let by_curves = matches!(allocates.allocation, Allocation::RdDp { .. });
        (by_curves && self.measured).then_some(allocates)
    }
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
    ) -> Result<Plan> {
        Ok(match curves {
            Some(curves) => Plan::allocate(self.decoder, &curves.rankings, recipe, ratio)?,
            None => Plan::make(self.decoder, self.calibration, recipe, ratio)?,
        })
    }

    /// Searches with one seed, in `dir`, from widths that `curves` give where they start it.
    pub(super) fn search(
        &self,
        recipe: &Recipe,
        curves: Option<&Curves>,
        (ratio, seed): (f64, u64),
        dir: &Path,
        bar: &Progress,
    ) -> Result<Found> {
        let options = Options {
            seed,
            ..self.config.options.clone()
        };
        let data = Data {
            calibration: self.windows,
            search: self.search,
        };
        let plan;
        let start = match self.config.start_of(recipe) {
            None => Start::Uniform(ratio),
            Some(first) => {
                plan = self.plan(&first, curves, ratio)?;
                Start::Plan(&plan)
            }
        };
        let steps = options.steps(self.decoder.config().layers());
        let bar = bar.nested(format!("search, seed {seed}"), steps as u64);
        let mut tick = || {
            bar.inc(1);
            ControlFlow::Continue(())
        };
        Ok(tyr::search(
            self.decoder,
            &data,
            recipe,
            start,
            &options,
            dir,
            &mut tick,
        )?)
    }

    /// Curves of the whole model's divergence, measured in `dir`, for any ratio.
    pub(super) fn curves(&self, recipe: &Recipe, dir: &Path, bar: &Progress) -> Result<Curves> {
        let start = Instant::now();
        let shape = &recipe.shape;
        let mut rankings = Ranking::all(self.decoder, self.calibration, recipe.score, shape)?;
        let measure = Measure {
            top_k: self.config.options.top_k,
            ..Measure::default()
        };
        let data = rate_distortion::Data {
            windows: self.search,
            dir,
        };
        let steps = measure.steps(self.decoder, &rankings);
        let bar = bar.nested("measuring curves", steps as u64);
        rate_distortion::measure(
            self.decoder,
            self.calibration,
            recipe,
            &mut rankings,
            data,
            measure,
            &mut |done| bar.inc(done as u64),
        )?;
        bar.finish();
        Ok(Curves {
            rankings,
            seconds: start.elapsed().as_secs_f64(),
        })
    }
}

/// Measured curves of every sublayer, and the time they took.
pub(super) struct Curves {
    pub(super) rankings: Vec<Ranking>,
    pub(super) seconds: f64,
}

/// Whether a plan by this recipe is made from Gram matrices of the dense model.
pub(super) fn plans_from_gram(recipe: &Recipe) -> bool {
    matches!(recipe.score, Score::Obs { .. })
        || matches!(recipe.allocation, Allocation::RdDp { .. })
}

/// Whether making or writing it reads them.
pub(super) fn reads_gram(recipe: &Recipe, decoder: &Decoder<'_>) -> bool {
    let refits = matches!(
        recipe.compensation(decoder),
        Compensation::LeastSquares { .. }
    );
    refits || plans_from_gram(recipe)
}
