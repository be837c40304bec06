//! Allocation: how many parameters each half of each block loses.
//!
//! A ratio counts the parameters that belong to removable units: the linears of the blocks, not embeddings, head and
//! norms. All allocations work on standardised scores and true unit costs. FLAP has four: AL compares scores across
//! layers, UL gives every layer the same share; AM compares attention with MLP, MM gives both the same share. An
//! allocation is a file of this folder and a line of [`Allocation`].

mod al_am;
mod al_mm;
mod closed_form;
mod cut;
mod equal_widths;
mod flap_compat;
mod knapsack;
mod rd_dp;
mod searched;
mod shares;
mod softmax;
mod ul_mm;
mod ul_um;

use crate::methods::methods;
use crate::ranking::Ranking;
use crate::stats::Needs;
use crate::{Calibration, Compensation, Error, Result};
use causal_lm::{Decoder, Progress};

pub use al_am::AlAm;
pub use al_mm::AlMm;
pub use closed_form::ClosedForm;
pub(crate) use equal_widths::{accepts_heads, equalise};
pub use flap_compat::FlapCompatCut;
pub use knapsack::{Knapsack, Point, convexify, knapsack};
pub use rd_dp::{Distortion, RdDp};
pub use searched::Searched;
pub use softmax::Softmax;
pub use ul_mm::UlMm;
pub use ul_um::UlUm;

methods! {
    /// How a budget is divided.
    pub enum Allocation: Allocate {
        /// One cut through all units of the model.
        "al-am" => AlAm(AlAm),
        /// One cut through all attention units, one through all neurons.
        "al-mm" => AlMm(AlMm),
        /// The same share of every layer: attention rounded to whole units, the MLP makes up the difference.
        "ul-mm" => UlMm(UlMm),
        /// The same share of every sublayer, each rounded to whole units.
        "ul-um" => UlUm(UlUm),
        /// AL-AM as FLAP's published implementation cuts.
        "flap-compat" => FlapCompat(FlapCompatCut),
        /// Each sublayer's share of its own parameters falls with its energy: see [`crate::structprune`].
        "closed-form" => ClosedForm(ClosedForm),
        /// A softmax over the energies divides what is removed: see [`crate::structprune`].
        "softmax" => Softmax(Softmax),
        /// The least sum of the sublayers' output errors: see [`crate::rate_distortion`].
        "rd-dp" => RdDp(RdDp),
        /// What a search over whole models has found: see [`crate::tyr`].
        "searched" => Searched(Searched),
    }
}

/// What may stay of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Budget {
    /// The ratio to remove, for errors.
    pub(crate) ratio: f64,
    /// Parameters that stay; what a compensation adds is already subtracted.
    pub(crate) parameters: f64,
}

impl Budget {
    /// `added` parameters of a compensation count against the ratio.
    pub(crate) fn new(rankings: &[Ranking], ratio: f64, added: u64) -> Self {
        Self {
            ratio,
            parameters: total(rankings) as f64 * (1.0 - ratio) - added as f64,
        }
    }

    /// The share of all units that stays.
    fn share(self, rankings: &[Ranking]) -> f64 {
        self.parameters / total(rankings) as f64
    }
}

/// What an allocation decides.
pub(crate) trait Allocate {
    /// Steps that each ranking keeps.
    fn keep(&self, rankings: &[Ranking], budget: Budget) -> Result<Vec<usize>>;

    /// Refuses parameters out of range.
    fn check_options(&self) -> Result<()> {
        Ok(())
    }

    /// Refuses a budget that it cannot meet, whatever the scores are.
    fn check_budget(&self, _rankings: &[Ranking], _budget: Budget) -> Result<()> {
        Ok(())
    }

    /// Statistics that it reads.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// Adds to the rankings what [`Allocate::keep`] reads beside scores and costs.
    fn prepare(
        &self,
        _decoder: &Decoder<'_>,
        _calibration: &Calibration,
        _compensation: Compensation,
        _rankings: &mut [Ranking],
        _progress: &dyn Progress,
    ) -> Result<()> {
        Ok(())
    }
}

impl Allocation {
    /// Steps that each ranking keeps when `ratio` of the prunable parameters is removed; `added` parameters of a
    /// compensation count against what is removed.
    ///
    /// AL-AM and AL-MM end within one step of the ratio, UL-MM within one step of every MLP, UL-UM within one step of
    /// every sublayer, RD-DP never above the budget, unless protected steps prevent it.
    ///
    /// # Errors
    /// [`Error::Ratio`] outside `[0, 1)`; [`Error::Unreachable`] when protected steps alone exceed the budget;
    /// [`Error::Option`] for an impossible temperature or largest share; [`Error::Missing`] for what rankings alone do
    /// not contain.
    pub fn keep(&self, rankings: &[Ranking], ratio: f64, added: u64) -> Result<Vec<usize>> {
        match self.budget(rankings, ratio, added)? {
            None => Ok(rankings.iter().map(|r| r.steps().len()).collect()),
            Some(budget) => self.method().keep(rankings, budget),
        }
    }

    /// What may stay, where anything is to go; refuses what the ratio and the costs alone rule out.
    pub(crate) fn budget(
        &self,
        rankings: &[Ranking],
        ratio: f64,
        added: u64,
    ) -> Result<Option<Budget>> {
        if !(0.0..1.0).contains(&ratio) {
            return Err(Error::Ratio(ratio));
        }
        self.method().check_options()?;
        if ratio == 0.0 {
            return Ok(None);
        }
        let budget = Budget::new(rankings, ratio, added);
        let total = total(rankings);
        let kept: u64 = rankings.iter().map(|r| r.cost(r.protected)).sum();
        let largest = rankings.iter().flat_map(Ranking::steps).map(|s| s.cost);
        let largest = largest.max().unwrap_or(0);
        if kept as f64 > budget.parameters + largest as f64 {
            return Err(Error::Unreachable { ratio, kept, total });
        }
        self.method().check_budget(rankings, budget)?;
        Ok(Some(budget))
    }

    /// Statistics that it reads.
    pub fn needs(&self) -> Needs {
        self.method().needs()
    }
}

/// Parameters of all units.
pub(crate) fn total(rankings: &[Ranking]) -> u64 {
    rankings.iter().map(Ranking::total).sum()
}
