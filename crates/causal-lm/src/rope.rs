//! Rotary position embeddings: inverse frequencies of every supported scaling rule.
//!
//! Checkpoints state them in three forms. The oldest has `rope_theta` at the top and the scaling rule, if any, in
//! `rope_scaling`; the newer one has both in `rope_parameters`; where layers of different kinds rotate differently that
//! object holds one object for each kind. Channels `i` and `i + turned/2` form a pair, or `2i` and `2i + 1`, rotated by
//! `position * inv_freq[i]`; channels beyond `turned` are not rotated.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::f64::consts::PI;
use tensor_io::Config;

/// Which channels are rotated together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pairs {
    /// `i` and `i + turned/2`.
    #[default]
    Halves,
    /// `2i` and `2i + 1`.
    Neighbours,
}

/// Frequencies for sequences longer than the model's first training context (longrope).
#[derive(Clone, Debug, PartialEq)]
pub struct Long {
    /// Longest sequence of the short frequencies.
    pub original: usize,
    /// Frequencies of all positions of a longer one.
    pub inv_freq: Vec<f64>,
}

/// YaRN's numbers, which its frequencies come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// How much longer the context became.
    pub factor: f64,
    /// Positions of the first training context.
    pub original: f64,
    /// Turns within it above which frequencies stay.
    pub beta_fast: f64,
    /// Turns within it below which they are divided by the factor.
    pub beta_slow: f64,
    /// Whether the ends of the range between them are whole pairs.
    pub truncate: bool,
}

/// Rotary embedding of the layers of one kind.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Rope {
    /// Base of the frequencies before any scaling.
    pub theta: f64,
    /// One angle per position for each pair of rotated channels.
    pub inv_freq: Vec<f64>,
    /// Factor on cos and sin (1 except for YaRN and longrope).
    pub attention_factor: f64,
    /// Which channels are rotated together.
    pub pairs: Pairs,
    /// Other frequencies for long sequences.
    pub long: Option<Long>,
    /// The rule behind the frequencies, where it is YaRN's.
    pub yarn: Option<Yarn>,
}

/// Queries grow with their position: `1 + beta · ln(1 + ⌊t / original⌋)`, Llama 4's temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScale {
    /// β.
    pub beta: f64,
    /// Positions of the first training context.
    pub original: usize,
}

impl QueryScale {
    /// The factor of the query at position `t`.
    pub fn at(self, t: usize) -> f64 {
        1.0 + self.beta * (1.0 + (t / self.original) as f64).ln()
    }
}

/// What a family's rotation is where the config leaves it open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Defaults {
    pub(crate) theta: f64,
    /// Share of the channels that are rotated; `None` where the architecture rotates all of them.
    pub(crate) partial: Option<f64>,
    pub(crate) pairs: Pairs,
    pub(crate) head_dim: usize,
    pub(crate) max_positions: usize,
}

/// Kinds of layers that may rotate differently.
const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];

/// Where the rotation of one kind of layers is stated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KindFields<'a> {
    /// Its object in `rope_parameters`.
    pub(crate) name: &'a str,
    /// The field at the top that has its base where the object has none.
    pub(crate) theta: Option<&'a str>,
    /// Whether `rope_scaling` is about it.
    pub(crate) is_scaled: bool,
}

/// The object that states the rotation of all layers: where both are there the older `rope_scaling` wins, unless it is empty,
/// and `rope_parameters` is not read at all.
pub(crate) fn section(config: &Config) -> Result<Option<Config>> {
    let old = config.opt_section("rope_scaling")?;
    match old.filter(|section| !section.raw().is_empty()) {
        Some(section) => Ok(Some(section)),
        None => Ok(config.opt_section("rope_parameters")?),
    }
}

/// What queries are multiplied with, from the object that states the rotation.
pub(crate) fn query_scale(config: &Config, max_positions: usize) -> Result<QueryScale> {
    let parameters = Parameters::new(config, section(config)?);
    let original = match parameters.rule()? {
        // Only rules that read it take the one at the top.
        "yarn" | "llama3" | "longrope" => parameters.original()?,
        _ => parameters.number(ORIGINAL)?,
    };
    let beta = parameters.number("llama_4_scaling_beta")?;
    Ok(QueryScale {
        beta: beta.unwrap_or(1.0),
        original: original
            .map_or(max_positions, |original| original as usize)
            .max(1),
    })
}

impl Rope {
    /// Reads the rotation of a model whose layers all rotate alike.
    pub(crate) fn read(config: &Config, defaults: Defaults) -> Result<Self> {
        let parameters = section(config)?;
        if let Some(section) = &parameters
            && let Some((kind, _)) = section.raw().iter().find(|(_, value)| value.is_object())
        {
            return Err(invalid(format!(
                "an object for {kind} layers, but all layers of this architecture rotate alike"
            )));
        }
        Parameters::new(config, parameters).rope(defaults)
    }

    /// Reads the rotation of one kind of layers of a family that once had `rope_scaling` for full layers. An object of a kind
    /// that is missing or null is one without scaling; fields that `rope_scaling` has win over those of the object.
    pub(crate) fn read_kind(
        config: &Config,
        kind: KindFields<'_>,
        defaults: Defaults,
    ) -> Result<Self> {
        let parameters = config.opt_section("rope_parameters")?;
        let is_of_kinds = |section: &Config| {
            let known = KINDS.iter().any(|kind| section.raw().contains_key(*kind));
            section.raw().is_empty() || known
        };
        if let Some(section) = &parameters
            && !is_of_kinds(section)
        {
            return Err(invalid(format!(
                "expected an object for {} layers each, by these names",
                KINDS.join(" and ")
            )));
        }
        let own = match &parameters {
            Some(section) => section.opt_section(kind.name)?,
            None => None,
        };
        let mut own = own.unwrap_or_default();
        if kind.is_scaled
            && let Some(scaling) = config.opt_section("rope_scaling")?
        {
            let spelt_otherwise = scaling.get("rope_type").or(scaling.get("type")).cloned();
            for (field, value) in scaling.raw() {
                own.set(field, value.clone());
            }
            if let Some(rule) = spelt_otherwise {
                own.set("rope_type", rule);
            }
        }
        if own.get("rope_theta").is_none()
            && let Some(theta) = kind.theta.and_then(|field| config.get(field))
        {
            own.set("rope_theta", theta.clone());
        }
        // The object of a kind stands for itself: fields at the top of the config are another kind's.
        Parameters::new(&Config::default(), Some(own)).rope(defaults)
    }

    /// Reads the rotation of one kind of layers of a family that has `rope_parameters` alone: `None` where these say that the
    /// kind is not rotated, `absent` where there are none.
    pub(crate) fn read_new_kind(
        config: &Config,
        kind: &str,
        defaults: Defaults,
        absent: impl FnOnce() -> Result<Self>,
    ) -> Result<Option<Self>> {
        let old = config.opt_section("rope_scaling")?;
        if old.is_some_and(|section| !section.raw().is_empty()) {
            return Err(Error::InvalidConfig {
                field: "rope_scaling",
                reason:
                    "this architecture has rope_parameters with an object for each kind of layers"
                        .into(),
            });
        }
        let Some(section) = config.opt_section("rope_parameters")? else {
            return absent().map(Some);
        };
        match section.raw().get(kind) {
            Some(Value::Null) => Ok(None),
            Some(_) => {
                let mut own = section.opt_section(kind)?.unwrap_or_default();
                if own.get("rope_theta").is_none()
                    && let Some(theta) = config.get("rope_theta")
                {
                    own.set("rope_theta", theta.clone());
                }
                Parameters::new(&Config::default(), Some(own))
                    .rope(defaults)
                    .map(Some)
            }
            None => Err(invalid(format!("no object for {kind} layers"))),
        }
    }

    /// Rotation without any scaling.
    pub(crate) fn plain(defaults: Defaults) -> Result<Self> {
        Parameters::new(&Config::default(), None).rope(defaults)
    }

    /// Frequencies of the whole head for the first `partial` of its pairs, the others standing still.
    pub(crate) fn proportional(defaults: Defaults, partial: f64) -> Result<Self> {
        let mut rope = Self::plain(defaults)?;
        let rotated = (partial * defaults.head_dim as f64 / 2.0) as usize;
        rope.inv_freq[rotated..].fill(0.0);
        Ok(rope)
    }

    /// Frequencies before any scaling.
    pub fn unscaled(&self) -> Vec<f64> {
        let turned = self.turned() as f64;
        let pairs = 0..self.inv_freq.len();
        pairs
            .map(|pair| self.theta.powf(-(2.0 * pair as f64) / turned))
            .collect()
    }

    /// Rotated channels of a head.
    pub fn turned(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// cos and sin for positions `start .. start + len` of a sequence of `total`, each `[len, turned / 2]`.
    ///
    /// Angles are computed in f64: at position 100,000 an f32 product is off by 0.004.
    ///
    /// # Errors
    /// When the device refuses the tensors.
    pub fn tables(
        &self,
        (start, len, total): (usize, usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let frequencies = match &self.long {
            Some(long) if total > long.original => &long.inv_freq,
            _ => &self.inv_freq,
        };
        let half = frequencies.len();
        let mut cos = Vec::with_capacity(len * half);
        let mut sin = Vec::with_capacity(len * half);
        for position in start..start + len {
            for freq in frequencies {
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

/// Positions that a model was first trained on.
const ORIGINAL: &str = "original_max_position_embeddings";

/// The scaling rule and its numbers, wherever they are in a config.
struct Parameters<'a> {
    top: &'a Config,
    section: Option<Config>,
}

impl<'a> Parameters<'a> {
    fn new(top: &'a Config, section: Option<Config>) -> Self {
        Self { top, section }
    }

    fn rule(&self) -> Result<&str> {
        let Some(section) = &self.section else {
            return Ok("default");
        };
        let rule = match section.opt_str("rope_type")? {
            Some(rule) => Some(rule),
            None => section.opt_str("type")?,
        };
        Ok(rule.unwrap_or("default"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match &self.section {
            Some(section) => Ok(section.opt_f64(key)?),
            None => Ok(None),
        }
    }

    fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let section = self.section.as_ref();
        let Some(value) = section.and_then(|section| section.raw().get(key)) else {
            return Ok(None);
        };
        let list = value.as_array().and_then(|list| {
            let numbers = list.iter().map(Value::as_f64);
            numbers.collect::<Option<Vec<f64>>>()
        });
        list.map(Some)
            .ok_or_else(|| invalid(format!("{key} must be a list of numbers")))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match &self.section {
            Some(section) => Ok(section.opt_bool(key)?),
            None => Ok(None),
        }
    }

    /// A positive number, or what it is where it is not stated.
    fn positive_or(&self, key: &str, absent: f64) -> Result<f64> {
        match self.number(key)? {
            Some(_) => self.required(key),
            None => Ok(absent),
        }
    }

    fn required(&self, key: &str) -> Result<f64> {
        match self.number(key)? {
            Some(value) if value > 0.0 => Ok(value),
            Some(value) => Err(invalid(format!("{key} must be positive, found {value}"))),
            None => Err(invalid(format!("{key} is missing"))),
        }
    }

    /// Positions that the model was first trained on: the field at the top wins over the one in the object.
    fn original(&self) -> Result<Option<f64>> {
        let original = match self.top.opt_f64(ORIGINAL)? {
            Some(original) => Some(original),
            None => self.number(ORIGINAL)?,
        };
        match original {
            Some(original) if original < 1.0 => {
                Err(invalid(format!("{ORIGINAL} must be positive")))
            }
            original => Ok(original),
        }
    }

    /// A number of the object or, in the oldest form, of the top.
    fn anywhere(&self, key: &str) -> Result<Option<f64>> {
        Ok(self.number(key)?.or(self.top.opt_f64(key)?))
    }

    fn rope(&self, defaults: Defaults) -> Result<Rope> {
        let Defaults {
            head_dim,
            max_positions,
            ..
        } = defaults;
        let theta = self.anywhere("rope_theta")?;
        let theta = theta.unwrap_or(defaults.theta);
        if !(theta.is_finite() && theta > 1.0) {
            return Err(invalid(format!(
                "rope_theta must be larger than 1, found {theta}"
            )));
        }
        let partial = self.anywhere("partial_rotary_factor")?;
        let rule = self.rule()?;
        let partial = match (partial, defaults.partial) {
            (Some(part), None) if part != 1.0 && rule != "proportional" => {
                return Err(Error::UnsupportedOption {
                    field: "partial_rotary_factor",
                    value: part.to_string(),
                    supported: "1",
                });
            }
            (given, default) => given.or(default).unwrap_or(1.0),
        };
        if !(partial > 0.0 && partial <= 1.0) {
            return Err(invalid(format!(
                "partial_rotary_factor must be above 0 and at most 1, found {partial}"
            )));
        }
        let turned = (head_dim as f64 * partial) as usize;
        let base = |turned: usize| -> Vec<f64> {
            (0..turned / 2)
                .map(|i| theta.powf(-(2.0 * i as f64) / turned as f64))
                .collect()
        };
        let mut rope = Rope {
            theta,
            inv_freq: vec![],
            attention_factor: 1.0,
            pairs: defaults.pairs,
            long: None,
            yarn: None,
        };
        rope.inv_freq = match rule {
            "default" => base(turned),
            "linear" => {
                let factor = self.required("factor")?;
                base(turned).into_iter().map(|f| f / factor).collect()
            }
            "llama3" => llama3(&base(turned), max_positions, self)?,
            "yarn" => {
                let (inv_freq, factor, numbers) =
                    yarn(&base(turned), theta, turned, max_positions, self)?;
                (rope.attention_factor, rope.yarn) = (factor, Some(numbers));
                inv_freq
            }
            // "su" is what early revisions call it.
            "longrope" | "su" => {
                let (short, long, factor) = longrope(&base(turned), max_positions, self)?;
                (rope.long, rope.attention_factor) = (Some(long), factor);
                short
            }
            "proportional" => {
                // Frequencies of the whole head, of which the first are used; the other pairs stand still.
                let rotated = (partial * head_dim as f64 / 2.0) as usize;
                let factor = self.positive_or("factor", 1.0)?;
                let mut inv_freq: Vec<f64> =
                    base(head_dim).into_iter().map(|f| f / factor).collect();
                inv_freq[rotated..].fill(0.0);
                inv_freq
            }
            other => {
                return Err(Error::UnsupportedOption {
                    field: "rope_type",
                    value: other.into(),
                    supported: "default, linear, llama3, yarn, longrope, proportional",
                });
            }
        };
        if rope.inv_freq.is_empty() || !rope.turned().is_multiple_of(2) {
            return Err(invalid(format!(
                "{partial} of {head_dim} channels leaves no pair to rotate"
            )));
        }
        Ok(rope)
    }
}

/// Llama 3.1: long waves are slowed by `factor`, short ones left, a linear blend between.
fn llama3(base: &[f64], max_positions: usize, parameters: &Parameters<'_>) -> Result<Vec<f64>> {
    let factor = parameters.required("factor")?;
    let low = parameters.required("low_freq_factor")?;
    let high = parameters.required("high_freq_factor")?;
    let context = parameters.original()?.unwrap_or(max_positions as f64);
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

/// Longrope (arXiv 2402.13753): every frequency has a divisor of its own, another one for long sequences, and attention
/// is sharpened by a factor on cos and sin.
fn longrope(
    base: &[f64],
    max_positions: usize,
    parameters: &Parameters<'_>,
) -> Result<(Vec<f64>, Long, f64)> {
    let original = parameters.original()?;
    let original = original.map_or(max_positions, |original| original as usize);
    let divided = |key: &str| -> Result<Vec<f64>> {
        let factors = parameters
            .numbers(key)?
            .ok_or_else(|| invalid(format!("{key} is missing")))?;
        if factors.len() != base.len() || factors.iter().any(|&factor| factor <= 0.0) {
            return Err(invalid(format!(
                "{key} must hold {} positive numbers, one for each pair of channels",
                base.len()
            )));
        }
        Ok(base
            .iter()
            .zip(factors)
            .map(|(freq, factor)| freq / factor)
            .collect())
    };
    let attention_factor = match parameters.number("attention_factor")? {
        Some(given) => given,
        None => {
            let longer = match parameters.number("factor")? {
                Some(factor) => factor,
                None => max_positions as f64 / original as f64,
            };
            match longer > 1.0 {
                true => (1.0 + longer.ln() / (original as f64).ln()).sqrt(),
                false => 1.0,
            }
        }
    };
    let long = Long {
        original,
        inv_freq: divided("long_factor")?,
    };
    Ok((divided("short_factor")?, long, attention_factor))
}

/// YaRN (arXiv 2309.00071): interpolates pairs that turn seldom within the original context,
/// extrapolates those that turn often, and sharpens attention by a factor on cos and sin.
fn yarn(
    base: &[f64],
    theta: f64,
    head_dim: usize,
    max_positions: usize,
    parameters: &Parameters<'_>,
) -> Result<(Vec<f64>, f64, Yarn)> {
    let context = parameters.original()?.unwrap_or(max_positions as f64);
    let factor = parameters.positive_or("factor", max_positions as f64 / context)?;
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
    let numbers = Yarn {
        factor,
        original: context,
        beta_fast: fast,
        beta_slow: slow,
        truncate,
    };
    Ok((inv_freq, attention_factor, numbers))
}

#[cfg(test)]
mod tests;
