//! Methods by name: a score, an allocation, a compensation, and the shapes they may result in.

use crate::allocate::Allocation;
use crate::compensate::Compensation;
use crate::ranking::Shape;
use crate::rate_distortion::Distortion;
use crate::score::Score;
use crate::structprune;
use causal_lm::Decoder;
use serde::{Deserialize, Serialize};

/// One way to prune.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// What it is called in tables.
    pub name: String,
    /// How columns are scored.
    pub score: Score,
    /// How the budget is spread.
    pub allocation: Allocation,
    /// What makes up for the loss; `None` for what suits the architecture.
    pub compensation: Option<Compensation>,
    /// Restrictions on widths.
    pub shape: Shape,
}

impl Recipe {
    /// What makes up for the loss in this model.
    pub fn compensation(&self, decoder: &Decoder<'_>) -> Compensation {
        self.compensation
            .unwrap_or_else(|| Compensation::suggested(decoder))
    }

    /// Names that [`Recipe::named`] knows.
    pub const NAMES: [&str; 9] = [
        "flap",
        "flap-compat",
        "tyr",
        "rd-dp",
        "structprune",
        "structprune-softmax",
        "wanda-sp",
        "magnitude",
        "random",
    ];

    /// A method as its authors, or common use, define it. `seed` is that of `random`.
    ///
    /// The controls spend the same share in every layer and leave the rest as it is.
    pub fn named(name: &str, seed: u64) -> Option<Self> {
        let control = |score| (score, Allocation::UlMm, Some(Compensation::None));
        let (score, allocation, compensation) = match name {
            "flap" => (Score::Wifv, Allocation::AlAm, None),
            "flap-compat" => (
                Score::FlapCompat,
                Allocation::FlapCompat,
                Some(Compensation::Bias),
            ),
            "structprune" => (Score::WandaSp, structprune::CLOSED_FORM, None),
            "structprune-softmax" => (Score::WandaSp, structprune::SOFTMAX, None),
            "wanda-sp" => control(Score::WandaSp),
            "magnitude" => control(Score::Magnitude),
            "random" => control(Score::Random { seed }),
            "rd-dp" => (
                Score::Obs { rounds: None },
                Allocation::RdDp {
                    distortion: Distortion::Hidden,
                    convex: false,
                },
                Some(Compensation::LEAST_SQUARES),
            ),
            "tyr" => (
                Score::Obs { rounds: None },
                Allocation::Searched,
                Some(Compensation::LEAST_SQUARES),
            ),
            _ => return None,
        };
        let mut shape = Shape::default();
        if allocation == Allocation::FlapCompat {
            // The published implementation has no floor.
            (shape.min_attention, shape.min_neurons) = (0, 0);
        }
        Some(Self {
            name: name.into(),
            score,
            allocation,
            compensation,
            shape,
        })
    }
}
