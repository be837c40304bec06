//! GPTQ's format, as AutoGPTQ, GPTQModel, vLLM and transformers load it.
//!
//! For a linear with n inputs, m outputs and G groups: `qweight` int32 `[n·bits/32, m]`, codes packed along the inputs;
//! `qzeros` int32 `[G, m·bits/32]`, zero points packed along the outputs; `scales` f16 `[G, m]`; `g_idx` int32 `[n]`.
//! Packing is dense, little end first, across words (for 3 bits: 32 values in 3 words).
//!
//! Version 1 stores zero − 1, modulo 2^bits. A zero point of 0 therefore wraps to 2^bits − 1, which some runtimes read as 2^bits
//! and others as 0: it is read as 0 here.

use rayon::prelude::*;
use serde_json::{Map, Value};
use tensor_io::{Checkpoint, Config, Result};

use super::stored::{self, refuse};
use super::{Format, Found, StoredGroups, bits, group_bits};

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

    /// What is to be added to a stored zero point.
    pub fn offset(self) -> u8 {
        match self {
            Self::V1 => 1,
            Self::V2 => 0,
        }
    }
}

/// Inputs packed and unpacked together: `bits` whole words.
const PACK: usize = 32;

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
    if group_bits(bits).is_none() {
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
        symmetric: section.opt_bool("sym")?.unwrap_or(false),
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

/// What a configuration says of all modules.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stated {
    pub(super) version: Version,
    pub(super) bits: usize,
    pub(super) group_size: Option<usize>,
    pub(super) symmetric: bool,
}

/// The weight of a module. Bits and groups are taken from the shapes where there is a `g_idx`, since configurations may
/// set them for some modules apart.
pub(super) fn read(checkpoint: &Checkpoint, module: &str, stated: Stated) -> Result<StoredGroups> {
    let Stated {
        version,
        bits,
        group_size,
        symmetric,
    } = stated;
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
    let Some(width) = group_bits(b).filter(|_| whole) else {
        return refuse(
            checkpoint,
            &name("qweight"),
            format!("{word_rows} words for {n} inputs are not 2, 3, 4 or 8 bits each"),
        );
    };
    let (scales, shape) = stored::floats(checkpoint, &name("scales"))?;
    let [groups, outputs] = stored::matrix(checkpoint, &name("scales"), &shape)?;
    if outputs != m {
        return refuse(
            checkpoint,
            &name("scales"),
            format!("expected {m} outputs, found {outputs}"),
        );
    }
    let (qzeros, shape) = stored::words(checkpoint, &name("qzeros"))?;
    if shape != [groups, (m * b).div_ceil(32)] {
        return refuse(
            checkpoint,
            &name("qzeros"),
            format!(
                "expected [{groups}, {}], found {shape:?}",
                (m * b).div_ceil(32)
            ),
        );
    }
    // A module's own index tells apart groups that the configuration says are of another width.
    let several = index.as_deref().filter(|_| groups > 1);
    let own = several.and_then(|index| run_width(index, groups));
    let stated = own.or(group_size);
    let group_width = stored::group_width(checkpoint, &name("scales"), n, groups, stated)?;
    let group_index = match index {
        Some(index) => stored::group_index(checkpoint, &name("g_idx"), &index, n, groups)?,
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
    let zeros: Vec<u8> = zeros.collect();
    let tell = match symmetric {
        true => mislabelled(&zeros, b, version),
        false => beside_the_mean((&codes, n), (&zeros, groups), &group_index, (b, version)),
    };
    if let Some(reason) = tell {
        return refuse(checkpoint, &name("qzeros"), reason);
    }
    Ok(StoredGroups {
        bits: width,
        rows: m,
        cols: n,
        group_width,
        codes,
        scales: (0..m * groups)
            .map(|at| scales[at % groups * m + at / groups])
            .collect(),
        zeros,
        group_index,
    })
}

/// Inputs in each group but the last, where an index counts `groups` groups up in runs of one width.
fn run_width(index: &[i64], groups: usize) -> Option<usize> {
    let width = index.iter().take_while(|&&group| group == 0).count();
    let in_runs = width > 0 && index.len().div_ceil(width) == groups;
    let counts = |(at, &group): (usize, &i64)| usize::try_from(group) == Ok(at / width);
    (in_runs && index.iter().enumerate().all(counts)).then_some(width)
}

/// Why zero points of `bits` bits, read by `version`, show that the file was labelled with the other version.
///
/// A symmetric grid has its zero in the middle, so that the two versions store two known numbers. Where the label is
/// wrong, every weight would be read one step off.
fn mislabelled(zeros: &[u8], bits: usize, version: Version) -> Option<String> {
    let other = match version {
        Version::V1 => Version::V2,
        Version::V2 => Version::V1,
    };
    let middle = 1u8 << (bits - 1);
    // What the middle becomes when it is stored by one version and read by the other.
    let wrong = middle + version.offset() - other.offset();
    if zeros.is_empty() || zeros.iter().any(|&zero| zero != wrong) {
        return None;
    }
    Some(format!(
        "every zero point is stored as {}: with `sym: true` that is how {} stores the middle of {bits} bits, but \
         checkpoint_format says {}; correct the label",
        middle - other.offset(),
        other.name(),
        version.name()
    ))
}

/// Codes that a mean tells anything of.
const TELLING: usize = 4096;
/// Largest part of a step that zero points of the right version lie beside the mean of their codes.
const NEAR: f64 = 0.2;

/// Why zero points of an asymmetric grid, read by `version`, show that the file was labelled with the other version.
///
/// Weights of a group have a mean near 0, so that the mean of its codes is near its zero point. Over many groups the other
/// version is exactly one step beside it. With 8 bits a step is too small to tell.
fn beside_the_mean(
    (codes, inputs): (&[u8], usize),
    (zeros, groups): (&[u8], usize),
    group_index: &[u32],
    (bits, version): (usize, Version),
) -> Option<String> {
    if bits > 4 || codes.len() < TELLING {
        return None;
    }
    let other = match version {
        Version::V1 => Version::V2,
        Version::V2 => Version::V1,
    };
    let mask = ((1u16 << bits) - 1) as u8;
    // Of each row: groups, and how far the mean code is from the zero point by either version.
    let of_row = |(codes, zeros): (&[u8], &[u8])| {
        let mut sums = vec![(0u32, 0u32); groups];
        for (&code, &group) in codes.iter().zip(group_index) {
            let (count, sum) = &mut sums[group as usize];
            (*count, *sum) = (*count + 1, *sum + u32::from(code));
        }
        let mut row = (0, [0.0; 2]);
        for (&(count, sum), &zero) in sums.iter().zip(zeros).filter(|((count, _), _)| *count > 0) {
            let mean = f64::from(sum) / f64::from(count);
            let stored = zero.wrapping_sub(version.offset()) & mask;
            let by_other = stored.wrapping_add(other.offset()) & mask;
            row.0 += 1;
            row.1[0] += mean - f64::from(zero);
            row.1[1] += mean - f64::from(by_other);
        }
        row
    };
    let rows = codes.par_chunks(inputs).zip(zeros.par_chunks(groups));
    let rows: Vec<(usize, [f64; 2])> = rows.map(of_row).collect();
    let count: usize = rows.iter().map(|row| row.0).sum();
    let mean = |reading: usize| rows.iter().map(|row| row.1[reading]).sum::<f64>() / count as f64;
    let (ours, theirs) = (mean(0), mean(1));
    (theirs.abs() < NEAR && ours.abs() > 1.0 - NEAR).then(|| {
        format!(
            "read as {}, which checkpoint_format says, the mean of the codes is {ours:+.2} from the zero point over {count} \
             groups, and {theirs:+.2} read as {}; correct the label",
            version.name(),
            other.name()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes and zero points of normally distributed weights on asymmetric grids, 64 rows of 4 groups of 32.
    fn grids(bits: usize) -> (Vec<u8>, Vec<u8>) {
        let top = f64::from((1u16 << bits) - 1);
        let mut state = 7u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let (mut codes, mut zeros) = (Vec::new(), Vec::new());
        for _ in 0..64 * 4 {
            let weights: Vec<f64> = (0..32)
                .map(|_| (0..12).map(|_| uniform()).sum::<f64>() - 6.0)
                .collect();
            let least = weights.iter().copied().fold(0.0, f64::min);
            let most = weights.iter().copied().fold(0.0, f64::max);
            let step = (most - least) / top;
            let zero = (-least / step).round();
            zeros.push(zero as u8);
            let code = |weight: &f64| (weight / step + zero).round().clamp(0.0, top) as u8;
            codes.extend(weights.iter().map(code));
        }
        (codes, zeros)
    }

    #[test]
    fn zero_points_a_step_beside_the_mean_of_their_codes_tell_the_other_version() {
        let index: Vec<u32> = (0..128).map(|input| input / 32).collect();
        for bits in [2, 3, 4, 8] {
            let (codes, zeros) = grids(bits);
            for version in [Version::V1, Version::V2] {
                let told = |zeros: &[u8]| {
                    beside_the_mean((&codes, 128), (zeros, 4), &index, (bits, version))
                };
                assert_eq!(told(&zeros), None, "{bits} bits");
                let mask = ((1u16 << bits) - 1) as u8;
                let other = 1 - version.offset();
                let read =
                    |zero: &u8| (zero - other.min(*zero)).wrapping_add(version.offset()) & mask;
                let wrong: Vec<u8> = zeros.iter().map(read).collect();
                match (bits, told(&wrong)) {
                    (8, told) => assert_eq!(told, None),
                    (_, Some(reason)) => {
                        assert!(reason.contains("checkpoint_format"), "{reason}");
                        assert!(
                            reason.contains(&format!("over {} groups", 64 * 4)),
                            "{reason}"
                        );
                    }
                    (bits, None) => panic!("{bits} bits by {version:?}"),
                }
            }
        }
    }

    #[test]
    fn an_index_tells_the_width_of_its_groups_also_where_the_last_is_shorter() {
        let index = |inputs: usize, width: usize| -> Vec<i64> {
            (0..inputs).map(|j| (j / width) as i64).collect()
        };
        assert_eq!(run_width(&index(160, 64), 3), Some(64));
        assert_eq!(run_width(&index(688, 128), 6), Some(128));
        assert_eq!(run_width(&index(96, 32), 3), Some(32));
        // Groups in another order, or not all of them.
        assert_eq!(run_width(&[1, 0, 1, 0], 2), None);
        assert_eq!(run_width(&[0, 1, 1, 0], 2), None);
        assert_eq!(run_width(&index(160, 64), 4), None);
        assert_eq!(run_width(&[], 0), None);
    }
}
