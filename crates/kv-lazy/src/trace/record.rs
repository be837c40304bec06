//! Recording of a run through a [`CacheSet`](crate::CacheSet).

use super::{LayerTrace, Trace, TraceMeta};
use crate::attention::{Scores, read};
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use half::f16;
use std::sync::Arc;

/// Queries, keys and values of each layer, collected step by step as f16.
#[derive(Debug, Clone, Default)]
pub struct Recorder {
    pub(super) layers: Vec<Option<RecordedLayer>>,
}

/// What one layer has seen.
#[derive(Debug, Clone)]
pub(super) struct RecordedLayer {
    pub(super) head_dim: usize,
    pub(super) scale: f64,
    /// Per query head `[T, d]`.
    pub(super) q: Vec<Vec<f16>>,
    /// Per KV head `[T, d]`.
    pub(super) k: Vec<Vec<f16>>,
    /// Per KV head `[T, d]`.
    pub(super) v: Vec<Vec<f16>>,
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
        Scores { scale, softcap }: Scores,
    ) -> Result<()> {
        if softcap.is_some() {
            return Err(Error::Step {
                layer,
                what: "recorded from a model that caps attention logits, which a trace has no field for",
            });
        }
        if self.layers.len() <= layer {
            self.layers.resize(layer + 1, None);
        }
        let (query_heads, kv_heads, head_dim) = (q.dim(1)?, k.dim(1)?, q.dim(3)?);
        let held = self.layers[layer].get_or_insert_with(|| RecordedLayer {
            head_dim,
            scale,
            q: vec![Vec::new(); query_heads],
            k: vec![Vec::new(); kv_heads],
            v: vec![Vec::new(); kv_heads],
        });
        if held.scale != scale || held.q.len() != query_heads || held.k.len() != kv_heads {
            return Err(Error::Step {
                layer,
                what: "recorded with other heads or another scale before",
            });
        }
        for (tensor, heads) in [(q, &mut held.q), (k, &mut held.k), (v, &mut held.v)] {
            let tensor = tensor.to_device(&Device::Cpu)?;
            let width = tensor.dim(2)? * head_dim;
            read::<f16, _>(&tensor, |data| {
                for (head, new) in heads.iter_mut().zip(data.chunks_exact(width)) {
                    head.extend_from_slice(new);
                }
            })?;
        }
        Ok(())
    }
}

impl Recorder {
    /// What was recorded, as a trace. `tokens` are the ids of all recorded positions; the scale is that of the recorded calls.
    ///
    /// # Errors
    /// Nothing recorded, layers with different scales or lengths, numbers that are not finite.
    pub fn into_trace(self, meta: TraceMeta, tokens: Vec<u32>) -> Result<Trace> {
        let fail = |problem: &str| Error::Trace {
            path: "recording".into(),
            problem: problem.into(),
        };
        let scale = self.layers.iter().flatten().map(|layer| layer.scale).next();
        let scale = scale.ok_or_else(|| fail("nothing was recorded"))?;
        if self
            .layers
            .iter()
            .flatten()
            .any(|layer| layer.scale != scale)
        {
            return Err(fail("layers differ in scale"));
        }
        let wide = |heads: &[Vec<f16>]| heads.iter().flatten().map(|x| x.to_f32()).collect();
        let layers = self
            .layers
            .iter()
            .enumerate()
            .filter_map(|(index, layer)| layer.as_ref().map(|layer| (index, layer)))
            .map(|(index, layer)| {
                let trace = LayerTrace {
                    query_heads: layer.q.len(),
                    kv_heads: layer.k.len(),
                    head_dim: layer.head_dim,
                    tokens: layer.k.first().map_or(0, Vec::len) / layer.head_dim,
                    q: wide(&layer.q),
                    k: wide(&layer.k),
                    v: wide(&layer.v),
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
