//! Compressing with an importance of the inputs that was measured elsewhere.

use super::sites::linears;
use super::source::{CompressedLinear, Linear, Source};
use super::{LayerId, StoredWeight};
use crate::compress::{Compressor, Needs};
use crate::{Error, Result};
use causal_lm::Decoder;
use std::collections::BTreeMap;
use tensor_io::{ContentHash, Hasher};

/// Importance of the inputs of every linear of a model: the mean square of each, as an importance matrix has it.
#[derive(Clone, Debug, PartialEq)]
pub struct InputImportance {
    layers: BTreeMap<LayerId, Vec<f64>>,
    hash: ContentHash,
}

impl InputImportance {
    /// That of these linears.
    pub fn new(layers: BTreeMap<LayerId, Vec<f64>>) -> Self {
        let mut hasher = Hasher::new();
        for (layer, values) in &layers {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            hasher.part(layer.to_string().as_bytes()).part(&bytes);
        }
        Self {
            hash: hasher.finish(),
            layers,
        }
    }

    /// That of a linear.
    pub fn get(&self, layer: LayerId) -> Option<&[f64]> {
        self.layers.get(&layer).map(Vec::as_slice)
    }
}

/// A compressor that fits scales with a given importance of the inputs instead of what calibration sees of them.
#[derive(Clone, Copy, Debug)]
pub struct WithImportance<'a> {
    compressor: Compressor,
    importance: &'a InputImportance,
}

impl<'a> WithImportance<'a> {
    /// `compressor` with this importance; one that weights nothing by importance is as without it.
    pub fn new(compressor: Compressor, importance: &'a InputImportance) -> Self {
        Self {
            compressor,
            importance,
        }
    }

    fn of(&self, layer: LayerId) -> Result<&'a [f64]> {
        self.importance.get(layer).ok_or_else(|| Error::Layer {
            layer: layer.to_string(),
            source: Box::new(Error::NeedsInputs {
                compressor: self.compressor.to_string(),
                needs: "the importance of its inputs, which was not given",
            }),
        })
    }
}

impl Source for WithImportance<'_> {
    fn describe(&self) -> Result<String> {
        Ok(format!(
            "{} with importance {}",
            self.compressor, self.importance.hash
        ))
    }

    fn compressor(&self) -> Option<Compressor> {
        Some(self.compressor)
    }

    fn needs(&self) -> Needs {
        self.compressor.needs_beside_importance()
    }

    fn check(&self, dense: &Decoder<'_>) -> Result<()> {
        self.compressor.check(dense)?;
        for (layer, [_, inputs]) in linears(dense) {
            let found = self.of(layer)?.len();
            if found != inputs {
                return Err(Error::Layer {
                    layer: layer.to_string(),
                    source: Box::new(Error::Shape {
                        what: "importance of the inputs",
                        found: vec![found],
                        expected: vec![inputs],
                    }),
                });
            }
        }
        Ok(())
    }

    fn compressed(&self, linear: &Linear<'_>) -> Result<CompressedLinear> {
        let importance = self.of(linear.layer)?;
        let compressor = self.compressor.at(linear.place);
        let inputs = Some(linear.inputs.into());
        let compressed = compressor.compress_weighted(linear.weight, inputs, Some(importance))?;
        Ok(CompressedLinear {
            sweep: compressed.sweep,
            weight: StoredWeight::of(compressed, linear.dtype)?,
        })
    }
}
