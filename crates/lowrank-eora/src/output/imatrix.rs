//! Importance matrices of llama.cpp: what calibration saw of the inputs of every linear.

use super::gguf_model::tensors_of;
use crate::Error;
use crate::Result;
use crate::repair::{InputImportance, Repaired, linears};
use causal_lm::Decoder;
use causal_lm::gguf::Architecture;
use causal_lm::gguf::layout::{FileTensor, holders};
use std::collections::BTreeMap;
use std::path::Path;
use tensor_io::imatrix::{Imatrix, Importance};

/// Names in an error before the others are counted.
const NAMED: usize = 8;

/// The mean square of each input of every linear of `decoder` on the calibration windows, under the names of GGUF weights;
/// `text` names the calibration text. Columns of weights are never reordered, so that it serves every architecture.
///
/// Inputs are those that the repair was fitted to: by default those of the model with all earlier blocks repaired.
///
/// # Errors
/// [`Error::Setting`] for a mixture, whose experts the repair does not observe, and for a type of model that is not mapped; what
/// reading the repair reports.
pub fn imatrix(repaired: &Repaired, decoder: &Decoder<'_>, text: &str) -> Result<Imatrix> {
    if decoder.config().mixtures.iter().any(Option::is_some) {
        // Readers would round the experts, most of the weights, without importances.
        return Err(Error::Setting {
            name: "model of an importance matrix",
            value: decoder.config().model_type.into(),
            expected: "a model without routed experts, whose inputs are not observed",
        });
    }
    let tensors = tensors(decoder)?;
    let mut imatrix = Imatrix {
        datasets: vec![text.to_string()],
        ..Imatrix::default()
    };
    for block in 0..repaired.blocks() {
        for layer in repaired.block(block)? {
            let id = layer.report.layer;
            // Readers refuse an entry of zeros, and round plainly where there is none.
            if layer.mean_square.iter().all(|&mean| mean == 0.0) {
                continue;
            }
            let tokens = layer.report.tokens;
            // All windows together count as one chunk.
            (imatrix.chunks, imatrix.chunk_tokens) = (Some(1), u32::try_from(tokens).ok());
            let importance = Importance::new(layer.mean_square, tokens);
            // A stacked projection may be several tensors, which read the same.
            for tensor in holders(&tensors, &id.weight()) {
                imatrix
                    .entries
                    .insert(tensor.name.clone(), importance.clone());
            }
        }
    }
    Ok(imatrix)
}

/// What the importance matrix at `path` says of the inputs of every linear of `decoder`.
///
/// # Errors
/// [`Error::Malformed`] that names the weights without an entry, or the one whose entry is of another size;
/// [`Error::Setting`] for a type of model that is not mapped.
pub fn importance(
    imatrix: &Imatrix,
    path: impl AsRef<Path>,
    decoder: &Decoder<'_>,
) -> Result<InputImportance> {
    let refuse = |reason: String| Error::Malformed {
        path: path.as_ref().to_owned(),
        reason,
    };
    let tensors = tensors(decoder)?;
    let mut layers = BTreeMap::new();
    let mut missing = Vec::new();
    for (id, [_, inputs]) in linears(decoder) {
        // A stacked projection may be several tensors, which read the same.
        for tensor in holders(&tensors, &id.weight()) {
            match imatrix.of(&tensor.name, inputs, 1).map_err(refuse)? {
                Some(entry) => {
                    layers.entry(id).or_insert_with(|| entry.means.clone());
                }
                None => missing.push(tensor.name.clone()),
            }
        }
    }
    if missing.is_empty() {
        return Ok(InputImportance::new(layers));
    }
    let more = match missing.len().checked_sub(NAMED) {
        None | Some(0) => String::new(),
        Some(more) => format!(" and {more} more"),
    };
    missing.truncate(NAMED);
    Err(refuse(format!("no entry for {}{more}", missing.join(", "))))
}

fn tensors(decoder: &Decoder<'_>) -> Result<Vec<FileTensor>> {
    let model_type = decoder.config().model_type;
    let architecture = Architecture::of(decoder.config()).ok_or_else(|| Error::Setting {
        name: "model of an importance matrix",
        value: model_type.into(),
        expected: "a type of model that GGUF files have",
    })?;
    Ok(tensors_of(decoder, architecture))
}
