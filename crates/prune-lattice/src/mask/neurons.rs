//! Whole neurons: masking them everywhere, and removing them for smaller tensors.
//!
//! A neuron masked in `W_hh` alone still integrates its input and feeds the read-out. Masked everywhere (its rows of `W_ih`
//! and `W_hh`, its biases, its columns in `W_hh` and in the layer above or the read-out) its state stays zero in every cell,
//! so that it can be removed without changing the function.

use super::{Mask, MaskSet};
use crate::{
    error::{Error, Result},
    order::bits::BitMatrix,
    params::{Param, ParamSet},
    rnn::{Rnn, Role},
};

/// For every layer, whether each neuron stays.
fn check(rnn: &Rnn, keep: &[Vec<bool>]) -> Result<()> {
    let sizes: Vec<usize> = keep.iter().map(Vec::len).collect();
    if sizes != rnn.config().hidden {
        return Err(Error::Shape {
            tensor: "kept neurons".into(),
            expected: format!(
                "one flag per neuron of the layers {:?}",
                rnn.config().hidden
            ),
            found: sizes,
        });
    }
    match keep.iter().position(|layer| !layer.contains(&true)) {
        Some(layer) => Err(Error::Setting {
            setting: "kept neurons",
            reason: format!("none in layer {layer}"),
        }),
        None => Ok(()),
    }
}

/// Which rows and columns of a parameter stay.
fn axes(rnn: &Rnn, role: Role, shape: &[usize], keep: &[Vec<bool>]) -> (Vec<bool>, Vec<bool>) {
    let gates = rnn.config().cell.gates();
    let all = |n: usize| vec![true; n];
    let tiled = |layer: usize| keep[layer].repeat(gates);
    match role {
        Role::Embedding | Role::OutputBias => {
            (all(shape[0]), all(shape.get(1).copied().unwrap_or(1)))
        }
        Role::InputWeight(l) => (
            tiled(l),
            if l == 0 {
                all(shape[1])
            } else {
                keep[l - 1].clone()
            },
        ),
        Role::RecurrentWeight(l) => (tiled(l), keep[l].clone()),
        Role::Bias(l) => (tiled(l), all(1)),
        Role::CandidateBias(l) => (keep[l].clone(), all(1)),
        Role::OutputWeight => (all(shape[0]), keep[keep.len() - 1].clone()),
    }
}

/// Masks that take the neurons not kept out of the whole network, biases included.
///
/// # Errors
/// The flags do not fit the layers, or a layer would lose all neurons.
pub fn neuron_masks(rnn: &Rnn, keep: &[Vec<bool>]) -> Result<MaskSet> {
    check(rnn, keep)?;
    let mut set = MaskSet::default();
    for (role, p) in rnn.roles().into_iter().zip(rnn.params().iter()) {
        let (rows, cols) = axes(rnn, role, &p.shape, keep);
        if rows.iter().chain(&cols).all(|&k| k) {
            continue;
        }
        let mask = match p.shape.len() {
            1 => Mask::of_bias(&rows),
            _ => Mask::of_matrix(BitMatrix::from_fn(rows.len(), cols.len(), |i, j| {
                rows[i] && cols[j]
            })),
        };
        set.insert(p.name.clone(), mask);
    }
    Ok(set)
}

/// The network without the neurons that are not kept: smaller tensors, the same function as the network masked with
/// [`neuron_masks`] (up to rounding).
///
/// # Errors
/// The flags do not fit the layers, or a layer would lose all neurons.
pub fn hard_remove(rnn: &Rnn, keep: &[Vec<bool>]) -> Result<Rnn> {
    check(rnn, keep)?;
    let mut config = rnn.config().clone();
    config.hidden = keep
        .iter()
        .map(|layer| layer.iter().filter(|&&k| k).count())
        .collect();
    let params = rnn
        .roles()
        .into_iter()
        .zip(rnn.params().iter())
        .map(|(role, p)| {
            let (rows, cols) = axes(rnn, role, &p.shape, keep);
            let width = cols.len();
            let data = (0..rows.len())
                .filter(|&i| rows[i])
                .flat_map(|i| {
                    (0..width)
                        .filter(|&j| cols[j])
                        .map(move |j| p.data[i * width + j])
                })
                .collect::<Vec<f32>>();
            let count = |flags: &[bool]| flags.iter().filter(|&&k| k).count();
            let mut shape = vec![count(&rows)];
            if p.shape.len() == 2 {
                shape.push(count(&cols));
            }
            Param {
                name: p.name.clone(),
                shape,
                data,
            }
        })
        .collect();
    Rnn::from_params(config, ParamSet::new(params))
}

/// Masks of a network as masks of the smaller one that [`hard_remove`] or merging makes of it.
///
/// # Errors
/// The flags do not fit the layers, or a layer would lose all neurons.
pub fn restrict_masks(rnn: &Rnn, masks: &MaskSet, keep: &[Vec<bool>]) -> Result<MaskSet> {
    check(rnn, keep)?;
    let mut set = MaskSet::default();
    for (role, p) in rnn.roles().into_iter().zip(rnn.params().iter()) {
        let Some(mask) = masks.get(&p.name) else {
            continue;
        };
        let (rows, cols) = axes(rnn, role, &p.shape, keep);
        let set_ones =
            |flags: &[bool]| -> Vec<usize> { (0..flags.len()).filter(|&i| flags[i]).collect() };
        let (rows, cols, bits) = (set_ones(&rows), set_ones(&cols), mask.keep());
        let small = match p.shape.len() {
            1 => {
                let flags: Vec<bool> = rows.iter().map(|&i| bits.get(0, i)).collect();
                Mask::of_bias(&flags)
            }
            _ => Mask::of_matrix(BitMatrix::from_fn(rows.len(), cols.len(), |i, j| {
                bits.get(rows[i], cols[j])
            })),
        };
        if small.pruned() > 0 {
            set.insert(p.name.clone(), small);
        }
    }
    Ok(set)
}
