//! Options of a search.

use crate::compensation::{Compensation, LeastSquares};
use crate::divergence::Sharing;
use crate::evolution::Stage;
use crate::obs::Rounds;
use crate::recipe::Recipe;
use crate::{Error, Result};
use causal_lm::Decoder;
use serde::{Deserialize, Serialize};

/// Most supernets, generations and candidates; no search lives to see the end of more.
const MOST: usize = 1_000_000;

/// Whose output is the calibration input of the next block of a supernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Accumulation {
    /// The paper's: all levels of the block, level e weighted by the share 1 − S_e that it keeps.
    Mixture,
    /// The level at the centre alone: a ninth of the work.
    Centre,
    /// The dense block, so that no error accumulates, which is what the published implementation
    /// does.
    Dense,
}

/// Options of a search. The default is for small models and one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Options {
    /// Seed of mutations and of the windows of each stage.
    pub seed: u64,
    /// Supernets, each around what the search in the one before has found.
    pub iterations: usize,
    /// Generations in each supernet.
    pub generations: usize,
    /// Candidates of a generation.
    pub offspring: usize,
    /// Rounds of selection, the parent joining in the last one, of which the best is the next parent.
    pub stages: Vec<Stage>,
    /// Logits of the teacher that are compared; both sides are renormalised over them.
    pub top_k: usize,
    /// Levels to each side of the centre.
    pub reach: u8,
    /// Spacing of levels in the first iteration, as a share of a sublayer's units. Halved in every
    /// iteration.
    pub spacing: f64,
    /// Least spacing of MLP levels, in neurons.
    pub finest_neurons: usize,
    /// What the next block is calibrated on.
    pub accumulation: Accumulation,
    /// Whether the widths found are pruned once more from the dense weights, at these widths alone,
    /// each block on exactly what the pruned blocks before it put out. Not in the paper.
    pub settle: bool,
    /// Units between two scorings; `None` chooses by [`Rounds::suggested`].
    pub rounds: Option<Rounds>,
    /// Bytes of hidden states held while candidates are compared. Results do not depend on it.
    pub memory: usize,
    /// What candidates share.
    pub sharing: Sharing,
}

impl Options {
    /// Tokens that the candidates of a search run on, all generations of all supernets together; the largest number where they are
    /// more.
    pub fn candidate_tokens(&self) -> usize {
        let entering = [self.offspring].into_iter();
        let entering = entering.chain(self.stages.iter().map(|stage| stage.survivors));
        let generation = entering
            .zip(&self.stages)
            .map(|(candidates, stage)| candidates.saturating_mul(stage.tokens));
        let tokens = generation.fold(0, usize::saturating_add);
        let generations = self.iterations.saturating_mul(self.generations);
        generations.saturating_mul(tokens)
    }
}

impl Default for Options {
    fn default() -> Self {
        let stage = |tokens, survivors| Stage { tokens, survivors };
        Self {
            seed: 0,
            iterations: 4,
            generations: 20,
            offspring: 32,
            stages: vec![stage(2048, 8), stage(8192, 3), stage(32_768, 1)],
            top_k: 512,
            reach: 4,
            spacing: 0.125,
            finest_neurons: 1,
            accumulation: Accumulation::Mixture,
            settle: false,
            rounds: None,
            memory: 1 << 30,
            sharing: Sharing::Prefixes,
        }
    }
}

impl Options {
    /// The sizes of the paper's experiments on models of 7 to 70 billion parameters: 236 million
    /// token passes.
    pub fn paper() -> Self {
        let stage = |tokens, survivors| Stage { tokens, survivors };
        Self {
            generations: 50,
            offspring: 128,
            stages: vec![stage(2048, 16), stage(16_384, 4), stage(131_072, 1)],
            top_k: 8192,
            finest_neurons: 32,
            rounds: Some(Rounds::PAPER),
            ..Self::default()
        }
    }

    /// Refuses what cannot be searched for, before anything is spent on it.
    ///
    /// # Errors
    /// [`Error::Search`] for sizes out of range, and for recipes that ask for equal widths or
    /// another compensation than least squares.
    pub fn check(&self, decoder: &Decoder<'_>, recipe: &Recipe) -> Result<()> {
        self.check_sizes()?;
        Self::ridge(decoder, recipe)?;
        if recipe.shape.uniform {
            return Err(Error::Search {
                option: "uniform",
                value: "true".into(),
                expected: "false: a search gives every layer a width of its own",
            });
        }
        Ok(())
    }

    /// The damping of least squares.
    pub(super) fn ridge(decoder: &Decoder<'_>, recipe: &Recipe) -> Result<f64> {
        match recipe.compensation(decoder) {
            Compensation::LeastSquares(LeastSquares { ridge }) => Ok(ridge),
            other => Err(Error::Search {
                option: "compensation",
                value: other.name().into(),
                expected: "least squares, which the levels of a supernet are refitted by",
            }),
        }
    }

    fn check_sizes(&self) -> Result<()> {
        let wrong = |option, value: usize, expected| {
            Err(Error::Search {
                option,
                value: value.to_string(),
                expected,
            })
        };
        let positive = "at least 1";
        let sizes = [
            ("iterations", self.iterations),
            ("generations", self.generations),
            ("offspring", self.offspring),
        ];
        if let Some((option, value)) = sizes.into_iter().find(|(_, value)| *value > MOST) {
            return wrong(option, value, "at most 1,000,000");
        }
        match self {
            Self { iterations: 0, .. } => wrong("iterations", 0, positive),
            Self { offspring: 0, .. } => wrong("offspring", 0, positive),
            Self { top_k: 0, .. } => wrong("top_k", 0, positive),
            Self { reach: 0, .. } => wrong("reach", 0, positive),
            Self { reach, .. } if *reach > 100 => wrong("reach", (*reach).into(), "at most 100"),
            Self { stages, .. } if stages.is_empty() => wrong("stages", 0, positive),
            Self { stages, .. } if stages.iter().any(|s| s.survivors == 0) => {
                wrong("survivors", 0, positive)
            }
            Self { spacing, .. } if !(*spacing > 0.0 && *spacing <= 1.0) => Err(Error::Search {
                option: "spacing",
                value: spacing.to_string(),
                expected: "above 0 and at most 1",
            }),
            _ => Ok(()),
        }
    }
}
