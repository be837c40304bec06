//! Trace files: safetensors with `l{L}.q` `[Hq, T, d]`, `l{L}.k` and `l{L}.v` `[Hkv, T, d]` in f16, `tokens` and
//! optionally `segments` u32 `[T]`, and the [`TraceMeta`] as JSON under the metadata key `trace`.

use super::{LayerTrace, Trace, TraceMeta};
use crate::error::{Error, Result};
use half::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

/// Metadata key of the description.
const KEY: &str = "trace";

/// Writes a trace; the file appears whole or not at all. Numbers are rounded to f16.
///
/// # Errors
/// A trace that is not consistent, numbers beyond f16, failed writing.
pub fn write(trace: &Trace, path: &Path) -> Result<()> {
    let name = path.display().to_string();
    trace.check(&name)?;
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (index, layer) in &trace.layers {
        for (part, data, heads) in [
            ("q", &layer.q, layer.query_heads),
            ("k", &layer.k, layer.kv_heads),
            ("v", &layer.v, layer.kv_heads),
        ] {
            let mut bytes = Vec::with_capacity(data.len() * 2);
            for &x in data {
                let half = f16::from_f32(x);
                if !half.is_finite() {
                    let problem = format!("l{index}.{part}: {x} does not fit f16");
                    return Err(Error::Trace {
                        path: name,
                        problem,
                    });
                }
                bytes.extend(half.to_le_bytes());
            }
            let shape = vec![heads, layer.tokens, layer.head_dim];
            tensors.push((format!("l{index}.{part}"), Dtype::F16, shape, bytes));
        }
    }
    let words = |ids: &[u32]| {
        ids.iter()
            .flat_map(|id| id.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let shape = vec![trace.tokens.len()];
    tensors.push((
        "tokens".into(),
        Dtype::U32,
        shape.clone(),
        words(&trace.tokens),
    ));
    if let Some(segments) = &trace.segments {
        tensors.push(("segments".into(), Dtype::U32, shape, words(segments)));
    }
    let bad = |problem: String| Error::Trace {
        path: name.clone(),
        problem,
    };
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            Ok((
                name.as_str(),
                TensorView::new(*dtype, shape.clone(), bytes)?,
            ))
        })
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|e| bad(e.to_string()))?;
    let meta = serde_json::to_string(&trace.meta).map_err(|e| bad(e.to_string()))?;
    let bytes = safetensors::serialize(views, Some(HashMap::from([(KEY.to_string(), meta)])))
        .map_err(|e| bad(e.to_string()))?;
    Ok(tensor_io::atomic::write(path, &bytes)?)
}

/// Reads a trace.
///
/// # Errors
/// A file that cannot be read, is not a trace or contradicts itself.
pub fn read(path: &Path) -> Result<Trace> {
    let name = path.display().to_string();
    let bad = |problem: String| Error::Trace {
        path: name.clone(),
        problem,
    };
    let bytes = std::fs::read(path).map_err(|source| Error::Io {
        path: name.clone(),
        source,
    })?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
    let text = header
        .metadata()
        .as_ref()
        .and_then(|meta| meta.get(KEY))
        .ok_or_else(|| bad(format!("no metadata `{KEY}`: not a trace")))?;
    let meta: TraceMeta =
        serde_json::from_str(text).map_err(|e| bad(format!("metadata `{KEY}`: {e}")))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;

    let tensor = |key: &str, dtype: Dtype, rank: usize| -> Result<(Vec<usize>, &[u8])> {
        let view = file
            .tensor(key)
            .map_err(|_| bad(format!("no tensor `{key}`")))?;
        if view.dtype() != dtype || view.shape().len() != rank {
            let (got, shape) = (view.dtype(), view.shape());
            return Err(bad(format!(
                "`{key}` is {got:?} {shape:?}, expected {dtype:?} of rank {rank}"
            )));
        }
        Ok((view.shape().to_vec(), view.data()))
    };
    let words = |bytes: &[u8]| -> Vec<u32> {
        bytes
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    };
    let halves = |bytes: &[u8]| -> Vec<f32> {
        bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect()
    };
    let tokens = words(tensor("tokens", Dtype::U32, 1)?.1);
    let mut segments = None;
    let mut layers = BTreeMap::new();
    for key in file.names() {
        if key == "segments" {
            segments = Some(words(tensor(key, Dtype::U32, 1)?.1));
            continue;
        }
        let Some(index) = key.strip_prefix('l').and_then(|k| k.strip_suffix(".q")) else {
            continue;
        };
        let index: usize = index
            .parse()
            .map_err(|_| bad(format!("`{key}` names no layer by number")))?;
        let (q_shape, q) = tensor(key, Dtype::F16, 3)?;
        let (k_shape, k) = tensor(&format!("l{index}.k"), Dtype::F16, 3)?;
        let (v_shape, v) = tensor(&format!("l{index}.v"), Dtype::F16, 3)?;
        if k_shape != v_shape || k_shape[1..] != q_shape[1..] {
            return Err(bad(format!(
                "layer {index}: q {q_shape:?}, k {k_shape:?}, v {v_shape:?} do not belong together"
            )));
        }
        let layer = LayerTrace {
            query_heads: q_shape[0],
            kv_heads: k_shape[0],
            head_dim: q_shape[2],
            tokens: q_shape[1],
            q: halves(q),
            k: halves(k),
            v: halves(v),
        };
        layers.insert(index, Arc::new(layer));
    }
    let trace = Trace {
        meta,
        tokens,
        segments,
        layers,
    };
    trace.check(&name)?;
    Ok(trace)
}
