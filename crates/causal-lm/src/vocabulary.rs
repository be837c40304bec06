//! The ends of a model: tokens to hidden states, and hidden states to logits.

use crate::block::Norm;
use crate::config::ModelConfig;
use crate::linear::Linear;
use crate::ops::softcap;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::borrow::Cow;
use std::fmt;
use tensor_io::Checkpoint;

/// The embedding of a model, in the dtype of the file.
#[derive(Clone)]
pub struct Embedding<'a> {
    name: String,
    rows: Rows<'a>,
    vocab: usize,
    hidden: usize,
    scale: f64,
    dtype: DType,
    device: Device,
}

/// Where rows of an embedding come from.
#[derive(Clone)]
enum Rows<'a> {
    /// From the file as they are needed, in its dtype.
    Stored(&'a Checkpoint, DType),
    /// From the bytes of the whole matrix, where a row cannot be read alone.
    Resident(Vec<u8>, DType),
    /// From another matrix, `[vocab, hidden]`.
    Table(Tensor),
}

impl fmt::Debug for Embedding<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Embedding")
            .field("vocab", &self.vocab)
            .field("hidden", &self.hidden)
            .finish_non_exhaustive()
    }
}

/// The last step of a model: final norm and vocabulary projection.
#[derive(Clone, Debug)]
pub struct Head {
    norm: Norm,
    vocab: Linear,
    scale: f64,
    softcap: Option<f64>,
}

impl<'a> Embedding<'a> {
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        config: &ModelConfig,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        let name = config.names.embedding();
        // Opening has checked that the embedding is of floats.
        let stored = checkpoint.info(&name)?.candle_dtype().unwrap_or(DType::F32);
        let rows = match checkpoint.source() {
            Some(_) => Rows::Stored(checkpoint, stored),
            None => match checkpoint.bytes(&name)? {
                Cow::Owned(bytes) => Rows::Resident(bytes, stored),
                Cow::Borrowed(_) => Rows::Stored(checkpoint, stored),
            },
        };
        Ok(Self {
            name,
            rows,
            vocab: config.vocab,
            hidden: config.hidden,
            scale: config.embedding_scale,
            dtype,
            device: device.clone(),
        })
    }

    /// The same with another matrix, `[vocab, hidden]`, for instance one that was rounded.
    ///
    /// # Errors
    /// [`Error::Shape`] for a matrix of another shape.
    pub fn with_table(self, table: Tensor) -> Result<Self> {
        let expected = vec![self.vocab, self.hidden];
        if table.dims() != expected {
            return Err(Error::Shape {
                tensor: self.name,
                found: table.dims().to_vec(),
                expected,
            });
        }
        Ok(Self {
            rows: Rows::Table(table.to_device(&self.device)?),
            ..self
        })
    }

    /// Embeds `[batch, tokens]` ids to `[batch, tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] for an id without a row.
    pub fn rows(&self, windows: &[&[u32]]) -> Result<Tensor> {
        let vocab = self.vocab;
        let tokens = || windows.iter().copied().flatten().copied();
        if let Some(token) = tokens().find(|&token| token as usize >= vocab) {
            return Err(Error::TokenOutOfRange { token, vocab });
        }
        let length = windows.first().map_or(0, |window| window.len());
        let shape = [windows.len(), length, self.hidden];
        let places = tokens().map(|token| token as usize);
        let stored =
            |bytes: &[u8], stored| Tensor::from_raw_buffer(bytes, stored, &shape, &self.device);
        let rows = match &self.rows {
            Rows::Table(table) => {
                let ids = Tensor::new(tokens().collect::<Vec<u32>>(), &self.device)?;
                table.index_select(&ids, 0)?.reshape(&shape)?
            }
            Rows::Resident(bytes, dtype) => {
                let row_bytes = bytes.len() / vocab;
                let row = |place: usize| &bytes[place * row_bytes..][..row_bytes];
                let rows: Vec<u8> = places.flat_map(row).copied().collect();
                stored(&rows, *dtype)?
            }
            Rows::Stored(checkpoint, dtype) => {
                let places: Vec<usize> = places.collect();
                stored(&checkpoint.rows(&self.name, &places)?, *dtype)?
            }
        };
        let rows = rows.to_dtype(self.dtype)?;
        Ok(match self.scale {
            1.0 => rows,
            // The reference keeps the factor in f32.
            scale => (rows * f64::from(scale as f32))?,
        })
    }
}

impl Head {
    pub(crate) fn new(norm: Norm, vocab: Linear, config: &ModelConfig) -> Self {
        Self {
            norm,
            vocab,
            scale: config.logit_scale,
            softcap: config.logit_softcap,
        }
    }

    /// The same with another vocabulary projection, `[vocab, hidden]`, for instance one that was rounded.
    ///
    /// # Errors
    /// [`Error::Shape`] for a matrix of another shape.
    pub fn with_vocab(mut self, weight: Tensor) -> Result<Self> {
        let expected = vec![self.vocab.outputs(), self.vocab.inputs()];
        if weight.dims() != expected {
            return Err(Error::Shape {
                tensor: "the vocabulary projection".into(),
                found: weight.dims().to_vec(),
                expected,
            });
        }
        self.vocab.set_weight(weight);
        Ok(self)
    }

    /// The vocabulary projection.
    pub(crate) fn vocab(&self) -> &Linear {
        &self.vocab
    }

    /// Entries of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab.outputs()
    }

    /// Bytes of its weights in memory.
    pub fn bytes(&self) -> usize {
        self.vocab.bytes() + self.norm.bytes()
    }

    /// `[rows, hidden]` to logits `[rows, vocab]`.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let logits = self.vocab.forward(&self.norm.forward(x)?)?;
        let logits = match self.scale {
            1.0 => logits,
            scale => (logits * scale)?,
        };
        match self.softcap {
            Some(cap) => softcap(&logits, cap),
            None => Ok(logits),
        }
    }
}
