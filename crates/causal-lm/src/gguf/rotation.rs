//! The rotation of a GGUF file as the rules of Hugging Face have it.

use serde_json::{Value, json};
use tensor_io::gguf::Gguf;

use super::config::Keys;
use super::names;
use crate::Result;

/// How closely a rule must reproduce the factors of a file to stand for them.
const RULE_TOLERANCE: f64 = 1e-6;

/// The scaling rule of the rotation, if any: that of the metadata, or the factors of a tensor.
pub(super) fn rule(
    file: &Gguf,
    keys: &Keys<'_>,
    theta: f64,
    head_dim: usize,
    context: usize,
) -> Result<Option<Value>> {
    let kind = keys.metadata.get_str(&keys.key("rope.scaling.type"))?;
    let factor = match keys.opt_f64("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.opt_f64("rope.scale_linear")?,
    };
    let stated = match (kind, factor) {
        (Some("none"), _) | (None, None) => None,
        (Some("linear") | None, Some(factor)) if factor > 0.0 => {
            (factor != 1.0).then(|| json!({"rope_type": "linear", "factor": factor}))
        }
        (Some("yarn"), Some(factor)) if factor > 0.0 => Some(yarn(keys, factor, context)?),
        (kind, factor) => {
            return Err(keys.refuse(format!(
                "{} {:?} with a factor of {factor:?} is not supported",
                keys.key("rope.scaling.type"),
                kind.unwrap_or_default()
            )));
        }
    };
    if !file.contains(names::ROPE_FACTORS) {
        return Ok(stated);
    }
    if let Some(stated) = stated {
        return Err(keys.refuse(format!(
            "both {} and the rule {stated} scale the rotation",
            names::ROPE_FACTORS
        )));
    }
    file.expect_shape(names::ROPE_FACTORS, &[head_dim / 2])?;
    let factors = file.floats(names::ROPE_FACTORS)?;
    if let Some(factor) = factors.iter().find(|factor| **factor <= 0.0) {
        return Err(keys.refuse(format!(
            "{} holds a factor of {factor}",
            names::ROPE_FACTORS
        )));
    }
    let factors: Vec<f64> = factors.into_iter().map(f64::from).collect();
    if factors.iter().all(|&factor| factor == 1.0) {
        return Ok(None);
    }
    Ok(Some(llama3(&factors, theta, head_dim).unwrap_or_else(
        || {
            // Any factors at all, in the one rule that lists them.
            json!({
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": context,
            })
        },
    )))
}

fn yarn(keys: &Keys<'_>, factor: f64, context: usize) -> Result<Value> {
    let key = "rope.scaling.yarn_ext_factor";
    if let Some(found) = keys.opt_f64(key)?.filter(|&found| found != 1.0) {
        return Err(keys.refuse(format!("{} of {found} is not supported", keys.key(key))));
    }
    // How attention is sharpened: by 1 + 0.1 ln(factor), or by its ratio to the same with a multiplier.
    let sharpened = |multiplier: f64| 1.0 + 0.1 * multiplier * factor.max(1.0).ln();
    let multiplier = keys.opt_f64("rope.scaling.yarn_log_multiplier")?;
    let mut attention = sharpened(1.0) / sharpened(multiplier.unwrap_or(0.0));
    for key in ["attn_factor", "yarn_attn_factor"] {
        attention *= keys.opt_f64(&format!("rope.scaling.{key}"))?.unwrap_or(1.0);
    }
    let original = keys.opt_usize("rope.scaling.original_context_length")?;
    let mut rule = json!({
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original.unwrap_or(context),
        "attention_factor": attention,
    });
    for beta in ["beta_fast", "beta_slow"] {
        if let Some(value) = keys.opt_f64(&format!("rope.scaling.yarn_{beta}"))? {
            rule[beta] = json!(value);
        }
    }
    Ok(rule)
}

/// The rule of Llama 3.1 that gives these factors, if there is one.
///
/// Between its two ends the rule keeps the share (c·f/2π − low)/(high − low) of a frequency f, with c the original context.
/// That leaves one of low, high and c free; low is 1 in all published models.
fn llama3(factors: &[f64], theta: f64, head_dim: usize) -> Option<Value> {
    let frequency = |i: usize| theta.powf(-(2.0 * i as f64) / head_dim as f64);
    let factor = factors.iter().copied().fold(1.0, f64::max);
    // The share as a linear function of the frequency, from the two factors farthest apart between the ends.
    let share = |i: usize| (1.0 / factors[i] - 1.0 / factor) / (1.0 - 1.0 / factor);
    let between = |&i: &usize| factors[i] > 1.0 && factors[i] < factor;
    let mut inner = (0..factors.len()).filter(between);
    let (first, last) = (inner.next()?, inner.next_back()?);
    let slope = (share(first) - share(last)) / (frequency(first) - frequency(last));
    let offset = share(first) - slope * frequency(first);
    let low = 1.0;
    let spread = -low / offset;
    let high = ((low + spread) * 1e3).round() / 1e3;
    let original = (slope * (high - low) * std::f64::consts::TAU).round();
    let reproduced = |(i, &expected): (usize, &f64)| {
        let turns = original * frequency(i) / std::f64::consts::TAU;
        let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        let found = 1.0 / (keep + (1.0 - keep) / factor);
        (found / expected - 1.0).abs() <= RULE_TOLERANCE
    };
    let fits = high > low && original > 0.0 && factors.iter().enumerate().all(reproduced);
    fits.then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_of_llama_3_is_found_from_its_factors() {
        let (theta, head_dim) = (500_000.0f64, 128);
        for (factor, original) in [(8.0, 8192.0), (32.0, 8192.0), (16.0, 4096.0)] {
            let of = |i: usize| {
                let frequency = theta.powf(-(2.0 * i as f64) / head_dim as f64);
                let turns: f64 = original * frequency / std::f64::consts::TAU;
                let keep = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
                f64::from((1.0 / (keep + (1.0 - keep) / factor)) as f32)
            };
            let factors: Vec<f64> = (0..head_dim / 2).map(of).collect();
            let rule = llama3(&factors, theta, head_dim).unwrap();
            assert_eq!(rule["factor"], factor);
            assert_eq!(rule["high_freq_factor"], 4.0);
            assert_eq!(rule["original_max_position_embeddings"], original);
            let mut others = factors.clone();
            others[20] *= 1.01;
            assert!(llama3(&others, theta, head_dim).is_none());
        }
        assert!(llama3(&[1.0, 2.0, 8.0], theta, 6).is_none());
        assert!(llama3(&[2.0, 2.0], theta, 4).is_none());
    }
}
