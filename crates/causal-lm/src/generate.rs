//! Generation of one sequence, greedy or sampled.

use crate::model::Model;
use crate::{Error, Result};
use candle_core::DType;
use kv_lazy::CacheSet;
use rand::distr::weighted::WeightedIndex;
use rand::prelude::*;
use rand_chacha::ChaCha8Rng;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// How the next token is chosen from the logits.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Sampling {
    /// The most likely token, the lowest id on a tie.
    Greedy,
    /// A draw from softmax(logits / temperature), cut to the most likely tokens.
    Random {
        /// Larger than 0; 1 is the model's own distribution.
        temperature: f64,
        /// Only this many most likely tokens; `None` for all.
        top_k: Option<usize>,
        /// Only the fewest most likely tokens whose probability reaches this; `None` for all.
        top_p: Option<f64>,
        /// Seed of the draws.
        seed: u64,
    },
}

/// When generation ends and how tokens are chosen.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GenerateOptions {
    /// Tokens generated at most.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the sequence; they are not part of the result.
    pub stop: Vec<u32>,
}

impl GenerateOptions {
    /// At most so many tokens, chosen greedily; none of them ends the sequence.
    pub fn new(max_new_tokens: usize) -> Self {
        Self {
            max_new_tokens,
            sampling: Sampling::Greedy,
            stop: Vec::new(),
        }
    }

    /// Chooses tokens otherwise.
    #[must_use]
    pub fn with_sampling(mut self, sampling: Sampling) -> Self {
        self.sampling = sampling;
        self
    }

    /// Tokens that end the sequence.
    #[must_use]
    pub fn with_stop(mut self, stop: Vec<u32>) -> Self {
        self.stop = stop;
        self
    }
}

/// A generated sequence and what it took.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Tokens after the prompt.
    pub tokens: Vec<u32>,
    /// Time until the first token was chosen.
    pub prefill: Duration,
    /// Time for the others.
    pub decode: Duration,
}

impl Generated {
    /// Tokens per second of the decode phase, `None` when there was none.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let steps = self
            .tokens
            .len()
            .checked_sub(1)
            .filter(|&steps| steps > 0)?;
        Some(steps as f64 / self.decode.as_secs_f64())
    }
}

/// Continues `prompt` in an empty or primed `cache` of batch 1; `on_token` is told each new token and may
/// end the sequence behind it.
///
/// # Errors
/// [`Error::Sampling`] for options without meaning, and what running the model reports.
pub fn generate(
    model: &Model<'_>,
    cache: &mut CacheSet,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    let mut sampler = Sampler::new(options.sampling)?;
    let start = Instant::now();
    let mut logits = model.forward(&[prompt], cache)?;
    let mut tokens = Vec::with_capacity(options.max_new_tokens);
    let mut prefill = None;
    while tokens.len() < options.max_new_tokens {
        let token = sampler.choose(&logits.to_dtype(DType::F32)?.squeeze(0)?.to_vec1::<f32>()?)?;
        prefill.get_or_insert_with(|| start.elapsed());
        if options.stop.contains(&token) {
            break;
        }
        tokens.push(token);
        if on_token(token).is_break() {
            break;
        }
        if tokens.len() < options.max_new_tokens {
            logits = model.forward(&[&[token]], cache)?;
        }
    }
    let prefill = prefill.unwrap_or_else(|| start.elapsed());
    Ok(Generated {
        tokens,
        prefill,
        decode: start.elapsed() - prefill,
    })
}

struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    fn new(sampling: Sampling) -> Result<Self> {
        let mut seed = 0;
        if let Sampling::Random {
            temperature,
            top_k,
            top_p,
            seed: given,
        } = sampling
        {
            seed = given;
            if !(temperature > 0.0 && temperature.is_finite()) {
                return Err(Error::Sampling(format!(
                    "temperature {temperature} must be larger than 0"
                )));
            }
            if top_k == Some(0) {
                return Err(Error::Sampling("top_k 0 leaves no token".into()));
            }
            if top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
                return Err(Error::Sampling(format!(
                    "top_p {} is outside (0, 1]",
                    top_p.unwrap_or_default()
                )));
            }
        }
        Ok(Self {
            sampling,
            rng: ChaCha8Rng::seed_from_u64(seed),
        })
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        if logits.iter().any(|l| !l.is_finite()) {
            return Err(Error::NonFinite {
                stage: "the logits".into(),
                window: 0,
                position: 0,
            });
        }
        let Sampling::Random {
            temperature,
            top_k,
            top_p,
            ..
        } = self.sampling
        else {
            let first = (0, f32::NEG_INFINITY);
            let all = logits.iter().copied().enumerate();
            let larger = |best: (usize, f32), next: (usize, f32)| match next.1 > best.1 {
                true => next,
                false => best,
            };
            return Ok(all.fold(first, larger).0 as u32);
        };
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| {
            logits[*b as usize]
                .total_cmp(&logits[*a as usize])
                .then(a.cmp(b))
        };
        ids.sort_unstable_by(by_logit);
        ids.truncate(top_k.unwrap_or(ids.len()));
        let max = f64::from(logits[ids[0] as usize]);
        let mut weights: Vec<f64> = ids
            .iter()
            .map(|&id| ((f64::from(logits[id as usize]) - max) / temperature).exp())
            .collect();
        if let Some(p) = top_p {
            let total: f64 = weights.iter().sum();
            let mut reached = 0.0;
            let kept = weights.iter().take_while(|&&w| {
                let before = reached;
                reached += w / total;
                before < p
            });
            weights.truncate(kept.count());
        }
        // The largest weight is 1, so the sum is positive and finite.
        let draw = WeightedIndex::new(&weights).expect("weights have a positive, finite sum");
        Ok(ids[draw.sample(&mut self.rng)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f64, top_k: Option<usize>, top_p: Option<f64>) -> Sampler {
        Sampler::new(Sampling::Random {
            temperature,
            top_k,
            top_p,
            seed: 1,
        })
        .unwrap()
    }

    #[test]
    fn greedy_takes_the_largest_logit_and_the_lowest_id_on_a_tie() {
        let mut greedy = Sampler::new(Sampling::Greedy).unwrap();
        assert_eq!(greedy.choose(&[0.0, 2.0, 2.0, 1.0]).unwrap(), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let mut sampler = sampler(2.0, None, None);
        let logits = [0.0, 2.0 * 3f32.ln()];
        let ones: u32 = (0..20_000).map(|_| sampler.choose(&logits).unwrap()).sum();
        assert!((f64::from(ones) / 20_000.0 - 0.75).abs() < 0.01, "{ones}");
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let seen = |mut sampler: Sampler| {
            let mut seen = [false; 4];
            (0..2000).for_each(|_| seen[sampler.choose(&logits).unwrap() as usize] = true);
            seen
        };
        assert_eq!(
            seen(sampler(1.0, Some(2), None)),
            [true, true, false, false]
        );
        assert_eq!(
            seen(sampler(1.0, None, Some(0.6))),
            [true, true, false, false]
        );
        assert_eq!(
            seen(sampler(1.0, None, Some(0.9))),
            [true, true, true, false]
        );
        assert_eq!(seen(sampler(1.0, None, None)), [true; 4]);
    }

    #[test]
    fn options_without_meaning_are_refused() {
        for sampling in [
            Sampling::Random {
                temperature: 0.0,
                top_k: None,
                top_p: None,
                seed: 0,
            },
            Sampling::Random {
                temperature: 1.0,
                top_k: Some(0),
                top_p: None,
                seed: 0,
            },
            Sampling::Random {
                temperature: 1.0,
                top_k: None,
                top_p: Some(1.5),
                seed: 0,
            },
        ] {
            assert!(matches!(Sampler::new(sampling), Err(Error::Sampling(_))));
        }
    }
}
