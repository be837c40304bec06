//! ReLU neurons that are zero at every step, proved from the weights.
//!
//! Let D be a set of neurons such that for each i in D the bias plus the largest contribution of any input is not positive, and
//! no neuron outside D excites it: `W_hh[i, j] <= 0` for j outside D. States are not negative and begin at zero, so all of D
//! stays at zero for ever, by induction over the steps. The union of two such sets is one, so there is a largest (Knaster and
//! Tarski on subsets); it is found by removing neurons that break the condition until none does.

use crate::{
    cell::Cell,
    error::{Error, Result},
    rnn::{InputKind, Rnn, Role},
};

/// Rounding of a sum in f32, as a share of the sum of magnitudes.
fn slack(terms: usize) -> f64 {
    (terms + 2) as f64 * f64::from(f32::EPSILON)
}

/// Sum of largest contributions and sum of magnitudes.
#[derive(Clone, Copy, Default)]
struct Bound {
    largest: f64,
    magnitude: f64,
}

impl Bound {
    fn add(&mut self, value: f64) {
        self.largest += value;
        self.magnitude += value.abs();
    }
}

/// The largest value of `row · x` over the inputs of the network.
fn input_bound(rnn: &Rnn, row: &[f32], range: Option<(f32, f32)>) -> Result<Bound> {
    match rnn.config().input {
        InputKind::OneHot { .. } => {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let magnitude = row.iter().fold(0f32, |m, w| m.max(w.abs()));
            Ok(Bound {
                largest: f64::from(largest),
                magnitude: f64::from(magnitude),
            })
        }
        InputKind::Embedding { dim, .. } => {
            let mut worst = Bound {
                largest: f64::NEG_INFINITY,
                magnitude: 0.0,
            };
            for symbol in rnn.get(Role::Embedding).chunks_exact(dim) {
                let mut bound = Bound::default();
                let products = symbol.iter().zip(row);
                products.for_each(|(x, w)| bound.add(f64::from(*x) * f64::from(*w)));
                worst.largest = worst.largest.max(bound.largest);
                worst.magnitude = worst.magnitude.max(bound.magnitude);
            }
            Ok(worst)
        }
        InputKind::Dense { .. } => {
            let (low, high) = range.ok_or_else(|| Error::Setting {
                setting: "input range",
                reason:
                    "a network that reads vectors has dead neurons only for inputs in a known range"
                        .into(),
            })?;
            let mut bound = Bound::default();
            for w in row.iter().map(|&w| f64::from(w)) {
                let (a, b) = (w * f64::from(low), w * f64::from(high));
                bound.largest += a.max(b);
                bound.magnitude += a.abs().max(b.abs());
            }
            Ok(bound)
        }
    }
}

/// The neurons of a ReLU network that are zero at every step of every input, starting from zero states. `range` bounds the
/// components of input vectors; networks that read symbols do not need it.
///
/// # Errors
/// Another cell, or a network that reads vectors without a range.
pub fn dead_neurons(rnn: &Rnn, range: Option<(f32, f32)>) -> Result<Vec<Vec<bool>>> {
    let config = rnn.config();
    if config.cell != Cell::Relu {
        return Err(Error::Setting {
            setting: "dead neurons",
            reason: format!("states of {} cells are not zero for ever", config.cell),
        });
    }
    let mut dead: Vec<Vec<bool>> = Vec::new();
    for (l, &n) in config.hidden.iter().enumerate() {
        let layer = rnn.layer(l);
        let mut quiet = Vec::with_capacity(n);
        for (i, row) in layer.w_ih.chunks_exact(layer.width).enumerate() {
            let bias = f64::from(layer.bias[i]);
            quiet.push(match l.checked_sub(1) {
                None => {
                    let bound = input_bound(rnn, row, range)?;
                    let magnitude = bound.magnitude + bias.abs();
                    bias + bound.largest + slack(row.len()) * magnitude <= 0.0
                }
                // States below are not negative and have no upper bound.
                Some(below) => {
                    let excites = |(w, dead): (&f32, &bool)| *w > 0.0 && !dead;
                    bias <= 0.0 && !row.iter().zip(&dead[below]).any(excites)
                }
            });
        }
        let mut changed = true;
        while changed {
            changed = false;
            for i in (0..n).filter(|&i| quiet[i]).collect::<Vec<_>>() {
                let row = &layer.w_hh[i * n..(i + 1) * n];
                if row.iter().zip(&quiet).any(|(w, quiet)| *w > 0.0 && !quiet) {
                    quiet[i] = false;
                    changed = true;
                }
            }
        }
        dead.push(quiet);
    }
    Ok(dead)
}
