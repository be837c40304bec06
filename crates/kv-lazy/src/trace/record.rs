//! Recording of a run through a [`CacheSet`](crate::CacheSet).

use super::{LayerTrace, Trace, TraceMeta};
use crate::attention::{Scores, read};
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::sync::Arc;

/// Queries, keys and values of each layer, collected step by step as the cache was given them.
#[derive(Debug, Clone, Default)]
pub struct Recorder {
    layers: Vec<Option<Layer>>,
}

/// What one layer has seen.
#[derive(Debug, Clone)]
struct Layer {
    head_dim: usize,
    scores: Scores,
    /// Per query head `[T, d]`.
    q: Vec<Vec<f32>>,
    /// Per KV head `[T, d]`.
    k: Vec<Vec<f32>>,
    /// Per KV head `[T, d]`.
    v: Vec<Vec<f32>>,
}

/// What a layer's cache was given in a whole run, in f32, which holds every type of a cache exactly.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Recorded {
    /// The layer.
    pub layer: usize,
    /// Queries `[1, Hq, T, d]`.
    pub q: Tensor,
    /// Keys `[1, Hkv, T, d]`.
    pub k: Tensor,
    /// Values `[1, Hkv, T, d]`.
    pub v: Tensor,
    /// From q·k to the softmax.
    pub scores: Scores,
}

impl Recorder {
    /// An empty recorder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes one layer's step: `q` `[1, Hq, T, d]`, `k` and `v` `[1, Hkv, T, d]`.
    pub(crate) fn push(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scores: Scores,
    ) -> Result<()> {
        if self.layers.len() <= layer {
            self.layers.resize(layer + 1, None);
        }
        let (query_heads, kv_heads, head_dim) = (q.dim(1)?, k.dim(1)?, q.dim(3)?);
        let held = self.layers[layer].get_or_insert_with(|| Layer {
            head_dim,
            scores,
            q: vec![Vec::new(); query_heads],
            k: vec![Vec::new(); kv_heads],
            v: vec![Vec::new(); kv_heads],
        });
        if held.scores != scores || held.q.len() != query_heads || held.k.len() != kv_heads {
            return Err(Error::Step {
                layer,
                what: "recorded with other heads or another scale before",
            });
        }
        for (tensor, heads) in [(q, &mut held.q), (k, &mut held.k), (v, &mut held.v)] {
            let tensor = tensor.to_device(&Device::Cpu)?;
            let width = tensor.dim(2)? * head_dim;
            read::<f32, _>(&tensor, |data| {
                for (head, new) in heads.iter_mut().zip(data.chunks_exact(width)) {
                    head.extend_from_slice(new);
                }
            })?;
        }
        Ok(())
    }

    /// What each layer was given, to [feed](crate::CacheSet::feed) to other caches.
    ///
    /// # Errors
    /// Tensors that cannot be made.
    pub fn into_layers(self) -> Result<Vec<Recorded>> {
        let layers = (0..).zip(self.layers);
        let layers = layers.filter_map(|(index, layer)| Some((index, layer?)));
        layers
            .map(|(layer, held)| {
                let d = held.head_dim;
                let tensor = |heads: Vec<Vec<f32>>| {
                    let shape = (1, heads.len(), heads[0].len() / d, d);
                    Tensor::from_vec(heads.concat(), shape, &Device::Cpu)
                };
                Ok(Recorded {
                    layer,
                    q: tensor(held.q)?,
                    k: tensor(held.k)?,
                    v: tensor(held.v)?,
                    scores: held.scores,
                })
            })
            .collect()
    }

    /// What was recorded, as a trace, whose numbers are rounded to f16 as its [file](super::file) has them. `tokens` are the ids of all recorded positions; the scale is
    /// that of the recorded calls.
    ///
    /// # Errors
    /// Nothing recorded, layers with different scales or lengths, capped logits, numbers that are not finite or beyond f16.
    pub fn into_trace(self, meta: TraceMeta, tokens: Vec<u32>) -> Result<Trace> {
        let fail = |problem: &str| Error::Trace {
            path: "recording".into(),
            problem: problem.into(),
        };
        let mut scores = self.layers.iter().flatten().map(|layer| layer.scores);
        let first = scores.next().ok_or_else(|| fail("nothing was recorded"))?;
        if first.softcap.is_some() || scores.clone().any(|scores| scores.softcap.is_some()) {
            return Err(fail(
                "the model caps attention logits, which a trace has no field for",
            ));
        }
        if scores.any(|scores| scores != first) {
            return Err(fail("layers differ in scale"));
        }
        let scale = first.scale;
        let rounded = |heads: Vec<Vec<f32>>| -> Vec<f32> {
            let mut halves = Vec::new();
            let mut all = Vec::new();
            for head in heads {
                halves.resize(head.len(), f16::ZERO);
                halves.convert_from_f32_slice(&head);
                let from = all.len();
                all.resize(from + head.len(), 0.0);
                halves.convert_to_f32_slice(&mut all[from..]);
            }
            all
        };
        let layers = (0..).zip(self.layers);
        let layers = layers
            .filter_map(|(index, layer)| Some((index, layer?)))
            .map(|(index, layer)| {
                let trace = LayerTrace {
                    query_heads: layer.q.len(),
                    kv_heads: layer.k.len(),
                    head_dim: layer.head_dim,
                    tokens: layer.k.first().map_or(0, Vec::len) / layer.head_dim,
                    q: rounded(layer.q),
                    k: rounded(layer.k),
                    v: rounded(layer.v),
                };
                (index, Arc::new(trace))
            })
            .collect();
        let trace = Trace {
            meta: TraceMeta { scale, ..meta },
            tokens,
            segments: None,
            layers,
        };
        trace.check("recording")?;
        Ok(trace)
    }
}
