//! Keys or values of all rows as tensors, quantised or not.

use crate::error::Result;
use crate::quantise::{Format, Packed, Side, hadamard};
use candle_core::{DType, Device, Tensor};

/// An overlay entry that stands for no token.
pub(super) const UNUSED: u32 = u32::MAX;

/// Keys or values of all rows.
#[derive(Debug, Clone)]
pub(super) enum SideData {
    /// `[rows, n, d]`.
    Exact(Tensor),
    Packed {
        format: Format,
        /// Bytes of codes `[rows, n, bytes]`.
        codes: Tensor,
        /// `[rows, n, groups]`.
        scales: Tensor,
        /// The same; none where the format is symmetric.
        lows: Option<Tensor>,
        /// Tokens in f16 `[rows, entries, d]`.
        overlay: Tensor,
    },
}

/// Rows `[rows, n, x]` with the same `slots` of each row selected.
pub(super) fn select(tensor: &Tensor, slots: &[Vec<u32>]) -> Result<Tensor> {
    let (rows, n, width) = tensor.dims3()?;
    let kept = slots.first().map_or(0, Vec::len);
    let index: Vec<u32> = slots
        .iter()
        .enumerate()
        .flat_map(|(row, slots)| slots.iter().map(move |&slot| (row * n) as u32 + slot))
        .collect();
    let index = Tensor::from_vec(index, rows * kept, tensor.device())?;
    let flat = tensor.contiguous()?.reshape((rows * n, width))?;
    Ok(flat.index_select(&index, 0)?.reshape((rows, kept, width))?)
}

fn join(old: Option<&Tensor>, new: Tensor) -> Result<Tensor> {
    match old {
        None => Ok(new),
        Some(old) => Ok(Tensor::cat(&[old, &new], 1)?),
    }
}

impl SideData {
    /// What `old` is after tokens `[rows, tokens, d]` on the host were appended.
    pub(super) fn appended(
        old: Option<&Self>,
        side: Side,
        new: &[f32],
        rows: usize,
        device: &Device,
    ) -> Result<Self> {
        let tokens_of = |width: usize| new.len() / rows / width;
        match side {
            Side::Exact(dtype) => {
                let d = new.len() / rows;
                let old = match old {
                    Some(Self::Exact(old)) => Some(old),
                    _ => None,
                };
                let width = match old {
                    Some(old) => old.dim(2)?,
                    None => d,
                };
                let new = Tensor::from_slice(new, (rows, tokens_of(width), width), device)?;
                Ok(Self::Exact(join(old, new.to_dtype(dtype)?)?))
            }
            Side::Packed(format) => {
                let d = format.head_dim;
                let tokens = tokens_of(d);
                let mut packed = Packed::new(format);
                packed.push(new);
                let view = packed.view();
                let bytes: Vec<u8> = view.words.iter().flat_map(|w| w.to_le_bytes()).collect();
                let shape = |width| (rows, tokens, width);
                let codes = Tensor::from_vec(bytes, shape(d * format.bits / 8), device)?;
                let groups = format.groups();
                let scales = Tensor::from_slice(view.scales, shape(groups), device)?;
                let lows = match format.symmetric {
                    true => None,
                    false => Some(Tensor::from_slice(view.lows, shape(groups), device)?),
                };
                let overlay = Tensor::from_slice(new, shape(d), device)?.to_dtype(DType::F16)?;
                let Some(Self::Packed {
                    codes: old_codes,
                    scales: old_scales,
                    lows: old_lows,
                    overlay: old_overlay,
                    ..
                }) = old
                else {
                    return Ok(Self::Packed {
                        format,
                        codes,
                        scales,
                        lows,
                        overlay,
                    });
                };
                Ok(Self::Packed {
                    format,
                    codes: join(Some(old_codes), codes)?,
                    scales: join(Some(old_scales), scales)?,
                    lows: match lows {
                        Some(lows) => Some(join(old_lows.as_ref(), lows)?),
                        None => None,
                    },
                    overlay: join(Some(old_overlay), overlay)?,
                })
            }
        }
    }

    /// The same with codes, scales and exact tokens as `tokens` makes them, and the overlay as `overlaid` does.
    fn map(
        &self,
        tokens: impl Fn(&Tensor) -> Result<Tensor>,
        overlaid: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        Ok(match self {
            Self::Exact(all) => Self::Exact(tokens(all)?),
            Self::Packed {
                format,
                codes,
                scales,
                lows,
                overlay,
            } => Self::Packed {
                format: *format,
                codes: tokens(codes)?,
                scales: tokens(scales)?,
                lows: lows.as_ref().map(tokens).transpose()?,
                overlay: overlaid(overlay)?,
            },
        })
    }

    /// The tokens in `slots` of each row alone; the overlay stays.
    pub(super) fn selected(&self, slots: &[Vec<u32>]) -> Result<Self> {
        self.map(|x| select(x, slots), |x| Ok(x.clone()))
    }

    /// The overlay's entries `kept` of each row alone.
    pub(super) fn with_overlay(&self, kept: &[Vec<u32>]) -> Result<Self> {
        self.map(|x| Ok(x.clone()), |x| select(x, kept))
    }

    /// All tokens `[rows, n, d]` as f32, those of the overlay in place of their quantised selves.
    pub(super) fn widened(&self, entries: &[Vec<u32>]) -> Result<Tensor> {
        let Self::Packed {
            format,
            codes,
            scales,
            lows,
            overlay,
        } = self
        else {
            let Self::Exact(all) = self else {
                unreachable!("there are two cases");
            };
            return Ok(all.to_dtype(DType::F32)?);
        };
        let (rows, n, _) = codes.dims3()?;
        let d = format.head_dim;
        let mut codes = codes.to_dtype(DType::F32)?;
        if format.bits == 4 {
            let high = (&codes / 16.0)?.floor()?;
            let low = (&codes - (&high * 16.0)?)?;
            codes = Tensor::stack(&[low, high], 3)?;
        }
        let groups = format.groups();
        let codes = codes.reshape((rows, n, groups, format.group))?;
        let wide = |x: &Tensor| x.to_dtype(DType::F32)?.reshape((rows, n, groups, 1));
        let scales = wide(scales)?;
        let offsets = match lows {
            Some(lows) => wide(lows)?,
            None => (&scales * -f64::from(1u32 << (format.bits - 1)))?,
        };
        let mut all = codes.broadcast_mul(&scales)?.broadcast_add(&offsets)?;
        let block = format.rotation;
        if block > 1 {
            let mut matrix = vec![0.0f32; block * block];
            for (i, row) in matrix.chunks_exact_mut(block).enumerate() {
                row[i] = 1.0;
                hadamard::rotate(row, block);
            }
            let matrix = Tensor::from_vec(matrix, (block, block), all.device())?;
            all = all
                .reshape((rows * n * d / block, block))?
                .matmul(&matrix)?;
        }
        let all = all.reshape((rows * n, d))?;
        let count = overlay.dim(1)?;
        let overlay = overlay.to_dtype(DType::F32)?.reshape((rows * count, d))?;
        let mut index: Vec<u32> = (0..(rows * n) as u32).collect();
        for (row, entries) in entries.iter().enumerate() {
            for (e, &slot) in entries.iter().enumerate() {
                if slot != UNUSED {
                    index[row * n + slot as usize] = (rows * n + row * count + e) as u32;
                }
            }
        }
        let index = Tensor::from_vec(index, rows * n, all.device())?;
        let both = Tensor::cat(&[all, overlay], 0)?;
        Ok(both.index_select(&index, 0)?.reshape((rows, n, d))?)
    }

    /// One row alone.
    pub(super) fn row(&self, row: usize) -> Result<Self> {
        let one = |x: &Tensor| Ok(x.narrow(0, row, 1)?.contiguous()?);
        self.map(one, one)
    }

    /// Bytes of the tokens that are kept as they are beside their codes.
    pub(super) fn overlay_bytes(&self) -> usize {
        match self {
            Self::Exact(_) => 0,
            Self::Packed { overlay, .. } => overlay.elem_count() * overlay.dtype().size_in_bytes(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let of = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        match self {
            Self::Exact(all) => of(all),
            Self::Packed {
                codes,
                scales,
                lows,
                overlay,
                ..
            } => of(codes) + of(scales) + lows.as_ref().map_or(0, of) + of(overlay),
        }
    }
}
