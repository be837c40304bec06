//! Rotary position embeddings: inverse frequencies of every supported scaling rule.
//!
//! Checkpoints state them in two forms. The older one has `rope_theta` at the top and the scaling
//! rule, if any, in `rope_scaling`; the newer one has both in `rope_parameters`.
//! Channels `i` and `i + head_dim/2` form a pair, rotated by `position * inv_freq[i]`.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::f64::consts::PI;
use tensor_io::Config;

/// Rotary embedding of one model.
#[derive(Clone, Debug)]
pub struct Rope {
    /// `head_dim / 2` angles per position.
    pub inv_freq: Vec<f64>,
    /// Factor on cos and sin (1 except for YaRN).
    pub attention_factor: f64,
}

impl Rope {
    /// Reads either config form.
    ///
    /// # Errors
    /// [`Error::UnsupportedOption`] for a rule other than default, linear, llama3 and yarn, or for
    /// a partial rotation; [`Error::InvalidConfig`] for missing or impossible parameters.
    pub fn from_config(config: &Config, head_dim: usize, max_positions: usize) -> Result<Self> {
        let theta = config.opt_f64("rope_theta")?;
        let parameters = match config.opt_section("rope_parameters")? {
            Some(section) => Some(section),
            None => config.opt_section("rope_scaling")?,
        };
        let parameters = Parameters(parameters);
        let theta = parameters
            .number("rope_theta")?
            .or(theta)
            .unwrap_or(10_000.0);
        if !(theta.is_finite() && theta > 1.0) {
            return Err(invalid(format!(
                "rope_theta must be larger than 1, found {theta}"
            )));
        }
        if let Some(part) = parameters
            .number("partial_rotary_factor")?
            .or(config.opt_f64("partial_rotary_factor")?)
            && part != 1.0
        {
            return Err(Error::UnsupportedOption {
                field: "partial_rotary_factor",
                value: part.to_string(),
                supported: "1",
            });
        }
        let half = head_dim / 2;
        let base: Vec<f64> = (0..half)
            .map(|i| theta.powf(-(2.0 * i as f64) / head_dim as f64))
            .collect();
        let mut attention_factor = 1.0;
        let inv_freq = match parameters.rule()? {
            "default" => base,
            "linear" => {
                let factor = parameters.required("factor")?;
                base.into_iter().map(|f| f / factor).collect()
            }
            "llama3" => llama3(&base, &parameters)?,
            "yarn" => {
                let (inv_freq, factor) = yarn(&base, theta, head_dim, max_positions, &parameters)?;
                attention_factor = factor;
                inv_freq
            }
            "longrope" if parameters.number("attention_factor")?.is_some() => {
                attention_factor = parameters.required("attention_factor")?;
                divided(&base, &parameters)?
            }
            other => {
                return Err(Error::UnsupportedOption {
                    field: "rope_type",
                    value: other.into(),
                    supported: "default, linear, llama3, yarn, and longrope with equal factors and an attention_factor",
                });
            }
        };
        Ok(Self {
            inv_freq,
            attention_factor,
        })
    }

    /// cos and sin for positions `start .. start + len`, each `[len, head_dim / 2]`.
    ///
    /// Angles are computed in f64: at position 100,000 an f32 product is off by 0.004.
    ///
    /// # Errors
    /// When the device refuses the tensors.
    pub fn tables(
        &self,
        start: usize,
        len: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let half = self.inv_freq.len();
        let mut cos = Vec::with_capacity(len * half);
        let mut sin = Vec::with_capacity(len * half);
        for position in start..start + len {
            for freq in &self.inv_freq {
                let (s, c) = (position as f64 * freq).sin_cos();
                cos.push((c * self.attention_factor) as f32);
                sin.push((s * self.attention_factor) as f32);
            }
        }
        let tensor = |values: Vec<f32>| -> Result<Tensor> {
            Ok(Tensor::from_vec(values, (len, half), device)?.to_dtype(dtype)?)
        };
        Ok((tensor(cos)?, tensor(sin)?))
    }
}

fn invalid(reason: String) -> Error {
    Error::InvalidConfig {
        field: "rope_parameters",
        reason,
    }
}

/// The object with the scaling rule, or nothing.
struct Parameters(Option<Config>);

impl Parameters {
    fn rule(&self) -> Result<&str> {
        let Some(section) = &self.0 else {
            return Ok("default");
        };
        if section.raw().values().any(|value| value.is_object()) {
            return Err(invalid(
                "one object for each layer type is not supported".into(),
            ));
        }
        let rule = match section.opt_str("rope_type")? {
            Some(rule) => Some(rule),
            None => section.opt_str("type")?,
        };
        Ok(rule.unwrap_or("default"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match &self.0 {
            Some(section) => Ok(section.opt_f64(key)?),
            None => Ok(None),
        }
    }

    /// `count` positive numbers.
    fn numbers(&self, key: &str, count: usize) -> Result<Vec<f64>> {
        let list = self
            .0
            .as_ref()
            .and_then(|section| section.get(key)?.as_array());
        let numbers: Option<Vec<f64>> =
            list.and_then(|list| list.iter().map(|x| x.as_f64()).collect());
        match numbers {
            Some(numbers) if numbers.len() == count && numbers.iter().all(|&x| x > 0.0) => {
                Ok(numbers)
            }
            _ => Err(invalid(format!(
                "{key} must be a list of {count} positive numbers"
            ))),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match &self.0 {
            Some(section) => Ok(section.opt_bool(key)?),
            None => Ok(None),
        }
    }

    fn required(&self, key: &str) -> Result<f64> {
        match self.number(key)? {
            Some(value) if value > 0.0 => Ok(value),
            Some(value) => Err(invalid(format!("{key} must be positive, found {value}"))),
            None => Err(invalid(format!("{key} is missing"))),
        }
    }
}

/// LongRoPE with the same factors for short and long texts: each frequency is divided by its own.
fn divided(base: &[f64], parameters: &Parameters) -> Result<Vec<f64>> {
    let factors = |key: &str| parameters.numbers(key, base.len());
    let short = factors("short_factor")?;
    if short != factors("long_factor")? {
        return Err(Error::UnsupportedOption {
            field: "rope_parameters",
            value: "long_factor other than short_factor".into(),
            supported: "equal factors",
        });
    }
    Ok(base
        .iter()
        .zip(short)
        .map(|(frequency, factor)| frequency / factor)
        .collect())
}

/// Llama 3.1: long waves are slowed by `factor`, short ones left, a linear blend between.
fn llama3(base: &[f64], parameters: &Parameters) -> Result<Vec<f64>> {
    let factor = parameters.required("factor")?;
    let low = parameters.required("low_freq_factor")?;
    let high = parameters.required("high_freq_factor")?;
    let context = parameters.required("original_max_position_embeddings")?;
    if high <= low {
        return Err(invalid(format!(
            "high_freq_factor {high} must exceed low_freq_factor {low}"
        )));
    }
    let scale = |freq: f64| {
        let turns = context * freq / (2.0 * PI);
        let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        keep * freq + (1.0 - keep) * freq / factor
    };
    Ok(base.iter().map(|&freq| scale(freq)).collect())
}

/// YaRN (arXiv 2309.00071): interpolates pairs that turn seldom within the original context,
/// extrapolates those that turn often, and sharpens attention by a factor on cos and sin.
fn yarn(
    base: &[f64],
    theta: f64,
    head_dim: usize,
    max_positions: usize,
    parameters: &Parameters,
) -> Result<(Vec<f64>, f64)> {
    let context = parameters
        .number("original_max_position_embeddings")?
        .unwrap_or(max_positions as f64);
    let factor = match parameters.number("factor")? {
        Some(_) => parameters.required("factor")?,
        None => max_positions as f64 / context,
    };
    let temperature = |mscale: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * mscale * factor.ln() + 1.0
        }
    };
    let nonzero =
        |key| -> Result<Option<f64>> { Ok(parameters.number(key)?.filter(|&v| v != 0.0)) };
    let attention_factor = match (
        parameters.number("attention_factor")?,
        nonzero("mscale")?,
        nonzero("mscale_all_dim")?,
    ) {
        (Some(given), _, _) => given,
        (None, Some(mscale), Some(all)) => temperature(mscale) / temperature(all),
        (None, _, _) => temperature(1.0),
    };
    let fast = nonzero("beta_fast")?.unwrap_or(32.0);
    let slow = nonzero("beta_slow")?.unwrap_or(1.0);
    let dim = head_dim as f64;
    // The (fractional) pair that makes `turns` turns within the original context.
    let pair = |turns: f64| dim * (context / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let truncate = parameters.flag("truncate")?.unwrap_or(true);
    let (mut low, mut high) = (pair(fast), pair(slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let inv_freq = base
        .iter()
        .enumerate()
        .map(|(i, freq)| {
            let interpolate = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            freq / factor * interpolate + freq * (1.0 - interpolate)
        })
        .collect();
    Ok((inv_freq, attention_factor))
}
