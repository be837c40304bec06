//! Which tensors a pruned checkpoint holds: names, shapes and where each comes from.

use super::form::{Form, Loading, NewBiases};
use crate::plan::Plan;
use crate::stats::Part;
use causal_lm::names::parse_block;
use causal_lm::{Decoder, LinearName};
use tensor_io::TensorSpec;

/// A tensor of the output.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub(crate) spec: TensorSpec,
    pub(crate) source: Source,
}

/// Where an output tensor comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The tensor of the same name, unchanged.
    Copy,
    /// The weight of a linear, sliced or masked, and compensated where it is an output projection.
    Weight(usize, LinearName),
    /// The bias of a linear, sliced, masked or compensated, or made anew.
    Bias(usize, LinearName),
}

/// All tensors of the output, those of the source in their order, each weight followed by its bias.
pub(crate) fn outputs(
    decoder: &Decoder<'_>,
    plan: &Plan,
    form: Form,
) -> tensor_io::Result<Vec<Output>> {
    let new_biases = NewBiases::of(decoder, plan);
    let loading = Loading::of(decoder, plan, form);
    let mut outputs = Vec::new();
    for name in decoder.checkpoint().names() {
        let info = decoder.checkpoint().info(name)?;
        let spec = |name: &str, shape: Vec<usize>| TensorSpec::new(name, info.dtype, shape);
        let Some((layer, linear, is_weight)) = linear_of(name) else {
            // A head norm of a block whose attention went has nothing left to normalise.
            let orphan = parse_block(name).is_some_and(|(layer, path)| {
                path.starts_with("self_attn.")
                    && form == Form::Sliced
                    && plan.layers[layer].heads.is_empty()
            });
            if !orphan {
                outputs.push(Output {
                    spec: spec(name, info.shape.clone()),
                    source: Source::Copy,
                });
            }
            continue;
        };
        let shape = match form {
            Form::Masked => decoder.config().linear_shape(layer, linear),
            Form::Sliced => sliced_shape(decoder, plan, layer, linear),
        };
        let dense = decoder.config().linear_shape(layer, linear);
        let untouched = sliced_shape(decoder, plan, layer, linear) == dense;
        let source = |source| if untouched { Source::Copy } else { source };
        // The bias of an output projection stays when all its columns go.
        let rows = match shape {
            Some([out, _]) => out,
            None if linear.is_output() => decoder.config().hidden,
            None => continue,
        };
        if !is_weight {
            let source = source(Source::Bias(layer, linear));
            outputs.push(Output {
                spec: spec(name, vec![rows]),
                source,
            });
            continue;
        }
        if let Some(shape) = shape {
            let source = source(Source::Weight(layer, linear));
            outputs.push(Output {
                spec: spec(name, shape.to_vec()),
                source,
            });
        }
        let bias = linear.bias(layer);
        if new_biases.covers(loading, linear) && !decoder.checkpoint().contains(&bias) {
            let source = Source::Bias(layer, linear);
            outputs.push(Output {
                spec: spec(&bias, vec![rows]),
                source,
            });
        }
    }
    Ok(outputs)
}

/// The linear that a tensor belongs to, and whether it is its weight.
pub(crate) fn linear_of(name: &str) -> Option<(usize, LinearName, bool)> {
    let (layer, path) = parse_block(name)?;
    let (module, kind) = path.rsplit_once('.')?;
    let linear = LinearName::ALL
        .into_iter()
        .find(|linear| linear.path() == module)?;
    Some((layer, linear, kind == "weight"))
}

/// Which half of a block a linear belongs to.
pub(crate) fn part_of(name: LinearName) -> Part {
    match name {
        LinearName::Q | LinearName::K | LinearName::V | LinearName::O => Part::Attention,
        LinearName::Gate | LinearName::Up | LinearName::Down => Part::Mlp,
    }
}

/// `[out, in]` of a linear after slicing, `None` when it goes altogether.
pub(crate) fn sliced_shape(
    decoder: &Decoder<'_>,
    plan: &Plan,
    layer: usize,
    name: LinearName,
) -> Option<[usize; 2]> {
    let [out, input] = decoder.config().linear_shape(layer, name)?;
    let kept = kept_features(decoder, plan, layer, name).len();
    let shape = if name.is_output() {
        [out, kept]
    } else {
        [kept, input]
    };
    (kept > 0).then_some(shape)
}

/// Rows, or for output projections columns, of a linear that a plan keeps.
pub(crate) fn kept_features(
    decoder: &Decoder<'_>,
    plan: &Plan,
    layer: usize,
    name: LinearName,
) -> Vec<usize> {
    let d = decoder.config().head_dim;
    let of_heads = |heads: &[usize]| {
        heads
            .iter()
            .flat_map(|head| head * d..(head + 1) * d)
            .collect()
    };
    let plan = &plan.layers[layer];
    match name {
        LinearName::Q | LinearName::O => of_heads(&plan.heads),
        LinearName::K | LinearName::V => of_heads(&plan.kv_heads),
        LinearName::Gate | LinearName::Up | LinearName::Down => plan.neurons.clone(),
    }
}
