//! LoRA adapter folders: `adapter_model.safetensors` and `adapter_config.json`, as PEFT writes them.
//!
//! A linear's output gains scale · B (A x). PEFT's scale is `lora_alpha / r` with a rank and an alpha
//! for each module where the configuration has patterns; vLLM knows one r and one alpha and ignores
//! patterns. So the default is one rank for all, smaller ones padded with zeros, and alpha = r: a
//! scale of 1 in both. Modules keep the case of their names.

use super::peft::{CONFIG, PREFIX, Peft, WEIGHTS};
use crate::repair::{LayerId, Repaired};
use crate::solve::LowRank;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use faer::Mat;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tensor_io::Checkpoint;

/// How layers of different rank are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterRanks {
    /// All with the largest rank, padded with zeros: what every runtime reads.
    #[default]
    Uniform,
    /// Each with its own, and `rank_pattern` and `alpha_pattern`: exactly the bytes of the factors,
    /// for runtimes that read both, as PEFT does and vLLM does not. Where all ranks are the same
    /// there are no patterns.
    Mixed,
}

/// How an adapter is written.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AdapterOptions {
    /// Stored dtype: f16, bf16 or f32.
    pub dtype: DType,
    /// How layers of different rank are stored.
    pub ranks: AdapterRanks,
    /// Declare `use_rslora`, whose scale is `lora_alpha / √r`; B is divided by √r.
    pub rslora: bool,
    /// `base_model_name_or_path`: the compressed model that the factors were fitted to, not the original.
    pub base_model: String,
    /// Replace an adapter that is there.
    pub overwrite: bool,
}

impl AdapterOptions {
    /// For the compressed model at this path or of this name; f16, one rank for all, never replacing an adapter.
    ///
    /// Runtimes resolve a relative path from wherever they run: give an absolute one.
    pub fn new(base_model: impl Into<String>) -> Self {
        Self {
            dtype: DType::F16,
            ranks: AdapterRanks::default(),
            rslora: false,
            base_model: base_model.into(),
            overwrite: false,
        }
    }

    /// Stored dtype: f16, bf16 or f32.
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// How layers of different rank are stored.
    pub fn with_ranks(self, ranks: AdapterRanks) -> Self {
        Self { ranks, ..self }
    }

    /// Declare `use_rslora`.
    pub fn with_rslora(self, rslora: bool) -> Self {
        Self { rslora, ..self }
    }

    /// Replace an adapter that is there.
    pub fn with_overwrite(self, overwrite: bool) -> Self {
        Self { overwrite, ..self }
    }
}

/// The factors of an adapter folder, one module each.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// In the order of the data.
    pub layers: Vec<AdapterFactors>,
}

/// B and A of a module, with the scale that a runtime multiplies B A with.
#[derive(Clone, Debug)]
pub struct AdapterFactors {
    /// Which.
    pub layer: LayerId,
    /// As stored.
    pub factors: LowRank,
    /// From the configuration.
    pub scale: f64,
}

impl Adapter {
    /// Writes the factors of a repair as an adapter folder.
    ///
    /// # Errors
    /// [`Error::Setting`] for another dtype, no base model or a repair without factors, values beyond the dtype
    /// with their tensor, and a folder that exists or cannot be written.
    pub fn write(
        repaired: &Repaired,
        options: &AdapterOptions,
        dst: impl AsRef<Path>,
    ) -> Result<()> {
        if !matches!(options.dtype, DType::F16 | DType::BF16 | DType::F32) {
            return Err(Error::Setting {
                name: "dtype of an adapter",
                value: options.dtype.as_str().into(),
                expected: "f16, bf16 or f32",
            });
        }
        if options.base_model.is_empty() {
            return Err(Error::Setting {
                name: "base model of an adapter",
                value: "empty".into(),
                expected: "the path or name of the compressed model",
            });
        }
        let ranks: BTreeMap<LayerId, usize> = (repaired.reports())
            .map(|report| (report.layer, report.rank))
            .collect();
        let largest = ranks.values().copied().max().unwrap_or(0);
        if largest == 0 {
            return Err(Error::Setting {
                name: "rank of the adapter",
                value: "0".into(),
                expected: "a repair with factors",
            });
        }
        let leaves: BTreeSet<&str> = (ranks.iter())
            .filter(|(_, rank)| **rank > 0)
            .map(|(layer, _)| leaf(layer))
            .collect();
        // The rank that a linear is stored with, if it is stored.
        let stored = |layer: &LayerId| {
            let rank = ranks.get(layer).copied().unwrap_or(0);
            match options.ranks {
                AdapterRanks::Uniform => leaves.contains(leaf(layer)).then_some(largest),
                AdapterRanks::Mixed => Some(rank).filter(|&rank| rank > 0),
            }
        };
        // A target without tensors would be initialised by the runtime, so that a name that stands for linears without
        // factors too is no target.
        let named = |layer: &&LayerId| leaves.contains(leaf(layer));
        let targets: BTreeSet<String> =
            match ranks.keys().filter(named).all(|l| stored(l).is_some()) {
                true => leaves.iter().map(ToString::to_string).collect(),
                false => (ranks.keys().filter(|layer| stored(layer).is_some()))
                    .map(ToString::to_string)
                    .collect(),
            };
        let pattern: Map<String, Value> = (ranks.keys())
            .filter_map(|layer| Some((layer, stored(layer)?)))
            .filter(|(_, rank)| *rank != largest)
            .map(|(layer, rank)| (layer.to_string(), rank.into()))
            .collect();
        let mut tensors = Vec::new();
        for block in 0..repaired.blocks() {
            for layer in repaired.block(block)? {
                let report = &layer.report;
                let Some(rank) = stored(&report.layer) else {
                    continue;
                };
                let scale = if options.rslora {
                    1.0 / (rank as f64).sqrt()
                } else {
                    1.0
                };
                let mut padded = LowRank {
                    b: Mat::zeros(report.outputs, rank),
                    a: Mat::zeros(rank, report.inputs),
                };
                if let Some(LowRank { b, a }) = &layer.factors {
                    let scaled = b * faer::Scale(scale);
                    padded
                        .b
                        .as_mut()
                        .subcols_mut(0, b.ncols())
                        .copy_from(&scaled);
                    padded.a.as_mut().subrows_mut(0, a.nrows()).copy_from(a);
                }
                let (a, b) = padded.to_tensors(options.dtype, &Device::Cpu)?;
                tensors.push((format!("{PREFIX}{}.lora_A.weight", report.layer), a));
                tensors.push((format!("{PREFIX}{}.lora_B.weight", report.layer), b));
            }
        }
        let peft = Peft {
            base: &options.base_model,
            rank: largest,
            ranks: pattern,
            modules: targets.into_iter().collect(),
            parameters: &[],
            rslora: options.rslora,
        };
        peft.write(dst.as_ref(), options.overwrite, &tensors)
    }

    /// Reads an adapter folder for a decoder, ours or another LoRA, as PEFT would.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the file for what is no LoRA adapter of a decoder's linears or asks
    /// for what plain LoRA is not (DoRA, biases, saved modules).
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join(CONFIG);
        let config = tensor_io::Config::read(&path)?;
        let refuse = |reason: String| Error::Malformed {
            path: path.clone(),
            reason,
        };
        let kind = config.str("peft_type")?;
        if kind != "LORA" {
            return Err(refuse(format!("peft_type is {kind}, expected LORA")));
        }
        let asks = |key: &str| match config.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::String(text)) => text != "none",
            Some(Value::Array(items)) => !items.is_empty(),
            Some(_) => true,
        };
        for key in ["use_dora", "bias", "modules_to_save", "fan_in_fan_out"] {
            if asks(key) {
                return Err(refuse(format!("{key} asks for more than plain LoRA")));
            }
        }
        let r = config.usize("r")?;
        let alpha = config.f64("lora_alpha")?;
        let rslora = config.opt_bool("use_rslora")?.unwrap_or(false);
        let file = Checkpoint::open_file(dir.join(WEIGHTS))?;
        let mut layers = Vec::new();
        for name in file.names() {
            let Some(module) = name.strip_suffix(".lora_A.weight") else {
                if name.ends_with(".lora_B.weight") {
                    continue;
                }
                return Err(refuse(format!("tensor {name} is no factor of a LoRA")));
            };
            let layer = module.strip_prefix(PREFIX).and_then(LayerId::parse);
            let layer =
                layer.ok_or_else(|| refuse(format!("{module} is no linear of a decoder")))?;
            let factor =
                |factor: &str| file.tensor(&format!("{module}.{factor}.weight"), &Device::Cpu);
            let (a, b): (Tensor, Tensor) = (factor("lora_A")?, factor("lora_B")?);
            let factors = LowRank::from_tensors(&a, &b)?;
            let of = |key: &str| pattern(&config, key, &layer.to_string());
            let rank = of("rank_pattern").unwrap_or(r as f64);
            if factors.rank() as f64 != rank {
                return Err(refuse(format!(
                    "{layer} has rank {}, and the configuration says {rank}",
                    factors.rank()
                )));
            }
            let alpha = of("alpha_pattern").unwrap_or(alpha);
            layers.push(AdapterFactors {
                layer,
                factors,
                scale: alpha / if rslora { rank.sqrt() } else { rank },
            });
        }
        layers.sort_by_key(|layer| layer.layer);
        Ok(Self { layers })
    }

    /// The factors of a linear.
    pub fn get(&self, layer: LayerId) -> Option<&AdapterFactors> {
        self.layers.iter().find(|factors| factors.layer == layer)
    }
}

impl AdapterFactors {
    /// scale · B A, `m × n`.
    pub fn product(&self) -> Mat<f64> {
        self.factors.product() * faer::Scale(self.scale)
    }
}

/// Last part of a module's path, which is what PEFT looks for.
fn leaf(layer: &LayerId) -> &'static str {
    layer.module().path.rsplit('.').next().unwrap_or_default()
}

/// The number that a pattern of the configuration gives a module: that of the first key which the
/// module's path ends with, at the start of a part.
fn pattern(config: &tensor_io::Config, key: &str, module: &str) -> Option<f64> {
    let patterns = config.get(key)?.as_object()?;
    let fits = |key: &str| {
        let before = module.strip_suffix(key);
        before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
    };
    patterns.iter().find(|(key, _)| fits(key))?.1.as_f64()
}
