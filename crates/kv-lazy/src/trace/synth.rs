//! Traces with a known truth, made without a model: several, because the ranking of policies is a property of the generator.
//!
//! Each is given as queries and keys, so that every policy can be replayed. None is tuned to favour a policy; read them with
//! their [`mri`](super::mri) statistics and the oracle beside.

use super::{LayerTrace, Trace, TraceMeta};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Sizes common to all generators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Positions T.
    pub tokens: usize,
    /// Positions of the prompt.
    pub prompt: usize,
    /// KV heads, each with its own draw.
    pub kv_heads: usize,
    /// Query heads per KV head.
    pub group: usize,
    /// Elements of a head, at least 8.
    pub head_dim: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            tokens: 1024,
            prompt: 64,
            kv_heads: 2,
            group: 2,
            head_dim: 64,
        }
    }
}

/// Tokens that are attended again after log-normal recurrence intervals, among sinks, heavy hitters and a preference for the near.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Planted {
    /// Sizes.
    pub sizes: Sizes,
    /// Recurring tokens, at most `head_dim` − 4, drawn from the first half of the positions.
    pub recurring: usize,
    /// Median recurrence interval in steps.
    pub period: f64,
    /// Standard deviation of the logarithm of a recurrence interval; the 80th percentile is `period`·exp(0.84·σ).
    pub sigma: f64,
    /// Heavy hitters, always attended.
    pub heavy: usize,
    /// Steps over which the preference for the near decays by e.
    pub decay: f64,
}

impl Default for Planted {
    fn default() -> Self {
        Self {
            sizes: Sizes::default(),
            recurring: 48,
            period: 30.0,
            sigma: 0.8,
            heavy: 8,
            decay: 64.0,
        }
    }
}

/// Logits that wander: each token's logit is a stationary Ornstein–Uhlenbeck process, with noise on top.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drifting {
    /// Sizes.
    pub sizes: Sizes,
    /// Correlation time in steps.
    pub tau: f64,
    /// Standard deviation of a logit.
    pub spread: f64,
    /// Standard deviation of the noise of a step.
    pub noise: f64,
}

impl Default for Drifting {
    fn default() -> Self {
        Self {
            sizes: Sizes::default(),
            tau: 80.0,
            spread: 2.0,
            noise: 0.5,
        }
    }
}

/// A fixed few tokens take most of the attention, always; some values have huge norms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeavyHitters {
    /// Sizes.
    pub sizes: Sizes,
    /// Zipf exponent of the tokens' popularity.
    pub exponent: f64,
    /// Share of values scaled by 20.
    pub outliers: f64,
    /// Standard deviation of the noise of a step.
    pub noise: f64,
}

impl Default for HeavyHitters {
    fn default() -> Self {
        Self {
            sizes: Sizes::default(),
            exponent: 1.2,
            outliers: 0.01,
            noise: 0.5,
        }
    }
}

/// Queries `[group][T, d]`, keys and values `[T, d]` of one KV head.
type Head = (Vec<Vec<f32>>, Vec<f32>, Vec<f32>);

fn normal(rng: &mut ChaCha8Rng) -> f64 {
    // Box–Muller; 1 − u is never 0.
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

fn assemble(
    name: &str,
    seed: u64,
    sizes: Sizes,
    mut head: impl FnMut(&mut ChaCha8Rng) -> Head,
) -> Trace {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..sizes.kv_heads {
        let (queries, keys, values) = head(&mut rng);
        q.extend(queries.into_iter().flatten());
        k.extend(keys);
        v.extend(values);
    }
    let layer = LayerTrace {
        query_heads: sizes.kv_heads * sizes.group,
        kv_heads: sizes.kv_heads,
        head_dim: sizes.head_dim,
        tokens: sizes.tokens,
        q,
        k,
        v,
    };
    Trace {
        meta: TraceMeta {
            seed: Some(seed),
            ..TraceMeta::new(name, sizes.prompt, 1.0)
        },
        tokens: (0..sizes.tokens as u32).collect(),
        segments: None,
        layers: BTreeMap::from([(0, Arc::new(layer))]),
    }
}

fn values(rng: &mut ChaCha8Rng, sizes: Sizes) -> Vec<f32> {
    (0..sizes.tokens * sizes.head_dim)
        .map(|_| normal(rng) as f32)
        .collect()
}

impl Planted {
    /// The trace of a seed.
    pub fn trace(&self, seed: u64) -> Trace {
        self.with_schedule(seed).0
    }

    /// The trace of a seed and its truth: per KV head, the (token, step position) pairs at which a recurring token is needed.
    pub fn with_schedule(&self, seed: u64) -> (Trace, Vec<Vec<(usize, usize)>>) {
        /// Logit of a needed token over the background.
        const NEEDED: f32 = 9.0;
        /// Logit of a sink.
        const SINK: f32 = 6.0;
        /// Logit of a heavy hitter.
        const HEAVY: f32 = 4.0;
        let Sizes {
            tokens,
            prompt,
            group,
            head_dim: d,
            ..
        } = self.sizes;
        let mut schedules = Vec::new();
        let trace = assemble("planted", seed, self.sizes, |rng| {
            // Dimension 0 prefers the near: its logit grows with the key's position. Dimension 1 gives sinks and heavy hitters the
            // level of the nearest token, wherever the query is, and dimension 2 their lift above it. 3 is noise, the rest one per
            // recurring token.
            let near = |t: usize| ((t as f64 - tokens as f64) / self.decay) as f32;
            let free = tokens / 2 - 4;
            let recurring = self.recurring.min(d - 4).min(free);
            let heavy = self.heavy.min(free - recurring);
            let places = rand::seq::index::sample(rng, free, recurring + heavy).into_vec();
            let (places, heavy) = places.split_at(recurring);
            let mut lift = vec![None; tokens];
            lift[..4].fill(Some(SINK));
            heavy.iter().for_each(|&t| lift[t + 4] = Some(HEAVY));
            let mut keys = vec![0.0f32; tokens * d];
            for (t, lift) in lift.into_iter().enumerate() {
                match lift {
                    Some(lift) => keys[t * d + 1..t * d + 3].copy_from_slice(&[1.0, lift]),
                    None => keys[t * d] = near(t),
                }
                keys[t * d + 3] = normal(rng) as f32;
            }
            let mut queries = vec![vec![0.0f32; tokens * d]; group];
            let mut schedule = Vec::new();
            for (r, place) in places.iter().enumerate() {
                let token = place + 4;
                keys[token * d + 4 + r] = 1.0;
                // The near is favoured by logits that fall with distance; a needed token overcomes that.
                let mut at = token as f64;
                loop {
                    at += (self.period.ln() + self.sigma * normal(rng)).exp().max(1.0);
                    let t = at as usize;
                    if t >= tokens {
                        break;
                    }
                    let distance = (t - token) as f64 / self.decay;
                    for queries in &mut queries {
                        queries[t * d + 4 + r] = NEEDED + distance as f32;
                    }
                    if t >= prompt {
                        schedule.push((token, t));
                    }
                }
            }
            for queries in &mut queries {
                for t in 0..tokens {
                    let noise = 0.5 * normal(rng) as f32;
                    queries[t * d..t * d + 4].copy_from_slice(&[1.0, near(t), 1.0, noise]);
                }
            }
            schedules.push(schedule);
            let values = values(rng, self.sizes);
            (queries, keys, values)
        });
        (trace, schedules)
    }
}

impl Drifting {
    /// The trace of a seed.
    pub fn trace(&self, seed: u64) -> Trace {
        let Sizes {
            tokens,
            group,
            head_dim: d,
            ..
        } = self.sizes;
        assemble("drifting", seed, self.sizes, |rng| {
            // q is an Ornstein–Uhlenbeck vector and k a random direction: each logit is such a process itself.
            let keys: Vec<f32> = (0..tokens * d).map(|_| normal(rng) as f32).collect();
            let keep = (-1.0 / self.tau).exp();
            let kick = (1.0 - keep * keep).sqrt();
            let size = self.spread / (d as f64).sqrt();
            let noise = self.noise / (d as f64).sqrt();
            let mut state: Vec<f64> = (0..d).map(|_| normal(rng)).collect();
            let mut queries = vec![Vec::with_capacity(tokens * d); group];
            for _ in 0..tokens {
                for x in &mut state {
                    *x = keep * *x + kick * normal(rng);
                }
                for queries in &mut queries {
                    queries.extend(
                        state
                            .iter()
                            .map(|x| (size * x + noise * normal(rng)) as f32),
                    );
                }
            }
            let values = values(rng, self.sizes);
            (queries, keys, values)
        })
    }
}

impl HeavyHitters {
    /// The trace of a seed.
    pub fn trace(&self, seed: u64) -> Trace {
        let Sizes {
            tokens,
            group,
            head_dim: d,
            ..
        } = self.sizes;
        assemble("heavy-hitters", seed, self.sizes, |rng| {
            // Popularity by a random rank: weight ∝ rank^−exponent is a logit of −exponent·ln(rank).
            let mut ranks: Vec<usize> = (1..=tokens).collect();
            for i in (1..tokens).rev() {
                ranks.swap(i, rng.random_range(0..=i));
            }
            let mut keys = vec![0.0f32; tokens * d];
            for (key, rank) in keys.chunks_exact_mut(d).zip(ranks) {
                key[0] = (-self.exponent * (rank as f64).ln()) as f32;
                key[1..].iter_mut().for_each(|x| *x = normal(rng) as f32);
            }
            let noise = self.noise / (d as f64 - 1.0).sqrt();
            let mut queries = vec![Vec::with_capacity(tokens * d); group];
            for queries in &mut queries {
                for _ in 0..tokens {
                    queries.push(1.0);
                    queries.extend((1..d).map(|_| (noise * normal(rng)) as f32));
                }
            }
            let mut values = values(rng, self.sizes);
            for value in values.chunks_exact_mut(d) {
                if rng.random_bool(self.outliers) {
                    value.iter_mut().for_each(|x| *x *= 20.0);
                }
            }
            (queries, keys, values)
        })
    }
}
