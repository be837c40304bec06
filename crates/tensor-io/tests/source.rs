//! A checkpoint of tensors that are decoded when asked for behaves as one of files.

use std::any::Any;
use std::borrow::Cow;
use std::sync::Mutex;

use candle_core::{DType, Device};
use tensor_io::{
    Checkpoint, CheckpointWriter, Config, Dtype, Error, Result, TensorSource, TensorSpec,
    WriteOptions,
};

/// Bytes that are stored as the difference from 7.
struct Shifted(Mutex<Vec<String>>);

impl Shifted {
    fn stored_bytes() -> Vec<u8> {
        [1f32, 2., 3., 4., 5., 6.]
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .map(|b| b.wrapping_sub(7))
            .collect()
    }
}

impl TensorSource for Shifted {
    fn bytes(&self, _name: &str) -> Result<Cow<'_, [u8]>> {
        Ok(Cow::Owned(
            Self::stored_bytes()
                .iter()
                .map(|b| b.wrapping_add(7))
                .collect(),
        ))
    }

    fn rows(&self, name: &str, rows: &[usize]) -> Result<Vec<u8>> {
        let all = self.bytes(name)?;
        Ok(rows
            .iter()
            .flat_map(|row| all[row * 8..][..8].to_vec())
            .collect())
    }

    fn stored(&self, _name: &str) -> Result<Cow<'_, [u8]>> {
        Ok(Cow::Owned(Self::stored_bytes()))
    }

    fn total_bytes(&self) -> u64 {
        5
    }

    fn release(&self, name: &str) {
        self.0.lock().unwrap().push(name.to_string());
    }

    fn files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(vec![("tokenizer.json".into(), b"{}".to_vec())])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn open() -> Checkpoint {
    let specs = vec![TensorSpec::new("w", Dtype::F32, [3, 2])];
    let source = Box::new(Shifted(Mutex::default()));
    Checkpoint::from_source("m.gguf", Config::default(), specs, source).unwrap()
}

/// A source whose matrix must not be decoded as a whole.
struct Rows;

impl TensorSource for Rows {
    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        panic!("all of {name} were asked for")
    }

    fn rows(&self, _name: &str, rows: &[usize]) -> Result<Vec<u8>> {
        let row = |row: &usize| [*row as f32, -(*row as f32)];
        Ok(rows
            .iter()
            .flat_map(row)
            .flat_map(f32::to_le_bytes)
            .collect())
    }

    fn stored(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        self.bytes(name)
    }

    fn total_bytes(&self) -> u64 {
        0
    }

    fn release(&self, _name: &str) {}

    fn files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(vec![])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[test]
fn a_range_of_rows_is_decoded_without_the_others() {
    // Three matrices of four rows.
    let specs = vec![TensorSpec::new("w", Dtype::F32, [3, 4, 2])];
    let checkpoint =
        Checkpoint::from_source("m.gguf", Config::default(), specs, Box::new(Rows)).unwrap();
    let second = checkpoint.rows_as("w", 4..6, DType::F64, &Device::Cpu);
    let second = second.unwrap().to_vec2::<f64>().unwrap();
    assert_eq!(second, [[4.0, -4.0], [5.0, -5.0]]);
    let shared = checkpoint.shared_rows("w", 11..12).unwrap();
    assert_eq!(
        (*shared).as_ref(),
        [11f32, -11.0].map(f32::to_le_bytes).concat()
    );
    assert!(
        checkpoint
            .rows_as("w", 11..13, DType::F64, &Device::Cpu)
            .is_err()
    );
}

#[test]
fn tensors_rows_and_sizes_come_from_the_source() {
    let checkpoint = open();
    let w = checkpoint.tensor_as("w", DType::F64, &Device::Cpu).unwrap();
    assert_eq!(w.to_vec2::<f64>().unwrap(), [[1., 2.], [3., 4.], [5., 6.]]);
    let rows = checkpoint.rows("w", &[2, 0]).unwrap();
    assert_eq!(rows, [5f32, 6., 1., 2.].map(f32::to_le_bytes).concat());
    let missing = checkpoint.rows("w", &[3]).unwrap_err();
    assert!(
        matches!(
            missing,
            Error::UnknownRow {
                row: 3,
                rows: 3,
                ..
            }
        ),
        "{missing}"
    );
    assert_eq!((checkpoint.total_bytes(), checkpoint.parameters()), (5, 6));
    assert_eq!(checkpoint.dir().to_str(), Some("m.gguf"));
    checkpoint.release(["w", "unknown"]);
    let source = checkpoint.source().unwrap().as_any();
    assert_eq!(
        *source.downcast_ref::<Shifted>().unwrap().0.lock().unwrap(),
        ["w"]
    );
}

#[test]
fn a_tensor_cannot_be_declared_twice() {
    let spec = TensorSpec::new("w", Dtype::F32, [3, 2]);
    let source = Box::new(Shifted(Mutex::default()));
    let twice = Checkpoint::from_source("m", Config::default(), vec![spec.clone(), spec], source);
    assert!(matches!(twice, Err(Error::BadDeclaration { .. })));
}

#[test]
fn a_folder_of_files_can_be_written_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open();
    let specs = vec![TensorSpec::new("w", Dtype::F32, [3, 2])];
    let folder = dir.path().join("out");
    let mut writer = CheckpointWriter::create(
        &folder,
        checkpoint.config(),
        specs,
        &WriteOptions::default(),
    )
    .unwrap();
    writer.carry_from(&checkpoint).unwrap();
    writer.copy_tensor("w", &checkpoint).unwrap();
    writer.finish().unwrap();
    let written = Checkpoint::open(&folder).unwrap();
    assert!(written.source().is_none());
    assert_eq!(written.bytes("w").unwrap(), checkpoint.bytes("w").unwrap());
    assert_eq!(
        written.rows("w", &[1]).unwrap(),
        checkpoint.rows("w", &[1]).unwrap()
    );
    assert_eq!(std::fs::read(folder.join("tokenizer.json")).unwrap(), b"{}");
    // The hash is of what is stored.
    assert_ne!(
        written.content_hash().unwrap(),
        checkpoint.content_hash().unwrap()
    );
}

#[test]
fn rows_of_several_matrices_in_one_tensor_are_counted_through() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let values: Vec<f32> = (0..12u8).map(f32::from).collect();
    let tensor = candle_core::Tensor::from_vec(values, (2, 3, 2), &Device::Cpu).unwrap();
    let metadata = std::collections::BTreeMap::new();
    tensor_io::write_file(&path, [("w", &tensor)], &metadata).unwrap();
    let file = Checkpoint::open_file(&path).unwrap();
    let rows = file.rows("w", &[4, 1]).unwrap();
    assert_eq!(rows, [8f32, 9., 2., 3.].map(f32::to_le_bytes).concat());
    let missing = file.rows("w", &[6]).unwrap_err();
    assert!(
        matches!(
            missing,
            Error::UnknownRow {
                row: 6,
                rows: 6,
                ..
            }
        ),
        "{missing}"
    );
}
