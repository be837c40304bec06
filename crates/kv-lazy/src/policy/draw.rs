//! Random numbers that are functions of what they are drawn for: batches, threads, slots and snapshots do not change them.

use super::{Clock, Place};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The draws of one eviction of one KV head.
pub(super) struct Draw(ChaCha8Rng, u64);

impl Draw {
    /// Of the eviction at `clock` in KV head `head`, counted from the policy's first.
    pub(super) fn new(seed: u64, place: Place, head: usize, clock: &Clock) -> Self {
        let mut bytes = [0; 32];
        let parts = [
            seed,
            (place.layer as u64) << 32 | place.sequence as u64,
            (place.first_head + head) as u64,
            u64::from(clock.next),
        ];
        for (bytes, part) in bytes.chunks_exact_mut(8).zip(parts) {
            bytes.copy_from_slice(&part.to_le_bytes());
        }
        let mut rng = ChaCha8Rng::from_seed(bytes);
        let event = rng.next_u64();
        Self(rng, event)
    }

    /// 32 random bits of the token at position `id`.
    pub(super) fn bits(&self, id: u32) -> u32 {
        (mix(self.1 ^ u64::from(id)) >> 32) as u32
    }

    /// A uniform number in (0, 1) of the token at position `id`.
    pub(super) fn uniform(&self, id: u32) -> f64 {
        (f64::from(self.bits(id)) + 0.5) / 4_294_967_296.0
    }

    /// Independent normal numbers of mean 0 and this variance.
    pub(super) fn normals(&mut self, count: usize, variance: f64) -> Vec<f64> {
        let mut uniform = || (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut normals = Vec::with_capacity(count + 1);
        while normals.len() < count {
            // Box and Muller; the logarithm's argument is never 0.
            let radius = (-2.0 * variance * (1.0 - uniform()).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * uniform()).sin_cos();
            normals.extend([radius * cos, radius * sin]);
        }
        normals.truncate(count);
        normals
    }
}

/// The finaliser of SplitMix64 (Steele et al., 2014): a bijection without visible structure.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normals_have_the_variance_asked_for() {
        let mut draw = Draw::new(7, Place::default(), 0, &clock(9));
        let normals = draw.normals(20_000, 0.05);
        let mean = normals.iter().sum::<f64>() / 20_000.0;
        let variance = normals.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 20_000.0;
        assert!(
            mean.abs() < 0.005 && (variance - 0.05).abs() < 0.002,
            "{mean} {variance}"
        );
    }

    fn clock(next: u32) -> Clock {
        Clock {
            next,
            step: 1,
            tokens: 1,
            prompt: 1,
            phase: super::super::Phase::Decode,
        }
    }

    #[test]
    fn a_draw_depends_on_what_it_is_for_and_on_nothing_else() {
        let at = |seed, head, next| Draw::new(seed, Place::default(), head, &clock(next)).bits(3);
        assert_eq!(at(1, 0, 9), at(1, 0, 9));
        let others = [at(2, 0, 9), at(1, 1, 9), at(1, 0, 10)];
        assert!(others.iter().all(|&bits| bits != at(1, 0, 9)));
    }
}
