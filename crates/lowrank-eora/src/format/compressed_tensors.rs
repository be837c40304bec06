//! The pack-quantized format of compressed-tensors, as llm-compressor writes it.
//!
//! `weight_packed` int32 `[m, ⌈n·bits/32⌉]` holds code = value + 2^(bits−1), packed along the inputs; `weight_scale`
//! `[m, G]`; for asymmetric grids `weight_zero_point` int32 `[⌈m·bits/32⌉, G]`, packed along the outputs with the same
//! offset; `weight_g_idx` `[n]` where groups follow the order of activations; `weight_shape` `[2]`. Releases up to late
//! 2025 packed ⌊32/bits⌋ codes into a word instead of crossing words, which differs for 3 bits; the shape tells them apart.

use half::f16;
use serde_json::{Value, json};
use tensor_io::{Checkpoint, Config, Dtype, TensorSpec};

use super::stored::{self, refuse};
use super::{Format, Found, bits};
use crate::compress::{
    Bits, ColumnOrder, Compressor, Group, GroupFit, Quantise, Quantised, Rounding, Symmetry,
};
use crate::{Error, Result};

const NAME: &str = "compressed-tensors";

/// Declarations of the tensors that [`tensors`] gives for a linear `m × n`.
///
/// # Errors
/// [`Error::NotStorable`] for an offset grid, and where readers could not tell how codes are packed.
pub fn specs(module: &str, (m, n): (usize, usize), quantise: &Quantise) -> Result<Vec<TensorSpec>> {
    let (bits, groups) = (quantise.grid.bits.get(), quantise.grid.group.count(n));
    let refuse = |reason: String| Error::NotStorable {
        module: module.to_string(),
        format: NAME,
        reason,
    };
    let words = (n * bits).div_ceil(32);
    Packing::of("weight_packed", n, bits, words)
        .map_err(|_| refuse(format!("{n} codes of {bits} bits can be read in two ways")))?;
    let spec = |name: &str, dtype, shape: Vec<usize>| {
        TensorSpec::new(format!("{module}.{name}"), dtype, shape)
    };
    let mut specs = vec![
        spec("weight_packed", Dtype::I32, vec![m, words]),
        spec("weight_scale", Dtype::F16, vec![m, groups]),
        spec("weight_shape", Dtype::I64, vec![2]),
    ];
    match quantise.grid.symmetry {
        Symmetry::Asymmetric => {
            let words = (m * bits).div_ceil(32);
            Packing::of("weight_zero_point", m, bits, words).map_err(|_| {
                refuse(format!(
                    "{m} zero points of {bits} bits can be read in two ways"
                ))
            })?;
            specs.push(spec("weight_zero_point", Dtype::I32, vec![words, groups]));
        }
        Symmetry::Offset => {
            return Err(refuse(
                "its groups have float offsets; quantise without `-offset`, or store it as GGUF"
                    .to_string(),
            ));
        }
        Symmetry::Symmetric | Symmetry::SymmetricClipped | Symmetry::Signed => {}
    }
    if quantise.takes_groups_apart() {
        specs.push(spec("weight_g_idx", Dtype::I32, vec![n]));
    }
    Ok(specs)
}

/// The tensors of a linear, with their bytes. A reader gets back exactly this weight.
///
/// # Errors
/// [`Error::NotStorable`] as for [`specs`], and for scales that are no f16 values.
pub fn tensors(
    module: &str,
    quantised: &Quantised,
    quantise: &Quantise,
) -> Result<Vec<(TensorSpec, Vec<u8>)>> {
    let (m, n, b) = (quantised.rows, quantised.cols, quantised.bits.get());
    let specs = specs(module, (m, n), quantise)?;
    let half = |scale: f64| f16::from_f64(scale);
    if quantised.scales.iter().any(|&s| half(s).to_f64() != s) {
        return Err(Error::NotStorable {
            module: module.to_string(),
            format: NAME,
            reason: "its scales are not f16 values; quantise with scales rounded to f16 (without `-exact`)".into(),
        });
    }
    let words = |line: &mut dyn Iterator<Item = u8>, count: usize| {
        let mut words = vec![0u32; (count * b).div_ceil(32)];
        bits::pack(line, b, &mut words);
        words
    };
    let codes = quantised.codes.chunks(n.max(1));
    let packed = codes.flat_map(|row| words(&mut row.iter().copied(), n));
    let mut tensors = Vec::new();
    for spec in specs {
        let bytes = match spec.name.rsplit('.').next() {
            Some("weight_packed") => packed.clone().flat_map(u32::to_le_bytes).collect(),
            Some("weight_scale") => {
                let scales = quantised.scales.iter();
                scales
                    .flat_map(|&scale| half(scale).to_le_bytes())
                    .collect()
            }
            Some("weight_shape") => [m, n]
                .into_iter()
                .flat_map(|size| (size as i64).to_le_bytes())
                .collect(),
            Some("weight_zero_point") => {
                let groups = quantised.groups();
                let columns: Vec<Vec<u32>> = (0..groups)
                    .map(|group| {
                        let zeros = (0..m).map(|row| quantised.zeros[row * groups + group]);
                        words(&mut { zeros }, m)
                    })
                    .collect();
                let rows = 0..(m * b).div_ceil(32);
                rows.flat_map(|word| columns.iter().map(move |column| column[word]))
                    .flat_map(u32::to_le_bytes)
                    .collect()
            }
            _ => {
                let index = quantised.group_index.iter();
                index.flat_map(|group| group.to_le_bytes()).collect()
            }
        };
        tensors.push((spec, bytes));
    }
    Ok(tensors)
}

/// The `quantization_config` of a checkpoint whose linears were quantised so; None if this compressor does not quantise
/// in groups.
pub fn quantization_config(compressor: &Compressor) -> Option<Value> {
    let quantise = compressor.quantise?;
    let (strategy, group_size) = match quantise.grid.group {
        Group::Channel => ("channel", None),
        Group::Columns(width) => ("group", Some(width)),
    };
    let order = match quantise.rounding {
        Rounding::Gptq {
            order: ColumnOrder::Activation,
            fit,
        } => Some(if fit == GroupFit::Static {
            "static"
        } else {
            "group"
        }),
        _ => None,
    };
    Some(json!({
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "input_activations": null,
            "output_activations": null,
            "weights": {
                "num_bits": quantise.grid.bits.get(),
                "type": "int",
                "symmetric": quantise.grid.symmetry != Symmetry::Asymmetric,
                "strategy": strategy,
                "group_size": group_size,
                "actorder": order,
                "dynamic": false,
                "observer": "minmax",
            },
        }},
    }))
}

/// What is asked of the configuration: one scheme for all linears, integer weights packed.
pub(super) fn detect(section: &Config) -> std::result::Result<Format, Found> {
    let unknown = |found: String| Err(Found::Unknown(found));
    let sparsity = section.opt_section("sparsity_config")?;
    let sparse = match &sparsity {
        Some(sparsity) => sparsity.opt_str("format")?.unwrap_or("dense"),
        None => "dense",
    };
    let format = section.opt_str("format")?.unwrap_or("dense");
    match (sparse, format) {
        ("dense", "pack-quantized") => {}
        ("dense", "dense") => return Ok(Format::Dense),
        ("sparse-24-bitmask" | "sparse-bitmask", "dense") => return Ok(Format::SparseBitmask),
        ("dense", other) => return unknown(format!("compressed-tensors `{other}`")),
        (sparse, other) => {
            return unknown(format!(
                "compressed-tensors `{other}` with sparsity `{sparse}`"
            ));
        }
    }
    let groups = section.section("config_groups")?;
    let mut schemes = Vec::new();
    for name in groups.raw().keys() {
        if let Some(weights) = groups.section(name)?.opt_section("weights")? {
            schemes.push(scheme(&weights)?);
        }
    }
    schemes.dedup();
    match schemes.as_slice() {
        [only] => Ok(only.clone()),
        [] => {
            unknown("compressed-tensors `pack-quantized` without weights in config_groups".into())
        }
        _ => unknown("compressed-tensors `pack-quantized` with several schemes for weights".into()),
    }
}

fn scheme(weights: &Config) -> std::result::Result<Format, Found> {
    let unknown = |found: String| {
        Err(Found::Unknown(format!(
            "compressed-tensors `pack-quantized` with {found}"
        )))
    };
    let bits = weights.usize("num_bits")?;
    let kind = weights.opt_str("type")?.unwrap_or("int");
    if kind != "int" || u8::try_from(bits).ok().and_then(Bits::new).is_none() {
        return unknown(format!("{bits}-bit {kind}"));
    }
    let strategy = match weights.opt_str("strategy")? {
        Some(strategy) => strategy,
        None if weights.get("group_size").is_some() => "group",
        None => "channel",
    };
    let group_size = match strategy {
        "channel" => None,
        "group" => match weights.get("group_size").and_then(Value::as_i64) {
            Some(width) if width > 0 => Some(width as usize),
            _ => None,
        },
        other => return unknown(format!("strategy `{other}`")),
    };
    Ok(Format::PackQuantized {
        bits,
        group_size,
        symmetric: weights.opt_bool("symmetric")?.unwrap_or(true),
    })
}

/// How codes lie in words.
#[derive(Clone, Copy, PartialEq)]
enum Packing {
    Dense,
    Aligned,
}

impl Packing {
    /// From the number of words that hold `count` codes.
    fn of(name: &str, count: usize, bits: usize, words: usize) -> Result<Self> {
        if count > words.saturating_mul(32) {
            return refuse(name, format!("{words} words do not hold {count} codes"));
        }
        let dense = (count * bits).div_ceil(32) == words;
        let aligned = count.div_ceil(32 / bits) == words;
        // Where a code never crosses words, or all fit into one, the two are the same.
        let alike = 32 % bits == 0 || words <= 1;
        match (dense, aligned) {
            (true, _) if alike || !aligned => Ok(Self::Dense),
            (false, true) => Ok(Self::Aligned),
            (true, _) => refuse(
                name,
                format!("{words} words for {count} codes of {bits} bits can be read in two ways"),
            ),
            (false, false) => refuse(
                name,
                format!("{words} words do not hold {count} codes of {bits} bits"),
            ),
        }
    }

    fn code(self, word: impl Fn(usize) -> u32, bits: usize, i: usize) -> u8 {
        match self {
            Self::Dense => bits::dense(word, bits, i),
            Self::Aligned => bits::aligned(word, bits, i),
        }
    }
}

pub(super) fn read(
    checkpoint: &Checkpoint,
    module: &str,
    bits: usize,
    group_size: Option<usize>,
    symmetric: bool,
) -> Result<Quantised> {
    let name = |tensor: &str| format!("{module}.{tensor}");
    let width = Bits::new(bits as u8).expect("detection admits these widths only");
    let shape = stored::integers(checkpoint, &name("weight_shape"))?;
    let &[m, n] = shape.as_slice() else {
        return refuse(
            &name("weight_shape"),
            format!("expected two numbers, found {shape:?}"),
        );
    };
    let (m, n) = (m as usize, n as usize);
    let (packed, [packed_rows, words]) = stored::words(checkpoint, &name("weight_packed"))?;
    if packed_rows != m {
        return refuse(
            &name("weight_packed"),
            format!("expected {m} rows, found {packed_rows}"),
        );
    }
    let packing = Packing::of(&name("weight_packed"), n, bits, words)?;
    let mut codes = Vec::with_capacity(m * n);
    for row in packed.chunks(words.max(1)) {
        codes.extend((0..n).map(|i| packing.code(|k| row[k], bits, i)));
    }

    let (scales, shape) = stored::floats(checkpoint, &name("weight_scale"))?;
    let [scale_rows, groups] = match shape.as_slice() {
        &[rows] => [rows, 1],
        other => stored::matrix(&name("weight_scale"), other)?,
    };
    if scale_rows != m {
        return refuse(
            &name("weight_scale"),
            format!("expected {m} rows, found {scale_rows}"),
        );
    }
    let zeros = if symmetric {
        vec![width.middle(); m * groups]
    } else {
        zero_points(checkpoint, &name("weight_zero_point"), (m, groups), width)?
    };
    let group_width = stored::group_width(&name("weight_scale"), n, groups, group_size)?;
    let mut group_index = None;
    if checkpoint.contains(&name("weight_g_idx")) {
        let index = stored::integers(checkpoint, &name("weight_g_idx"))?;
        // An index that was never set is filled with −1.
        if index.iter().any(|&group| group != -1) {
            group_index = Some(stored::group_index(
                &name("weight_g_idx"),
                &index,
                n,
                groups,
            )?);
        }
    }
    Ok(Quantised {
        bits: width,
        rows: m,
        cols: n,
        group_width,
        codes,
        scales,
        zeros,
        offsets: Vec::new(),
        group_index: group_index
            .unwrap_or_else(|| (0..n).map(|j| (j / group_width) as u32).collect()),
    })
}

/// Zero points `[m, groups]`, offset like codes: packed along the outputs, or one int8 each in early files.
fn zero_points(
    checkpoint: &Checkpoint,
    name: &str,
    (m, groups): (usize, usize),
    width: Bits,
) -> Result<Vec<u8>> {
    if checkpoint.info(name)?.dtype == Dtype::I8 {
        let values = stored::integers(checkpoint, name)?;
        if values.len() != m * groups {
            return refuse(
                name,
                format!("expected {} values, found {}", m * groups, values.len()),
            );
        }
        let codes = values.iter().map(|zero| {
            let code = zero + i64::from(width.middle());
            u8::try_from(code)
                .ok()
                .filter(|code| *code <= width.max_code())
        });
        return match codes.collect() {
            Some(codes) => Ok(codes),
            None => refuse(name, format!("holds values beyond {} bits", width.get())),
        };
    }
    let (packed, [words, columns]) = stored::words(checkpoint, name)?;
    if columns != groups {
        return refuse(name, format!("expected {groups} columns, found {columns}"));
    }
    let packing = Packing::of(name, m, width.get(), words)?;
    let code = |at: usize| {
        let (row, group) = (at / groups, at % groups);
        packing.code(|k| packed[k * groups + group], width.get(), row)
    };
    Ok((0..m * groups).map(code).collect())
}
