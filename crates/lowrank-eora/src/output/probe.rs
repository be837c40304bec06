//! Inputs and expected outputs of each repaired linear, to check a runtime with.
//!
//! A runtime that drops the adapter, ignores `lora_alpha`, or mixes up modules still produces fluent
//! text. A probe makes it visible: for each linear a few inputs x, W_c x + B A x without bias, and
//! B A x alone, which tells what share of the adapter the runtime applied.

use crate::matrix::{from_tensor, to_tensor};
use crate::repair::{LayerId, Repaired};
use crate::solve::LowRank;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use faer::Mat;
use linalg::product;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tensor_io::Checkpoint;

/// A probe file: `MODULE.input` `[tokens, n]`, `MODULE.output` and `MODULE.correction` `[tokens, m]`, f32.
#[derive(Debug)]
pub struct Probe {
    path: PathBuf,
    file: Checkpoint,
    layers: Vec<LayerId>,
}

/// What a probe holds of a linear.
#[derive(Clone, Debug)]
pub struct ProbeLayer {
    /// Which.
    pub layer: LayerId,
    /// x, `[tokens, n]`.
    pub input: Tensor,
    /// W_c x + B A x, `[tokens, m]`.
    pub output: Tensor,
    /// B A x, `[tokens, m]`.
    pub correction: Tensor,
}

/// How far a runtime is off on a linear.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Deviation {
    /// Which.
    pub layer: LayerId,
    /// ‖y − expected‖ / ‖B A x‖: 0 for the right output, 1 where the adapter is not applied. Where
    /// the linear has no correction, relative to the expected output.
    pub error: f64,
    /// The factor on B A x that explains y best: 1 where all is well, 0 where the adapter is not
    /// applied. `None` where the linear has no correction.
    pub scale: Option<f64>,
}

impl Probe {
    /// Computes a probe of `tokens` random inputs in [−1, 1) and writes it.
    ///
    /// # Errors
    /// What reading the repair and writing the file report.
    pub fn write(
        repaired: &Repaired,
        tokens: usize,
        seed: u64,
        path: impl AsRef<Path>,
    ) -> Result<()> {
        if tokens == 0 {
            return Err(Error::Setting {
                name: "tokens of a probe",
                value: "0".into(),
                expected: "a number ≥ 1",
            });
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut tensors = Vec::new();
        for block in 0..repaired.blocks() {
            for layer in repaired.block(block)? {
                // Inputs are what f32 and f16 hold exactly, so that nobody's rounding shows.
                let input = Mat::from_fn(layer.report.inputs, tokens, |_, _| {
                    f64::from(rng.random_range(-1024i32..1024)) / 1024.0
                });
                let correction = match &layer.factors {
                    Some(LowRank { a, b }) => {
                        product(b.as_ref(), product(a.as_ref(), input.as_ref()).as_ref())
                    }
                    None => Mat::zeros(layer.report.outputs, tokens),
                };
                let weight = layer.weight.matrix()?;
                let output = product(weight.as_ref(), input.as_ref()) + &correction;
                for (what, matrix) in [
                    ("input", input),
                    ("output", output),
                    ("correction", correction),
                ] {
                    let tensor = to_tensor(matrix.transpose(), DType::F32, &Device::Cpu)?;
                    tensors.push((format!("{}.{what}", layer.report.layer), tensor));
                }
            }
        }
        let metadata = BTreeMap::from([(
            "about".to_owned(),
            "output = (W_c + B A) input without bias; correction = B A input".to_owned(),
        )]);
        let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        Ok(tensor_io::write_file(path, tensors, &metadata)?)
    }

    /// Opens a probe.
    ///
    /// # Errors
    /// What reading the file reports; [`Error::Malformed`] when it is no probe.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = Checkpoint::open_file(path)?;
        let mut layers: Vec<LayerId> = (file.names())
            .filter_map(|name| LayerId::parse(name.strip_suffix(".input")?))
            .collect();
        layers.sort();
        if layers.is_empty() {
            return Err(Error::Malformed {
                path: path.to_owned(),
                reason: "it holds no MODULE.input: this is no probe".into(),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            layers,
        })
    }

    /// The linears it probes.
    pub fn layers(&self) -> &[LayerId] {
        &self.layers
    }

    /// What it holds of a linear.
    ///
    /// # Errors
    /// A tensor that is missing.
    pub fn layer(&self, layer: LayerId) -> Result<ProbeLayer> {
        let tensor = |what: &str| self.file.tensor(&format!("{layer}.{what}"), &Device::Cpu);
        Ok(ProbeLayer {
            layer,
            input: tensor("input")?,
            output: tensor("output")?,
            correction: tensor("correction")?,
        })
    }

    /// Asks `runtime` for the output of each linear (`[tokens, m]` without bias, from
    /// `[tokens, n]`) and compares.
    ///
    /// # Errors
    /// What the runtime reports, and outputs of another shape or that are not finite, with the linear.
    pub fn check(
        &self,
        mut runtime: impl FnMut(LayerId, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Vec<Deviation>> {
        let check = |&layer: &LayerId| {
            let probe = self.layer(layer)?;
            let found = runtime(layer, &probe.input).map_err(Error::from);
            (found.and_then(|found| deviation(&probe, &found))).map_err(|source| Error::Layer {
                layer: format!("{}: {layer}", self.path.display()),
                source: Box::new(source),
            })
        };
        self.layers.iter().map(check).collect()
    }
}

fn deviation(probe: &ProbeLayer, found: &Tensor) -> Result<Deviation> {
    if found.dims() != probe.output.dims() {
        return Err(Error::Shape {
            what: "output of the runtime",
            found: found.dims().to_vec(),
            expected: probe.output.dims().to_vec(),
        });
    }
    let found = from_tensor(found, "output of the runtime")?;
    let output = from_tensor(&probe.output, "expected output")?;
    let correction = from_tensor(&probe.correction, "expected correction")?;
    let error = &found - &output;
    let strength = correction.squared_norm_l2();
    if strength == 0.0 {
        let norm = output.norm_l2();
        return Ok(Deviation {
            layer: probe.layer,
            error: if norm > 0.0 {
                error.norm_l2() / norm
            } else {
                error.norm_l2()
            },
            scale: None,
        });
    }
    let along: f64 = (error.col_iter().zip(correction.col_iter()))
        .map(|(e, c)| e.iter().zip(c.iter()).map(|(e, c)| e * c).sum::<f64>())
        .sum();
    Ok(Deviation {
        layer: probe.layer,
        error: error.norm_l2() / strength.sqrt(),
        scale: Some(1.0 + along / strength),
    })
}
