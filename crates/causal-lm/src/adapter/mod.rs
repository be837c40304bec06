//! LoRA adapters: low-rank factors beside the weights of a model.
//!
//! An adapter adds `scale · B A` to linears, with A `[r, in]` and B `[out, r]`. Two forms are read: a PEFT folder
//! (`adapter_config.json` and `adapter_model.safetensors`) and a GGUF file of type `adapter`. Opening one reads and checks all
//! factors and keeps none: they are read again when a weight is asked for. [`open_adapted`] gives the model with the factors
//! added, as a checkpoint that decodes each weight when it is asked for.

mod lora_gguf;
mod peft;

use std::any::Any;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use packed::{BlockType, QuantRows};
use rayon::prelude::*;
use tensor_io::gguf::Gguf;
use tensor_io::{Checkpoint, Dtype, TensorSource, TensorSpec};

use crate::gguf::Order;
use crate::{Error, Result};

/// The factors of one weight: `scale · B A`.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// `[rank, cols]`, row-major.
    pub a: Vec<f32>,
    /// `[rows, rank]`, row-major.
    pub b: Vec<f32>,
    /// Rows of A and columns of B.
    pub rank: usize,
    /// What the product is multiplied with.
    pub scale: f32,
}

/// A LoRA adapter.
#[derive(Debug)]
pub struct Adapter {
    path: PathBuf,
    file: File,
    /// By the name of the weight in Hugging Face.
    places: BTreeMap<String, Place>,
    scale: f32,
}

/// The file with the factors.
#[derive(Debug)]
enum File {
    Safetensors(Checkpoint),
    Gguf(Gguf),
}

/// Where the factors of a weight are.
#[derive(Debug)]
struct Place {
    a: String,
    b: String,
    rank: usize,
    /// Rows and columns of the weight.
    shape: [usize; 2],
    /// α / r, or what the form has in its place.
    scale: f64,
    /// Where rows of B are in the file, if not in their order.
    order: Option<Order>,
}

/// Opens the model at `base`, as [`open`](crate::open), with the adapter at `adapter` added to its weights.
///
/// # Errors
/// What opening the base reports, and [`Error::Text`] for an adapter that is malformed or of another model.
pub fn open_adapted(base: impl AsRef<Path>, adapter: impl AsRef<Path>) -> Result<Checkpoint> {
    let base = crate::open(base)?;
    Adapter::open(adapter, &base)?.added_to(base)
}

impl Adapter {
    /// Reads an adapter for the model `base`: a PEFT folder, or a GGUF file. Norms of a GGUF adapter are passed over, as llama.cpp
    /// does.
    ///
    /// # Errors
    /// [`Error::Text`] and [`Error::Checkpoint`] with the file and what is wrong: factors without their partner, of a tensor
    /// that the model does not have, of another shape or not finite.
    pub fn open(path: impl AsRef<Path>, base: &Checkpoint) -> Result<Self> {
        let path = path.as_ref();
        let (file, places) = match path.is_dir() {
            true => {
                let (file, places) = peft::read(path)?;
                (File::Safetensors(file), places)
            }
            false => {
                let file = Gguf::open(path)?;
                let places = lora_gguf::read(&file, base)?;
                (File::Gguf(file), places)
            }
        };
        let adapter = Self {
            path: path.to_path_buf(),
            file,
            places,
            scale: 1.0,
        };
        adapter.check(base)?;
        Ok(adapter)
    }

    /// The model that the adapter at `path` names as its base: a path, from where the adapter lies or whoever made it was, or a name
    /// on a hub. `None` where it names none, as GGUF files do not. Opening compares shapes alone.
    ///
    /// # Errors
    /// A configuration that cannot be read.
    pub fn base_model(path: impl AsRef<Path>) -> Result<Option<String>> {
        match path.as_ref().is_dir() {
            true => peft::base(path.as_ref()),
            false => Ok(None),
        }
    }

    fn check(&self, base: &Checkpoint) -> Result<()> {
        let path = &self.path;
        if self.places.is_empty() {
            return Err(fault(path, "it holds no factors"));
        }
        for (name, place) in &self.places {
            let Ok(info) = base.info(name) else {
                return Err(fault(path, format!("the model has no tensor {name}")));
            };
            let expected = match info.shape[..] {
                [rows, cols] => [rows, cols],
                _ => return Err(fault(path, format!("{name} is no matrix"))),
            };
            let found = place.shape;
            if found != expected || name.contains("embed_tokens") {
                return Err(fault(
                    path,
                    format!(
                        "{name}: factors of a {found:?} matrix, but the model's is {expected:?}"
                    ),
                ));
            }
            // Refuses values that are not finite before anything runs.
            self.read(place)?;
        }
        Ok(())
    }

    /// The same with all factors multiplied by `scale`, beside the scale that the adapter states.
    ///
    /// # Errors
    /// [`Error::Text`] for a scale that is not finite.
    pub fn with_scale(self, scale: f32) -> Result<Self> {
        match scale.is_finite() {
            true => Ok(Self { scale, ..self }),
            false => Err(fault(&self.path, format!("a scale of {scale}"))),
        }
    }

    /// Names of the weights that it has factors for.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// The factors of a weight; `None` for one without.
    ///
    /// # Errors
    /// What reading reports.
    pub fn factors(&self, name: &str) -> Result<Option<Factors>> {
        let place = self.places.get(name);
        Ok(place.map(|place| self.read(place)).transpose()?)
    }

    /// The model `base`, for which the adapter was opened, with the factors added to its weights.
    ///
    /// # Errors
    /// What reading the names of the base reports.
    pub fn added_to(self, base: Checkpoint) -> Result<Checkpoint> {
        let path = base.dir().to_path_buf();
        let config = base.config().clone();
        let mut specs = Vec::new();
        for name in base.names() {
            let info = base.info(name)?;
            let dtype = match self.places.contains_key(name) {
                true => Dtype::F32,
                false => info.dtype,
            };
            specs.push(TensorSpec::new(name, dtype, info.shape.clone()));
        }
        let source = Adapted {
            base,
            adapter: self,
        };
        Ok(Checkpoint::from_source(
            path,
            config,
            specs,
            Box::new(source),
        )?)
    }

    /// Reads factors and lets go of the memory behind them.
    fn read(&self, place: &Place) -> tensor_io::Result<Factors> {
        let Place {
            a, b, rank, order, ..
        } = place;
        let (a_values, stored) = (self.values(a)?, self.values(b)?);
        self.release(place);
        let b = match order {
            None => stored,
            Some(order) => {
                let row = |row: usize| &stored[order.in_file(row) * rank..][..*rank];
                (0..order.rows()).flat_map(row).copied().collect()
            }
        };
        Ok(Factors {
            a: a_values,
            b,
            rank: *rank,
            scale: (f64::from(self.scale) * place.scale) as f32,
        })
    }

    /// The values of a tensor, checked to be finite.
    fn values(&self, name: &str) -> tensor_io::Result<Vec<f32>> {
        match &self.file {
            File::Safetensors(file) => {
                let tensor = file.tensor_as(name, DType::F32, &Device::Cpu)?;
                let values = tensor.flatten_all().and_then(|values| values.to_vec1());
                values.map_err(|source| tensor_io::Error::Tensor {
                    tensor: name.to_string(),
                    source,
                })
            }
            File::Gguf(file) => {
                let info = file.info(name)?;
                let quantised = BlockType::from_id(info.layout.id).filter(|ty| ty.is_quantised());
                let Some(ty) = quantised else {
                    return file.floats(name);
                };
                let (rows, cols) = (info.elements() / info.width().max(1), info.width());
                let values = QuantRows::new(ty, rows, cols, file.bytes(name)?)
                    .and_then(|blocks| blocks.check().map(|()| blocks.dequantise()));
                values.map_err(|error| tensor_io::Error::Decode {
                    file: file.path().to_path_buf(),
                    tensor: name.to_string(),
                    reason: error.to_string(),
                })
            }
        }
    }

    /// The bytes of a tensor as they are stored.
    fn bytes(&self, name: &str) -> tensor_io::Result<Cow<'_, [u8]>> {
        match &self.file {
            File::Safetensors(file) => file.bytes(name),
            File::Gguf(file) => file.bytes(name).map(Cow::Borrowed),
        }
    }

    fn release(&self, place: &Place) {
        let names = [place.a.as_str(), place.b.as_str()];
        match &self.file {
            File::Safetensors(file) => file.release(names),
            File::Gguf(file) => file.release(names),
        }
    }

    /// Size of all factors as they are stored.
    fn total_bytes(&self) -> u64 {
        match &self.file {
            File::Safetensors(file) => file.total_bytes(),
            File::Gguf(file) => {
                let names = self.places.values().flat_map(|place| [&place.a, &place.b]);
                let bytes = names.filter_map(|name| file.info(name).ok());
                bytes.map(|info| info.bytes as u64).sum()
            }
        }
    }
}

fn fault(path: &Path, reason: impl Into<String>) -> Error {
    Error::Text {
        path: path.into(),
        reason: format!("adapter: {}", reason.into()),
    }
}

/// A model with an adapter added.
pub(crate) struct Adapted {
    pub(crate) base: Checkpoint,
    pub(crate) adapter: Adapter,
}

impl TensorSource for Adapted {
    fn bytes(&self, name: &str) -> tensor_io::Result<Cow<'_, [u8]>> {
        let Some(place) = self.adapter.places.get(name) else {
            return self.base.bytes(name);
        };
        let Factors { a, b, rank, scale } = self.adapter.read(place)?;
        let cols = a.len() / rank;
        let tensor = |source| tensor_io::Error::Tensor {
            tensor: name.to_string(),
            source,
        };
        let weight = self.base.tensor_as(name, DType::F32, &Device::Cpu)?;
        let mut weight: Vec<f32> = weight
            .flatten_all()
            .and_then(|weight| weight.to_vec1())
            .map_err(tensor)?;
        weight
            .par_chunks_mut(cols)
            .zip(b.par_chunks(rank))
            .for_each(|(row, b)| {
                for (b, a) in b.iter().zip(a.chunks_exact(cols)) {
                    let b = scale * b;
                    for (weight, a) in row.iter_mut().zip(a) {
                        *weight += b * a;
                    }
                }
            });
        Ok(Cow::Owned(
            weight
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        ))
    }

    fn rows(&self, name: &str, rows: &[usize]) -> tensor_io::Result<Vec<u8>> {
        let Some(place) = self.adapter.places.get(name) else {
            return self.base.rows(name, rows);
        };
        let row_bytes = place.shape[1] * size_of::<f32>();
        let all = self.bytes(name)?;
        Ok(rows
            .iter()
            .flat_map(|row| all[row * row_bytes..][..row_bytes].to_vec())
            .collect())
    }

    fn stored(&self, name: &str) -> tensor_io::Result<Cow<'_, [u8]>> {
        let base = match self.base.source() {
            Some(source) => source.stored(name)?,
            None => self.base.bytes(name)?,
        };
        let Some(place) = self.adapter.places.get(name) else {
            return Ok(base);
        };
        let mut bytes = base.into_owned();
        bytes.extend_from_slice(&self.adapter.bytes(&place.a)?);
        bytes.extend_from_slice(&self.adapter.bytes(&place.b)?);
        let scale = f64::from(self.adapter.scale) * place.scale;
        bytes.extend_from_slice(&scale.to_le_bytes());
        Ok(Cow::Owned(bytes))
    }

    fn total_bytes(&self) -> u64 {
        self.base.total_bytes() + self.adapter.total_bytes()
    }

    fn release(&self, name: &str) {
        self.base.release([name]);
        if let Some(place) = self.adapter.places.get(name) {
            self.adapter.release(place);
        }
    }

    fn release_rows(&self, name: &str, rows: Range<usize>) {
        self.base.release_rows(name, rows);
    }

    fn files(&self) -> tensor_io::Result<Vec<(String, Vec<u8>)>> {
        crate::open::carried_files(&self.base)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
