//! One place for randomness: a stream of ChaCha8 per (seed, purpose), so that no draw depends on the order of the work.

#[cfg(feature = "train")]
use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// The generator for one purpose under one seed.
pub(crate) fn rng(seed: u64, purpose: &str) -> ChaCha8Rng {
    numbered(seed, purpose, 0)
}

/// One of many generators for the same purpose.
pub(crate) fn numbered(seed: u64, purpose: &str, number: u64) -> ChaCha8Rng {
    // FNV-1a of the purpose selects the stream: a short name, no content to be recognised again.
    let stream = purpose.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    rng
}

/// A standard normal number (Box and Muller 1958).
#[cfg(feature = "train")]
pub(crate) fn normal(rng: &mut impl Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
    radius * (2.0 * std::f32::consts::PI * rng.random::<f32>()).cos()
}
