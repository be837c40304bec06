//! The flags that say how the weights of a model are run.

use std::path::PathBuf;

use causal_lm::Arithmetic;
use clap::{Args, ValueEnum};

use crate::settings::Weights;

#[derive(Args)]
pub(super) struct WeightArgs {
    /// Arithmetic of weights that are stored in fewer than 32 bits [default: f32, for generate int8]
    #[arg(long, value_enum, value_name = "NAME")]
    arithmetic: Option<ArithmeticArg>,
    /// LoRA adapter to add to the model: a PEFT folder or a GGUF file
    #[arg(long, value_name = "PATH")]
    adapter: Option<PathBuf>,
    /// Factor on what the adapter adds [default: 1]
    #[arg(long, value_name = "X", requires = "adapter", allow_negative_numbers = true, value_parser = super::values::finite)]
    adapter_scale: Option<f32>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ArithmeticArg {
    /// Weights as they decode times f32 activations
    F32,
    /// Activations rounded to 8 bits, one scale for 32 columns: faster, with about 0.5 % error of an output
    Int8,
    /// From 16 tokens at once on, weights and activations rounded to bf16, sums in f32: faster where the processor has
    /// AVX512-BF16, the same results and slower than f32 elsewhere
    Bf16,
}

/// Arithmetic of a model to calibrate on.
#[derive(Clone, Copy, Default, ValueEnum)]
pub(super) enum CalibrationArithmetic {
    /// Weights and activations in f32
    #[default]
    F32,
    /// Weights that are stored in fewer than 32 bits and activations rounded to bf16, sums in f32: faster where the
    /// processor has AVX512-BF16, the same results and slower than f32 elsewhere
    Bf16,
}

impl CalibrationArithmetic {
    /// Without an adapter.
    pub(super) fn weights(self) -> Weights {
        let arithmetic = match self {
            Self::F32 => Arithmetic::F32,
            Self::Bf16 => Arithmetic::Bf16,
        };
        Weights {
            arithmetic,
            ..Weights::default()
        }
    }
}

impl WeightArgs {
    /// With this arithmetic where none was asked for.
    pub(super) fn or(&self, default: Arithmetic) -> Weights {
        Weights {
            arithmetic: match self.arithmetic {
                None => default,
                Some(ArithmeticArg::F32) => Arithmetic::F32,
                Some(ArithmeticArg::Int8) => Arithmetic::Int8,
                Some(ArithmeticArg::Bf16) => Arithmetic::Bf16,
            },
            adapter: self.adapter.clone(),
            adapter_scale: self.adapter_scale,
        }
    }
}
