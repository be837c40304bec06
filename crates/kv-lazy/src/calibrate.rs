//! What policies need to know of a model, measured on traces: W and α for LazyEviction, query statistics for TriAttention.
//!
//! The window is the 80th percentile of the MRI over all layers and heads, as in the paper (arXiv 2506.15969, Sec. 4). The paper gives α per model
//! without a rule; here it is the largest of a grid for which 95 % of the active tokens have an MRI above 1, which is the condition
//! under which the importance function can tell recurring tokens from stale ones. Where no α meets it, the best is taken and
//! `recurring_share` says how far off it is. Statistics belong to the task they were taken from.

use crate::attention::Reduce;
use crate::error::{Error, Result};
use crate::policy::Threshold;
use crate::policy::tri_attention::{self, HeadStatistics, QueryStatistics};
use crate::rotary::Rotary;
use crate::trace::Trace;
use crate::trace::mri::{self, MriHistogram};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::BTreeMap;
use std::path::Path;
use tensor_io::Progress;

/// Share of tokens whose MRI the window covers.
pub const WINDOW_PERCENTILE: f64 = 0.8;
/// Share of active tokens that should have an MRI above 1.
pub const RECURRING_SHARE: f64 = 0.95;
/// Thresholds tried, largest first.
pub const ALPHAS: [f32; 9] = [1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 1e-5];

/// What calibration found.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// W: the 80th percentile of the MRI.
    pub window: usize,
    /// α.
    pub alpha: f32,
    /// Share of active tokens with an MRI above 1 under α.
    pub recurring_share: f64,
    /// Histograms of the KV heads of each layer under α.
    pub layers: BTreeMap<usize, Vec<MriHistogram>>,
}

/// Measures W and α over `traces`, trying each α of `alphas` from the largest.
///
/// # Errors
/// No traces or thresholds; no token active under any; weights that are not finite; a cancelled `progress`.
pub fn calibrate(
    traces: &[Trace],
    alphas: &[f32],
    reduce: Reduce,
    progress: &dyn Progress,
) -> Result<Calibration> {
    let mut best: Option<Calibration> = None;
    for &alpha in alphas {
        let candidate = at(traces, alpha, reduce, progress)?;
        let Some(candidate) = candidate else { continue };
        let enough = candidate.recurring_share >= RECURRING_SHARE;
        if best
            .as_ref()
            .is_none_or(|b| candidate.recurring_share > b.recurring_share)
        {
            best = Some(candidate);
        }
        if enough {
            break;
        }
    }
    best.ok_or_else(|| Error::Setting {
        name: "alphas",
        value: format!("{alphas:?} over {} traces", traces.len()),
        expected: "a threshold that some token passes after its birth",
    })
}

/// The statistics under one α; none if no token is ever active.
fn at(
    traces: &[Trace],
    alpha: f32,
    reduce: Reduce,
    progress: &dyn Progress,
) -> Result<Option<Calibration>> {
    progress.begin(
        &format!("recurrence at α = {alpha}"),
        traces.iter().map(mri::steps).sum(),
    );
    let mut layers: BTreeMap<usize, Vec<MriHistogram>> = BTreeMap::new();
    let mut all = MriHistogram::default();
    for trace in traces {
        let threshold = Threshold::Absolute(alpha);
        for (&index, layer) in &trace.layers {
            let (prompt, scale) = (trace.meta.prompt_len, trace.meta.scale);
            let heads = mri::of_layer(layer, prompt, scale, threshold, reduce, progress)?;
            let held = layers.entry(index).or_default();
            held.resize(held.len().max(heads.len()), MriHistogram::default());
            for (held, head) in held.iter_mut().zip(&heads) {
                held.merge(head);
                all.merge(head);
            }
        }
    }
    Ok(all.percentile(WINDOW_PERCENTILE).map(|window| Calibration {
        window: window as usize,
        alpha,
        recurring_share: all.recurring_share(),
        layers,
    }))
}

/// Means of each query head before rotation, over all positions of `traces`; `rotary` gives each layer's rotation, none where a layer has none.
///
/// # Errors
/// Traces of different shapes; a rotation that does not fit the heads.
pub fn queries<'a>(
    traces: &[Trace],
    rotary: impl Fn(usize) -> Option<&'a Rotary>,
) -> Result<QueryStatistics> {
    let mut sums: BTreeMap<usize, (usize, usize, Vec<Vec<f64>>)> = BTreeMap::new();
    for trace in traces {
        for (&index, layer) in &trace.layers {
            let Some(rotary) = rotary(index) else {
                continue;
            };
            let d = layer.head_dim;
            rotary.check(d)?;
            let (count, width, heads) = sums.entry(index).or_insert_with(|| {
                let zero = vec![0.0; d + rotary.frequencies.len()];
                (0, d, vec![zero; layer.query_heads])
            });
            if *width != d || heads.len() != layer.query_heads {
                return Err(Error::Trace {
                    path: trace.meta.model.clone(),
                    problem: format!("layer {index} has other heads than in the traces before"),
                });
            }
            let mut query = vec![0.0; d];
            for (head, sums) in heads.iter_mut().enumerate() {
                for t in 0..layer.tokens {
                    query.copy_from_slice(layer.query(head, t));
                    rotary.rotate(&mut query, -(t as i64));
                    tri_attention::add(sums, &query, rotary);
                }
            }
            *count += layer.tokens;
        }
    }
    let layers = sums.into_iter().map(|(index, (count, d, heads))| {
        let heads = heads.iter().map(|sums| tri_attention::mean(sums, count, d));
        (index, heads.collect())
    });
    Ok(QueryStatistics {
        layers: layers.collect(),
    })
}

impl QueryStatistics {
    /// Writes the statistics as safetensors: `l{L}.mean` `[heads, d]` and `l{L}.abs` `[heads, pairs]` in f32. The file appears whole or not at all.
    ///
    /// # Errors
    /// Heads of different sizes, failed writing.
    pub fn write(&self, path: &Path) -> Result<()> {
        let bad = |problem: String| Error::Trace {
            path: path.display().to_string(),
            problem,
        };
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for (index, heads) in &self.layers {
            let first = heads
                .first()
                .map_or((0, 0), |h| (h.mean.len(), h.magnitude.len()));
            if heads
                .iter()
                .any(|h| (h.mean.len(), h.magnitude.len()) != first)
            {
                return Err(bad(format!("heads of layer {index} differ in size")));
            }
            let bytes = |part: &dyn Fn(&HeadStatistics) -> Vec<f32>| {
                let numbers = heads.iter().flat_map(part);
                numbers.flat_map(f32::to_le_bytes).collect::<Vec<u8>>()
            };
            let mean = bytes(&|head| head.mean.clone());
            let magnitude = bytes(&|head| head.magnitude.clone());
            tensors.push((format!("l{index}.mean"), vec![heads.len(), first.0], mean));
            tensors.push((
                format!("l{index}.abs"),
                vec![heads.len(), first.1],
                magnitude,
            ));
        }
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| {
                Ok((
                    name.as_str(),
                    TensorView::new(Dtype::F32, shape.clone(), bytes)?,
                ))
            })
            .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|e| bad(e.to_string()))?;
        let bytes = safetensors::serialize(views, None).map_err(|e| bad(e.to_string()))?;
        Ok(tensor_io::atomic::write(path, &bytes)?)
    }

    /// Reads statistics.
    ///
    /// # Errors
    /// A file that cannot be read or holds something else.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let bad = |problem: String| Error::Trace {
            path: name.clone(),
            problem,
        };
        let bytes = std::fs::read(path).map_err(|source| Error::Io {
            path: name.clone(),
            source,
        })?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
        let rows = |key: &str| -> Result<Vec<Vec<f32>>> {
            let view = file
                .tensor(key)
                .map_err(|_| bad(format!("no tensor `{key}`")))?;
            let &[heads, width] = view.shape() else {
                return Err(bad(format!(
                    "`{key}` has shape {:?}, expected two dimensions",
                    view.shape()
                )));
            };
            if view.dtype() != Dtype::F32 || heads == 0 || width == 0 {
                return Err(bad(format!(
                    "`{key}` is {:?} {:?}, expected F32 and not empty",
                    view.dtype(),
                    view.shape()
                )));
            }
            let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            let row = |row: &[u8]| row.chunks_exact(4).map(number).collect();
            Ok(view.data().chunks_exact(4 * width).map(row).collect())
        };
        let mut layers = BTreeMap::new();
        for key in file.names() {
            let Some(index) = key.strip_prefix('l').and_then(|k| k.strip_suffix(".mean")) else {
                continue;
            };
            let index: usize = index
                .parse()
                .map_err(|_| bad(format!("`{key}` names no layer by number")))?;
            let (means, magnitudes) = (rows(key)?, rows(&format!("l{index}.abs"))?);
            if means.len() != magnitudes.len() {
                return Err(bad(format!(
                    "layer {index}: {} means, {} magnitudes",
                    means.len(),
                    magnitudes.len()
                )));
            }
            let heads = means.into_iter().zip(magnitudes);
            let heads = heads.map(|(mean, magnitude)| HeadStatistics { mean, magnitude });
            layers.insert(index, heads.collect());
        }
        if layers.is_empty() {
            return Err(bad("no `l{L}.mean`: not statistics of queries".into()));
        }
        Ok(Self { layers })
    }
}
