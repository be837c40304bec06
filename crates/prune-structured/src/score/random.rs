//! Random scores: the baseline of every other score.

use super::Scoring;
use crate::Result;
use crate::stats::{ColumnStats, Part};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Uniform random numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Random {
    /// Seed of the draw.
    pub seed: u64,
}

impl Scoring for Random {
    fn columns(&self, layer: usize, part: Part, stats: &ColumnStats) -> Result<Vec<f64>> {
        // A stream of its own for each sublayer, so that widths do not shift later draws.
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(2 * layer as u64 + u64::from(part == Part::Mlp));
        Ok((0..stats.moments.mean.len())
            .map(|_| rng.random())
            .collect())
    }
}
