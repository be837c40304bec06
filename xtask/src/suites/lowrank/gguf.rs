//! Models in GGUF blocks: the types of their tensors, and what is rounded beside the linears.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use causal_lm::Decoder;
use lowrank_eora::compress::{BlockTypes, Compressor};
use lowrank_eora::output::{Fallback, ImatrixOrigin, TypeTable, gguf_types, importance, rest};
use lowrank_eora::packed::BlockType;
use lowrank_eora::repair::{InputImportance, LayerId, StoredWeight, linears};
use tensor_io::gguf::Gguf;
use tensor_io::imatrix::Imatrix;

use super::config::{Config, Rest};
use super::output::Output;
use crate::suites::perplexity::file_name;

/// An importance matrix that was given.
pub(super) struct Imported {
    imatrix: Imatrix,
    pub(super) importance: InputImportance,
    pub(super) origin: ImatrixOrigin,
}

impl Imported {
    /// That of `--imatrix`, where there is one.
    pub(super) fn read(config: &Config, decoder: &Decoder<'_>) -> Result<Option<Self>> {
        let Some(path) = &config.imatrix else {
            return Ok(None);
        };
        let imatrix = Imatrix::read(path).context("--imatrix")?;
        let importance = importance(&imatrix, path, decoder).context("--imatrix")?;
        let origin = ImatrixOrigin {
            file: Some(file_name(path)),
            dataset: imatrix.datasets.first().cloned(),
            entries: u32::try_from(imatrix.entries.len()).ok(),
            chunks: imatrix.chunks,
        };
        Ok(Some(Self {
            imatrix,
            importance,
            origin,
        }))
    }

    /// For a compressor that weights by importance.
    pub(super) fn of<'a>(imported: &'a Option<Self>, compressor: &Compressor) -> Option<&'a Self> {
        imported
            .as_ref()
            .filter(|_| compressor.weights_by_importance())
    }
}

/// How a compressed model is stored in a GGUF file, and counted and measured as stored there.
#[derive(Clone)]
pub(super) struct InGguf {
    /// Embedding and head where they are rounded.
    pub(super) rest: Arc<Vec<(String, StoredWeight)>>,
    /// Bytes of everything but the linears.
    pub(super) rest_bytes: u64,
    /// Tensors by type; `None` for another compressor beside the same rest.
    pub(super) table: Option<TypeTable>,
    fallbacks: Vec<Fallback>,
}

impl InGguf {
    /// Another compressor's linears beside the same rest.
    pub(super) fn of_control(&self) -> Self {
        Self {
            table: None,
            fallbacks: Vec::new(),
            ..self.clone()
        }
    }

    /// Types of the tensors, bits per weight, bytes, and the linears that have another type than was asked for.
    pub(super) fn described(&self) -> Option<String> {
        let table = self.table.as_ref()?;
        let mut text = format!("{table}, {:.1} MB", table.bytes() as f64 / 1e6);
        for fallback in &self.fallbacks {
            text += &format!("; {fallback}");
        }
        Some(text)
    }

    /// Bytes of the linears, which `counted` is for any other file.
    pub(super) fn linear_bytes(&self, counted: u64) -> u64 {
        self.table
            .as_ref()
            .map_or(counted, |table| table.linear_bytes)
    }
}

/// What GGUF files of a run are made from.
pub(super) struct Files<'a> {
    pub(super) config: &'a Config,
    pub(super) decoder: &'a Decoder<'a>,
    pub(super) template: Option<&'a Gguf>,
    pub(super) imported: &'a Option<Imported>,
}

impl Files<'_> {
    /// How what `compressor` makes is stored: in blocks, or as blocks where a GGUF file of it is written. `None` for
    /// everything else, and for types of model that GGUF files do not have.
    pub(super) fn of_compressor(&self, compressor: &Compressor) -> Result<Option<InGguf>> {
        // Groups are counted as in their own files unless they are written into a GGUF file.
        if compressor.blocks.is_none() && self.template.is_none() {
            return Ok(None);
        }
        let types = gguf_types(self.decoder, compressor)?;
        let imported = Imported::of(self.imported, compressor);
        let imatrix = imported.map(|imported| &imported.imatrix);
        let asked = compressor.blocks.map(|blocks| blocks.types);
        let in_gguf = self.stored(&types, asked, imatrix)?;
        Ok(in_gguf.map(|in_gguf| InGguf {
            fallbacks: Fallback::all(self.decoder, compressor),
            ..in_gguf
        }))
    }

    /// How linears of these types are stored.
    pub(super) fn of_types(&self, types: &BTreeMap<LayerId, BlockType>) -> Result<Option<InGguf>> {
        self.stored(types, None, None)
    }

    fn stored(
        &self,
        types: &BTreeMap<LayerId, BlockType>,
        asked: Option<BlockTypes>,
        imatrix: Option<&Imatrix>,
    ) -> Result<Option<InGguf>> {
        let mut values: BTreeMap<BlockType, usize> = BTreeMap::new();
        for (id, [rows, cols]) in linears(self.decoder) {
            if let Some(ty) = types.get(&id) {
                *values.entry(*ty).or_default() += rows * cols;
            }
        }
        let most = values.into_iter().max_by_key(|(_, count)| *count);
        let Some((most, _)) = most.filter(|(ty, _)| ty.is_quantised() || asked.is_some()) else {
            return Ok(None);
        };
        let rounded = match self.config.rest {
            Rest::LlamaCpp => rest(
                self.decoder,
                asked.unwrap_or(BlockTypes::One(most)),
                imatrix,
            )?,
            Rest::Stored => Vec::new(),
        };
        let table = TypeTable::predicted(self.decoder, self.template, types, &rounded)?;
        Ok(table.map(|table| InGguf {
            rest: Arc::new(rounded),
            rest_bytes: table.bytes() - table.linear_bytes,
            table: Some(table),
            fallbacks: Vec::new(),
        }))
    }
}

/// Where the importance of a run's GGUF files comes from.
pub(super) fn imatrix_origin(
    config: &Config,
    imported: &Option<Imported>,
    outputs: &[Output],
) -> ImatrixOrigin {
    if let Some(imported) = imported {
        return imported.origin.clone();
    }
    let saved = [Output::Imatrix, Output::ImatrixDat];
    let saved = saved.into_iter().find(|form| outputs.contains(form));
    ImatrixOrigin {
        file: saved.map(Output::file_name),
        dataset: Some(file_name(&config.calib)),
        entries: None,
        // All windows together.
        chunks: Some(1),
    }
}
