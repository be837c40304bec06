//! What a well-formed file says.

use tensor_io::Error;
use tensor_io::gguf::{Array, Gguf, GgufError, Metadata, Value, ValueType};

use crate::builder::{Bytes, File, Key, Tensor};

fn open(file: &File) -> Gguf {
    Gguf::from_bytes("test.gguf", file.bytes()).unwrap()
}

#[test]
fn both_versions_give_tensors_with_the_outermost_dimension_first() {
    for version in [2, 3] {
        let mut file = File {
            version,
            ..File::default()
        };
        file.tensors = vec![
            Tensor(b"m".into(), vec![4, 2], 0, 0),
            Tensor(b"q".into(), vec![32, 1], 2, 32),
        ];
        let gguf = open(&file);
        assert_eq!(gguf.version(), version);
        let info = gguf.info("m").unwrap();
        assert_eq!((&info.shape[..], info.layout.name), (&[2, 4][..], "F32"));
        assert_eq!(gguf.floats("m").unwrap(), [0., 1., 2., 3., 4., 5., 6., 7.]);
        let info = gguf.info("q").unwrap();
        assert_eq!(
            (info.layout.name, info.bytes, info.elements()),
            ("Q4_0", 18, 32)
        );
        assert_eq!(gguf.bytes("q").unwrap(), &file.data[32..50]);
        let wrong = gguf.floats("q").unwrap_err();
        assert!(wrong.to_string().contains("`q`: type Q4_0"), "{wrong}");
        assert!(matches!(gguf.bytes("x"), Err(Error::UnknownTensor { .. })));
        assert!(gguf.expect_shape("m", &[2, 4]).is_ok());
        assert!(matches!(
            gguf.expect_shape("m", &[4, 2]),
            Err(Error::WrongShape { .. })
        ));
        assert_eq!((gguf.parameters(), gguf.total_bytes()), (40, 50));
    }
}

#[test]
fn a_part_of_a_tensor_outlives_the_file_that_it_is_shared_with() {
    let file = File::default();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    for gguf in [Gguf::open(&path).unwrap(), open(&file)] {
        let name = gguf.tensors()[1].name.clone();
        let whole = gguf.bytes(&name).unwrap().to_vec();
        assert!(whole.len() > 8);
        let (part, none) = (
            gguf.shared_bytes(&name, 4..8),
            gguf.shared_bytes(&name, 8..8),
        );
        for beyond in [0..whole.len() + 1, whole.len() + 1..whole.len() + 2] {
            let error = gguf.shared_bytes(&name, beyond).err().unwrap();
            assert!(error.to_string().contains("has no part"), "{error}");
        }
        drop(gguf);
        assert_eq!((*part.unwrap()).as_ref(), &whole[4..8]);
        assert!((*none.unwrap()).as_ref().is_empty());
    }
}

#[test]
fn an_alignment_moves_the_data() {
    let mut file = File {
        alignment: 256,
        ..File::default()
    };
    file.keys.push(Key::u32("general.alignment", 256));
    file.tensors[1].3 = 256;
    file.data.resize(256 + 32, 7);
    let gguf = open(&file);
    assert_eq!(gguf.bytes("b").unwrap(), [7; 32]);
}

#[test]
fn a_file_needs_neither_tensors_nor_padding_behind_the_last() {
    let mut file = File::default();
    file.tensors.clear();
    file.data.clear();
    let mut bytes = file.bytes();
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    assert!(Gguf::from_bytes("t", bytes).unwrap().tensors().is_empty());
    let mut file = File::default();
    file.tensors[1] = Tensor::f32("b", 3, 32);
    file.data.truncate(32 + 12);
    assert_eq!(open(&file).bytes("b").unwrap().len(), 12);
}

#[test]
fn gaps_between_tensors_are_tolerated() {
    let mut file = File::default();
    file.tensors[1].3 = 96;
    file.data.resize(128, 0);
    assert_eq!(open(&file).bytes("b").unwrap(), [0; 32]);
}

#[test]
fn values_come_in_their_types() {
    let mut file = File::default();
    let scalars: [(&str, Value); 12] = [
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-3)),
        ("u16", Value::U16(60_000)),
        ("i16", Value::I16(-5)),
        ("u32", Value::U32(7)),
        ("i32", Value::I32(7)),
        ("f32", Value::F32(1e-5)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("é".into())),
        ("u64", Value::U64(u64::MAX)),
        ("i64", Value::I64(9)),
        ("f64", Value::F64(0.1)),
    ];
    let raw: [(u32, Vec<u8>); 12] = [
        (0, vec![200]),
        (1, vec![253]),
        (2, 60_000u16.to_le_bytes().into()),
        (3, (-5i16).to_le_bytes().into()),
        (4, 7u32.to_le_bytes().into()),
        (5, 7i32.to_le_bytes().into()),
        (6, 1e-5f32.to_le_bytes().into()),
        (7, vec![1]),
        (8, Bytes::default().string("é".as_bytes()).0),
        (10, u64::MAX.to_le_bytes().into()),
        (11, 9i64.to_le_bytes().into()),
        (12, 0.1f64.to_le_bytes().into()),
    ];
    for ((key, _), (ty, value)) in scalars.iter().zip(&raw) {
        file.keys
            .push(Key(key.as_bytes().into(), *ty, value.clone()));
    }
    let strings = Bytes::default()
        .string(b"a")
        .string(b"")
        .string("ß".as_bytes());
    file.keys.push(Key::array("strings", 8, 3, &strings.0));
    file.keys.push(Key::array("bools", 7, 2, &[0, 1]));
    file.keys
        .push(Key::array("sizes", 4, 2, &[1, 0, 0, 0, 2, 0, 0, 0]));
    let gguf = open(&file);
    let metadata = gguf.metadata();
    for (key, value) in &scalars {
        assert_eq!(metadata.get(key).unwrap().as_ref(), Some(value), "{key}");
        assert_eq!(metadata.value_type(key).unwrap().0, value.value_type());
    }
    assert_eq!(metadata.get_u64("u8").unwrap(), Some(200));
    assert_eq!(metadata.get_u64("i64").unwrap(), Some(9));
    assert_eq!(metadata.get_u64("u64").unwrap(), Some(u64::MAX));
    assert_eq!(metadata.get_f64("f32").unwrap(), Some(1e-5));
    assert_eq!(metadata.get_f64("f64").unwrap(), Some(0.1));
    assert_eq!(metadata.get_bool("bool").unwrap(), Some(true));
    assert_eq!(metadata.get_str("string").unwrap(), Some("é"));
    assert_eq!(
        metadata.get_strings("strings").unwrap(),
        Some(vec!["a", "", "ß"])
    );
    assert_eq!(metadata.len_of("strings").unwrap(), Some(3));
    assert_eq!(
        metadata.get("bools").unwrap(),
        Some(Value::Array(Array::Bool(vec![false, true])))
    );
    assert_eq!(
        metadata.value_type("bools").unwrap().1,
        Some(ValueType::Bool)
    );
    assert_eq!(metadata.get_usizes("sizes", 2).unwrap(), Some(vec![1, 2]));
    assert_eq!(metadata.get_usizes("u32", 3).unwrap(), Some(vec![7, 7, 7]));
    assert_eq!(metadata.get_i32s("sizes").unwrap(), Some(vec![1, 2]));
    assert_eq!(metadata.get_str("absent").unwrap(), None);
    assert_eq!(metadata.keys().count(), 16);
    assert!(metadata.contains("bools") && !metadata.contains("bool "));
    assert_eq!(metadata.required("u8", Metadata::get_u64).unwrap(), 200);
}

#[test]
fn a_value_of_another_kind_is_an_error_that_names_the_key() {
    let mut file = File::default();
    file.keys.push(Key::i32("negative", -1));
    file.keys.push(Key::u32("number", 3));
    file.keys.push(Key::string("latin1", &[0xE9]));
    file.keys
        .push(Key(b"nan".into(), 6, f32::NAN.to_le_bytes().into()));
    file.keys.push(Key::array("three", 4, 3, &[0; 12]));
    file.keys.push(Key::array(
        "texts",
        8,
        1,
        &Bytes::default().string(&[0xFF]).0,
    ));
    let gguf = open(&file);
    let metadata = gguf.metadata();
    let faults = [
        metadata.get_u64("negative").unwrap_err(),
        metadata.get_u64("latin1").unwrap_err(),
        metadata.get_f64("number").unwrap_err(),
        metadata.get_f64("nan").unwrap_err(),
        metadata.get_bool("number").unwrap_err(),
        metadata.get_str("latin1").unwrap_err(),
        metadata.get("latin1").unwrap_err(),
        metadata.get_str("number").unwrap_err(),
        metadata.get_usizes("three", 2).unwrap_err(),
        metadata.get_strings("texts").unwrap_err(),
        metadata.get_strings("three").unwrap_err(),
        metadata.get_f32s("three").unwrap_err(),
        metadata.get_i32s("number").unwrap_err(),
        metadata.len_of("number").unwrap_err(),
    ];
    for fault in faults {
        let Error::Gguf { file, source } = &fault else {
            panic!("{fault}");
        };
        assert_eq!(file.to_str(), Some("test.gguf"));
        assert!(matches!(source, GgufError::Value { .. }), "{source}");
    }
    let missing = metadata.required("x", Metadata::get_u64).unwrap_err();
    assert_eq!(
        missing.to_string(),
        "test.gguf: metadata key `x` is missing"
    );
    let length = metadata.get_usizes("three", 2).unwrap_err().to_string();
    assert!(
        length.contains("a list of 2") && length.contains("a list of 3 u32"),
        "{length}"
    );
}

#[test]
fn values_that_are_not_finite_are_found_when_floats_are_read() {
    let mut file = File::default();
    file.data[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = open(&file).floats("b").unwrap_err();
    assert!(
        matches!(error, Error::NonFinite { element: 2, .. }),
        "{error}"
    );
}
