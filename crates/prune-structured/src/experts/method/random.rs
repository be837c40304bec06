//! Random numbers: the control.

use super::Choosing;
use crate::Result;
use crate::experts::layer::Layer;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Uniform random numbers, a stream of its own for each layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RandomExperts {
    /// Seed.
    pub seed: u64,
}

impl Choosing for RandomExperts {
    fn scores(&self, layer: &Layer<'_>) -> Result<Vec<f64>> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(layer.index as u64);
        Ok((0..layer.experts()).map(|_| rng.random()).collect())
    }
}
