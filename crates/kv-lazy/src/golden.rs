//! Inputs of the golden values: numbers by a formula, so that no file is needed.

/// e in [−1, 1) for each element of a tensor called `name`: a linear congruential generator seeded by the FNV-1a hash of the name.
pub(crate) fn uniform(name: &str, len: usize) -> Vec<f32> {
    let mut x = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (0..len)
        .map(|_| {
            x = x
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let u = (x >> 11) as f64 / (1u64 << 53) as f64;
            (2.0 * u - 1.0) as f32
        })
        .collect()
}

/// Tokens.
pub(crate) const TOKENS: usize = 48;
/// Elements of a head.
pub(crate) const D: usize = 64;

/// All keys `[48, 64]`, with two outlier channels.
pub(crate) fn all_keys() -> Vec<f32> {
    let mut keys = uniform("kv2.k", TOKENS * D);
    for key in keys.chunks_exact_mut(D) {
        key[5] *= 8.0;
        key[37] *= 6.0;
    }
    keys
}

/// One key.
pub(crate) fn keys(token: usize) -> Vec<f32> {
    all_keys()[token * D..(token + 1) * D].to_vec()
}

/// All values `[48, 64]`, one of them an outlier.
pub(crate) fn all_values() -> Vec<f32> {
    let mut values = uniform("kv2.v", TOKENS * D);
    values[7 * D..8 * D].iter_mut().for_each(|x| *x *= 9.0);
    values
}

/// Queries of two heads at the last eight positions, `[2, 8, 64]`.
pub(crate) fn queries() -> Vec<f32> {
    let mut queries = uniform("kv2.q", 2 * 8 * D);
    queries.iter_mut().for_each(|x| *x *= 2.0);
    queries
}

/// Numbers agree to `bar`, relative to their size or to 1e-3 of the largest.
#[track_caller]
pub(crate) fn close(got: &[f32], want: &[f64], bar: f64) {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let size = want.abs().max(1e-3 * largest);
        assert!(
            (f64::from(got) - want).abs() <= bar * size,
            "{i}: {got} {want}"
        );
    }
}
