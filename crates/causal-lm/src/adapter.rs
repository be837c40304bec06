//! LoRA adapters: low-rank factors beside the weights of a model.
//!
//! An adapter adds `scale · B A` to linears, with A `[r, in]` and B `[out, r]`. Two forms are read: a PEFT folder
//! (`adapter_config.json` and `adapter_model.safetensors`) and a GGUF file of type `adapter`. [`open_adapted`] gives the
//! model with the factors added, as a checkpoint that decodes each weight when it is asked for.

use std::any::Any;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use rayon::prelude::*;
use tensor_io::gguf::{Gguf, Metadata};
use tensor_io::{Checkpoint, Config, Dtype, TensorSource, TensorSpec};

use crate::gguf::layout::{self, Experts, Part, Rows};
use crate::gguf::{Architecture, GgufTensors, content};
use crate::{Error, ModelConfig, Result};

const PEFT_CONFIG: &str = "adapter_config.json";
const PEFT_WEIGHTS: &str = "adapter_model.safetensors";
const PEFT_PREFIX: &str = "base_model.model.";

/// The factors of one weight, the scale in B.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// `[rank, cols]`, row-major.
    pub a: Vec<f32>,
    /// `[rows, rank]`, row-major, times the scale.
    pub b: Vec<f32>,
    /// Columns of A and rows of B.
    pub rank: usize,
}

/// A LoRA adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Adapter {
    /// By the name of the weight in Hugging Face.
    pub factors: BTreeMap<String, Factors>,
}

/// Opens the model at `base`, as [`open`](crate::open), with the adapter at `adapter` added to its weights.
///
/// # Errors
/// What opening the base reports, and [`Error::Text`] for an adapter that is malformed or of another model.
pub fn open_adapted(base: impl AsRef<Path>, adapter: impl AsRef<Path>) -> Result<Checkpoint> {
    let base = crate::open(base)?;
    let adapter = Adapter::open(adapter, &base)?;
    let path = base.dir().to_path_buf();
    let config = base.config().clone();
    let mut specs = Vec::new();
    for name in base.names() {
        let info = base.info(name)?;
        let dtype = match adapter.factors.contains_key(name) {
            true => Dtype::F32,
            false => info.dtype,
        };
        specs.push(TensorSpec::new(name, dtype, info.shape.clone()));
    }
    let source = Adapted { base, adapter };
    Ok(Checkpoint::from_source(
        path,
        config,
        specs,
        Box::new(source),
    )?)
}

impl Adapter {
    /// Reads an adapter for the model `base`: a PEFT folder, or a GGUF file.
    ///
    /// # Errors
    /// [`Error::Text`] and [`Error::Checkpoint`] with the file and what is wrong: factors without their partner, of a tensor
    /// that the model does not have, of another shape or not finite.
    pub fn open(path: impl AsRef<Path>, base: &Checkpoint) -> Result<Self> {
        let path = path.as_ref();
        let adapter = match path.is_dir() {
            true => Self::read_peft(path)?,
            false => Self::read_gguf(&Gguf::open(path)?, base)?,
        };
        if adapter.factors.is_empty() {
            return Err(fault(path, "it holds no factors"));
        }
        for (name, factors) in &adapter.factors {
            let Ok(info) = base.info(name) else {
                return Err(fault(path, format!("the model has no tensor {name}")));
            };
            let expected = match info.shape[..] {
                [rows, cols] => [rows, cols],
                _ => return Err(fault(path, format!("{name} is no matrix"))),
            };
            let rank = factors.rank.max(1);
            let found = [factors.b.len() / rank, factors.a.len() / rank];
            if found != expected || name.contains("embed_tokens") {
                return Err(fault(
                    path,
                    format!(
                        "{name}: factors of a {found:?} matrix, but the model's is {expected:?}"
                    ),
                ));
            }
        }
        Ok(adapter)
    }

    fn read_gguf(file: &Gguf, base: &Checkpoint) -> Result<Self> {
        let metadata = file.metadata();
        let kind = metadata.get_str("general.type")?.unwrap_or("model");
        let form = metadata.get_str("adapter.type")?.unwrap_or("lora");
        if kind != "adapter" || form != "lora" {
            let what = format!("general.type is {kind:?} ({form}), expected a LoRA adapter");
            return Err(content(&metadata, what));
        }
        let name = metadata.required("general.architecture", Metadata::get_str)?;
        let source = base
            .source()
            .and_then(|source| source.as_any().downcast_ref::<GgufTensors>());
        let wanted = source.map(GgufTensors::architecture);
        let found = Architecture::named(name);
        let Some(architecture) = found.filter(|found| wanted.is_none_or(|wanted| wanted == *found))
        else {
            let wanted = wanted.map_or("a supported one", Architecture::name);
            let what = format!("architecture {name:?}, but the model is {wanted}");
            return Err(content(&metadata, what));
        };
        let mut config = ModelConfig::new(base.config())?;
        config.names = config
            .names
            .located(config.layers(), |name| base.contains(name));
        let tensors = layout::tensors(&config, architecture, Experts::Stacked);
        let alpha = metadata.get_f64("adapter.lora.alpha")?.unwrap_or(0.0);
        let mut adapter = Self::default();
        for info in file.tensors() {
            let Some(weight) = info.name.strip_suffix(".lora_a") else {
                let known = info.name.strip_suffix(".lora_b");
                match known.filter(|weight| file.contains(&format!("{weight}.lora_a"))) {
                    Some(_) => continue,
                    None => {
                        let what = format!("unexpected tensor `{}`", info.name);
                        return Err(content(&metadata, what));
                    }
                }
            };
            let b_name = format!("{weight}.lora_b");
            let b_info = file.info(&b_name)?;
            let (&[rank, _], &[rows, b_rank]) = (&info.shape[..], &b_info.shape[..]) else {
                return Err(content(
                    &metadata,
                    format!("factors of {weight} are no matrices"),
                ));
            };
            if rank != b_rank {
                let what = format!("{weight}: A has rank {rank}, B {b_rank}");
                return Err(content(&metadata, what));
            }
            let (a, mut b) = (file.floats(&info.name)?, file.floats(&b_name)?);
            let tensor = tensors.iter().find(|tensor| tensor.name == weight);
            let name = match tensor.map(|tensor| &tensor.parts[..]) {
                Some(
                    [
                        Part {
                            tensor,
                            rows: Rows::All,
                        },
                    ],
                ) => tensor.clone(),
                Some(
                    [
                        Part {
                            tensor,
                            rows: Rows::Order(order),
                        },
                    ],
                ) if order.len() == rows => {
                    let mut reordered = vec![0.0; b.len()];
                    for (of_file, &row) in order.iter().enumerate() {
                        reordered[row * rank..][..rank]
                            .copy_from_slice(&b[of_file * rank..][..rank]);
                    }
                    b = reordered;
                    tensor.clone()
                }
                _ => {
                    return Err(content(
                        &metadata,
                        format!("factors of `{weight}` for {rows} rows have no place"),
                    ));
                }
            };
            // Without alpha the factors stand for themselves.
            if alpha != 0.0 {
                let scale = (alpha / rank as f64) as f32;
                b.iter_mut().for_each(|value| *value *= scale);
            }
            adapter.factors.insert(name, Factors { a, b, rank });
        }
        Ok(adapter)
    }

    fn read_peft(dir: &Path) -> Result<Self> {
        let config = Config::read(dir.join(PEFT_CONFIG))?;
        let kind = config.opt_str("peft_type")?.unwrap_or("LORA");
        let dora = config.opt_bool("use_dora")?.unwrap_or(false);
        let bias = config.opt_str("bias")?.unwrap_or("none");
        if kind != "LORA" || dora || bias != "none" {
            let what =
                format!("peft_type {kind}, use_dora {dora}, bias {bias}: expected plain LoRA");
            return Err(fault(&dir.join(PEFT_CONFIG), what));
        }
        let weights = dir.join(PEFT_WEIGHTS);
        let file = Checkpoint::open_file(&weights)?;
        let mut adapter = Self::default();
        for name in file.names() {
            let Some(module) = name.strip_suffix(".lora_A.weight") else {
                let known = name.strip_suffix(".lora_B.weight");
                match known.filter(|module| file.contains(&format!("{module}.lora_A.weight"))) {
                    Some(_) => continue,
                    None => return Err(fault(&weights, format!("unexpected tensor {name}"))),
                }
            };
            let read = |factor: &str| -> Result<(Vec<usize>, Vec<f32>)> {
                let name = format!("{module}.{factor}.weight");
                let tensor = file.tensor_as(&name, DType::F32, &Device::Cpu)?;
                Ok((tensor.dims().to_vec(), tensor.flatten_all()?.to_vec1()?))
            };
            let ((a_shape, a), (b_shape, mut b)) = (read("lora_A")?, read("lora_B")?);
            let (&[rank, _], &[_, b_rank]) = (&a_shape[..], &b_shape[..]) else {
                return Err(fault(
                    &weights,
                    format!("factors of {module} are no matrices"),
                ));
            };
            if rank != b_rank || rank == 0 {
                return Err(fault(
                    &weights,
                    format!("{module}: A has rank {rank}, B {b_rank}"),
                ));
            }
            let module = module.strip_prefix(PEFT_PREFIX).unwrap_or(module);
            let scale = peft_scale(&config, module)? as f32;
            b.iter_mut().for_each(|value| *value *= scale);
            adapter
                .factors
                .insert(format!("{module}.weight"), Factors { a, b, rank });
        }
        Ok(adapter)
    }
}

/// α / r of a module, or α / √r with `use_rslora`; both may have a value of their own for it.
fn peft_scale(config: &Config, module: &str) -> Result<f64> {
    let of = |field: &str, pattern: &str| -> Result<f64> {
        if let Some(own) = config.opt_section(pattern)? {
            // Keys are whole names or their last parts; PEFT also allows expressions, which are not supported.
            let keys = own.raw().iter();
            let matching = keys.filter(|(key, _)| {
                let rest = module.strip_suffix(key.as_str());
                rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            });
            if let Some(value) = matching.filter_map(|(_, value)| value.as_f64()).next() {
                return Ok(value);
            }
        }
        Ok(config.f64(field)?)
    };
    let (alpha, rank) = (of("lora_alpha", "alpha_pattern")?, of("r", "rank_pattern")?);
    Ok(match config.opt_bool("use_rslora")?.unwrap_or(false) {
        true => alpha / rank.sqrt(),
        false => alpha / rank,
    })
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
        let Some(Factors { a, b, rank }) = self.adapter.factors.get(name) else {
            return self.base.bytes(name);
        };
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
            .zip(b.par_chunks(*rank))
            .for_each(|(row, b)| {
                for (b, a) in b.iter().zip(a.chunks_exact(cols)) {
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
        let Some(Factors { a, rank, .. }) = self.adapter.factors.get(name) else {
            return self.base.rows(name, rows);
        };
        let row_bytes = a.len() / rank * size_of::<f32>();
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
        let Some(Factors { a, b, .. }) = self.adapter.factors.get(name) else {
            return Ok(base);
        };
        let factors = a.iter().chain(b).flat_map(|value| value.to_le_bytes());
        Ok(Cow::Owned(base.iter().copied().chain(factors).collect()))
    }

    fn total_bytes(&self) -> u64 {
        let factors = self.adapter.factors.values();
        let bytes: usize = factors
            .map(|f| (f.a.len() + f.b.len()) * size_of::<f32>())
            .sum();
        self.base.total_bytes() + bytes as u64
    }

    fn release(&self, name: &str) {
        self.base.release([name]);
    }

    fn files(&self) -> tensor_io::Result<Vec<(String, Vec<u8>)>> {
        crate::open::carried_files(&self.base)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
