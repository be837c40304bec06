//! What the writer writes, the reader reads, and the writer refuses what the reader would.

use std::fs;

use proptest::prelude::*;
use tensor_io::Error;
use tensor_io::gguf::{Array, BlockLayout, Gguf, GgufError, TensorSpec, Value, Writer};

use crate::builder::File;

fn layout(name: &str) -> BlockLayout {
    BlockLayout::named(name).unwrap()
}

fn text(key: &str, value: impl Into<Value>) -> (String, Value) {
    (key.to_string(), value.into())
}

#[test]
fn a_file_has_the_bytes_of_the_format() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let specs = [
        TensorSpec::new("a", layout("F32"), [8]),
        TensorSpec::new("b", layout("F32"), [8]),
    ];
    let metadata = [text("general.architecture", "llama")];
    let mut writer = Writer::create(&path, &metadata, &specs).unwrap();
    let file = File::default();
    writer.write("a", &file.data[..32]).unwrap();
    writer.write("b", &file.data[32..50]).unwrap();
    assert!(!path.exists());
    writer.write("b", &file.data[50..]).unwrap();
    assert_eq!(writer.finish().unwrap(), file.bytes().len() as u64);
    assert_eq!(fs::read(&path).unwrap(), file.bytes());
}

#[test]
fn tensors_are_padded_to_the_alignment_that_the_metadata_state() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let specs = [
        TensorSpec::new("a", layout("Q4_0"), [1, 32]),
        TensorSpec::new("b", layout("F16"), [3]),
    ];
    let metadata = [text("general.alignment", 64u32)];
    let mut writer = Writer::create(&path, &metadata, &specs).unwrap();
    writer.write("a", &[1; 18]).unwrap();
    writer.write("b", &[2; 6]).unwrap();
    assert_eq!(writer.finish().unwrap() % 64, 0);
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.info("a").unwrap().shape, [1, 32]);
    assert_eq!(gguf.bytes("a").unwrap(), [1; 18]);
    assert_eq!(gguf.bytes("b").unwrap(), [2; 6]);
    gguf.release(["a", "b", "no such tensor"]);
    assert_eq!(gguf.bytes("a").unwrap(), [1; 18]);
}

#[test]
fn a_writer_keeps_to_its_declarations_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    fs::write(&path, b"old").unwrap();
    let specs = [
        TensorSpec::new("a", layout("F32"), [2]),
        TensorSpec::new("b", layout("F32"), [2]),
    ];
    let mut writer = Writer::create(&path, &[], &specs).unwrap();
    assert!(
        matches!(writer.write("b", &[0; 8]), Err(Error::OutOfOrder { expected, .. }) if expected == "a")
    );
    let long = writer.write("a", &[0; 12]);
    assert!(matches!(
        long,
        Err(Error::WrongLength {
            expected: 8,
            found: 12,
            ..
        })
    ));
    writer.write("a", &[0; 4]).unwrap();
    let missing = writer.finish().unwrap_err();
    assert!(
        matches!(&missing, Error::NotWritten { tensors, .. } if tensors == &["a", "b"]),
        "{missing}"
    );
    let mut writer = Writer::create(&path, &[], &specs[..1]).unwrap();
    writer.write("a", &[0; 8]).unwrap();
    assert!(matches!(
        writer.write("a", &[0; 8]),
        Err(Error::NotDeclared { .. })
    ));
    drop(writer);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_file_that_does_not_read_back_as_it_was_written_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let specs = [
        TensorSpec::new("a", layout("F32"), [8]),
        TensorSpec::new("b", layout("F32"), [8]),
        TensorSpec::new("c", layout("Q4_0"), [1, 32]),
    ];
    for (damaged, tensor) in [(0, Some("a")), (32, None), (64, Some("c"))] {
        fs::write(&path, b"old").unwrap();
        let mut writer = Writer::create(&path, &[], &specs).unwrap();
        writer.write("a", &[1; 32]).unwrap();
        writer.write("b", &[2; 32]).unwrap();
        writer.write("c", &[3; 18]).unwrap();
        // The data are the last bytes of the unfinished file, each tensor at a multiple of 32.
        let mut entries = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let partial = entries.find(|entry| *entry != path).unwrap();
        let mut bytes = fs::read(&partial).unwrap();
        let data = bytes.len() - 96;
        bytes[data + damaged] ^= 1;
        fs::write(&partial, bytes).unwrap();
        let finished = writer.finish();
        match tensor {
            Some(expected) => {
                assert!(
                    matches!(&finished, Err(Error::ReadBack { tensor, .. }) if tensor == expected),
                    "{finished:?}"
                );
                assert_eq!(fs::read(&path).unwrap(), b"old");
            }
            // The second tensor of a type is not compared.
            None => assert!(finished.is_ok()),
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

#[test]
fn what_the_reader_refuses_cannot_be_declared() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |metadata: &[(String, Value)], specs: &[TensorSpec]| match Writer::create(
        dir.path().join("m.gguf"),
        metadata,
        specs,
    ) {
        Err(Error::Gguf { source, .. }) => source,
        other => panic!("expected a refusal, found {other:?}"),
    };
    let f32s = |name: &str, shape: &[usize]| TensorSpec::new(name, layout("F32"), shape);
    for (metadata, expected) in [
        (vec![text("", 1u32)], "BadKey"),
        (vec![text(&"k".repeat(65_536), 1u32)], "BadKey"),
        (vec![text("k", 1u32), text("k", 2u32)], "DuplicateKey"),
        (vec![text("general.alignment", 24u32)], "Alignment"),
        (vec![text("general.alignment", 32u64)], "Alignment"),
    ] {
        let error = refused(&metadata, &[]);
        assert!(format!("{error:?}").starts_with(expected), "{error:?}");
    }
    for (specs, expected) in [
        (vec![f32s("", &[1])], "BadName"),
        (vec![f32s(&"n".repeat(64), &[1])], "BadName"),
        (
            vec![f32s("a", &[1]), f32s("b", &[1]), f32s("a", &[1])],
            "DuplicateTensor",
        ),
        (vec![f32s("a", &[])], "Dimensions"),
        (vec![f32s("a", &[1, 1, 1, 1, 1])], "Dimensions"),
        (vec![f32s("a", &[2, 0])], "Shape"),
        (vec![f32s("a", &[1 << 40, 1 << 40])], "Shape"),
        (
            vec![
                f32s("a", &[1 << 60]),
                f32s("b", &[1 << 60]),
                f32s("c", &[1 << 60]),
                f32s("d", &[1 << 60]),
            ],
            "Shape",
        ),
        (
            vec![TensorSpec::new("a", layout("Q4_K"), [2, 128])],
            "PartialBlock",
        ),
    ] {
        let error = refused(&[], &specs);
        assert!(format!("{error:?}").starts_with(expected), "{error:?}");
        assert!(!matches!(error, GgufError::Content(_)));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

fn value() -> impl Strategy<Value = Value> {
    let strings = prop::collection::vec(".{0,8}", 0..6);
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i16>().prop_map(Value::I16),
        any::<u64>().prop_map(Value::U64),
        any::<f32>()
            .prop_filter("equal to itself", |x| !x.is_nan())
            .prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        ".{0,40}".prop_map(Value::String),
        strings.prop_map(|list| Value::Array(Array::String(list))),
        prop::collection::vec(any::<i32>(), 0..9).prop_map(|list| Value::Array(Array::I32(list))),
        prop::collection::vec(any::<bool>(), 0..9).prop_map(|list| Value::Array(Array::Bool(list))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read_back(
        values in prop::collection::vec(value(), 0..12),
        sizes in prop::collection::vec((1usize..4, 1usize..4, 0usize..3), 0..6),
        alignment in 0u32..8,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let mut metadata: Vec<(String, Value)> =
            values.into_iter().enumerate().map(|(i, value)| (format!("key.{i}"), value)).collect();
        metadata.push(text("general.alignment", 1u32 << alignment));
        let specs: Vec<TensorSpec> = sizes
            .iter()
            .enumerate()
            .map(|(i, &(rows, blocks, kind))| {
                let layout = [layout("F32"), layout("Q5_1"), layout("Q2_K")][kind];
                TensorSpec::new(format!("t{i}"), layout, [rows, blocks * layout.values])
            })
            .collect();
        let mut writer = Writer::create(&path, &metadata, &specs).unwrap();
        let data = |i: usize, spec: &TensorSpec| -> Vec<u8> {
            let bytes = spec.shape[0] * spec.layout.row_bytes(spec.shape[1]).unwrap();
            (0..bytes).map(|at| (at * 31 + i * 7) as u8).collect()
        };
        for (i, spec) in specs.iter().enumerate() {
            for piece in data(i, spec).chunks(97) {
                writer.write(&spec.name, piece).unwrap();
            }
        }
        writer.finish().unwrap();
        let gguf = Gguf::open(&path).unwrap();
        prop_assert_eq!(gguf.version(), 3);
        let read: Vec<(String, Value)> = gguf
            .metadata()
            .keys()
            .map(|key| (key.to_string(), gguf.metadata().get(key).unwrap().unwrap()))
            .collect();
        prop_assert_eq!(read, metadata);
        prop_assert_eq!(gguf.tensors().len(), specs.len());
        for (i, (info, spec)) in gguf.tensors().iter().zip(&specs).enumerate() {
            prop_assert_eq!((&info.name, &info.shape, info.layout), (&spec.name, &spec.shape, spec.layout));
            prop_assert_eq!(gguf.bytes(&spec.name).unwrap(), data(i, spec));
        }
    }
}
