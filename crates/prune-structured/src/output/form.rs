//! In which shapes a plan is written, and who can load them.

use crate::plan::Plan;
use causal_lm::{Decoder, LinearName, ModelType, Widths};

/// In which shapes a plan is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Form {
    /// Smaller tensors.
    #[default]
    Sliced,
    /// The dense shapes with zeros where units were removed: no smaller, but it opens wherever the dense model does.
    Masked,
}

/// How a pruned checkpoint states its shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Loading {
    /// Through the scalar fields that every runtime reads: `num_attention_heads`,
    /// `num_key_value_heads`, `head_dim`, `intermediate_size` and the architecture's bias flags.
    Stock,
    /// Through per-layer lists, read by causal-lm and by the Python loader in the folder; stock
    /// runtimes refuse the shapes.
    PerLayer,
}

impl Loading {
    /// How `plan` has to be stored.
    ///
    /// Stock needs equal widths in all layers, a slot for every bias, and, because the Llama
    /// config of transformers insists on it, a hidden size that is a multiple of the head count.
    pub fn of(decoder: &Decoder<'_>, plan: &Plan, form: Form) -> Self {
        let biases = NewBiases::of(decoder, plan);
        let llama = decoder.config().model_type == ModelType::Llama;
        let bias_without_slot = !llama && (biases.attention || biases.mlp);
        let refused = || {
            let heads = plan.layers[0].heads.len();
            llama && !decoder.config().hidden.is_multiple_of(heads)
        };
        let shapes_fit = form == Form::Masked || plan.is_uniform() && !refused();
        if shapes_fit && !bias_without_slot {
            Self::Stock
        } else {
            Self::PerLayer
        }
    }
}

/// Which parts of a model get biases that the dense model has none of.
///
/// Biases are per architecture, not per layer: when any layer needs one, all have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NewBiases {
    pub(crate) attention: bool,
    pub(crate) mlp: bool,
}

impl NewBiases {
    pub(crate) fn of(decoder: &Decoder<'_>, plan: &Plan) -> Self {
        let pruned = |differs: fn(&Widths, &Widths) -> bool| {
            plan.compensation.adds_bias()
                && plan
                    .widths()
                    .iter()
                    .zip(&decoder.config().widths)
                    .any(|(now, dense)| differs(now, dense))
        };
        Self {
            attention: pruned(|now, dense| now.heads != dense.heads)
                && !decoder.config().has_bias(LinearName::O),
            mlp: pruned(|now, dense| now.neurons != dense.neurons)
                && !decoder.config().has_bias(LinearName::Down),
        }
    }

    /// Whether this linear gets one. Stock Llama modules have biases on all linears of a half or on
    /// none, so there the others get zeros; elsewhere only the output projection has one.
    pub(super) fn covers(self, loading: Loading, name: LinearName) -> bool {
        let whole_half = loading == Loading::Stock;
        match name {
            LinearName::O => self.attention,
            LinearName::Down => self.mlp,
            LinearName::Q | LinearName::K | LinearName::V => self.attention && whole_half,
            LinearName::Gate | LinearName::Up => self.mlp && whole_half,
        }
    }
}
