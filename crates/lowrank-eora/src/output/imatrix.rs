//! Importance matrices of llama.cpp: what calibration saw of the inputs of every linear.

use super::gguf_model::tensors_of;
use crate::Error;
use crate::Result;
use crate::repair::Repaired;
use causal_lm::Decoder;
use causal_lm::gguf::Architecture;
use causal_lm::gguf::layout::holders;
use tensor_io::imatrix::{Imatrix, Importance};

/// The mean square of each input of every linear of `decoder` on the calibration windows, under the names of GGUF weights;
/// `text` names the calibration text. Columns of weights are never reordered, so that it serves every architecture.
///
/// Inputs are those that the repair was fitted to: by default those of the model with all earlier blocks repaired.
///
/// # Errors
/// [`Error::Setting`] for a type of model that is not mapped, and what reading the repair reports.
pub fn imatrix(repaired: &Repaired, decoder: &Decoder<'_>, text: &str) -> Result<Imatrix> {
    let model_type = decoder.config().model_type;
    let architecture = Architecture::of(decoder.config()).ok_or_else(|| Error::Setting {
        name: "model of an importance matrix",
        value: model_type.into(),
        expected: "a type of model that GGUF files have",
    })?;
    let tensors = tensors_of(decoder, architecture);
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
