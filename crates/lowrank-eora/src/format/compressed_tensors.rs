//! The pack-quantized format of compressed-tensors, as llm-compressor writes it.
//!
//! `weight_packed` int32 `[m, ⌈n·bits/32⌉]` holds code = value + 2^(bits−1), packed along the inputs; `weight_scale`
//! `[m, G]`; for asymmetric grids `weight_zero_point` int32 `[⌈m·bits/32⌉, G]`, packed along the outputs with the same
//! offset; `weight_g_idx` `[n]` where groups follow the order of activations; `weight_shape` `[2]`. Releases up to late
//! 2025 packed ⌊32/bits⌋ codes into a word instead of crossing words, which differs for 3 bits; the shape tells them apart.

use causal_lm::compressed::bits;
use causal_lm::compressed::compressed_tensors::is_ambiguous;
use half::f16;
use serde_json::{Value, json};
use tensor_io::{Dtype, TensorSpec};

use crate::compress::{
    ColumnOrder, Compressor, Group, GroupFit, Quantise, Quantised, Rounding, Symmetry,
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
    if is_ambiguous(n, bits, words) {
        return Err(refuse(format!(
            "{n} codes of {bits} bits can be read in two ways"
        )));
    }
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
            if is_ambiguous(m, bits, words) {
                return Err(refuse(format!(
                    "{m} zero points of {bits} bits can be read in two ways"
                )));
            }
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
