//! Any set of tensors, under any shard limit, comes back as it was written.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use tensor_io::{
    Checkpoint, CheckpointWriter, Config, Dtype, Header, TensorData, TensorSpec, WriteOptions,
    write_file,
};

const DTYPES: [Dtype; 14] = [
    Dtype::BOOL,
    Dtype::F4,
    Dtype::U8,
    Dtype::I8,
    Dtype::F8_E4M3,
    Dtype::I16,
    Dtype::U16,
    Dtype::F16,
    Dtype::BF16,
    Dtype::I32,
    Dtype::F32,
    Dtype::C64,
    Dtype::F64,
    Dtype::U64,
];

#[derive(Debug, Clone)]
struct Stored {
    spec: TensorSpec,
    bytes: Vec<u8>,
}

fn stored(name: String) -> impl Strategy<Value = Stored> {
    let shape = prop::collection::vec(0usize..6, 0..4);
    (prop::sample::select(&DTYPES[..]), shape, any::<u8>()).prop_map(
        move |(dtype, mut shape, seed)| {
            if dtype.bitsize() < 8 {
                // Whole bytes.
                shape.push(8);
            }
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            Stored {
                bytes: (0..bytes)
                    .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
                    .collect(),
                spec: TensorSpec::new(name.clone(), dtype, shape),
            }
        },
    )
}

/// Tensors with distinct names of all kinds, in any order.
fn tensors() -> impl Strategy<Value = Vec<Stored>> {
    prop::collection::btree_set("[a-c.\\\\\"é\\n]{0,6}", 0..12)
        .prop_flat_map(|names| names.into_iter().map(stored).collect::<Vec<_>>())
        .prop_shuffle()
}

/// The file that the safetensors crate makes of these tensors.
fn by_safetensors(tensors: &[Stored]) -> Vec<u8> {
    let views: Vec<_> = tensors
        .iter()
        .map(|t| {
            let view =
                safetensors::tensor::TensorView::new(t.spec.dtype, t.spec.shape.clone(), &t.bytes);
            (t.spec.name.clone(), view.unwrap())
        })
        .collect();
    safetensors::serialize(views, None).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn checkpoints_come_back(
        tensors in tensors(),
        max_shard_bytes in 0u64..2000,
        order in any::<prop::sample::Index>(),
    ) {
        let out = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.set("z", 0.1);
        config.set("a", "é");
        let specs: Vec<_> = tensors.iter().map(|tensor| tensor.spec.clone()).collect();
        let options = WriteOptions::default().with_max_shard_bytes(max_shard_bytes);
        let mut writer = CheckpointWriter::create(out.path().join("m"), &config, specs, &options).unwrap();
        let first = if tensors.is_empty() { 0 } else { order.index(tensors.len()) };
        for tensor in tensors[first..].iter().chain(&tensors[..first]) {
            writer.write_bytes(&tensor.spec.name, &tensor.bytes).unwrap();
        }
        let written = writer.finish().unwrap();

        let read = Checkpoint::open(&written.dir).unwrap();
        prop_assert_eq!(read.config().raw(), config.raw());
        prop_assert_eq!(read.names().count(), tensors.len());
        prop_assert_eq!(read.total_bytes(), written.bytes);
        prop_assert_eq!(read.parameters(), written.parameters);
        prop_assert_eq!(read.shards().len(), written.shards);
        for tensor in &tensors {
            let info = read.info(&tensor.spec.name).unwrap();
            prop_assert_eq!(info.dtype, tensor.spec.dtype);
            prop_assert_eq!(&info.shape, &tensor.spec.shape);
            let bytes = read.bytes(&tensor.spec.name).unwrap();
            prop_assert_eq!(&bytes[..], &tensor.bytes[..]);
        }
        for (number, path) in read.shards().iter().enumerate() {
            let file = std::fs::read(path).unwrap();
            prop_assert!(safetensors::SafeTensors::deserialize(&file).is_ok());
            let inside: Vec<usize> = read
                .names()
                .map(|name| read.info(name).unwrap())
                .filter(|info| info.shard == number)
                .map(|info| info.bytes)
                .collect();
            let total: usize = inside.iter().sum();
            let nonempty = inside.iter().filter(|&&bytes| bytes > 0).count();
            prop_assert!(total as u64 <= max_shard_bytes || nonempty <= 1);
        }
    }

    #[test]
    fn files_read_by_the_safetensors_crate_are_read_alike(tensors in tensors()) {
        let file = by_safetensors(&tensors);
        let header = Header::parse(&file).unwrap();
        prop_assert_eq!(header.entries.len(), tensors.len());
        for entry in &header.entries {
            let tensor = tensors.iter().find(|t| t.spec.name == entry.name).unwrap();
            prop_assert_eq!(entry.dtype, tensor.spec.dtype);
            prop_assert_eq!(&entry.shape, &tensor.spec.shape);
            prop_assert_eq!(&file[header.data_start + entry.start..header.data_start + entry.end], &tensor.bytes[..]);
        }
    }

    #[test]
    fn damaged_files_are_refused_wherever_safetensors_refuses_them(
        tensors in tensors(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in 0usize..12,
    ) {
        let mut file = by_safetensors(&tensors);
        for (position, value) in damage {
            let position = position.index(file.len());
            file[position] = value;
        }
        // Mostly whole, sometimes cut.
        file.truncate(file.len() - cut.saturating_sub(8));
        if Header::parse(&file).is_ok() {
            prop_assert!(safetensors::SafeTensors::deserialize(&file).is_ok());
        }
    }

    #[test]
    fn single_files_come_back(tensors in tensors(), text in "[ -~é]{0,20}") {
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("x.safetensors");
        let metadata = BTreeMap::from([("key".to_string(), text)]);
        let data = tensors.iter().map(|t| {
            let data = TensorData::Bytes { dtype: t.spec.dtype, shape: &t.spec.shape, bytes: &t.bytes };
            (t.spec.name.as_str(), data)
        });
        write_file(&path, data, &metadata).unwrap();
        let read = Checkpoint::open_file(&path).unwrap();
        prop_assert_eq!(read.metadata(), &metadata);
        for tensor in &tensors {
            let bytes = read.bytes(&tensor.spec.name).unwrap();
            prop_assert_eq!(&bytes[..], &tensor.bytes[..]);
        }
    }

    #[test]
    fn conversions_agree_with_candle(
        values in prop::collection::vec(prop::num::f32::NORMAL | prop::num::f32::ZERO | prop::num::f32::SUBNORMAL, 1..700),
        stored in prop::sample::select(vec![DType::F32, DType::F64, DType::BF16]),
        wanted in prop::sample::select(vec![DType::F32, DType::F64, DType::BF16]),
    ) {
        // Values that are finite in bf16 too; what is too large is another test's matter.
        let values: Vec<f32> = values.into_iter().map(|x| if x.abs() > 3e38 { 1.0 } else { x }).collect();
        let tensor = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(stored).unwrap();
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("x.safetensors");
        write_file(&path, [("x", &tensor)], &BTreeMap::new()).unwrap();
        let read = Checkpoint::open_file(&path).unwrap();
        let bits = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        prop_assert_eq!(bits(&read.tensor("x", &Device::Cpu).unwrap()), bits(&tensor));
        let converted = read.tensor_as("x", wanted, &Device::Cpu).unwrap();
        prop_assert_eq!(converted.dtype(), wanted);
        // All values are f32. Through it, because `half` looks at the upper half of an f64 alone and so takes what lies just
        // above the middle of two bf16 values for the middle.
        let single = tensor.to_dtype(DType::F32).unwrap();
        prop_assert_eq!(bits(&converted), bits(&single.to_dtype(wanted).unwrap()));
    }
}
