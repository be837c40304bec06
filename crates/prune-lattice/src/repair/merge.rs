//! Neurons merged into those that are kept: a linear prediction of all states from the kept ones, folded into the weights
//! that read them. The result is a smaller dense network.

use super::{by_support, check_ridge, refit::add_constants, solve};
use crate::{
    calibration::{Calibration, Moments, RecordConfig, record_joint},
    data::{Dataset, Examples},
    error::{Error, Result},
    mask::{Mask, MaskSet, hard_remove},
    names::with,
    prune::PruneContext,
    rnn::{Rnn, Role, evaluate},
};
use linalg::faer::Mat;
use serde::{Deserialize, Serialize};
use tensor_io::Progress;

/// How neurons are merged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct MergeConfig {
    /// Ridge of the regression as a share of the mean variance of the kept neurons: finite and not negative.
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
    let lambda = (ridge * diagonal).max(f64::MIN_POSITIVE.sqrt());
    // States that never vary predict nothing; the offset holds them. What rounding leaves of their covariances is no matrix of
    // any states, and need not be positive definite.
    let varying: Vec<usize> = (0..k)
        .filter(|&i| !moments.is_constant(sources[i]))
        .collect();
    let mut matrix: Mat<f64> = Mat::zeros(targets.len(), k);
    if !varying.is_empty() {
        let source = |i: usize| sources[varying[i]];
        let a = Mat::from_fn(varying.len(), varying.len(), |i, j| {
            c[source(i) * n + source(j)] + if i == j { lambda } else { 0.0 }
        });
        let b = Mat::from_fn(varying.len(), targets.len(), |i, t| {
            c[source(i) * n + targets[t]]
        });
        let solved = solve(a, b, "states")?;
        for (i, &column) in varying.iter().enumerate() {
            (0..targets.len()).for_each(|t| matrix[(t, column)] = solved[(i, t)]);
        }
    }
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
/// The flags do not fit the moments, or keep nothing; a ridge that is negative or not finite.
pub fn predict(moments: &Moments, keep: &[bool], config: &MergeConfig) -> Result<Prediction> {
    check_ridge(config.ridge)?;
    let kept = numbers(keep);
    if keep.len() != moments.dim() || kept.is_empty() {
        return Err(Error::Shape {
            tensor: "kept neurons".into(),
            expected: format!("{} flags, one set at least", moments.dim()),
            found: vec![keep.len(), kept.len()],
        });
    }
    predict_from(moments, &kept, &kept, config.ridge)
}

/// The prediction of all states as a matrix over the `kept` ones, of which only `sources` are used.
fn predict_from(
    moments: &Moments,
    kept: &[usize],
    sources: &[usize],
    ridge: f64,
) -> Result<Prediction> {
    let all: Vec<usize> = (0..moments.dim()).collect();
    let mut found = regress(moments, &all, sources, ridge)?;
    for (k, &i) in sources.iter().enumerate() {
        found.offset[i] = 0.0;
        (0..sources.len()).for_each(|j| found.matrix[(i, j)] = f64::from(u8::from(j == k)));
    }
    Ok(found.spread(kept, sources))
}

/// The same from joint moments of the states of two networks, the second of which has the `kept` neurons alone: the states of
/// the first are predicted from those of the second.
fn predict_jointly(
    moments: &Moments,
    kept: &[usize],
    sources: &[usize],
    ridge: f64,
) -> Result<Prediction> {
    let n = moments.dim() - kept.len();
    let all: Vec<usize> = (0..n).collect();
    let places = (0..kept.len()).filter(|&k| sources.contains(&kept[k]));
    let of_second: Vec<usize> = places.map(|k| n + k).collect();
    Ok(regress(moments, &all, &of_second, ridge)?.spread(kept, sources))
}

/// The neurons whose flags are set.
pub(crate) fn numbers(flags: &[bool]) -> Vec<usize> {
    (0..flags.len()).filter(|&i| flags[i]).collect()
}

impl Prediction {
    /// With a column for each of `kept`, zero for those that are no source.
    fn spread(self, kept: &[usize], sources: &[usize]) -> Self {
        if kept == sources {
            return self;
        }
        let mut matrix = Mat::zeros(self.matrix.nrows(), kept.len());
        for (k, source) in sources.iter().enumerate() {
            if let Ok(to) = kept.binary_search(source) {
                matrix.col_mut(to).copy_from(self.matrix.col(k));
            }
        }
        Self { matrix, ..self }
    }
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

/// Predicts a layer's states over the kept neurons, from sources among them.
type Predict = fn(&Moments, &[usize], &[usize], f64) -> Result<Prediction>;

/// How the states of every layer, and what the read-out sees, are predicted.
struct Predictions<'a> {
    how: Predict,
    layers: &'a [&'a Moments],
    read_out: &'a Moments,
    /// The neurons that stay, of each layer.
    kept: &'a [Vec<usize>],
    ridge: f64,
}

/// A matrix that reads states, `[rows, n]`, of which some rows stay.
struct Reader<'a> {
    w: &'a [f32],
    of_rows: usize,
    rows: Vec<usize>,
    /// What it reads: moments of the states, and the neurons that stay.
    moments: &'a Moments,
    kept: &'a [usize],
    /// The entries that exist.
    within: Option<&'a Mask>,
}

impl Reader<'_> {
    /// The rows over the kept neurons, and what is added to their biases. Rows that read the same neurons share a prediction.
    fn fold(&self, predictions: &Predictions<'_>) -> Result<(Vec<f32>, Vec<f32>)> {
        let k = self.kept.len();
        let n = self.w.len() / self.of_rows;
        let row = |r: usize| &self.w[r * n..(r + 1) * n];
        let groups = by_support(self.within.map(Mask::keep), &self.rows);
        let mut weights = vec![0.0; self.rows.len() * k];
        let mut constants = vec![0.0; self.rows.len()];
        for places in groups {
            let exists = |j: &usize| {
                let first = self.rows[places[0]];
                self.within.is_none_or(|mask| mask.keep().get(first, *j))
            };
            let sources: Vec<usize> = self.kept.iter().copied().filter(exists).collect();
            let Predictions { how, ridge, .. } = predictions;
            let prediction = how(self.moments, self.kept, &sources, *ridge)?;
            let w: Vec<f32> = places
                .iter()
                .flat_map(|&at| row(self.rows[at]).iter().copied())
                .collect();
            let (folded, constant) = fold(&w, &prediction);
            for (p, &at) in places.iter().enumerate() {
                weights[at * k..(at + 1) * k].copy_from_slice(&folded[p * k..(p + 1) * k]);
                constants[at] = constant[p];
            }
        }
        Ok((weights, constants))
    }
}

/// The small network whose matrices read the predictions.
fn build(
    rnn: &Rnn,
    keep: &[Vec<bool>],
    predictions: &Predictions<'_>,
    within: Option<&MaskSet>,
) -> Result<Rnn> {
    let mut small = hard_remove(rnn, keep)?;
    let gates = rnn.config().cell.gates();
    let kept = predictions.kept;
    let reader = |role: Role, rows: &[usize], moments, read: usize| {
        let name = rnn.name_of(role);
        Reader {
            w: rnn.get(role),
            of_rows: match role {
                Role::OutputWeight => rnn.config().outputs,
                Role::InputWeight(l) | Role::RecurrentWeight(l) => gates * rnn.config().hidden[l],
                _ => rows.len(),
            },
            rows: rows.to_vec(),
            moments,
            kept: &kept[read],
            within: name.and_then(|name| within?.get(name)),
        }
    };
    for (l, n) in rnn.config().hidden.iter().enumerate() {
        let gate = |g: usize| kept[l].iter().map(move |i| g * n + i);
        let rows: Vec<usize> = (0..gates).flat_map(gate).collect();
        let mut fold = |role: Role, read: usize| -> Result<()> {
            let moments = predictions.layers[read];
            let (weights, constants) = reader(role, &rows, moments, read).fold(predictions)?;
            small.set(role, weights);
            let recurrent = role == Role::RecurrentWeight(l);
            add_constants(&mut small, l, recurrent, &constants);
            Ok(())
        };
        fold(Role::RecurrentWeight(l), l)?;
        if let Some(below) = l.checked_sub(1) {
            fold(Role::InputWeight(l), below)?;
        }
    }
    let rows: Vec<usize> = (0..rnn.config().outputs).collect();
    let top = kept.len() - 1;
    let read_out = reader(Role::OutputWeight, &rows, predictions.read_out, top);
    let (weights, constants) = read_out.fold(predictions)?;
    small.set(Role::OutputWeight, weights);
    small.add_to(Role::OutputBias, &constants);
    Ok(small)
}

/// The network with only the neurons that are kept, one list of flags a layer; what the others said is predicted from them.
///
/// Equal to [`hard_remove`] where nothing reads the removed neurons, and to the network itself where the removed neurons are
/// affine functions of the kept ones.
///
/// # Errors
/// Flags or a calibration that do not fit the network, a layer without neurons, or a ridge that is negative or not finite.
pub fn merge(
    rnn: &Rnn,
    keep: &[Vec<bool>],
    calibration: &Calibration,
    config: &MergeConfig,
) -> Result<Rnn> {
    let context = PruneContext::default().calibrated(calibration);
    merge_in(rnn, keep, &context, config)
}

/// The same for a network that does not have all connections ([`PruneContext::within`]): every row predicts what it read from
/// the kept neurons that it is connected with, so that the result has no other connections. Its masks are those of
/// [`restrict_masks`](crate::mask::restrict_masks).
///
/// # Errors
/// Those of [`merge`]; a context without a calibration.
pub fn merge_in(
    rnn: &Rnn,
    keep: &[Vec<bool>],
    context: &PruneContext<'_>,
    config: &MergeConfig,
) -> Result<Rnn> {
    check_ridge(config.ridge)?;
    let calibration = context.calibration.ok_or_else(|| Error::Setting {
        setting: "calibration",
        reason: "merging needs one".into(),
    })?;
    let shape = rnn.config();
    calibration.check(shape.input.width(), &shape.hidden)?;
    let sizes: Vec<usize> = keep.iter().map(Vec::len).collect();
    if sizes != shape.hidden {
        return Err(Error::Shape {
            tensor: "kept neurons".into(),
            expected: format!("one flag per neuron of the layers {:?}", shape.hidden),
            found: sizes,
        });
    }
    let kept: Vec<Vec<usize>> = keep.iter().map(|flags| numbers(flags)).collect();
    let after: Vec<&Moments> = calibration.layers.iter().map(|l| &l.after).collect();
    let predictions = Predictions {
        how: predict_from,
        layers: &after,
        read_out: &calibration.read_out,
        kept: &kept,
        ridge: config.ridge,
    };
    build(rnn, keep, &predictions, context.within)
}

/// [`merge_in`], then again until there were `config.passes`, with all states predicted from those that the small network has
/// when it runs by itself; the pass with the smallest validation loss is returned, with its number (counted from 0).
///
/// # Errors
/// As [`merge_in`]; examples that do not fit the network; [`Error::Cancelled`].
pub fn merge_passes(
    rnn: &Rnn,
    keep: &[Vec<bool>],
    context: &PruneContext<'_>,
    config: &MergeConfig,
    data: &Dataset,
    progress: &dyn Progress,
) -> Result<(Rnn, usize)> {
    let first = merge_in(rnn, keep, context, config)?;
    if config.passes <= 1 {
        return Ok((first, 0));
    }
    let kept: Vec<Vec<usize>> = keep.iter().map(|flags| numbers(flags)).collect();
    let loss = |rnn: &Rnn, on: &Examples| Ok::<_, Error>(evaluate(rnn, on)?.loss);
    let mut best = (loss(&first, &data.valid)?, first.clone(), 0);
    let mut current = first;
    for pass in 1..config.passes {
        let (joint, read_out) =
            record_joint(rnn, &current, &data.train, &config.recording, progress)?;
        let layers: Vec<&Moments> = joint.iter().collect();
        let predictions = Predictions {
            how: predict_jointly,
            layers: &layers,
            read_out: &read_out,
            kept: &kept,
            ridge: config.ridge,
        };
        current = build(rnn, keep, &predictions, context.within)?;
        let found = loss(&current, &data.valid)?;
        if found < best.0 {
            best = (found, current.clone(), pass);
        }
    }
    Ok((best.1, best.2))
}
