//! Which neurons an input reaches, and which reach an output.

use crate::rnn::{Rnn, Role};

/// Paths of nonzero weights through a neuron.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Liveness {
    /// A path from an input leads to it.
    pub fed: bool,
    /// A path from it leads to an output.
    pub heard: bool,
}

/// The paths through every neuron, layer by layer; masks must have been applied to the weights.
pub fn live_neurons(rnn: &Rnn) -> Vec<Vec<Liveness>> {
    let config = rnn.config();
    let gates = config.cell.gates();
    let mut first = Vec::new();
    let mut total = 0;
    for &n in &config.hidden {
        first.push(total);
        total += n;
    }
    // Neurons in one row of numbers; targets of each, and sources.
    let (mut targets, mut sources) = (vec![Vec::new(); total], vec![Vec::new(); total]);
    let mut fed = vec![false; total];
    for (l, &n) in config.hidden.iter().enumerate() {
        let layer = rnn.layer(l);
        let reads = |w: &[f32], i: usize, j: usize, cols: usize| {
            (0..gates).any(|g| w[(g * n + i) * cols + j] != 0.0)
        };
        for i in 0..n {
            let mut connect = |j: usize| {
                targets[j].push(first[l] + i);
                sources[first[l] + i].push(j);
            };
            for j in (0..n).filter(|&j| reads(layer.w_hh, i, j, n)) {
                connect(first[l] + j);
            }
            for j in (0..layer.width).filter(|&j| reads(layer.w_ih, i, j, layer.width)) {
                match l.checked_sub(1) {
                    Some(below) => connect(first[below] + j),
                    None => fed[i] = true,
                }
            }
        }
    }
    let top = config.hidden.len() - 1;
    let width = config.hidden[top];
    let read_out = rnn.get(Role::OutputWeight);
    let mut heard = vec![false; total];
    for j in 0..width {
        heard[first[top] + j] = read_out[j..].iter().step_by(width).any(|w| *w != 0.0);
    }
    spread(&mut fed, &targets);
    spread(&mut heard, &sources);
    config
        .hidden
        .iter()
        .zip(&first)
        .map(|(&n, &at)| {
            let liveness = |x: usize| Liveness {
                fed: fed[x],
                heard: heard[x],
            };
            (at..at + n).map(liveness).collect()
        })
        .collect()
}

/// Marks everything that can be reached from what is marked.
fn spread(marked: &mut [bool], next: &[Vec<usize>]) {
    let mut open: Vec<usize> = (0..marked.len()).filter(|&x| marked[x]).collect();
    while let Some(x) = open.pop() {
        for &y in &next[x] {
            if !std::mem::replace(&mut marked[y], true) {
                open.push(y);
            }
        }
    }
}
