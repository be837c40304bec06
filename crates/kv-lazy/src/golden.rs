//! Inputs of the golden values: numbers by a formula, so that no file is needed.

use crate::error::Result;
use crate::policy::{RecentQueries, Rows};
use crate::rotary::Rotary;
use std::borrow::Cow;

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

/// All keys, rotated to their positions by the plain rotation of base 10,000.
pub(crate) fn rotated_keys() -> Vec<f32> {
    let rotary = Rotary::plain(10_000.0, D);
    let mut keys = all_keys();
    for (position, key) in keys.chunks_exact_mut(D).enumerate() {
        rotary.rotate(key, position as i64);
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

/// Keys, values and queries as they are cached in one KV head of two query heads; queries are scaled by 1/8.
pub(crate) struct Observed {
    ids: Vec<u32>,
    queries: Vec<f32>,
    positions: Vec<u32>,
}

impl Observed {
    pub(crate) fn new() -> Self {
        let queries = queries();
        let of = |t: usize, head: usize| &queries[(head * 8 + t) * D..][..D];
        Self {
            ids: (0..TOKENS as u32).collect(),
            queries: (0..8)
                .flat_map(|t| [of(t, 0), of(t, 1)].concat())
                .map(|x| x / 8.0)
                .collect(),
            positions: (TOKENS as u32 - 8..TOKENS as u32).collect(),
        }
    }
}

impl Rows for Observed {
    fn head_dim(&self) -> usize {
        D
    }
    fn ids(&self, _: usize) -> &[u32] {
        &self.ids
    }
    fn keys(&self, _: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        Ok(all_keys()[from * D..].to_vec().into())
    }
    fn values(&self, _: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        Ok(all_values()[from * D..].to_vec().into())
    }
    fn queries(&self, _: usize) -> RecentQueries<'_> {
        RecentQueries {
            queries: &self.queries,
            positions: &self.positions,
            softcap: None,
        }
    }
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
