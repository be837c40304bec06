//! In which shapes a plan is written, and who can load them.

use crate::allocation::accepts_heads;
use crate::plan::Plan;
use causal_lm::names::Module;
use causal_lm::{Decoder, LinearName, Widths};

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
    /// Stock needs equal widths in all layers, a slot for every bias, and a number of heads that the config class of
    /// transformers accepts.
    pub fn of(decoder: &Decoder<'_>, plan: &Plan, form: Form) -> Self {
        let config = decoder.config();
        let biases = NewBiases::of(decoder, plan);
        let bias_without_slot = biases.attention && !config.has_bias_slot(LinearName::O)
            || biases.mlp && !config.has_bias_slot(LinearName::Down);
        let widths = plan.widths();
        let attention_fits = || {
            let heads = |w: &Widths| (w.heads, w.kv_heads);
            let dense = config.widths.iter().map(heads);
            let untouched = widths.iter().map(heads).eq(dense);
            // Layers with a delta net have no attention beside it.
            let of_attention = widths.iter().zip(&config.delta_nets);
            let of_attention = of_attention.filter(|(_, net)| net.is_none());
            let mut kept = of_attention.map(|(widths, _)| heads(widths));
            let equal = kept.next().is_none_or(|first| {
                let fits = first.0 > 0 && accepts_heads(decoder, first.0);
                fits && kept.all(|other| other == first)
            });
            untouched || equal
        };
        // Layers with experts have no MLP beside them.
        let of_mlps = widths.iter().zip(&config.mixtures);
        let mut neurons = of_mlps.filter(|(_, m)| m.is_none()).map(|(w, _)| w.neurons);
        let mlp_fits = match neurons.next() {
            Some(first) => first > 0 && neurons.all(|other| other == first),
            None => true,
        };
        let shapes_fit = form == Form::Masked || mlp_fits && attention_fits();
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

    /// Whether this module gets one. Stock modules have biases on all linears of a half or on none, so there the others
    /// get zeros; elsewhere only the output projection has one.
    pub(super) fn covers(self, loading: Loading, module: &Module) -> bool {
        let half = match module.is_attention() {
            _ if module.is_delta_net() => false,
            true => self.attention,
            false => self.mlp && !module.parts[0].is_shared(),
        };
        half && (module.is_output() || loading == Loading::Stock)
    }
}
