//! Neurons with equal states for ever: equitable partitions (lumping, arXiv 2209.07475; bisimulation, arXiv 2110.03726).
//!
//! Two neurons of a class have equal biases, equal input weights, and, for every class, equal sums of the weights that they
//! read from it, in every gate. From equal initial states their states stay equal, so that one of them stands for all.

use crate::{
    error::{Error, Result},
    params::{Param, ParamSet},
    rnn::{Rnn, Role},
};
use std::collections::BTreeMap;

/// The coarsest equitable partition: for every layer the class of each neuron, numbered from 0 by first members. Numbers count
/// as equal when they round to the same multiple of `tolerance` times the largest weight of their matrix.
///
/// As many classes as neurons is what trained networks have; fewer show that weights are shared, and [`quotient`] makes use
/// of it.
///
/// # Errors
/// A tolerance that is not positive.
pub fn equitable_partition(rnn: &Rnn, tolerance: f64) -> Result<Vec<Vec<usize>>> {
    if tolerance.is_nan() || tolerance <= 0.0 {
        return Err(Error::Setting {
            setting: "tolerance",
            reason: format!("{tolerance} is not positive"),
        });
    }
    let config = rnn.config();
    let gates = config.cell.gates();
    let largest = |w: &[f32]| {
        let most = w.iter().fold(0f32, |m, v| m.max(v.abs()));
        f64::from(most.max(f32::MIN_POSITIVE))
    };
    let mut classes: Vec<Vec<usize>> = config.hidden.iter().map(|&n| vec![0; n]).collect();
    loop {
        let before: Vec<usize> = classes.iter().map(|c| count(c)).collect();
        for (l, &n) in config.hidden.iter().enumerate() {
            let layer = rnn.layer(l);
            let units = [layer.w_ih, layer.w_hh, layer.bias].map(|w| tolerance * largest(w));
            let round = |v: f64, unit: f64| (v / unit).round() as i64;
            let sizes = sizes(&classes[l]);
            let key = |i: usize| {
                let mut key = vec![classes[l][i] as i64];
                // A class of one neuron cannot be divided: in trained networks all are after the first pass.
                if sizes[classes[l][i]] == 1 {
                    return key;
                }
                for g in 0..gates {
                    let row = g * n + i;
                    key.push(round(f64::from(layer.bias[row]), units[2]));
                    let w_ih = &layer.w_ih[row * layer.width..(row + 1) * layer.width];
                    let from_below = match l.checked_sub(1) {
                        None => w_ih.iter().map(|&w| f64::from(w)).collect(),
                        Some(below) => sums(w_ih, &classes[below]),
                    };
                    key.extend(from_below.into_iter().map(|v| round(v, units[0])));
                    let own = sums(&layer.w_hh[row * n..(row + 1) * n], &classes[l]);
                    key.extend(own.into_iter().map(|v| round(v, units[1])));
                }
                if let Some(bias) = layer.candidate_bias {
                    key.push(round(f64::from(bias[i]), units[2]));
                }
                key
            };
            let keys: Vec<Vec<i64>> = (0..n).map(key).collect();
            let mut numbers = BTreeMap::new();
            for (i, key) in keys.iter().enumerate() {
                let next = numbers.len();
                classes[l][i] = *numbers.entry(key).or_insert(next);
            }
        }
        if classes.iter().map(|c| count(c)).eq(before.iter().copied()) {
            return Ok(classes);
        }
    }
}

fn count(classes: &[usize]) -> usize {
    classes.iter().max().map_or(0, |c| c + 1)
}

/// Members of each class.
fn sizes(classes: &[usize]) -> Vec<usize> {
    let mut sizes = vec![0; count(classes)];
    classes.iter().for_each(|&c| sizes[c] += 1);
    sizes
}

/// Sum of the weights of each class.
fn sums(row: &[f32], classes: &[usize]) -> Vec<f64> {
    let mut sums = vec![0.0; count(classes)];
    for (w, &c) in row.iter().zip(classes) {
        sums[c] += f64::from(*w);
    }
    sums
}

/// The network with one neuron for each class, which says what all of them said.
///
/// # Errors
/// Classes that are not numbered from 0 without gaps, or of another network.
pub fn quotient(rnn: &Rnn, classes: &[Vec<usize>]) -> Result<Rnn> {
    let config = rnn.config();
    let sizes: Vec<usize> = classes.iter().map(Vec::len).collect();
    let gaps = |c: &Vec<usize>| (0..count(c)).any(|k| !c.contains(&k));
    if sizes != config.hidden || classes.iter().any(gaps) {
        return Err(Error::Shape {
            tensor: "classes".into(),
            expected: format!(
                "for layers of {:?}, numbered from 0 without gaps",
                config.hidden
            ),
            found: sizes,
        });
    }
    let gates = config.cell.gates();
    // The first member of each class stands for it.
    let members: Vec<Vec<usize>> = classes
        .iter()
        .map(|of| {
            let first = |k| of.iter().position(|&c| c == k).unwrap_or(0);
            (0..count(of)).map(first).collect()
        })
        .collect();
    let tiled = |l: usize| -> Vec<usize> {
        let n = config.hidden[l];
        let gate = |g: usize| members[l].iter().map(move |&i| g * n + i);
        (0..gates).flat_map(gate).collect()
    };
    let mut smaller = config.clone();
    smaller.hidden = members.iter().map(Vec::len).collect();
    let params = rnn.roles().into_iter().zip(rnn.params().iter());
    let params = params.map(|(role, p)| {
        let all = |n: usize| (0..n).collect::<Vec<usize>>();
        let (rows, read) = match role {
            Role::Embedding | Role::OutputBias => (all(p.shape[0]), None),
            Role::InputWeight(l) => (tiled(l), l.checked_sub(1)),
            Role::RecurrentWeight(l) => (tiled(l), Some(l)),
            Role::Bias(l) => (tiled(l), None),
            Role::CandidateBias(l) => (members[l].clone(), None),
            Role::OutputWeight => (all(p.shape[0]), Some(classes.len() - 1)),
        };
        let width = p.shape.get(1).copied().unwrap_or(1);
        let data: Vec<f32> = rows
            .iter()
            .flat_map(|&r| {
                let row = &p.data[r * width..(r + 1) * width];
                match read {
                    None => row.to_vec(),
                    Some(l) => sums(row, &classes[l])
                        .into_iter()
                        .map(|v| v as f32)
                        .collect(),
                }
            })
            .collect();
        let mut shape = vec![rows.len()];
        if p.shape.len() == 2 {
            shape.push(data.len() / rows.len());
        }
        Param {
            name: p.name.clone(),
            shape,
            data,
        }
    });
    Rnn::from_params(smaller, ParamSet::new(params.collect()))
}
