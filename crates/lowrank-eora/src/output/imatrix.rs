//! Importance matrices of llama.cpp: what calibration saw of the inputs of every linear.

use crate::Result;
use crate::repair::Repaired;
use causal_lm::gguf::names::{in_block, linear};
use tensor_io::imatrix::{Imatrix, Importance};

/// The mean square of each input of every linear on the calibration windows, under the names of GGUF weights; `text`
/// names the calibration text. Columns of weights are never reordered, so that it serves every architecture.
///
/// Inputs are those that the repair was fitted to: by default those of the model with all earlier blocks repaired.
///
/// # Errors
/// What reading the repair reports.
pub fn imatrix(repaired: &Repaired, text: &str) -> Result<Imatrix> {
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
            let name = in_block(
                id.block(),
                &format!("{}.weight", linear(id.module().parts[0])),
            );
            let tokens = layer.report.tokens;
            // All windows together count as one chunk.
            (imatrix.chunks, imatrix.chunk_tokens) = (Some(1), u32::try_from(tokens).ok());
            let importance = Importance::new(layer.mean_square, tokens);
            imatrix.entries.insert(name, importance);
        }
    }
    Ok(imatrix)
}
