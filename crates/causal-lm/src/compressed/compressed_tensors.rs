//! The pack-quantized format of compressed-tensors, as llm-compressor writes it.
//!
//! `weight_packed` int32 `[m, ⌈n·bits/32⌉]` holds code = value + 2^(bits−1), packed along the inputs; `weight_scale`
//! `[m, G]`; for asymmetric grids `weight_zero_point` int32 `[⌈m·bits/32⌉, G]`, packed along the outputs with the same
//! offset; `weight_g_idx` `[n]` where groups follow the order of activations; `weight_shape` `[2]`. Releases up to late
//! 2025 packed ⌊32/bits⌋ codes into a word instead of crossing words, which differs for 3 bits; the shape tells them apart.

use packed::GroupBits;
use serde_json::Value;
use tensor_io::{Checkpoint, Config, Dtype, Result};

use super::stored::{self, refuse};
use super::{Format, Found, StoredGroups, bits, group_bits};

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
    if kind != "int" || group_bits(bits).is_none() {
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

/// Whether readers cannot tell from the number of words how `count` codes are packed in them.
pub fn is_ambiguous(count: usize, bits: usize, words: usize) -> bool {
    let dense = (count * bits).div_ceil(32) == words;
    let aligned = count.div_ceil(32 / bits) == words;
    // Where a code never crosses words, or all fit into one, the two are the same.
    let alike = 32 % bits == 0 || words <= 1;
    dense && aligned && !alike
}

impl Packing {
    /// From the number of words that hold `count` codes.
    fn of(
        checkpoint: &Checkpoint,
        name: &str,
        count: usize,
        bits: usize,
        words: usize,
    ) -> Result<Self> {
        if count > words.saturating_mul(32) {
            let reason = format!("{words} words do not hold {count} codes");
            return refuse(checkpoint, name, reason);
        }
        if is_ambiguous(count, bits, words) {
            let reason =
                format!("{words} words for {count} codes of {bits} bits can be read in two ways");
            return refuse(checkpoint, name, reason);
        }
        if (count * bits).div_ceil(32) == words {
            return Ok(Self::Dense);
        }
        if count.div_ceil(32 / bits) == words {
            return Ok(Self::Aligned);
        }
        let reason = format!("{words} words do not hold {count} codes of {bits} bits");
        refuse(checkpoint, name, reason)
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
) -> Result<StoredGroups> {
    let name = |tensor: &str| format!("{module}.{tensor}");
    let width = group_bits(bits).expect("detection admits these widths only");
    let [m, n] = stored::shape(checkpoint, &name("weight_shape"))?;
    let (packed, [packed_rows, words]) = stored::words(checkpoint, &name("weight_packed"))?;
    if packed_rows != m {
        return refuse(
            checkpoint,
            &name("weight_packed"),
            format!("expected {m} rows, found {packed_rows}"),
        );
    }
    let packing = Packing::of(checkpoint, &name("weight_packed"), n, bits, words)?;
    let mut codes = Vec::with_capacity(m * n);
    for row in packed.chunks(words.max(1)) {
        codes.extend((0..n).map(|i| packing.code(|k| row[k], bits, i)));
    }

    let (scales, shape) = stored::floats(checkpoint, &name("weight_scale"))?;
    let [scale_rows, groups] = match shape.as_slice() {
        &[rows] => [rows, 1],
        other => stored::matrix(checkpoint, &name("weight_scale"), other)?,
    };
    if scale_rows != m {
        return refuse(
            checkpoint,
            &name("weight_scale"),
            format!("expected {m} rows, found {scale_rows}"),
        );
    }
    let zeros = if symmetric {
        vec![width.middle(); m * groups]
    } else {
        zero_points(checkpoint, &name("weight_zero_point"), (m, groups), width)?
    };
    let group_width =
        stored::group_width(checkpoint, &name("weight_scale"), n, groups, group_size)?;
    let mut group_index = None;
    if checkpoint.contains(&name("weight_g_idx")) {
        let index = stored::integers(checkpoint, &name("weight_g_idx"))?;
        // An index that was never set is filled with −1.
        if index.iter().any(|&group| group != -1) {
            group_index = Some(stored::group_index(
                checkpoint,
                &name("weight_g_idx"),
                &index,
                n,
                groups,
            )?);
        }
    }
    Ok(StoredGroups {
        bits: width,
        rows: m,
        cols: n,
        group_width,
        codes,
        scales,
        zeros,
        group_index: group_index
            .unwrap_or_else(|| (0..n).map(|j| (j / group_width) as u32).collect()),
    })
}

/// Zero points `[m, groups]`, offset like codes: packed along the outputs, or one int8 each in early files.
fn zero_points(
    checkpoint: &Checkpoint,
    name: &str,
    (m, groups): (usize, usize),
    width: GroupBits,
) -> Result<Vec<u8>> {
    if checkpoint.info(name)?.dtype == Dtype::I8 {
        let values = stored::integers(checkpoint, name)?;
        if values.len() != m * groups {
            return refuse(
                checkpoint,
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
            None => refuse(
                checkpoint,
                name,
                format!("holds values beyond {} bits", width.get()),
            ),
        };
    }
    let bits = width.get() as usize;
    let (packed, [words, columns]) = stored::words(checkpoint, name)?;
    if columns != groups {
        return refuse(
            checkpoint,
            name,
            format!("expected {groups} columns, found {columns}"),
        );
    }
    let packing = Packing::of(checkpoint, name, m, bits, words)?;
    let code = |at: usize| {
        let (row, group) = (at / groups, at % groups);
        packing.code(|k| packed[k * groups + group], bits, row)
    };
    Ok((0..m * groups).map(code).collect())
}
