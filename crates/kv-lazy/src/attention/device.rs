//! The same attention from tensor operations, for devices other than the CPU.
//!
//! Grouped queries multiply as `[B, Hkv, group·T, d] × [B, Hkv, d, n]`, so keys and values are never expanded. The softmax is
//! f32. Weights that a policy asks for cross to the host: one `[B, Hkv, n]` copy per layer and step.

use super::{Exported, Geometry, Reduce, Scores, WeightKind};
use crate::error::{Error, Result};
use candle_core::{DType, Tensor};

/// Which keys each new token may see.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mask {
    /// New tokens T.
    pub(crate) tokens: usize,
    /// Keys physically before the first of them.
    pub(crate) offset: usize,
    /// Logical position of the first new token and the sliding window.
    pub(crate) window: Option<(u32, usize)>,
}

/// A step's queries: what is done to their scores, their heads, and what they see.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceQuery {
    pub(crate) scores: Scores,
    pub(crate) geometry: Geometry,
    pub(crate) mask: Mask,
}

/// Output `[B, Hq, T, d]` in the dtype of `q`; the weights that `exported` is prepared for are copied to the host. `ids` (`[B·Hkv][n]`) are the
/// keys' logical positions; without them keys are at 0..n.
pub(crate) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    ids: Option<&[Vec<u32>]>,
    query: &DeviceQuery,
    exported: Option<&mut Exported>,
) -> Result<Tensor> {
    let DeviceQuery {
        scores: Scores { scale, softcap },
        geometry,
        mask,
    } = *query;
    let (batch, query_heads, tokens, head_dim) = q.dims4()?;
    let Geometry { group, .. } = geometry;
    let kv_heads = query_heads / group;
    let n = k.dim(2)?;
    let grouped = (q.to_dtype(DType::F32)? * scale)?.contiguous()?.reshape((
        batch,
        kv_heads,
        group * tokens,
        head_dim,
    ))?;
    let keys = k.to_dtype(DType::F32)?.transpose(2, 3)?;
    let mut scores = grouped.matmul(&keys)?;
    if let Some(cap) = softcap {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    if let Some(bias) = bias(mask, ids, batch * kv_heads, n, q)? {
        let rows = bias.dim(0)?;
        let shape = if rows == 1 {
            (1, 1, 1, tokens, n)
        } else {
            (batch, kv_heads, 1, tokens, n)
        };
        scores = scores
            .reshape((batch, kv_heads, group, tokens, n))?
            .broadcast_add(&bias.reshape(shape)?)?
            .reshape((batch, kv_heads, group * tokens, n))?;
    }
    let weights = candle_nn::ops::softmax_last_dim(&scores)?;
    let out = weights
        .matmul(&v.to_dtype(DType::F32)?.contiguous()?)?
        .reshape((batch, query_heads, tokens, head_dim))?
        .to_dtype(q.dtype())?;
    if let Some(exported) = exported {
        let by_head = weights.reshape((batch, kv_heads, group, tokens, n))?;
        hand_out(&by_head, exported)?;
    }
    Ok(out)
}

/// Copies weights `[B, Hkv, group, T, n]`, reduced as wanted, to the host.
fn hand_out(by_head: &Tensor, exported: &mut Exported) -> Result<()> {
    let (_, _, _, tokens, n) = by_head.dims5()?;
    let (kinds, queries) = (exported.kinds(), exported.queries());
    let reductions = kinds.reductions().count();
    let blocks = queries * reductions + usize::from(kinds.columns());
    let into = exported.as_mut_slice();
    let single = by_head.narrow(3, tokens - queries, queries)?;
    for (r, reduce) in kinds.reductions().enumerate() {
        let reduced = match reduce {
            Reduce::Max => single.max(2)?,
            Reduce::Mean => single.mean(2)?,
            Reduce::Sum => single.sum(2)?,
        };
        let all = reduced.flatten_all()?.to_vec1::<f32>()?;
        for (i, weights) in all.chunks_exact(n).enumerate() {
            let (row, query) = (i / queries, i % queries);
            let block = row * blocks + query * reductions + r;
            into[block * n..(block + 1) * n].copy_from_slice(weights);
        }
    }
    if kinds.contains(WeightKind::Columns) {
        let all = by_head.sum(3)?.sum(2)?.flatten_all()?.to_vec1::<f32>()?;
        for (row, weights) in all.chunks_exact(n).enumerate() {
            let block = (row + 1) * blocks - 1;
            into[block * n..(block + 1) * n].copy_from_slice(weights);
        }
    }
    Ok(())
}

/// 0 where a token sees a key and −∞ where not: `[1 or rows, T, n]`; none if everything is seen.
fn bias(
    mask: Mask,
    ids: Option<&[Vec<u32>]>,
    rows: usize,
    n: usize,
    like: &Tensor,
) -> Result<Option<Tensor>> {
    let Mask {
        tokens,
        offset,
        window,
    } = mask;
    if tokens == 1 && window.is_none() {
        return Ok(None);
    }
    let identity: Vec<u32>;
    let ids: Vec<&[u32]> = match ids {
        Some(ids) if window.is_some() => ids.iter().map(Vec::as_slice).collect(),
        _ => {
            identity = (0..n as u32).collect();
            vec![&identity]
        }
    };
    if ids.iter().any(|ids| ids.len() != n) || (ids.len() != 1 && ids.len() != rows) {
        return Err(Error::Shape {
            what: "ids",
            got: vec![ids.len(), ids.first().map_or(0, |i| i.len())],
            expected: format!("[{rows}, {n}]"),
        });
    }
    let mut bias = Vec::with_capacity(ids.len() * tokens * n);
    for ids in &ids {
        for t in 0..tokens {
            bias.extend(ids.iter().enumerate().map(|(j, &id)| {
                let causal = j <= offset + t;
                let near =
                    window.is_none_or(|(position, w)| position as usize + t < id as usize + w);
                if causal && near {
                    0.0
                } else {
                    f32::NEG_INFINITY
                }
            }));
        }
    }
    Ok(Some(Tensor::from_vec(
        bias,
        (ids.len(), tokens, n),
        like.device(),
    )?))
}
