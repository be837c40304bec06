//! GPTQ's format, as AutoGPTQ, GPTQModel, vLLM and transformers load it.
//!
//! For a linear with n inputs, m outputs and G groups: `qweight` int32 `[n·bits/32, m]`, codes packed along the inputs;
//! `qzeros` int32 `[G, m·bits/32]`, zero points packed along the outputs; `scales` f16 `[G, m]`; `g_idx` int32 `[n]`.
//! Packing is dense, little end first, across words (for 3 bits: 32 values in 3 words).
//!
//! Version 1 stores zero − 1, modulo 2^bits. A zero point of 0 therefore wraps to 2^bits − 1, which some runtimes read as 2^bits
//! and others as 0: it is refused in writing (store version 2, or a symmetric grid) and read as 0.

use faer::MatRef;
use half::f16;
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use tensor_io::{Checkpoint, Config, Dtype, TensorSpec};

use super::stored::{self, refuse};
use super::{Format, Found, bits};
use crate::compress::{
    Bits, ColumnOrder, Compressor, Group, GroupFit, Quantised, Rounding, Symmetry,
};
use crate::{Error, Result};

/// AutoGPTQ's own configuration file, for checkpoints whose `config.json` says nothing.
pub const CONFIG_FILE: &str = "quantize_config.json";

/// The convention for zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// `gptq`: zero − 1 is stored. Every runtime loads it.
    V1,
    /// `gptq_v2`: zero is stored.
    V2,
}

impl Version {
    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "gptq",
            Self::V2 => "gptq_v2",
        }
    }

    fn offset(self) -> u8 {
        match self {
            Self::V1 => 1,
            Self::V2 => 0,
        }
    }
}

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

/// AutoGPTQ's own file as the section it would be in `config.json`.
pub(super) fn from_file(mut config: Config) -> Config {
    if config.get("quant_method").is_none() {
        config.set("quant_method", "gptq");
    }
    config
}

pub(super) fn detect(section: &Config) -> std::result::Result<Format, Found> {
    let unknown = |found: String| Err(Found::Unknown(found));
    let stated = match section.opt_str("checkpoint_format")? {
        Some(stated) => stated,
        None => section.opt_str("format")?.unwrap_or("gptq"),
    };
    let version = match stated {
        "gptq" => Version::V1,
        "gptq_v2" => Version::V2,
        other => return unknown(format!("GPTQ with checkpoint_format `{other}`")),
    };
    if mentions(section.raw(), "planar") {
        return unknown("GPTQ with planar packing".to_string());
    }
    if let Some(dtype) = section.opt_str("pack_dtype")?
        && dtype != "int32"
    {
        return unknown(format!("GPTQ packed in {dtype}"));
    }
    let bits = section.usize("bits")?;
    if u8::try_from(bits).ok().and_then(Bits::new).is_none() {
        return unknown(format!("GPTQ with {bits} bits"));
    }
    let group_size = match section.get("group_size").and_then(Value::as_i64) {
        Some(width) if width > 0 => Some(width as usize),
        _ => None,
    };
    Ok(Format::Gptq {
        version,
        bits,
        group_size,
    })
}

/// Whether a word stands anywhere in a configuration.
fn mentions(fields: &Map<String, Value>, word: &str) -> bool {
    fields.iter().any(|(key, value)| {
        key == word
            || match value {
                Value::String(text) => text == word,
                Value::Object(inner) => mentions(inner, word),
                _ => false,
            }
    })
}

/// The weight of a module. Bits and groups are taken from the shapes where there is a `g_idx`, since configurations may
/// set them for some modules apart.
pub(super) fn read(
    checkpoint: &Checkpoint,
    module: &str,
    version: Version,
    bits: usize,
    group_size: Option<usize>,
) -> Result<Quantised> {
    let name = |tensor: &str| format!("{module}.{tensor}");
    let (qweight, [word_rows, m]) = stored::words(checkpoint, &name("qweight"))?;
    let index = match checkpoint.contains(&name("g_idx")) {
        true => Some(stored::integers(checkpoint, &name("g_idx"))?),
        false => None,
    };
    let (n, b) = match &index {
        Some(index) if !index.is_empty() => (index.len(), word_rows * 32 / index.len()),
        _ => (word_rows * 32 / bits, bits),
    };
    let whole = n * b == word_rows * 32;
    let Some(width) = u8::try_from(b).ok().and_then(Bits::new).filter(|_| whole) else {
        return refuse(
            &name("qweight"),
            format!("{word_rows} words for {n} inputs are not 2, 3, 4 or 8 bits each"),
        );
    };
    let (scales, shape) = stored::floats(checkpoint, &name("scales"))?;
    let [groups, outputs] = stored::matrix(&name("scales"), &shape)?;
    if outputs != m {
        return refuse(
            &name("scales"),
            format!("expected {m} outputs, found {outputs}"),
        );
    }
    let (qzeros, shape) = stored::words(checkpoint, &name("qzeros"))?;
    if shape != [groups, (m * b).div_ceil(32)] {
        return refuse(
            &name("qzeros"),
            format!(
                "expected [{groups}, {}], found {shape:?}",
                (m * b).div_ceil(32)
            ),
        );
    }
    let group_width = stored::group_width(&name("scales"), n, groups, group_size)?;
    let group_index = match index {
        Some(index) => stored::group_index(&name("g_idx"), &index, n, groups)?,
        None => (0..n).map(|j| (j / group_width) as u32).collect(),
    };

    let mut codes = vec![0; m * n];
    codes
        .par_chunks_mut(PACK * n.max(1))
        .enumerate()
        .for_each(|(strip, codes)| {
            let rows = codes.len() / n;
            for block in 0..n.div_ceil(PACK) {
                for row in 0..rows {
                    let word = |k: usize| qweight[(block * b + k) * m + strip * PACK + row];
                    let columns = block * PACK..((block + 1) * PACK).min(n);
                    for (i, code) in codes[row * n..][columns].iter_mut().enumerate() {
                        *code = bits::dense(word, b, i);
                    }
                }
            }
        });
    let zero_words = shape[1];
    let zeros = (0..m * groups).map(|at| {
        let (row, group) = (at / groups, at % groups);
        let stored = bits::dense(|k| qzeros[group * zero_words + k], b, row);
        stored.wrapping_add(version.offset()) & width.max_code()
    });
    let by_group = MatRef::from_row_major_slice(&scales, groups, m);
    Ok(Quantised {
        bits: width,
        rows: m,
        cols: n,
        group_width,
        codes,
        offsets: Vec::new(),
        scales: (0..m * groups)
            .map(|at| by_group[(at % groups, at / groups)])
            .collect(),
        zeros: zeros.collect(),
        group_index,
    })
}
