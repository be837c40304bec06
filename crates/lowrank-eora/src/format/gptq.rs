//! GPTQ's format, as AutoGPTQ, GPTQModel, vLLM and transformers load it.
//!
//! For a linear with n inputs, m outputs and G groups: `qweight` int32 `[n·bits/32, m]`, codes packed along the inputs;
//! `qzeros` int32 `[G, m·bits/32]`, zero points packed along the outputs; `scales` f16 `[G, m]`; `g_idx` int32 `[n]`.
//! Packing is dense, little end first, across words (for 3 bits: 32 values in 3 words).
//!
//! Version 1 stores zero − 1, modulo 2^bits. A zero point of 0 therefore wraps to 2^bits − 1, which some runtimes read as 2^bits
//! and others as 0: it is refused in writing (store version 2, or a symmetric grid) and read as 0.

use causal_lm::compressed::bits;
pub use causal_lm::compressed::gptq::{CONFIG_FILE, Version};
use half::f16;
use rayon::prelude::*;
use serde_json::{Value, json};
use tensor_io::{Dtype, TensorSpec};

use crate::compress::{
    Bits, ColumnOrder, Compressor, Group, GroupFit, Quantised, Rounding, Symmetry,
};
use crate::{Error, Result};

/// Inputs packed and unpacked together: `bits` whole words.
const PACK: usize = 32;

/// Declarations of the tensors that [`tensors`] gives for a linear `m × n`, for
/// [`CheckpointWriter::create`](tensor_io::CheckpointWriter::create).
///
/// # Errors
/// [`Error::NotStorable`] if a row or column of codes does not fill whole words.
pub fn specs(
    module: &str,
    (m, n): (usize, usize),
    bits: Bits,
    group: Group,
) -> Result<Vec<TensorSpec>> {
    let bits = bits.get();
    let groups = group.count(n);
    if !(m * bits).is_multiple_of(32) || !(n * bits).is_multiple_of(32) {
        return Err(Error::NotStorable {
            module: module.to_string(),
            format: "gptq",
            reason: format!(
                "{m} outputs and {n} inputs of {bits} bits do not fill whole 32-bit words"
            ),
        });
    }
    let spec = |name: &str, dtype, shape: Vec<usize>| {
        TensorSpec::new(format!("{module}.{name}"), dtype, shape)
    };
    Ok(vec![
        spec("qweight", Dtype::I32, vec![n * bits / 32, m]),
        spec("qzeros", Dtype::I32, vec![groups, m * bits / 32]),
        spec("scales", Dtype::F16, vec![groups, m]),
        spec("g_idx", Dtype::I32, vec![n]),
    ])
}

/// The tensors of a linear, with their bytes. A reader gets back exactly this weight.
///
/// # Errors
/// [`Error::NotStorable`] as for [`specs`], for scales that are no f16 values, and in version 1 for zero points of 0.
pub fn tensors(
    module: &str,
    quantised: &Quantised,
    version: Version,
) -> Result<Vec<(TensorSpec, Vec<u8>)>> {
    let (m, n, b) = (quantised.rows, quantised.cols, quantised.bits.get());
    let group = Group::Columns(quantised.group_width);
    let specs = specs(module, (m, n), quantised.bits, group)?;
    let refuse = |reason: &str| Error::NotStorable {
        module: module.to_string(),
        format: version.name(),
        reason: reason.to_string(),
    };
    let half = |&scale: &f64| f16::from_f64(scale);
    if !quantised.offsets.is_empty() {
        return Err(refuse(
            "its groups have float offsets, which GPTQ does not store; quantise without `-offset`, or store it as GGUF",
        ));
    }
    if quantised
        .scales
        .iter()
        .any(|scale| half(scale).to_f64() != *scale)
    {
        return Err(refuse(
            "its scales are not f16 values; quantise with scales rounded to f16 (without `-exact`)",
        ));
    }
    if version == Version::V1 && quantised.zeros.contains(&0) {
        return Err(refuse(
            "a zero point of 0 wraps in this version and is read differently by different runtimes; store gptq_v2, or quantise with `-sym`",
        ));
    }

    let mut qweight = vec![0u32; n * b / 32 * m];
    qweight
        .par_chunks_mut(b * m.max(1))
        .enumerate()
        .for_each(|(block, words)| {
            let columns = block * PACK..((block + 1) * PACK).min(n);
            let mut packed = vec![0; words.len() / m];
            for row in 0..m {
                let codes = &quantised.codes[row * n..][columns.clone()];
                bits::pack(codes.iter().copied(), b, &mut packed);
                for (word, value) in packed.iter().enumerate() {
                    words[word * m + row] = *value;
                }
            }
        });
    let groups = quantised.groups();
    let mut qzeros = vec![0u32; groups * (m * b / 32)];
    let mut scales = Vec::with_capacity(groups * m);
    for (group, words) in qzeros.chunks_mut((m * b / 32).max(1)).enumerate() {
        let zeros = (0..m).map(|row| quantised.zeros[row * groups + group] - version.offset());
        bits::pack(zeros, b, words);
        scales.extend((0..m).map(|row| half(&quantised.scales[row * groups + group])));
    }
    let contents = [
        qweight.iter().flat_map(|word| word.to_le_bytes()).collect(),
        qzeros.iter().flat_map(|word| word.to_le_bytes()).collect(),
        scales
            .iter()
            .flat_map(|scale| scale.to_le_bytes())
            .collect(),
        quantised
            .group_index
            .iter()
            .flat_map(|group| group.to_le_bytes())
            .collect(),
    ];
    Ok(specs.into_iter().zip(contents).collect())
}

/// The `quantization_config` of a checkpoint whose linears were quantised so; None if this compressor does not quantise.
pub fn quantization_config(compressor: &Compressor, version: Version) -> Option<Value> {
    let quantise = compressor.quantise?;
    let (order, fit) = match quantise.rounding {
        Rounding::Gptq { order, fit } => (order, fit),
        Rounding::Nearest => (ColumnOrder::Natural, GroupFit::Updated),
    };
    let group_size: i64 = match quantise.grid.group {
        Group::Channel => -1,
        Group::Columns(width) => width as i64,
    };
    Some(json!({
        "quant_method": "gptq",
        "checkpoint_format": version.name(),
        "bits": quantise.grid.bits.get(),
        "group_size": group_size,
        "sym": quantise.grid.symmetry != Symmetry::Asymmetric,
        "desc_act": order == ColumnOrder::Activation,
        "static_groups": fit == GroupFit::Static,
        "damp_percent": compressor.sweep.damping,
        "lm_head": false,
    }))
}
