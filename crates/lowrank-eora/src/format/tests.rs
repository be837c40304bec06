//! Formats that are only read, from tensors put together by hand.

use std::collections::BTreeMap;

use tempfile::TempDir;
use tensor_io::{Checkpoint, Dtype, TensorData, write_file};

use super::{Format, QuantisedCheckpoint};

/// Name, dtype, shape and bytes of a tensor.
type Stored = (&'static str, Dtype, Vec<usize>, Vec<u8>);

fn folder(config: &str, tensors: &[Stored]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let config = format!(r#"{{"quantization_config": {config}}}"#);
    std::fs::write(folder.path().join("config.json"), config).expect("written");
    let data = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let dtype = *dtype;
        (
            *name,
            TensorData::Bytes {
                dtype,
                shape,
                bytes,
            },
        )
    });
    let path = folder.path().join("model.safetensors");
    write_file(path, data, &BTreeMap::new()).expect("written");
    folder
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn shape(rows: i64, cols: i64) -> Vec<u8> {
    [rows, cols]
        .iter()
        .flat_map(|size| size.to_le_bytes())
        .collect()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// One row of 32 three-bit codes i mod 8, so values i mod 8 − 4, in either packing.
#[test]
fn both_packings_of_three_bits_are_read() {
    let code = |i: u32| i % 8;
    let mut dense = [0u32; 3];
    let mut aligned = [0u32; 4];
    for i in 0..32u32 {
        for bit in 0..3 {
            let at = 3 * i + bit;
            dense[at as usize / 32] |= (code(i) >> bit & 1) << (at % 32);
        }
        aligned[i as usize / 10] |= code(i) << (3 * (i % 10));
    }
    let config = r#"{"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups":
        {"group_0": {"targets": ["Linear"], "weights":
        {"num_bits": 3, "type": "int", "symmetric": true, "strategy": "group", "group_size": 16}}}}"#;
    for packed in [&dense[..], &aligned[..]] {
        let tensors = [
            (
                "m.weight_packed",
                Dtype::I32,
                vec![1, packed.len()],
                words(packed),
            ),
            (
                "m.weight_scale",
                Dtype::F32,
                vec![1, 2],
                floats(&[0.5, 2.0]),
            ),
            ("m.weight_shape", Dtype::I64, vec![2], shape(1, 32)),
        ];
        let folder = folder(config, &tensors);
        let checkpoint = Checkpoint::open(folder.path()).expect("complete");
        let reader = QuantisedCheckpoint::open(&checkpoint).expect("known");
        assert_eq!(reader.modules(), ["m"]);
        let weight = reader.weight("m").expect("well-formed");
        for i in 0..32 {
            let scale = if i < 16 { 0.5 } else { 2.0 };
            assert_eq!(weight[(0, i)], scale * ((i % 8) as f64 - 4.0));
        }
    }
}

#[test]
fn packed_zero_points_and_the_order_of_activations_are_read() {
    // Two rows of eight four-bit codes; two groups, alternating; zero points 8 + (−8, 1) and 8 + (3, 7).
    let config = r#"{"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups":
        {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": false,
        "strategy": "group", "group_size": 4, "actorder": "group"}}}}"#;
    let index: Vec<u32> = (0..8).map(|i| i % 2).collect();
    let tensors = [
        (
            "m.weight_packed",
            Dtype::I32,
            vec![2, 1],
            words(&[0x7654_3210, 0xFEDC_BA98]),
        ),
        (
            "m.weight_scale",
            Dtype::F32,
            vec![2, 2],
            floats(&[1.0, 2.0, 4.0, 8.0]),
        ),
        (
            "m.weight_zero_point",
            Dtype::I32,
            vec![1, 2],
            words(&[0xB0, 0xF9]),
        ),
        ("m.weight_g_idx", Dtype::I32, vec![8], words(&index)),
        ("m.weight_shape", Dtype::I64, vec![2], shape(2, 8)),
    ];
    let folder = folder(config, &tensors);
    let checkpoint = Checkpoint::open(folder.path()).expect("complete");
    let weight = QuantisedCheckpoint::open(&checkpoint)
        .and_then(|reader| reader.weight("m"))
        .expect("well-formed");
    let (scales, zeros) = ([[1.0, 2.0], [4.0, 8.0]], [[0.0, 9.0], [11.0, 15.0]]);
    for i in 0..2 {
        for j in 0..8 {
            let expected = scales[i][j % 2] * ((8 * i + j) as f64 - zeros[i][j % 2]);
            assert_eq!(weight[(i, j)], expected, "{i} {j}");
        }
    }
}

#[test]
fn bitmasks_are_read() {
    let config = r#"{"quant_method": "compressed-tensors", "format": "dense",
        "sparsity_config": {"format": "sparse-24-bitmask"}}"#;
    let tensors = |values: &[f32]| {
        [
            (
                "m.compressed",
                Dtype::F32,
                vec![2, values.len() / 2],
                floats(values),
            ),
            ("m.bitmask", Dtype::U8, vec![2, 1], vec![0b1001, 0b0110]),
            ("m.shape", Dtype::I64, vec![2, 1], shape(2, 4)),
        ]
    };
    let stored = folder(config, &tensors(&[1.0, 2.0, 3.0, 4.0]));
    let checkpoint = Checkpoint::open(stored.path()).expect("complete");
    let reader = QuantisedCheckpoint::open(&checkpoint).expect("known");
    assert_eq!(reader.format(), &Format::SparseBitmask);
    let weight = reader.weight("m").expect("well-formed");
    let expected = [[1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 4.0, 0.0]];
    assert!((0..8).all(|at| weight[(at / 4, at % 4)] == expected[at / 4][at % 4]));

    let stored = folder(config, &tensors(&[1.0, 2.0]));
    let checkpoint = Checkpoint::open(stored.path()).expect("complete");
    let reader = QuantisedCheckpoint::open(&checkpoint).expect("known");
    let error = reader.weight("m").expect_err("too few").to_string();
    assert!(
        error.contains("`m.compressed`: holds fewer values"),
        "{error}"
    );
}
