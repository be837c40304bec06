//! Trace files: safetensors with `l{L}.q` `[Hq, T, d]`, `l{L}.k` and `l{L}.v` `[Hkv, T, d]` in f16, `tokens` and
//! optionally `segments` u32 `[T]`, and the [`TraceMeta`] as JSON under the metadata key `trace`.

use super::{LayerTrace, Trace, TraceMeta};
use crate::error::{Error, Result};
use crate::tensor_file::{self, Named, TensorFile};
use half::f16;
use safetensors::Dtype;
use std::collections::BTreeMap;
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
    let mut tensors = Vec::new();
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
            tensors.push(Named {
                name: format!("l{index}.{part}"),
                dtype: Dtype::F16,
                shape: vec![heads, layer.tokens, layer.head_dim],
                bytes,
            });
        }
    }
    let words = |name: &str, ids: &[u32]| Named {
        name: name.into(),
        dtype: Dtype::U32,
        shape: vec![ids.len()],
        bytes: ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
    };
    tensors.push(words("tokens", &trace.tokens));
    tensors.extend(trace.segments.as_ref().map(|ids| words("segments", ids)));
    let meta = serde_json::to_string(&trace.meta).map_err(|e| Error::Trace {
        path: name,
        problem: e.to_string(),
    })?;
    tensor_file::write(path, &tensors, Some((KEY, meta)))
}

/// Reads a trace.
///
/// # Errors
/// A file that cannot be read, is not a trace or contradicts itself.
pub fn read(path: &Path) -> Result<Trace> {
    let file = TensorFile::read(path)?;
    let text = file.metadata(KEY)?;
    let text = text.ok_or_else(|| file.bad(format!("no metadata `{KEY}`: not a trace")))?;
    let meta: TraceMeta =
        serde_json::from_str(&text).map_err(|e| file.bad(format!("metadata `{KEY}`: {e}")))?;
    let tensors = file.open()?;
    let words = |name: &str| -> Result<Vec<u32>> {
        Ok(tensors.get(name, Dtype::U32, 1)?.map4(u32::from_le_bytes))
    };
    let mut layers = BTreeMap::new();
    for index in tensors.layers("q")? {
        let of = |part: &str| tensors.get(&format!("l{index}.{part}"), Dtype::F16, 3);
        let (q, k, v) = (of("q")?, of("k")?, of("v")?);
        if k.shape != v.shape || k.shape[1..] != q.shape[1..] {
            let (q, k, v) = (q.shape, k.shape, v.shape);
            return Err(file.bad(format!(
                "layer {index}: q {q:?}, k {k:?}, v {v:?} do not belong together"
            )));
        }
        let halves = |b| f16::from_le_bytes(b).to_f32();
        let layer = LayerTrace {
            query_heads: q.shape[0],
            kv_heads: k.shape[0],
            head_dim: q.shape[2],
            tokens: q.shape[1],
            q: q.map2(halves),
            k: k.map2(halves),
            v: v.map2(halves),
        };
        layers.insert(index, Arc::new(layer));
    }
    let has_segments = tensors.has("segments");
    let trace = Trace {
        meta,
        tokens: words("tokens")?,
        segments: has_segments.then(|| words("segments")).transpose()?,
        layers,
    };
    trace.check(&path.display().to_string())?;
    Ok(trace)
}
