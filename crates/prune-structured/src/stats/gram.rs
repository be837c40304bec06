//! Gram matrices H = XᵀX of linear inputs, one file per half of a block.
//!
//! Products and sums are f32. A refit adds a ridge of a hundredth of the mean diagonal, which is far
//! above their rounding.

use super::Part;
use crate::Result;
use crate::stored::{self, Tensors};
use candle_core::{DType, Device, Tensor};
use faer::{Mat, MatRef};
use linalg::{Entries, add_product, mirror_lower};
use std::path::{Path, PathBuf};

/// Sums H = XᵀX over batches of inputs.
#[derive(Clone, Debug)]
pub(crate) enum GramCollector {
    /// Inputs on the CPU; the lower triangle of H.
    Cpu(Mat<f32>),
    /// Inputs on another device, where H stays until the end.
    Device(Tensor),
}

impl GramCollector {
    /// An empty sum for inputs of `width` features on `device`.
    pub(crate) fn new(width: usize, device: &Device) -> Result<Self> {
        Ok(match device {
            Device::Cpu => Self::Cpu(Mat::zeros(width, width)),
            _ => Self::Device(Tensor::zeros((width, width), DType::F32, device)?),
        })
    }

    /// Adds a batch, `[tokens, width]` f32.
    pub(crate) fn update(&mut self, x: &Tensor) -> Result<()> {
        match self {
            Self::Cpu(sum) => {
                let (tokens, width) = x.dims2()?;
                let values = x.flatten_all()?.to_vec1::<f32>()?;
                let x = MatRef::from_column_major_slice(&values, width, tokens);
                add_product(sum.as_mut(), x, x.transpose(), 1.0, Entries::Lower);
            }
            Self::Device(sum) => *sum = (&*sum + x.t()?.matmul(x)?)?,
        }
        Ok(())
    }

    /// H, `[width, width]` f32 on the CPU.
    pub(crate) fn finish(self) -> Result<Tensor> {
        match self {
            Self::Cpu(mut sum) => {
                mirror_lower(sum.as_mut());
                let width = sum.ncols();
                let values: Vec<f32> = sum.col_iter().flat_map(|c| c.iter().copied()).collect();
                Ok(Tensor::from_vec(values, (width, width), &Device::Cpu)?)
            }
            Self::Device(sum) => Ok(sum.to_device(&Device::Cpu)?),
        }
    }
}

/// A folder of Gram matrices.
#[derive(Clone, Debug)]
pub struct GramStore {
    dir: PathBuf,
}

impl GramStore {
    /// Uses `dir`, which must exist and outlive the store.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, layer: usize, part: Part) -> PathBuf {
        self.dir
            .join(format!("gram-{layer}-{}.safetensors", part.name()))
    }

    pub(crate) fn save(&self, layer: usize, part: Part, gram: &Tensor) -> Result<()> {
        stored::write_tensors(&self.path(layer, part), &[("gram".into(), gram.clone())])
    }

    /// H of one half, `[width, width]` f32.
    ///
    /// # Errors
    /// When it was not collected, or its file cannot be read or is damaged.
    pub fn load(&self, layer: usize, part: Part) -> Result<Tensor> {
        Tensors::open(&self.path(layer, part))?.load("gram")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_add_up_to_the_product_of_all_tokens_whatever_the_threads() {
        // Wide enough to be divided among threads.
        let value = |i: usize| ((i * i + 3 * i) % 17) as f32 - 8.0;
        let x = Tensor::from_iter((0..600 * 400).map(value), &Device::Cpu).unwrap();
        let x = x.reshape((400, 600)).unwrap();
        let collect = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.unwrap().install(|| {
                let mut collector = GramCollector::new(600, &Device::Cpu).unwrap();
                for batch in x.chunk(3, 0).unwrap() {
                    collector.update(&batch).unwrap();
                }
                collector.finish().unwrap().to_vec2::<f32>().unwrap()
            })
        };
        // Sums of small integers are exact.
        let expected = x.t().unwrap().matmul(&x).unwrap();
        let one = collect(1);
        assert_eq!(one, expected.to_vec2::<f32>().unwrap());
        for threads in [2, 3] {
            assert_eq!(collect(threads), one);
        }
    }
}
