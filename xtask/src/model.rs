//! The decoder that a suite evaluates.

use anyhow::{Context, Result};
use candle_core::DType;
use causal_lm::{Decoder, Execution};
use tensor_io::Checkpoint;

use crate::settings::Settings;

/// A decoder that multiplies with weights as they are stored. It computes in f32 on CPUs; on GPUs in bf16, with decoded weights.
pub(crate) fn decoder<'a>(common: &Settings, checkpoint: &'a Checkpoint) -> Result<Decoder<'a>> {
    Ok(decoded(common, checkpoint)?.packed(Execution::new(common.weights.arithmetic)))
}

/// A decoder with weights as tensors, to calibrate on and to change: in f32 on CPUs, in bf16 on GPUs.
pub(crate) fn decoded<'a>(common: &Settings, checkpoint: &'a Checkpoint) -> Result<Decoder<'a>> {
    let device = common.device.open()?;
    let dtype = match device.is_cpu() {
        true => DType::F32,
        false => DType::BF16,
    };
    Decoder::new(checkpoint, dtype, &device).with_context(|| checkpoint.dir().display().to_string())
}
