//! Traces: the queries, keys and values of one run, to replay any policy on.
//!
//! Attention is not stored but recomputed: rotated queries, keys and values are far smaller than the weights of all steps
//! and let every policy be replayed. [`Recorder`] collects a trace from a [`CacheSet`](crate::CacheSet), [`file`](mod@file) keeps it in safetensors, [`synth`]
//! makes traces with a known truth, [`replay`](mod@replay) runs a policy on one and measures what it loses, [`mri`] measures recurrence.

pub mod file;
pub mod mri;
mod record;
pub mod replay;
pub mod synth;

pub use record::{Recorded, Recorder};

use crate::attention::decode::{DecodeQuery, DecodeScratch, Export, decode};
use crate::attention::{Elements, Exported, Geometry, Reduce, RowView, WeightKinds};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Where a trace comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TraceMeta {
    /// Version of the file format.
    pub schema: u32,
    /// The model, or the generator.
    pub model: String,
    /// Hash of the model's weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_hash: Option<String>,
    /// RoPE base; keys before RoPE are recovered by rotating back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// RoPE scaling as the model's configuration has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<serde_json::Value>,
    /// Factor on q·k.
    pub scale: f64,
    /// Positions of the prompt.
    pub prompt_len: usize,
    /// Seed of sampling or of the generator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// How tokens were chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampler: Option<String>,
}

impl TraceMeta {
    /// Version that this crate writes.
    pub const SCHEMA: u32 = 1;

    /// The least that must be known.
    pub fn new(model: impl Into<String>, prompt_len: usize, scale: f64) -> Self {
        Self {
            schema: Self::SCHEMA,
            model: model.into(),
            model_hash: None,
            rope_theta: None,
            rope_scaling: None,
            scale,
            prompt_len,
            seed: None,
            sampler: None,
        }
    }
}

/// One layer's rotated queries, keys and values.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTrace {
    /// Query heads.
    pub query_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Positions T.
    pub tokens: usize,
    /// `[query_heads, T, d]`.
    pub q: Vec<f32>,
    /// `[kv_heads, T, d]`.
    pub k: Vec<f32>,
    /// `[kv_heads, T, d]`.
    pub v: Vec<f32>,
}

impl LayerTrace {
    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    fn head<'a>(&self, data: &'a [f32], head: usize) -> &'a [f32] {
        let width = self.tokens * self.head_dim;
        &data[head * width..(head + 1) * width]
    }

    /// Keys of a KV head `[T, d]`.
    pub fn keys(&self, head: usize) -> &[f32] {
        self.head(&self.k, head)
    }

    /// Values of a KV head `[T, d]`.
    pub fn values(&self, head: usize) -> &[f32] {
        self.head(&self.v, head)
    }

    /// The query of a head at position `t`.
    pub fn query(&self, query_head: usize, t: usize) -> &[f32] {
        &self.head(&self.q, query_head)[t * self.head_dim..(t + 1) * self.head_dim]
    }

    /// Full-cache attention of one query: weights of positions 0..=t and the output.
    ///
    /// # Errors
    /// A softmax that is not finite.
    pub fn attention(
        &self,
        query_head: usize,
        t: usize,
        scale: f64,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let d = self.head_dim;
        let head = query_head / self.group();
        let scaled: Vec<f32> = self
            .query(query_head, t)
            .iter()
            .map(|x| x * scale as f32)
            .collect();
        let row = RowView::single(
            Elements::F32(&self.keys(head)[..(t + 1) * d]),
            Elements::F32(&self.values(head)[..(t + 1) * d]),
            &[],
            d,
        );
        let query = DecodeQuery {
            geometry: Geometry {
                group: 1,
                head_dim: d,
            },
            tokens: 1,
            cap: None,
            window: None,
        };
        let (mut out, mut exported) = (vec![0.0; d], Exported::default());
        let kinds = WeightKinds::last(Reduce::Max);
        exported.prepare(kinds, 1, std::iter::once(t + 1));
        let export = Export {
            into: &mut exported,
            last: 0,
            columns: false,
        };
        decode(
            query,
            &scaled,
            &[row],
            Some(export),
            &mut DecodeScratch::default(),
            &mut out,
        )
        .map_err(|_| Error::NonFinite {
            layer: 0,
            sequence: 0,
            head,
        })?;
        Ok((exported.into_weights(), out))
    }

    /// Checks that sizes agree and that every number is finite.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        if self.kv_heads == 0 || !self.query_heads.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "{} query heads do not divide over {} KV heads",
                self.query_heads, self.kv_heads
            ));
        }
        if self.head_dim == 0 {
            return Err("heads of no elements".into());
        }
        let width = self.tokens * self.head_dim;
        for (name, data, heads) in [
            ("q", &self.q, self.query_heads),
            ("k", &self.k, self.kv_heads),
            ("v", &self.v, self.kv_heads),
        ] {
            if data.len() != heads * width {
                return Err(format!(
                    "{name} has {} elements, expected {}",
                    data.len(),
                    heads * width
                ));
            }
            if let Some(at) = data.iter().position(|x| !x.is_finite()) {
                return Err(format!(
                    "{name} is not finite at head {}, position {}",
                    at / width,
                    at % width / self.head_dim
                ));
            }
        }
        Ok(())
    }
}

/// A run: its tokens and what its layers saw.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// Where it comes from.
    pub meta: TraceMeta,
    /// Token ids, one per position.
    pub tokens: Vec<u32>,
    /// Which part of the text each position belongs to, where that is known.
    pub segments: Option<Vec<u32>>,
    /// Layers by index; not every layer need be there.
    pub layers: BTreeMap<usize, Arc<LayerTrace>>,
}

impl Trace {
    /// Checks that all layers have as many positions as there are tokens, and that the prompt is one.
    ///
    /// # Errors
    /// [`Error::Trace`] with `path` and what is wrong.
    pub fn check(&self, path: &str) -> Result<()> {
        let fail = |problem: String| {
            Err(Error::Trace {
                path: path.into(),
                problem,
            })
        };
        let len = self.tokens.len();
        if self.meta.schema != TraceMeta::SCHEMA {
            return fail(format!(
                "schema {}, expected {}",
                self.meta.schema,
                TraceMeta::SCHEMA
            ));
        }
        if self.meta.prompt_len == 0 || self.meta.prompt_len > len {
            return fail(format!(
                "prompt of {} in {len} positions",
                self.meta.prompt_len
            ));
        }
        if self.segments.as_ref().is_some_and(|s| s.len() != len) {
            return fail(format!(
                "segments and tokens differ in length, {len} tokens"
            ));
        }
        for (index, layer) in &self.layers {
            if layer.tokens != len {
                return fail(format!(
                    "layer {index} has {} positions, {len} tokens",
                    layer.tokens
                ));
            }
            if let Err(problem) = layer.check() {
                return fail(format!("layer {index}: {problem}"));
            }
        }
        Ok(())
    }
}
