//! Methods by name: a score, an allocation, a compensation, and the shapes they may result in.

use crate::Result;
use crate::allocation::{
    AlAm, Allocation, ClosedForm, FlapCompatCut, RdDp, Searched, Softmax, UlMm, equalise,
};
use crate::compensation::{Bias, Compensation, NoCompensation};
use crate::plan::prunable;
use crate::ranking::{Ranking, Shape};
use crate::score::{FlapCompat, Magnitude, Obs, Random, Score, WandaSp, Wifv};
use crate::stats::Needs;
use causal_lm::Decoder;
use serde::{Deserialize, Serialize};

/// One way to prune.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Recipe {
    /// Its name in tables.
    pub name: String,
    /// How columns are scored.
    pub score: Score,
    /// How the budget is divided.
    pub allocation: Allocation,
    /// What compensates for the removed units; `None` for what suits the architecture.
    pub compensation: Option<Compensation>,
    /// Restrictions on widths.
    pub shape: Shape,
}

/// Score, allocation and compensation of a named method.
type Parts = (Score, Allocation, Option<Compensation>);

/// A name, and what makes the method from a seed.
type Method = (&'static str, fn(u64) -> Parts);

/// Every method, one line each.
const METHODS: [Method; 9] = [
    ("flap", |_| parts(Wifv, AlAm, None)),
    ("flap-compat", |_| {
        parts(FlapCompat, FlapCompatCut, Some(Bias.into()))
    }),
    ("tyr", |_| {
        parts(Obs::default(), Searched, Some(Compensation::LEAST_SQUARES))
    }),
    ("rd-dp", |_| {
        let least_squares = Some(Compensation::LEAST_SQUARES);
        parts(Obs::default(), RdDp::default(), least_squares)
    }),
    ("structprune", |_| {
        parts(WandaSp, ClosedForm::default(), None)
    }),
    ("structprune-softmax", |_| {
        parts(WandaSp, Softmax::default(), None)
    }),
    ("wanda-sp", |_| baseline(WandaSp)),
    ("magnitude", |_| baseline(Magnitude)),
    ("random", |seed| baseline(Random { seed })),
];

fn parts(
    score: impl Into<Score>,
    allocation: impl Into<Allocation>,
    compensation: Option<Compensation>,
) -> Parts {
    (score.into(), allocation.into(), compensation)
}

/// Baselines remove the same share of every layer and compensate for nothing.
fn baseline(score: impl Into<Score>) -> Parts {
    parts(score, UlMm, Some(NoCompensation.into()))
}

impl Recipe {
    /// Names that [`Recipe::named`] knows.
    pub const NAMES: [&str; METHODS.len()] = {
        let mut names = [""; METHODS.len()];
        let mut i = 0;
        while i < names.len() {
            names[i] = METHODS[i].0;
            i += 1;
        }
        names
    };

    /// A method as its authors, or common use, define it. `seed` is that of `random`.
    pub fn named(name: &str, seed: u64) -> Option<Self> {
        let (_, make) = METHODS.iter().find(|(known, _)| *known == name)?;
        let (score, allocation, compensation) = make(seed);
        let mut recipe = Self::new(name, score, allocation);
        recipe.compensation = compensation;
        if matches!(allocation, Allocation::FlapCompat(_)) {
            // The published implementation has no minimum.
            (recipe.shape.min_attention, recipe.shape.min_neurons) = (0, 0);
        }
        Some(recipe)
    }

    /// A method of your own, with the compensation that suits the architecture and no restriction on widths but that
    /// no half of a block is removed altogether.
    pub fn new(
        name: impl Into<String>,
        score: impl Into<Score>,
        allocation: impl Into<Allocation>,
    ) -> Self {
        Self {
            name: name.into(),
            score: score.into(),
            allocation: allocation.into(),
            compensation: None,
            shape: Shape::default(),
        }
    }

    /// Refuses what cannot be asked of this model, before anything is computed: parameters out of range, widths that its
    /// layers do not have, a ratio that these do not reach, equal widths that nothing comes near. A search over whole
    /// models is checked by [`crate::tyr::Options::check`] too.
    ///
    /// # Errors
    /// As [`crate::Plan::make`], but for what depends on scores.
    pub fn check(&self, decoder: &Decoder<'_>, ratio: f64) -> Result<()> {
        let compensation = self.compensation(decoder);
        compensation.check()?;
        let rankings = Ranking::unscored(decoder, &self.shape)?;
        prunable(decoder, &rankings, ratio)?;
        let added = compensation.added(decoder);
        let budget = self.allocation.budget(&rankings, ratio, added)?;
        if let (true, Some(budget)) = (self.shape.uniform, budget) {
            // Whether any widths are near enough does not depend on the widths that they are near to.
            let whole: Vec<usize> = rankings.iter().map(|r| r.steps().len()).collect();
            equalise(decoder, &rankings, &whole, budget)?;
        }
        Ok(())
    }

    /// What compensates for the removed units in this model.
    pub fn compensation(&self, decoder: &Decoder<'_>) -> Compensation {
        self.compensation
            .unwrap_or_else(|| Compensation::suggested(decoder))
    }

    /// Statistics that making a plan reads.
    pub fn needs_for_plan(&self) -> Needs {
        self.score.needs() | self.allocation.needs()
    }

    /// Statistics that making and writing a plan for this model read.
    pub fn needs(&self, decoder: &Decoder<'_>) -> Needs {
        self.needs_for_plan() | self.compensation(decoder).needs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_gives_a_method_of_that_name_and_no_other_does() {
        for name in Recipe::NAMES {
            let recipe = Recipe::named(name, 3).unwrap();
            assert_eq!(recipe.name, name);
            let json = serde_json::to_string(&recipe).unwrap();
            assert_eq!(serde_json::from_str::<Recipe>(&json).unwrap(), recipe);
        }
        assert_eq!(Recipe::named("no-such-method", 0), None);
    }
}
