//! Neurons merged into those that are kept: a linear prediction of all states from the kept ones, folded into the weights
//! that read them. The result is a smaller dense network.

use super::{refit::add_constants, solve};
use crate::{
    calibration::{Calibration, Moments, RecordConfig, record_joint},
    data::{Dataset, Examples},
    error::{Error, Result},
    mask::hard_remove,
    names::with,
    rnn::{Rnn, Role, evaluate},
};
use linalg::faer::Mat;
use serde::{Deserialize, Serialize};
use tensor_io::Progress;

/// How neurons are merged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MergeConfig {
    /// Ridge of the regression as a share of the mean variance of the kept neurons.
    pub ridge: f64,
    /// Passes of [`merge_passes`].
    pub passes: usize,
    /// What a later pass records.
    pub recording: RecordConfig,
}

with!(MergeConfig);

impl Default for MergeConfig {
    fn default() -> Self {
        Self {
            ridge: 1e-4,
            passes: 1,
            recording: RecordConfig::default(),
        }
    }
}

/// A prediction `h ≈ M h_K + d` of `n` states from `k` kept ones.
#[derive(Debug, Clone)]
pub struct Prediction {
    /// M, `[n, k]`.
    pub matrix: Mat<f64>,
    /// d, `[n]`.
    pub offset: Vec<f64>,
}

/// Ridge regression of the components `targets` on the components `sources`, centred.
fn regress(
    moments: &Moments,
    targets: &[usize],
    sources: &[usize],
    ridge: f64,
) -> Result<Prediction> {
    let (n, mean) = (moments.dim(), moments.mean());
    let c = moments.covariance();
    let k = sources.len();
    let diagonal = sources.iter().map(|&i| c[i * n + i]).sum::<f64>() / k.max(1) as f64;
    // States that never vary predict nothing; the offset holds them.
    let lambda = (ridge * diagonal).max(f64::MIN_POSITIVE.sqrt());
    let a = Mat::from_fn(k, k, |i, j| {
        c[sources[i] * n + sources[j]] + if i == j { lambda } else { 0.0 }
    });
    let b = Mat::from_fn(k, targets.len(), |i, t| c[sources[i] * n + targets[t]]);
    let matrix = solve(a, b, "states")?.transpose().to_owned();
    let offset = targets
        .iter()
        .enumerate()
        .map(|(t, &target)| {
            let known: f64 = (0..k).map(|i| matrix[(t, i)] * mean[sources[i]]).sum();
            mean[target] - known
        })
        .collect();
    Ok(Prediction { matrix, offset })
}

/// The prediction of all states from the kept ones; kept states predict themselves exactly.
///
/// # Errors
/// The flags do not fit the moments, or keep nothing.
pub fn predict(moments: &Moments, keep: &[bool], config: &MergeConfig) -> Result<Prediction> {
    let kept: Vec<usize> = (0..keep.len()).filter(|&i| keep[i]).collect();
    if keep.len() != moments.dim() || kept.is_empty() {
        return Err(Error::Shape {
            tensor: "kept neurons".into(),
            expected: format!("{} flags, one set at least", moments.dim()),
            found: vec![keep.len(), kept.len()],
        });
    }
    let all: Vec<usize> = (0..keep.len()).collect();
    let mut found = regress(moments, &all, &kept, config.ridge)?;
    for (k, &i) in kept.iter().enumerate() {
        found.offset[i] = 0.0;
        (0..kept.len()).for_each(|j| found.matrix[(i, j)] = f64::from(u8::from(j == k)));
    }
    Ok(found)
}

/// Rows of `w` `[rows, n]` times M, and times d.
fn fold(w: &[f32], p: &Prediction) -> (Vec<f32>, Vec<f32>) {
    let (n, k) = p.matrix.shape();
    let rows = w.len() / n;
    let w = Mat::from_fn(rows, n, |i, j| f64::from(w[i * n + j]));
    let folded = linalg::product(w.as_ref(), p.matrix.as_ref());
    let weights = (0..rows * k)
        .map(|e| folded[(e / k, e % k)] as f32)
        .collect();
    let constant = (0..rows)
        .map(|i| (0..n).map(|j| w[(i, j)] * p.offset[j]).sum::<f64>() as f32)
        .collect();
    (weights, constant)
}

/// Rows of the kept neurons in every gate.
fn kept_rows(w: &[f32], keep: &[bool], cols: usize) -> Vec<f32> {
    let rows = w.chunks_exact(cols).enumerate();
    rows.filter(|(r, _)| keep[r % keep.len()])
        .flat_map(|(_, row)| row.iter().copied())
        .collect()
}

/// The small network whose matrices read the predictions.
fn build(
    rnn: &Rnn,
    keep: &[Vec<bool>],
    layers: &[Prediction],
    read_out: &Prediction,
) -> Result<Rnn> {
    let mut small = hard_remove(rnn, keep)?;
    for (l, keep) in keep.iter().enumerate() {
        let layer = rnn.layer(l);
        let (weights, constant) = fold(&kept_rows(layer.w_hh, keep, layer.hidden), &layers[l]);
        small.set(Role::RecurrentWeight(l), weights);
        add_constants(&mut small, l, true, &constant);
        if let Some(below) = l.checked_sub(1) {
            let rows = kept_rows(layer.w_ih, keep, layer.width);
            let (weights, constant) = fold(&rows, &layers[below]);
            small.set(Role::InputWeight(l), weights);
            add_constants(&mut small, l, false, &constant);
        }
    }
    let (weights, constant) = fold(rnn.get(Role::OutputWeight), read_out);
    small.set(Role::OutputWeight, weights);
    small.add_to(Role::OutputBias, &constant);
    Ok(small)
}

/// The network with only the neurons that are kept, one list of flags a layer; what the others said is predicted from them.
///
/// Equal to [`hard_remove`] where nothing reads the removed neurons, and to the network itself where the removed neurons are
/// affine functions of the kept ones.
///
/// # Errors
/// Flags or a calibration that do not fit the network, or a layer without neurons.
pub fn merge(
    rnn: &Rnn,
    keep: &[Vec<bool>],
    calibration: &Calibration,
    config: &MergeConfig,
) -> Result<Rnn> {
    let shape = rnn.config();
    calibration.check(shape.input.width(), &shape.hidden)?;
    if keep.len() != shape.hidden.len() {
        return Err(Error::Shape {
            tensor: "kept neurons".into(),
            expected: format!("flags for {} layers", shape.hidden.len()),
            found: vec![keep.len()],
        });
    }
    let layers = keep
        .iter()
        .zip(&calibration.layers)
        .map(|(keep, moments)| predict(&moments.after, keep, config))
        .collect::<Result<Vec<_>>>()?;
    let read_out = predict(&calibration.read_out, &keep[keep.len() - 1], config)?;
    build(rnn, keep, &layers, &read_out)
}

/// [`merge`], then again until there were `config.passes`, with all states predicted from those that the small network has when it runs by
/// itself; the pass with the smallest validation loss is returned, with its number (counted from 0).
///
/// # Errors
/// As [`merge`]; examples that do not fit the network; [`Error::Cancelled`].
pub fn merge_passes(
    rnn: &Rnn,
    keep: &[Vec<bool>],
    calibration: &Calibration,
    config: &MergeConfig,
    data: &Dataset,
    progress: &dyn Progress,
) -> Result<(Rnn, usize)> {
    let first = merge(rnn, keep, calibration, config)?;
    let loss = |rnn: &Rnn, on: &Examples| Ok::<_, Error>(evaluate(rnn, on)?.loss);
    let mut best = (loss(&first, &data.valid)?, first.clone(), 0);
    let mut current = first;
    for pass in 1..config.passes {
        let (joint, read_out) =
            record_joint(rnn, &current, &data.train, &config.recording, progress)?;
        let prediction = |moments: &Moments, n: usize| {
            let (all, kept): (Vec<usize>, Vec<usize>) = (0..moments.dim()).partition(|&i| i < n);
            regress(moments, &all, &kept, config.ridge)
        };
        let layers = joint
            .iter()
            .zip(&rnn.config().hidden)
            .map(|(moments, &n)| prediction(moments, n))
            .collect::<Result<Vec<_>>>()?;
        let top = rnn.config().hidden[rnn.config().hidden.len() - 1];
        current = build(rnn, keep, &layers, &prediction(&read_out, top)?)?;
        let found = loss(&current, &data.valid)?;
        if found < best.0 {
            best = (found, current.clone(), pass);
        }
    }
    Ok((best.1, best.2))
}
