//! Which tensors a pruned checkpoint holds: names, shapes and where each comes from.

use super::form::{Form, Loading, NewBiases};
use crate::plan::Plan;
use crate::stats::Part;
use causal_lm::names::Module;
use causal_lm::{Decoder, LinearName};
use tensor_io::TensorSpec;

/// A tensor of the output.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub(crate) spec: TensorSpec,
    /// Name in the source.
    pub(crate) from: String,
    pub(crate) source: Source,
}

/// Where an output tensor comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A tensor of the source, unchanged.
    Copy,
    /// The weight of a module, sliced or masked, and compensated where it is an output projection.
    Weight(usize, &'static Module),
    /// The bias of a module, sliced, masked or compensated, or made anew.
    Bias(usize, &'static Module),
}

/// All tensors of the output, those of the source in their order, each weight followed by its bias.
pub(crate) fn outputs(
    decoder: &Decoder<'_>,
    plan: &Plan,
    form: Form,
) -> tensor_io::Result<Vec<Output>> {
    let new_biases = NewBiases::of(decoder, plan);
    let loading = Loading::of(decoder, plan, form);
    let (config, names) = (decoder.config(), decoder.config().names);
    let moved = moves(decoder, plan, loading);
    let keeps_extras = keeps_extras(decoder, plan, form);
    let renamed = |name: &str| match moved {
        _ if !keeps_extras && names.is_extra(name) => None,
        false => Some(name.to_string()),
        true => names.alone(name),
    };
    let mut outputs = Vec::new();
    for name in decoder.checkpoint().names() {
        let info = decoder.checkpoint().info(name)?;
        let Some(new_name) = renamed(name) else {
            continue;
        };
        let mut add = |source, from: &str, name: String, shape: Vec<usize>| {
            outputs.push(Output {
                spec: TensorSpec::new(name, info.dtype, shape),
                from: from.into(),
                source,
            });
        };
        let Some((layer, module, is_weight)) = names.parse_module(name) else {
            // A head norm of a block whose attention is removed has nothing left to normalise.
            let orphan = names.parse_block(name).is_some_and(|(layer, path)| {
                let table = names.table();
                let norm = |module| {
                    path.strip_prefix(module)
                        .is_some_and(|p| p.starts_with('.'))
                };
                (norm(table.q_norm) || norm(table.k_norm))
                    && form == Form::Sliced
                    && plan.layers[layer].heads.is_empty()
            });
            if !orphan {
                add(Source::Copy, name, new_name, info.shape.clone());
            }
            continue;
        };
        let dense = config.module_shape(layer, module);
        let sliced = sliced_shape(decoder, plan, layer, module);
        let shape = match form {
            Form::Masked => dense,
            Form::Sliced => sliced,
        };
        let source = |source| {
            if sliced == dense {
                Source::Copy
            } else {
                source
            }
        };
        // The bias of an output projection stays when all its columns are removed.
        let rows = match shape {
            Some([out, _]) => out,
            None if module.is_output() => config.hidden,
            None => continue,
        };
        if !is_weight {
            add(
                source(Source::Bias(layer, module)),
                name,
                new_name,
                vec![rows],
            );
            continue;
        }
        if let Some(shape) = shape {
            add(
                source(Source::Weight(layer, module)),
                name,
                new_name,
                shape.to_vec(),
            );
        }
        let bias = names.bias(layer, module);
        if new_biases.covers(loading, module)
            && !decoder.checkpoint().contains(&bias)
            && let Some(new_name) = renamed(&bias)
        {
            add(Source::Bias(layer, module), &bias, new_name, vec![rows]);
        }
    }
    Ok(outputs)
}

/// Whether the decoder goes into a folder of its own, whose names have its own prefix: where widths differ by layer.
fn moves(decoder: &Decoder<'_>, plan: &Plan, loading: Loading) -> bool {
    decoder.config().nested && loading == Loading::PerLayer && !plan.is_identity(decoder)
}

/// Whether tensors beside the decoder that share its widths stay ([`Names::is_extra`](causal_lm::names::Names::is_extra)): they
/// would not fit once these change.
pub(crate) fn keeps_extras(decoder: &Decoder<'_>, plan: &Plan, form: Form) -> bool {
    let loading = Loading::of(decoder, plan, form);
    plan.is_identity(decoder) || form == Form::Masked && !moves(decoder, plan, loading)
}

/// Which half of a block a module belongs to.
pub(crate) fn part_of(module: &Module) -> Part {
    match module.is_attention() {
        true => Part::Attention,
        false => Part::Mlp,
    }
}

/// `[out, in]` of a module after slicing, `None` when it is removed altogether.
pub(crate) fn sliced_shape(
    decoder: &Decoder<'_>,
    plan: &Plan,
    layer: usize,
    module: &Module,
) -> Option<[usize; 2]> {
    let [out, input] = decoder.config().module_shape(layer, module)?;
    let kept = kept_features(decoder, plan, layer, module).len();
    let shape = if module.is_output() {
        [out, kept]
    } else {
        [kept, input]
    };
    (kept > 0).then_some(shape)
}

/// Stored rows, or for output projections columns, of a module that a plan keeps.
pub fn kept_features(
    decoder: &Decoder<'_>,
    plan: &Plan,
    layer: usize,
    module: &Module,
) -> Vec<usize> {
    let config = decoder.config();
    match module.is_output() {
        true => kept_of(decoder, plan, layer, module.parts[0]),
        false => config.stored_rows(layer, module, |part| kept_of(decoder, plan, layer, part)),
    }
}

/// Rows, or for output projections columns, of a linear that a plan keeps.
pub(crate) fn kept_of(
    decoder: &Decoder<'_>,
    plan: &Plan,
    layer: usize,
    name: LinearName,
) -> Vec<usize> {
    let attention = &decoder.config().attention[layer];
    let of_heads = |heads: &[usize], d: usize| {
        let rows = heads.iter().flat_map(|head| head * d..(head + 1) * d);
        rows.collect()
    };
    let (plan, d) = (&plan.layers[layer], attention.head_dim);
    match name {
        LinearName::Q if attention.gated => of_heads(&plan.heads, 2 * d),
        LinearName::Q | LinearName::O => of_heads(&plan.heads, d),
        LinearName::K | LinearName::V => of_heads(&plan.kv_heads, d),
        LinearName::Gate | LinearName::Up | LinearName::Down => plan.neurons.clone(),
        // Delta nets and the expert that every token passes through are not pruned.
        other => {
            let shape = decoder.config().linear_shape(layer, other);
            let width = shape.map_or(0, |[rows, columns]| match other.is_output() {
                true => columns,
                false => rows,
            });
            (0..width).collect()
        }
    }
}
