//! Checkpoints whose linears are stored in groups of GPTQ or compressed-tensors.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::json;
use tensor_io::{Dtype, TensorData, write_file};

use causal_lm::compressed::bits;
use causal_lm::testing::TestModel;

/// How a module is stored in a test.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stored {
    pub(crate) gptq: Option<&'static str>,
    pub(crate) bits: usize,
    pub(crate) group: Option<usize>,
    pub(crate) symmetric: bool,
    pub(crate) act_order: bool,
}

impl Stored {
    fn config(self) -> serde_json::Value {
        let Self { bits, group, .. } = self;
        match self.gptq {
            Some(version) => json!({
                "quant_method": "gptq", "checkpoint_format": version, "bits": bits,
                "group_size": group.map_or(-1, |width| width as i64), "sym": self.symmetric,
            }),
            None => json!({
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                    "num_bits": bits, "type": "int", "symmetric": self.symmetric,
                    "strategy": if group.is_some() { "group" } else { "channel" }, "group_size": group,
                }}},
            }),
        }
    }

    /// The tensors of a matrix, rounded to the nearest codes.
    fn tensors(self, module: &str, weight: &Tensor) -> Vec<Raw> {
        let (m, n) = weight.dims2().unwrap();
        let rows: Vec<Vec<f32>> = weight.to_vec2().unwrap();
        let Self { bits: b, .. } = self;
        let width = self.group.unwrap_or(n);
        let groups = n.div_ceil(width);
        // Columns 0, 2, 4, .. first where groups follow another order.
        let group_of = |column: usize| match self.act_order {
            false => column / width,
            true => (column % 2 * n.div_ceil(2) + column / 2) / width,
        };
        let most = (1u32 << b) - 1;
        let (mut codes, mut scales, mut zeros) = (vec![], vec![], vec![]);
        for row in &rows {
            let mut of_row = vec![];
            for group in 0..groups {
                let of_group = (0..n).filter(|&column| group_of(column) == group);
                let values: Vec<f32> = of_group.map(|column| row[column]).collect();
                let high = values.iter().fold(0f32, |most, x| most.max(x.abs()));
                let (scale, zero) = match self.symmetric {
                    true => (2.0 * high / most as f32, 1 << (b - 1)),
                    false => {
                        let low = values.iter().fold(0f32, |least, x| least.min(*x));
                        let top = values.iter().fold(0f32, |most, x| most.max(*x));
                        let scale = (top - low) / most as f32;
                        // Version 1 has no zero of 0.
                        (scale, ((-low / scale).round() as u32).clamp(1, most))
                    }
                };
                of_row.push((half::f16::from_f32(scale), zero));
            }
            for (column, value) in row.iter().enumerate() {
                let (scale, zero) = of_row[group_of(column)];
                let code = (value / scale.to_f32()).round() + zero as f32;
                codes.push(code.clamp(0.0, most as f32) as u8);
            }
            scales.extend(of_row.iter().map(|(scale, _)| *scale));
            zeros.extend(of_row.iter().map(|(_, zero)| *zero as u8));
        }
        let pack = |codes: &mut dyn Iterator<Item = u8>, count: usize| -> Vec<u32> {
            let mut words = vec![0; (count * b).div_ceil(32)];
            bits::pack(codes, b, &mut words);
            words
        };
        let by_row: Vec<Vec<u32>> = codes
            .chunks(n)
            .map(|row| pack(&mut row.iter().copied(), n))
            .collect();
        let bytes = |words: Vec<u32>| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        let transposed = |rows: &[Vec<u32>]| -> Vec<u32> {
            let columns = 0..rows[0].len();
            columns
                .flat_map(|column| rows.iter().map(move |row| row[column]))
                .collect()
        };
        let index: Vec<u32> = (0..n).map(|column| group_of(column) as u32).collect();
        let name = |part: &str| format!("{module}.{part}");
        let half = |at: usize| scales[at].to_le_bytes();
        match self.gptq {
            Some(version) => {
                let offset = u8::from(version == "gptq");
                let of_group = |group: usize| {
                    let stored = (0..m).map(|row| zeros[row * groups + group] - offset);
                    pack(&mut stored.into_iter(), m)
                };
                let qzeros: Vec<u32> = (0..groups).flat_map(of_group).collect();
                let by_group = (0..groups).flat_map(|g| (0..m).map(move |row| row * groups + g));
                let words = by_row[0].len();
                vec![
                    (
                        name("qweight"),
                        Dtype::I32,
                        vec![words, m],
                        bytes(transposed(&by_row)),
                    ),
                    (
                        name("qzeros"),
                        Dtype::I32,
                        vec![groups, (m * b).div_ceil(32)],
                        bytes(qzeros),
                    ),
                    (
                        name("scales"),
                        Dtype::F16,
                        vec![groups, m],
                        by_group.flat_map(half).collect(),
                    ),
                    (name("g_idx"), Dtype::I32, vec![n], bytes(index)),
                ]
            }
            None => {
                let words = by_row[0].len();
                let shape = [m as i64, n as i64];
                let mut tensors = vec![
                    (
                        name("weight_packed"),
                        Dtype::I32,
                        vec![m, words],
                        bytes(by_row.concat()),
                    ),
                    (
                        name("weight_scale"),
                        Dtype::F16,
                        vec![m, groups],
                        (0..m * groups).flat_map(half).collect(),
                    ),
                    (
                        name("weight_shape"),
                        Dtype::I64,
                        vec![2],
                        shape.iter().flat_map(|size| size.to_le_bytes()).collect(),
                    ),
                ];
                if !self.symmetric {
                    let of_group = |group: usize| {
                        let stored = (0..m).map(|row| zeros[row * groups + group]);
                        pack(&mut stored.into_iter(), m)
                    };
                    let columns: Vec<Vec<u32>> = (0..groups).map(of_group).collect();
                    let words = columns[0].len();
                    let stored = bytes(transposed(&columns));
                    tensors.push((
                        name("weight_zero_point"),
                        Dtype::I32,
                        vec![words, groups],
                        stored,
                    ));
                }
                if self.act_order {
                    tensors.push((name("weight_g_idx"), Dtype::I32, vec![n], bytes(index)));
                }
                tensors
            }
        }
    }
}

/// Writes `model` with its linears stored so.
pub(crate) fn write_compressed(model: &TestModel, stored: Stored, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let checkpoint = model.checkpoint();
    let mut config = checkpoint.config().raw().clone();
    config.insert("quantization_config".into(), stored.config());
    let config = serde_json::Value::Object(config);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut tensors = Vec::new();
    for name in checkpoint.names() {
        let tensor = checkpoint
            .tensor_as(name, DType::F32, &Device::Cpu)
            .unwrap();
        match name.strip_suffix("_proj.weight") {
            Some(_) => {
                let module = name.strip_suffix(".weight").unwrap();
                tensors.extend(stored.tensors(module, &tensor));
            }
            None => {
                let info = checkpoint.info(name).unwrap();
                let bytes = checkpoint.bytes(name).unwrap().into_owned();
                tensors.push((name.to_string(), info.dtype, info.shape.clone(), bytes));
            }
        }
    }
    write_tensors(dir, &tensors);
}

/// A tensor as it is stored.
pub(crate) type Raw = (String, Dtype, Vec<usize>, Vec<u8>);

/// Writes the tensors of a folder.
pub(crate) fn write_tensors(dir: &Path, tensors: &[Raw]) {
    let data = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let dtype = *dtype;
        (
            name,
            TensorData::Bytes {
                dtype,
                shape,
                bytes,
            },
        )
    });
    write_file(dir.join("model.safetensors"), data, &BTreeMap::new()).unwrap();
}

pub(crate) const STORED: [Stored; 10] = {
    let gptq = Stored {
        gptq: Some("gptq"),
        bits: 4,
        group: Some(32),
        symmetric: true,
        act_order: false,
    };
    let tensors = Stored { gptq: None, ..gptq };
    [
        gptq,
        Stored {
            gptq: Some("gptq_v2"),
            symmetric: false,
            ..gptq
        },
        Stored {
            symmetric: false,
            act_order: true,
            ..gptq
        },
        Stored {
            bits: 8,
            group: None,
            ..gptq
        },
        Stored {
            bits: 3,
            symmetric: false,
            ..gptq
        },
        Stored {
            group: Some(16),
            symmetric: false,
            act_order: true,
            ..gptq
        },
        Stored {
            group: Some(16),
            bits: 8,
            ..tensors
        },
        tensors,
        Stored {
            bits: 2,
            group: None,
            symmetric: false,
            ..tensors
        },
        Stored {
            act_order: true,
            symmetric: false,
            ..tensors
        },
    ]
};
