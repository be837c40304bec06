//! Linear layers in the Hugging Face layout.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::ops::with_f32;
use crate::packing::{Execution, packed_error};
use crate::weights::DenseReason;
use crate::{Error, Result};

/// `y = x Wᵀ + b`, with W as a tensor or as it is stored.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    /// `[out]`.
    bias: Option<Tensor>,
}

#[derive(Clone, Debug)]
enum Weight {
    /// `[out, in]`, and why it is not packed.
    Tensor(Tensor, DenseReason),
    /// Blocks, groups or floats of 16 bits.
    Packed(Arc<Packed>),
}

#[derive(Debug)]
struct Packed {
    /// Perhaps with factors of low rank; the bias included.
    linear: packed::Linear,
    execution: Execution,
}

impl Linear {
    /// From a weight `[out, in]` and a bias `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self::dense(weight, bias, DenseReason::Given)
    }

    /// The same of a checkpoint's weight that is not packed for this reason.
    pub(crate) fn dense(weight: Tensor, bias: Option<Tensor>, reason: DenseReason) -> Self {
        Self {
            weight: Weight::Tensor(weight, reason),
            bias,
        }
    }

    /// From a weight that is multiplied as it is.
    pub(crate) fn packed(
        linear: packed::Linear,
        bias: Option<Tensor>,
        execution: Execution,
    ) -> Result<Self> {
        let linear = match &bias {
            None => linear,
            Some(bias) => {
                let values = bias.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                linear.with_bias(&values).map_err(packed_error("bias"))?
            }
        };
        Ok(Self {
            weight: Weight::Packed(Arc::new(Packed { linear, execution })),
            bias,
        })
    }

    /// W, `[out, in]`. Of a packed weight it is decoded on each call, factors of low rank included.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn weight(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Tensor(weight, _) => Ok(weight.clone()),
            Weight::Packed(packed) => {
                let linear = &packed.linear;
                let shape = (linear.rows(), linear.cols());
                let weight = Tensor::from_vec(linear.weight().dequantise(), shape, &Device::Cpu)?;
                match linear.low_rank() {
                    None => Ok(weight),
                    Some(low_rank) => {
                        let product = low_rank.product();
                        let product = Tensor::from_vec(product, shape, &Device::Cpu)?;
                        Ok((weight + product)?)
                    }
                }
            }
        }
    }

    /// Puts another weight `[out, in]` in the place of W, factors of low rank included.
    pub fn set_weight(&mut self, weight: Tensor) {
        self.weight = Weight::Tensor(weight, DenseReason::Given);
    }

    /// The layer of these rows, by their numbers in a vector of u32, as a tensor.
    ///
    /// # Errors
    /// For a row that is not there.
    pub fn select(&self, rows: &Tensor) -> Result<Self> {
        let select =
            |x: &Tensor| -> Result<Tensor> { Ok(x.index_select(&rows.to_device(x.device())?, 0)?) };
        let bias = self.bias.as_ref().map(select).transpose()?;
        Ok(Self::new(select(&self.weight()?)?, bias))
    }

    /// The bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What W is multiplied as; `None` for a tensor.
    pub fn kind(&self) -> Option<packed::Kind> {
        match &self.weight {
            Weight::Tensor(..) => None,
            Weight::Packed(packed) => Some(packed.linear.weight().kind()),
        }
    }

    /// Why W is multiplied as a tensor; `None` where it is multiplied as it is stored.
    pub fn dense_reason(&self) -> Option<DenseReason> {
        match &self.weight {
            Weight::Tensor(_, reason) => Some(*reason),
            Weight::Packed(_) => None,
        }
    }

    /// Rank of the factors beside W, where there are some.
    pub fn rank(&self) -> Option<usize> {
        match &self.weight {
            Weight::Tensor(..) => None,
            Weight::Packed(packed) => packed.linear.low_rank().map(packed::LowRank::rank),
        }
    }

    /// Bytes that a product reads: of W, of factors of low rank and of the bias.
    pub fn bytes(&self) -> usize {
        match &self.weight {
            Weight::Packed(packed) => packed.linear.bytes(),
            Weight::Tensor(weight, _) => {
                let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
                bytes(weight) + self.bias.as_ref().map_or(0, bytes)
            }
        }
    }

    /// Width of what it reads.
    pub fn inputs(&self) -> usize {
        match &self.weight {
            Weight::Tensor(weight, _) => weight.dims()[1],
            Weight::Packed(packed) => packed.linear.cols(),
        }
    }

    /// Width of what it writes.
    pub fn outputs(&self) -> usize {
        match &self.weight {
            Weight::Tensor(weight, _) => weight.dims()[0],
            Weight::Packed(packed) => packed.linear.rows(),
        }
    }

    /// `[rows, in]` to `[rows, out]`.
    ///
    /// # Errors
    /// When `x` has another width than the weight.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [y] = Self::forward_all([self], x)?;
        Ok(y)
    }

    /// [`Linear::forward`] of several layers that read the same `x`, such as those of queries, keys and values. Packed ones run
    /// together.
    ///
    /// # Errors
    /// As there.
    pub fn forward_all<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let mut outputs: [Option<Tensor>; N] = [const { None }; N];
        let together: Vec<(usize, &Packed)> = layers
            .iter()
            .enumerate()
            .filter_map(|(at, layer)| match &layer.weight {
                Weight::Packed(packed) => Some((at, &**packed)),
                Weight::Tensor(..) => None,
            })
            .collect();
        if let Some((_, Packed { execution, .. })) = together.first() {
            let rows = x.dim(0)?;
            let mut values: Vec<Vec<f32>> = together
                .iter()
                .map(|(_, packed)| vec![0.0; rows * packed.linear.rows()])
                .collect();
            let linears: Vec<&packed::Linear> =
                together.iter().map(|(_, packed)| &packed.linear).collect();
            let mut parts: Vec<&mut [f32]> = values.iter_mut().map(Vec::as_mut_slice).collect();
            with_f32(x, |x| {
                packed::forward(&linears, x, &mut parts, &execution.context())
            })?
            .map_err(packed_error("input"))?;
            for ((at, packed), values) in together.iter().zip(values) {
                let shape = (rows, packed.linear.rows());
                let y = Tensor::from_vec(values, shape, &Device::Cpu)?;
                outputs[*at] = Some(y);
            }
        }
        let mut outputs = outputs.into_iter();
        let mut done = Vec::with_capacity(N);
        for layer in layers {
            done.push(match (outputs.next().flatten(), &layer.weight) {
                (Some(y), _) => y,
                (None, Weight::Tensor(weight, _)) => {
                    let y = x.matmul(&weight.t()?)?;
                    match &layer.bias {
                        Some(bias) => y.broadcast_add(bias)?,
                        None => y,
                    }
                }
                (None, Weight::Packed(_)) => unreachable!("packed layers have run"),
            });
        }
        done.try_into()
            .map_err(|_| Error::Windows("one output for each layer".into()))
    }
}
