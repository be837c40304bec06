//! All statistics of one input, which linears that read the same tensor share.

use super::{Accumulation, CrossCollector, Diagonal, Gram, GramCollector, Rows};
use crate::matrix::{expect_shape, from_tensor, to_tensor};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use faer::Mat;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Which statistics are collected; channel sums always are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collect {
    /// H.
    pub gram: bool,
    /// K; needs teacher activations.
    pub cross: bool,
}

impl Collect {
    /// What either needs.
    pub fn or(self, other: Self) -> Self {
        Self {
            gram: self.gram || other.gram,
            cross: self.cross || other.cross,
        }
    }
}

/// Finished statistics of one input.
#[derive(Clone, Debug)]
pub struct InputStats {
    /// Channel sums.
    pub diagonal: Diagonal,
    /// H.
    pub gram: Option<Gram>,
    /// K = Σ w x x̂ᵀ, `n × n`: teacher inputs by student inputs.
    pub cross: Option<Mat<f64>>,
}

/// Collects [`InputStats`].
#[derive(Clone, Debug)]
pub struct InputCollector {
    diagonal: Diagonal,
    gram: Option<GramCollector>,
    cross: Option<CrossCollector>,
}

impl InputCollector {
    /// Empty sums over tokens of `width` channels.
    ///
    /// # Errors
    /// When the accumulation counts no samples.
    pub fn new(width: usize, collect: Collect, accumulation: Accumulation) -> Result<Self> {
        Ok(Self {
            diagonal: Diagonal::new(width),
            gram: (collect
                .gram
                .then(|| GramCollector::new(width, accumulation)))
            .transpose()?,
            cross: collect.cross.then(|| CrossCollector::new(width)),
        })
    }

    /// Goes on from finished sums.
    ///
    /// # Errors
    /// When the accumulation counts no samples.
    pub fn resume(stats: InputStats, accumulation: Accumulation) -> Result<Self> {
        let gram = stats
            .gram
            .map(|gram| GramCollector::resume(gram, accumulation));
        Ok(Self {
            diagonal: stats.diagonal,
            gram: gram.transpose()?,
            cross: stats.cross.map(CrossCollector::resume),
        })
    }

    /// Adds a batch of inputs as the compressed model sees them, and the same tokens' inputs in
    /// the dense model where K is collected.
    ///
    /// # Errors
    /// When shapes do not fit, or K is collected and the teacher's inputs are missing.
    pub fn update(&mut self, student: &Rows, teacher: Option<&Rows>) -> Result<()> {
        self.diagonal.update(student)?;
        if let Some(gram) = &mut self.gram {
            gram.update(student)?;
        }
        if let Some(cross) = &mut self.cross {
            let teacher = teacher.ok_or(Error::MissingStatistic {
                method: "the cross statistic",
                statistic: "the dense model's inputs",
            })?;
            cross.update(teacher, student)?;
        }
        Ok(())
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let channels = 3 * size_of::<f64>() * self.diagonal.width();
        channels as u64
            + self.gram.as_ref().map_or(0, GramCollector::bytes)
            + self.cross.as_ref().map_or(0, CrossCollector::bytes)
    }

    /// The sums.
    pub fn finish(self) -> InputStats {
        InputStats {
            diagonal: self.diagonal,
            gram: self.gram.map(GramCollector::finish),
            cross: self.cross.map(CrossCollector::finish),
        }
    }
}

impl InputStats {
    /// Channels.
    pub fn width(&self) -> usize {
        self.diagonal.width()
    }

    /// Adds sums over other tokens.
    ///
    /// # Errors
    /// When widths differ or one has a statistic that the other lacks.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        self.diagonal.merge(&other.diagonal)?;
        let lacking = |statistic| Error::MissingStatistic {
            method: "merging statistics",
            statistic,
        };
        match (&mut self.gram, &other.gram) {
            (Some(gram), Some(other)) => gram.merge(other)?,
            (None, None) => {}
            _ => return Err(lacking("H on both sides")),
        }
        match (&mut self.cross, &other.cross) {
            (Some(cross), Some(other)) => {
                expect_shape("cross statistic", other.as_ref(), cross.shape())?;
                *cross += other;
            }
            (None, None) => {}
            _ => return Err(lacking("K on both sides")),
        }
        Ok(())
    }

    /// Writes a safetensors file, which appears when it is complete.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let diagonal = &self.diagonal;
        let vector = |values: &[f64]| Tensor::new(values, &Device::Cpu);
        let mut tensors = vec![
            ("square", vector(&diagonal.square)?),
            ("abs", vector(&diagonal.abs)?),
            ("max_mean_abs", vector(&diagonal.max_mean_abs)?),
        ];
        let mut metadata = BTreeMap::from([
            ("tokens".to_owned(), diagonal.tokens.to_string()),
            ("weight".to_owned(), format!("{:?}", diagonal.weight)),
        ]);
        if let Some(gram) = &self.gram {
            tensors.push(("gram", to_tensor(gram.matrix(), DType::F64, &Device::Cpu)?));
            metadata.insert("gram_tokens".into(), gram.tokens().to_string());
            metadata.insert("gram_weight".into(), format!("{:?}", gram.weight()));
        }
        if let Some(cross) = &self.cross {
            tensors.push((
                "cross",
                to_tensor(cross.as_ref(), DType::F64, &Device::Cpu)?,
            ));
        }
        let tensors = tensors.iter().map(|(name, tensor)| (*name, tensor));
        Ok(tensor_io::write_file(path, tensors, &metadata)?)
    }

    /// Reads what [`Self::save`] wrote.
    ///
    /// # Errors
    /// When the file cannot be read or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |reason: String| Error::StatisticsFile {
            path: path.to_owned(),
            reason,
        };
        let file = tensor_io::Checkpoint::open_file(path)?;
        let tensor = |name| file.tensor_as(name, DType::F64, &Device::Cpu);
        let width = tensor("square")?.elem_count();
        let vector = |name| -> Result<Vec<f64>> {
            file.expect_shape(name, &[width])?;
            Ok(tensor(name)?.to_vec1()?)
        };
        let matrix = |name| -> Result<Option<Mat<f64>>> {
            if !file.contains(name) {
                return Ok(None);
            }
            file.expect_shape(name, &[width, width])?;
            Ok(Some(from_tensor(&tensor(name)?, name)?))
        };
        let entry = |key: &str| {
            let value = file.metadata().get(key);
            value.ok_or_else(|| wrong(format!("metadata has no {key}; these are no statistics")))
        };
        let count = |key: &str| -> Result<u64> {
            let value = entry(key)?;
            value
                .parse()
                .map_err(|_| wrong(format!("{key} is {value:?}, expected a count")))
        };
        let weight = |key: &str| -> Result<f64> {
            let value = entry(key)?;
            match value.parse::<f64>() {
                Ok(weight) if weight.is_finite() && weight >= 0.0 => Ok(weight),
                _ => Err(wrong(format!("{key} is {value:?}, expected a number ≥ 0"))),
            }
        };
        let gram = match matrix("gram")? {
            Some(h) => Some(Gram::from_parts(
                h,
                count("gram_tokens")?,
                weight("gram_weight")?,
            )),
            None => None,
        };
        Ok(Self {
            diagonal: Diagonal {
                square: vector("square")?,
                abs: vector("abs")?,
                max_mean_abs: vector("max_mean_abs")?,
                weight: weight("weight")?,
                tokens: count("tokens")?,
            },
            gram,
            cross: matrix("cross")?,
        })
    }
}
