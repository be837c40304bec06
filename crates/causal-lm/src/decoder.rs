//! A checkpoint seen as a decoder whose parts are loaded one at a time.

use crate::block::{Attention, Block, Mlp, RmsNorm, RopeTables};
use crate::config::ModelConfig;
use crate::linear::Linear;
use crate::names::{self, LinearName};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::borrow::Cow;
use std::fmt;
use tensor_io::Checkpoint;

/// A decoder checkpoint, checked against its config, with nothing in memory yet.
#[derive(Debug)]
pub struct Decoder<'a> {
    checkpoint: &'a Checkpoint,
    config: ModelConfig,
    dtype: DType,
    device: Device,
}

/// The embedding of a model, in the dtype of the file.
#[derive(Clone)]
pub struct Embedding<'a> {
    checkpoint: &'a Checkpoint,
    /// The whole matrix, where a row cannot be read alone.
    resident: Option<Vec<u8>>,
    vocab: usize,
    hidden: usize,
    stored: DType,
    dtype: DType,
    device: Device,
}

impl fmt::Debug for Embedding<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Embedding")
            .field("vocab", &self.vocab)
            .field("hidden", &self.hidden)
            .field("stored", &self.stored)
            .finish_non_exhaustive()
    }
}

/// The last step of a model: final norm and vocabulary projection.
#[derive(Clone, Debug)]
pub struct Head {
    norm: RmsNorm,
    vocab: Linear,
}

impl<'a> Decoder<'a> {
    /// Reads the config and checks the name and shape of every tensor.
    ///
    /// Parts are computed in `dtype`: f32 on a CPU, where bf16 decodes eleven times slower.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::UnexpectedTensor`] or a missing tensor where checkpoint and
    /// config disagree, and everything that [`ModelConfig::new`] reports.
    pub fn new(checkpoint: &'a Checkpoint, dtype: DType, device: &Device) -> Result<Self> {
        let config = ModelConfig::new(checkpoint.config())?;
        let decoder = Self {
            checkpoint,
            config,
            dtype,
            device: device.clone(),
        };
        decoder.check()?;
        Ok(decoder)
    }

    /// The model's dimensions.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The checkpoint it was made from.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// Where parts are loaded to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What parts are loaded as.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn check(&self) -> Result<()> {
        let mut expected = self.config.tensors();
        // A bias that the config does not announce is read where the file has one, also of an
        // output projection without inputs: that is how bias-compensated models of architectures
        // without a slot are stored.
        for layer in 0..self.config.layers() {
            for name in LinearName::ALL
                .into_iter()
                .filter(|&name| !self.config.has_bias(name))
            {
                let shape = self.config.linear_shape(layer, name);
                let rows = shape
                    .map(|[rows, _]| rows)
                    .or(name.is_output().then_some(self.config.hidden));
                if let Some(rows) = rows.filter(|_| self.checkpoint.contains(&name.bias(layer))) {
                    expected.push((name.bias(layer), vec![rows]));
                }
            }
        }
        for (tensor, expected) in &expected {
            let info = self.checkpoint.info(tensor)?;
            if info.shape != *expected {
                return Err(Error::Shape {
                    tensor: tensor.clone(),
                    found: info.shape.clone(),
                    expected: expected.clone(),
                });
            }
        }
        let known: std::collections::HashSet<&str> =
            expected.iter().map(|(name, _)| name.as_str()).collect();
        // Older exports carry the frequencies, and tied ones a copy of the embedding.
        let surplus = |name: &str| name.ends_with("rotary_emb.inv_freq") || name == names::HEAD;
        match self
            .checkpoint
            .names()
            .find(|name| !known.contains(name) && !surplus(name))
        {
            Some(tensor) => Err(Error::UnexpectedTensor {
                tensor: tensor.into(),
                model_type: self.config.model_type.name(),
            }),
            None => Ok(()),
        }
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        Ok(self.checkpoint.tensor_as(name, self.dtype, &self.device)?)
    }

    fn norm(&self, name: &str) -> Result<RmsNorm> {
        Ok(RmsNorm {
            weight: self.load(name)?,
            eps: self.config.rms_eps,
        })
    }

    fn linear(&self, layer: usize, name: LinearName) -> Result<Linear> {
        Ok(Linear {
            weight: self.load(&name.weight(layer))?,
            bias: self.bias(layer, name)?,
        })
    }

    fn bias(&self, layer: usize, name: LinearName) -> Result<Option<Tensor>> {
        let bias = name.bias(layer);
        self.checkpoint
            .contains(&bias)
            .then(|| self.load(&bias))
            .transpose()
    }

    /// Loads block `layer`; [`Decoder::release`] lets go of the file's pages afterwards.
    ///
    /// # Errors
    /// What reading the tensors reports, among it values that are not finite.
    pub fn block(&self, layer: usize) -> Result<Block> {
        let widths = self.config.widths[layer];
        let head_norm = |name: &str| -> Result<Option<RmsNorm>> {
            self.config
                .qk_norm
                .then(|| self.norm(&names::block(layer, name)))
                .transpose()
        };
        let attention = match widths.heads {
            0 => None,
            _ => Some(Attention {
                q: self.linear(layer, LinearName::Q)?,
                k: self.linear(layer, LinearName::K)?,
                v: self.linear(layer, LinearName::V)?,
                o: self.linear(layer, LinearName::O)?,
                q_norm: head_norm(names::Q_NORM)?,
                k_norm: head_norm(names::K_NORM)?,
                head_dim: self.config.head_dim,
                sliding_window: self.config.sliding_window[layer],
            }),
        };
        let mlp = match widths.neurons {
            0 => None,
            _ => Some(Mlp {
                gate: self.linear(layer, LinearName::Gate)?,
                up: self.linear(layer, LinearName::Up)?,
                down: self.linear(layer, LinearName::Down)?,
            }),
        };
        let constant = |name, absent: bool| match absent {
            true => self.bias(layer, name),
            false => Ok(None),
        };
        Ok(Block {
            layer,
            attention_constant: constant(LinearName::O, attention.is_none())?,
            mlp_constant: constant(LinearName::Down, mlp.is_none())?,
            input_norm: self.norm(&names::block(layer, names::INPUT_NORM))?,
            attention,
            post_norm: self.norm(&names::block(layer, names::POST_NORM))?,
            mlp,
        })
    }

    /// Lets go of the mapped pages of block `layer`.
    pub fn release(&self, layer: usize) {
        let of_block = |name: &&str| names::parse_block(name).is_some_and(|(l, _)| l == layer);
        self.checkpoint
            .release(self.checkpoint.names().filter(of_block));
    }

    /// The embedding. Its rows are read as they are needed, except for a pickle's, which is read once and kept in memory.
    ///
    /// # Errors
    /// What reading the tensor reports.
    pub fn embedding(&self) -> Result<Embedding<'a>> {
        let resident = match self.checkpoint.source() {
            Some(_) => None,
            None => match self.checkpoint.bytes(names::EMBEDDING)? {
                Cow::Owned(bytes) => Some(bytes),
                Cow::Borrowed(_) => None,
            },
        };
        Ok(Embedding {
            checkpoint: self.checkpoint,
            resident,
            vocab: self.config.vocab,
            hidden: self.config.hidden,
            // Opening has checked that the embedding is of floats.
            stored: self
                .checkpoint
                .info(names::EMBEDDING)?
                .candle_dtype()
                .unwrap_or(DType::F32),
            dtype: self.dtype,
            device: self.device.clone(),
        })
    }

    /// [`Embedding::rows`] of the model's embedding. Whoever embeds again and again keeps the [`Embedding`].
    ///
    /// # Errors
    /// As there, and what reading the embedding reports.
    pub fn embed(&self, windows: &[&[u32]]) -> Result<Tensor> {
        self.embedding()?.rows(windows)
    }

    /// Loads the final norm and the vocabulary projection.
    ///
    /// # Errors
    /// What reading the tensors reports.
    pub fn head(&self) -> Result<Head> {
        let weight = if self.config.tied {
            names::EMBEDDING
        } else {
            names::HEAD
        };
        let head = Head {
            norm: self.norm(names::FINAL_NORM)?,
            vocab: Linear {
                weight: self.load(weight)?,
                bias: None,
            },
        };
        self.checkpoint.release([weight]);
        Ok(head)
    }

    /// Rotations for positions `start .. start + tokens`.
    ///
    /// # Errors
    /// When the device refuses the tensors.
    pub fn rope(&self, start: usize, tokens: usize) -> Result<RopeTables> {
        let (cos, sin) = self
            .config
            .rope
            .tables(start, tokens, self.dtype, &self.device)?;
        Ok(RopeTables { cos, sin })
    }
}

impl Embedding<'_> {
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
        let rows = tokens().map(|token| token as usize);
        let rows: Vec<u8> = match &self.resident {
            Some(bytes) => {
                let row_bytes = bytes.len() / vocab;
                let row = |row: usize| &bytes[row * row_bytes..][..row_bytes];
                rows.flat_map(row).copied().collect()
            }
            None => {
                let rows: Vec<usize> = rows.collect();
                self.checkpoint.rows(names::EMBEDDING, &rows)?
            }
        };
        let length = windows.first().map_or(0, |window| window.len());
        let shape = [windows.len(), length, self.hidden];
        let rows = Tensor::from_raw_buffer(&rows, self.stored, &shape, &self.device)?;
        Ok(rows.to_dtype(self.dtype)?)
    }
}

impl Head {
    /// Entries of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab.weight.dims()[0]
    }

    /// `[rows, hidden]` to logits `[rows, vocab]`.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.vocab.forward(&self.norm.forward(x)?)
    }
}
