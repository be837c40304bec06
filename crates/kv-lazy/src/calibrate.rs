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
use crate::tensor_file::{self, Named, TensorFile};
use crate::trace::Trace;
use crate::trace::mri::{self, MriHistogram};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
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

/// Means of each query head before rotation, over all positions of `traces`; `rotary` gives each layer's rotation, none where a layer has none. The model's hash is that of the
/// traces, where all have the same.
///
/// # Errors
/// Traces of different shapes; a rotation that does not fit the heads.
pub fn queries<'a>(
    traces: &[Trace],
    rotary: impl Fn(usize) -> Option<&'a Rotary>,
) -> Result<QueryStatistics> {
    let mut sums: BTreeMap<usize, (usize, usize, Vec<Vec<f64>>)> = BTreeMap::new();
    let mut rotations = BTreeMap::new();
    for trace in traces {
        for (&index, layer) in &trace.layers {
            let Some(rotary) = rotary(index) else {
                continue;
            };
            let d = layer.head_dim;
            rotary.check(d)?;
            rotations.entry(index).or_insert_with(|| rotary.clone());
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
    let mut hashes = traces.iter().map(|trace| &trace.meta.model_hash);
    let first = hashes.next().cloned().flatten();
    Ok(QueryStatistics {
        layers: layers.collect(),
        rotary: rotations,
        model_hash: first.filter(|first| hashes.all(|hash| hash.as_ref() == Some(first))),
    })
}

/// Metadata key of what statistics were taken from.
const KEY: &str = "statistics";

/// What stands in a file beside the numbers.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    schema: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model_hash: Option<String>,
    rotary: BTreeMap<usize, Rotary>,
}

/// Version of the file format.
const SCHEMA: u32 = 1;

impl QueryStatistics {
    /// Writes the statistics as safetensors: `l{L}.mean` `[heads, d]` and `l{L}.abs` `[heads, pairs]` in f32, and as JSON under the metadata key `statistics` the rotation of each
    /// layer (frequencies, and which elements are pairs) and the model's hash. The file appears whole or not at all.
    ///
    /// # Errors
    /// Heads of different sizes, failed writing.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        for (index, heads) in &self.layers {
            let sizes = |h: &HeadStatistics| (h.mean.len(), h.magnitude.len());
            let first = heads.first().map_or((0, 0), sizes);
            if heads.iter().any(|head| sizes(head) != first) {
                return Err(Error::Trace {
                    path: path.display().to_string(),
                    problem: format!("heads of layer {index} differ in size"),
                });
            }
            let mut push = |part: &str, width: usize, of: &dyn Fn(&HeadStatistics) -> &[f32]| {
                let numbers = heads.iter().flat_map(of);
                tensors.push(Named {
                    name: format!("l{index}.{part}"),
                    dtype: Dtype::F32,
                    shape: vec![heads.len(), width],
                    bytes: numbers.flat_map(|x| x.to_le_bytes()).collect(),
                });
            };
            push("mean", first.0, &|head| &head.mean);
            push("abs", first.1, &|head| &head.magnitude);
        }
        let description = Description {
            schema: SCHEMA,
            model_hash: self.model_hash.clone(),
            rotary: self.rotary.clone(),
        };
        let text = serde_json::to_string(&description).map_err(|e| Error::Trace {
            path: path.display().to_string(),
            problem: e.to_string(),
        })?;
        tensor_file::write(path, &tensors, Some((KEY, text)))
    }

    /// Reads statistics.
    ///
    /// # Errors
    /// A file that cannot be read or holds something else.
    pub fn read(path: &Path) -> Result<Self> {
        let file = TensorFile::read(path)?;
        let text = file.metadata(KEY)?;
        let text = text
            .ok_or_else(|| file.bad(format!("no metadata `{KEY}`: not statistics of queries")))?;
        let Description {
            schema,
            model_hash,
            rotary,
        } = serde_json::from_str(&text).map_err(|e| file.bad(format!("metadata `{KEY}`: {e}")))?;
        if schema != SCHEMA {
            return Err(file.bad(format!("schema {schema}, expected {SCHEMA}")));
        }
        let tensors = file.open()?;
        let rows = |name: String| -> Result<Vec<Vec<f32>>> {
            let found = tensors.get(&name, Dtype::F32, 2)?;
            let (heads, width) = (found.shape[0], found.shape[1]);
            let numbers = found.map4(f32::from_le_bytes);
            if heads == 0 {
                return Err(file.bad(format!("`{name}` is empty")));
            }
            if numbers.iter().any(|x| !x.is_finite()) {
                return Err(file.bad(format!("`{name}` is not finite")));
            }
            // A layer that does not rotate has no pairs.
            let row = |head: usize| numbers[head * width..(head + 1) * width].to_vec();
            Ok((0..heads).map(row).collect())
        };
        let mut layers = BTreeMap::new();
        for index in tensors.layers("mean")? {
            let means = rows(format!("l{index}.mean"))?;
            let magnitudes = rows(format!("l{index}.abs"))?;
            if means.len() != magnitudes.len() {
                let (means, magnitudes) = (means.len(), magnitudes.len());
                return Err(file.bad(format!(
                    "layer {index}: {means} means, {magnitudes} magnitudes"
                )));
            }
            let heads = means.into_iter().zip(magnitudes);
            let heads = heads.map(|(mean, magnitude)| HeadStatistics { mean, magnitude });
            layers.insert(index, heads.collect());
        }
        if layers.is_empty() {
            return Err(file.bad("no `l{L}.mean`: not statistics of queries"));
        }
        if layers.keys().ne(rotary.keys()) {
            return Err(file.bad("other layers are rotated than have statistics"));
        }
        Ok(Self {
            layers,
            rotary,
            model_hash,
        })
    }
}
