//! Attention over cached keys and values, grouped-query native: query head h reads KV head h / group.
//!
//! On the CPU one kernel serves a few new tokens per sequence and hands out the attention weights on the way;
//! [`prefill()`] serves many new tokens, blocked and causal. Elsewhere the same semantics are built from tensor operations.

mod ahead;
mod chunk;
pub(crate) mod decode;
mod dense;
pub(crate) mod device;
mod element;
mod exp;
mod machine;
mod packed;
pub(crate) mod prefill;
pub(crate) mod products;
mod rows;
mod scores;
mod tensors;
mod weights;

pub(crate) use element::Element;
pub use exp::exp;
pub(crate) use rows::{Elements, Part, RowView};
pub use scores::{Scores, softcap_in_place};
pub(crate) use tensors::{expect_shape, read};
pub(crate) use weights::Exported;
pub use weights::{Reduce, WeightKind, WeightKinds};

use crate::error::{Error, Result};
use candle_core::{DType, Tensor};

/// New tokens times heads of a group up to which attention reads the cache once for all of them, instead of by blocks of queries.
pub(crate) const FEW: usize = 64;

/// Heads per KV head and their dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Query heads per KV head.
    pub(crate) group: usize,
    /// Elements of a head.
    pub(crate) head_dim: usize,
}

/// A sliding window of this many tokens hides nothing; larger ones are taken for it.
pub(crate) const WIDEST: usize = u32::MAX as usize;

/// A step's queries on the CPU, whatever their number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Causal {
    pub(crate) geometry: Geometry,
    /// New tokens per row, whose keys are the row's last.
    pub(crate) tokens: usize,
    /// From q·k to the softmax.
    pub(crate) scores: Scores,
    /// Logical position of the first new token and the sliding window.
    pub(crate) window: Option<(u32, usize)>,
}

impl Causal {
    /// Attends `q` `[rows, group, tokens, head_dim]` into `out` of the same shape; `exported` is prepared for these rows.
    ///
    /// On a softmax that is not finite returns the index of the first such row.
    pub(crate) fn attend(
        self,
        q: &[f32],
        rows: &[RowView<'_>],
        mut exported: Option<&mut Exported>,
        scratch: &mut decode::DecodeScratch,
        out: &mut [f32],
    ) -> std::result::Result<(), usize> {
        let Self {
            geometry,
            tokens,
            scores,
            window,
        } = self;
        let scale = scores.scale as f32;
        if tokens == 0 {
            return Ok(());
        }
        let d = geometry.head_dim;
        let few = decode::DecodeQuery {
            geometry,
            tokens,
            cap: scores.cap(),
            window,
        };
        if tokens * geometry.group <= FEW {
            let scaled: Vec<f32> = q.iter().map(|x| x * scale).collect();
            let export = exported.map(|into| decode::Export {
                last: into.queries().saturating_sub(1),
                columns: true,
                into,
            });
            return decode::decode(few, &scaled, rows, export, scratch, out);
        }
        let many = prefill::PrefillQuery {
            geometry,
            tokens,
            scale,
            cap: scores.cap(),
            window,
        };
        let columns = match &mut exported {
            Some(exported) if exported.kinds().columns() => Some(exported.columns_mut()),
            _ => None,
        };
        prefill::prefill(many, q, rows, columns, out)?;
        let Some(exported) = exported else {
            return Ok(());
        };
        if exported.kinds() == WeightKinds::COLUMNS {
            return Ok(());
        }
        // The queries whose weights are wanted one by one, once more by themselves.
        let mut unused = vec![0.0; rows.len() * geometry.group * d];
        for last in 0..exported.queries() {
            let before = exported.queries() - 1 - last;
            let t = tokens - 1 - before;
            let query: Vec<f32> = q
                .chunks_exact(tokens * d)
                .flat_map(|head| &head[t * d..(t + 1) * d])
                .map(|x| x * scale)
                .collect();
            let rows: Vec<RowView<'_>> = rows
                .iter()
                .map(|row| row.prefix(row.len() - before, d))
                .collect();
            let one = decode::DecodeQuery {
                tokens: 1,
                window: window.map(|(position, w)| (position + t as u32, w)),
                ..few
            };
            let export = decode::Export {
                into: &mut *exported,
                last,
                columns: false,
            };
            decode::decode(one, &query, &rows, Some(export), scratch, &mut unused)?;
        }
        Ok(())
    }
}

/// Causal grouped-query attention of T new tokens over n = `offset` + T keys.
///
/// `q` `[B, Hq, T, d]`, `k` and `v` `[B, Hkv, n, d]` with Hq a multiple of Hkv; new token t sees keys 0..=`offset` + t, and with
/// a `sliding_window` w only the last w of these. `scores` is the factor on q·k, usually 1/√d, and the cap where there is one. Returns `[B, Hq, T, d]` in the
/// dtype of `q`; arithmetic is f32. On the CPU nothing of size T × n is ever held for more than a few queries at a
/// time, and the result does not depend on the number of threads.
///
/// # Errors
/// Shapes that do not fit, dtypes other than f32, f16 and bf16, and non-finite weights.
pub fn prefill(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scores: impl Into<Scores>,
    offset: usize,
    sliding_window: Option<usize>,
) -> Result<Tensor> {
    let scores = scores.into();
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
    if head_dim == 0 {
        return Err(Error::Shape {
            what: "q",
            got: q.dims().to_vec(),
            expected: "heads of at least one element".into(),
        });
    }
    let n = offset.saturating_add(tokens);
    expect_shape("k", k, &[batch, kv_heads, n, head_dim])?;
    expect_shape("v", v, &[batch, kv_heads, n, head_dim])?;
    let geometry = Geometry {
        group: query_heads / kv_heads,
        head_dim,
    };
    let window = sliding_window.map(|w| (offset as u32, w.min(WIDEST)));
    if !q.device().is_cpu() {
        let query = device::DeviceQuery {
            scores,
            geometry,
            mask: device::Mask {
                tokens,
                offset,
                window,
            },
        };
        return device::attend(q, k, v, None, &query, None);
    }
    let step = Causal {
        geometry,
        tokens,
        scores,
        window,
    };
    match k.dtype() {
        DType::F32 => prefill_tensors::<f32>(q, k, v, step),
        DType::F16 => prefill_tensors::<half::f16>(q, k, v, step),
        DType::BF16 => prefill_tensors::<half::bf16>(q, k, v, step),
        got => Err(Error::DType { got }),
    }
}

fn prefill_tensors<T: Element>(q: &Tensor, k: &Tensor, v: &Tensor, step: Causal) -> Result<Tensor> {
    let (batch, query_heads, tokens, head_dim) = q.dims4()?;
    let n = k.dim(2)?;
    let ids: Vec<u32> = (0..n as u32).collect();
    let mut out = vec![0.0f32; batch * query_heads * tokens * head_dim];
    if out.is_empty() {
        return Ok(q.clone());
    }
    let done = read::<f32, _>(q, |q| {
        read::<T, _>(k, |k| {
            read::<T, _>(v, |v| {
                let rows: Vec<RowView<'_>> = k
                    .chunks_exact(n * head_dim)
                    .zip(v.chunks_exact(n * head_dim))
                    .map(|(keys, values)| {
                        let (keys, values) = (T::elements(keys), T::elements(values));
                        RowView::single(keys, values, &ids, head_dim)
                    })
                    .collect();
                step.attend(q, &rows, None, &mut Default::default(), &mut out)
            })
        })
    })???;
    let kv_heads = query_heads / step.geometry.group;
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
