//! The decoder that a suite evaluates.

use std::error::Error as StdError;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::DType;
use causal_lm::{Arithmetic, Decoder, Error, Execution};
use tensor_io::Checkpoint;

use crate::settings::Settings;

/// A decoder that multiplies with weights as they are stored. It computes in f32 on CPUs; on GPUs in bf16, where quantised weights are an error.
pub(crate) fn decoder<'a>(common: &Settings, checkpoint: &'a Checkpoint) -> Result<Decoder<'a>> {
    Ok(decoded(common, checkpoint)?.packed(Execution::new(common.weights.arithmetic)))
}

/// A decoder to calibrate on and to change: with weights as tensors, in f32 on CPUs, in bf16 on GPUs. In bf16 arithmetic weights
/// that are stored in fewer than 32 bits are multiplied as they are stored.
pub(crate) fn decoded<'a>(common: &Settings, checkpoint: &'a Checkpoint) -> Result<Decoder<'a>> {
    let device = common.device.open()?;
    let dtype = match device.is_cpu() {
        true => DType::F32,
        false => DType::BF16,
    };
    let decoder = Decoder::new(checkpoint, dtype, &device)
        .with_context(|| checkpoint.dir().display().to_string())?;
    Ok(match common.weights.arithmetic {
        arithmetic @ Arithmetic::Bf16 => decoder.packed(Execution::new(arithmetic)),
        Arithmetic::F32 | Arithmetic::Int8 => decoder,
    })
}

/// What a suite that compresses the linears of blocks alone leaves of a mixture of experts, in words; `None` where a model has no
/// experts.
pub(crate) fn experts_left(decoder: &Decoder<'_>) -> Option<String> {
    let config = decoder.config();
    let mixtures = config.mixtures.iter().flatten();
    let parameters = mixtures.map(|mixture| 3 * mixture.experts * mixture.width * config.hidden);
    let parameters: usize = parameters.sum();
    let share = 100.0 * parameters as f64 / decoder.checkpoint().parameters().max(1) as f64;
    (parameters > 0).then(|| {
        format!(
            "left as they are, {share:.0} % of the parameters; `eval lowrank --experts`, `eval structured --quantise` and `eval frontier` compress them"
        )
    })
}

/// The error of a run of `model`, which it names where the error is one of activations or tokens and would not tell.
pub(crate) fn naming(error: anyhow::Error, model: &Path) -> anyhow::Error {
    let is_of_a_run = error.chain().filter_map(of_a_model).any(|error| {
        matches!(
            error,
            Error::NonFinite { .. }
                | Error::TokenOutOfRange { .. }
                | Error::Routing { .. }
                | Error::Cache(kv_lazy::Error::NonFinite { .. })
        )
    });
    let name = model.display().to_string();
    let mut errors = error.chain().filter_map(of_a_model);
    if errors.any(|error| matches!(error, Error::QuantisedWeights { .. })) {
        return error.context(format!(
            "{name}: --device cpu runs it as it is, `eval structured --method magnitude --ratio 0 --save DIR` writes it in floats"
        ));
    }
    match is_of_a_run && !format!("{error:#}").contains(&name) {
        true => error.context(name),
        false => error,
    }
}

/// What a crate that runs models passes on.
fn of_a_model<'e>(error: &'e (dyn StdError + 'static)) -> Option<&'e Error> {
    if let Some(prune_structured::Error::Model(error)) = error.downcast_ref() {
        return Some(error);
    }
    if let Some(lowrank_eora::Error::Model(error)) = error.downcast_ref() {
        return Some(error);
    }
    if let Some(lm_eval::Error::Model(error)) = error.downcast_ref() {
        return Some(error);
    }
    if let Some(frontier::Error::Model(error)) = error.downcast_ref() {
        return Some(error);
    }
    error.downcast_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_a_run_name_the_model_once_and_others_stay() {
        let token = || Error::TokenOutOfRange { token: 7, vocab: 5 };
        let model = Path::new("a/model");
        let named = |error: anyhow::Error| format!("{:#}", naming(error, model));
        let expected = "a/model: token id 7 is outside the vocabulary of 5 entries";
        for error in [
            anyhow::Error::new(token()),
            prune_structured::Error::Model(token()).into(),
            lowrank_eora::Error::Model(token()).into(),
            lm_eval::Error::from(token()).into(),
            frontier::Error::from(token()).into(),
        ] {
            assert_eq!(named(error), expected);
        }
        let quantised = lm_eval::Error::from(Error::QuantisedWeights {
            tensor: "lm_head.weight".into(),
            stored: "Q4_1".into(),
            dtype: DType::BF16,
            device: candle_core::DeviceLocation::Cuda { gpu_id: 0 },
        });
        let error = named(quantised.into());
        for part in [
            "a/model",
            "--ratio 0 --save",
            "lm_head.weight",
            "Q4_1",
            "bf16",
        ] {
            assert!(error.contains(part), "{error}");
        }
        let named_already = anyhow::Error::new(token()).context("a/model");
        assert_eq!(named(named_already), expected);
        assert_eq!(named(anyhow::anyhow!("--rank: no")), "--rank: no");
        let attention = kv_lazy::Error::NonFinite {
            layer: 3,
            sequence: 0,
            head: 1,
        };
        let error = named(lm_eval::Error::from(Error::from(attention)).into());
        assert!(error.starts_with("a/model: non-finite"), "{error}");
        assert!(error.contains("layer 3"), "{error}");
    }
}
