//! Attention over cached keys and values, grouped-query native: query head h reads KV head h / group.
//!
//! On the CPU one kernel serves one new token per sequence and hands out the attention weights on the way;
//! [`prefill()`] serves many new tokens, blocked and causal. Elsewhere the same semantics are built from tensor operations.

mod chunk;
pub(crate) mod decode;
pub(crate) mod device;
mod element;
mod exp;
mod machine;
pub(crate) mod prefill;
mod tensors;

pub(crate) use element::Element;
pub use exp::exp;
pub(crate) use tensors::{expect_shape, read};

use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

/// How the weights of the query heads that share a KV head become one weight per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reduce {
    /// The largest: some head of the group needs the token.
    #[default]
    Max,
    /// The mean over the group.
    Mean,
    /// The sum over the group.
    Sum,
}

impl Reduce {
    /// Takes one of `group` heads' weights into `reduced`, which starts at 0.
    pub(crate) fn accumulate(self, reduced: &mut [f32], weights: &[f32], group: usize) {
        let pairs = reduced.iter_mut().zip(weights);
        match self {
            Reduce::Max => pairs.for_each(|(r, w)| *r = r.max(*w)),
            Reduce::Sum => pairs.for_each(|(r, w)| *r += w),
            Reduce::Mean => {
                let share = 1.0 / group as f32;
                pairs.for_each(|(r, w)| *r += w * share);
            }
        }
    }
}

/// What a step wants beside its output: one weight per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Export {
    /// The last query's weights, reduced over the group.
    Last(Reduce),
    /// Weights summed over all queries and the group.
    Columns,
}

/// Heads per KV head and their dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Query heads per KV head.
    pub(crate) group: usize,
    /// Elements of a head.
    pub(crate) head_dim: usize,
}

/// What one KV head of one sequence holds: `[n, head_dim]` keys and values and the logical position of each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowView<'a, T> {
    pub(crate) keys: &'a [T],
    pub(crate) values: &'a [T],
    pub(crate) ids: &'a [u32],
}

impl<T> RowView<'_, T> {
    pub(crate) fn len(&self, head_dim: usize) -> usize {
        self.keys.len() / head_dim
    }
}

/// Causal grouped-query attention of T new tokens over n = `offset` + T keys.
///
/// `q` `[B, Hq, T, d]`, `k` and `v` `[B, Hkv, n, d]` with Hq a multiple of Hkv; new token t sees keys 0..=`offset` + t, and with
/// a `sliding_window` w only the last w of these. `scale` multiplies q·k, usually 1/√d. Returns `[B, Hq, T, d]` in the
/// dtype of `q`; arithmetic is f32. On the CPU nothing of size T × n is ever held for more than a few queries at a
/// time, and the result does not depend on the number of threads.
///
/// # Errors
/// Shapes that do not fit, dtypes other than f32, f16 and bf16, and non-finite weights.
pub fn prefill(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    offset: usize,
    sliding_window: Option<usize>,
) -> Result<Tensor> {
    let (batch, query_heads, tokens, head_dim) = q.dims4().map_err(|_| Error::Shape {
        what: "q",
        got: q.dims().to_vec(),
        expected: "[batch, query heads, tokens, head_dim]".into(),
    })?;
    let kv_heads = k.dims().get(1).copied().unwrap_or(0);
    if kv_heads == 0 || query_heads % kv_heads != 0 {
        return Err(Error::HeadGroups {
            layer: 0,
            query_heads,
            kv_heads,
        });
    }
    let n = offset + tokens;
    expect_shape("k", k, &[batch, kv_heads, n, head_dim])?;
    expect_shape("v", v, &[batch, kv_heads, n, head_dim])?;
    let geometry = Geometry {
        group: query_heads / kv_heads,
        head_dim,
    };
    if !q.device().is_cpu() {
        let mask = device::Mask {
            tokens,
            offset,
            window: sliding_window.map(|w| (offset as u32, w)),
        };
        let query = device::DeviceQuery {
            scale,
            geometry,
            mask,
            export: None,
        };
        return device::attend(q, k, v, None, &query).map(|(out, _)| out);
    }
    match k.dtype() {
        DType::F32 => prefill_tensors::<f32>(q, k, v, scale, offset, sliding_window, geometry),
        DType::F16 => {
            prefill_tensors::<half::f16>(q, k, v, scale, offset, sliding_window, geometry)
        }
        DType::BF16 => {
            prefill_tensors::<half::bf16>(q, k, v, scale, offset, sliding_window, geometry)
        }
        got => Err(Error::DType { got }),
    }
}

fn prefill_tensors<T: Element>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    offset: usize,
    sliding_window: Option<usize>,
    geometry: Geometry,
) -> Result<Tensor> {
    let (batch, query_heads, tokens, head_dim) = q.dims4()?;
    let n = offset + tokens;
    let ids: Vec<u32> = (0..n as u32).collect();
    let window = sliding_window.map(|w| (offset as u32, w));
    let query = prefill::PrefillQuery {
        geometry,
        tokens,
        offset,
        scale: scale as f32,
        window,
    };
    let mut out = vec![0.0f32; batch * query_heads * tokens * head_dim];
    let done = read::<f32, _>(q, |q| {
        read::<T, _>(k, |k| {
            read::<T, _>(v, |v| {
                let rows: Vec<RowView<'_, T>> = k
                    .chunks_exact(n * head_dim)
                    .zip(v.chunks_exact(n * head_dim))
                    .map(|(keys, values)| RowView {
                        keys,
                        values,
                        ids: &ids,
                    })
                    .collect();
                if tokens == 1 {
                    let scaled: Vec<f32> = q.iter().map(|x| x * scale as f32).collect();
                    let single = decode::DecodeQuery { geometry, window };
                    return decode::decode(
                        single,
                        &scaled,
                        &rows,
                        None,
                        &mut Default::default(),
                        &mut out,
                    );
                }
                prefill::prefill(query, q, &rows, None, &mut out)
            })
        })
    })???;
    let kv_heads = query_heads / geometry.group;
    done.map_err(|row| Error::NonFinite {
        layer: 0,
        sequence: row / kv_heads,
        head: row % kv_heads,
    })?;
    Ok(
        Tensor::from_vec(out, (batch, query_heads, tokens, head_dim), q.device())?
            .to_dtype(q.dtype())?,
    )
}
