//! What the example `inspect` says of files.

#[allow(dead_code, reason = "the example has a main function of its own")]
#[path = "../examples/inspect.rs"]
mod inspect;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use tensor_io::gguf::{BlockLayout, TensorSpec, Value, Writer};

#[test]
fn a_gguf_file_is_listed_with_its_metadata_types_bytes_and_alignment() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let spec = |name: &str, ty: &str, shape: [usize; 2]| {
        TensorSpec::new(name, BlockLayout::named(ty).unwrap(), shape)
    };
    let specs = [
        spec("a", "Q4_0", [2, 32]),
        spec("b", "Q4_0", [1, 64]),
        spec("c", "F32", [1, 3]),
    ];
    let tokens: Value = ["x", "y"].map(String::from).to_vec().into();
    let metadata = [
        ("general.architecture", Value::from("llama")),
        ("general.alignment", 64u32.into()),
        ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.chat_template", "x".repeat(200).as_str().into()),
    ]
    .map(|(key, value)| (key.to_string(), value));
    let mut writer = Writer::create(&path, &metadata, &specs).unwrap();
    for (name, bytes) in [("a", 36), ("b", 36), ("c", 12)] {
        writer.write(name, &vec![0; bytes]).unwrap();
    }
    writer.finish().unwrap();
    let listing = inspect::listing(&path).unwrap();
    for line in [
        "general.architecture     \"llama\"",
        "Q4_0: 2 tensors, 128 parameters, 72 bytes",
        "F32: 1 tensors, 3 parameters, 12 bytes",
        "3 tensors, 131 parameters, 84 bytes, 5.130 bits a parameter, in 1 file(s) of version 3, aligned to 64",
    ] {
        assert!(
            listing.lines().any(|found| found == line),
            "{line}:\n{listing}"
        );
    }
    assert!(listing.contains("2 of string"), "{listing}");
    assert!(listing.lines().all(|line| line.len() < 120), "{listing}");
}

#[test]
fn a_safetensors_file_is_listed_with_its_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let weight = Tensor::zeros((4, 3), DType::BF16, &Device::Cpu).unwrap();
    tensor_io::write_file(&path, [("w", &weight)], &BTreeMap::new()).unwrap();
    let listing = inspect::listing(&path).unwrap();
    assert!(
        listing.contains("1 tensors, 12 parameters, 24 bytes"),
        "{listing}"
    );
}
