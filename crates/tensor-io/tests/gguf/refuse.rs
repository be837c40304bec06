//! Every refusal of a malformed file.

use tensor_io::Error;
use tensor_io::gguf::{Gguf, GgufError};

use crate::builder::{Bytes, File, Key, Tensor};

fn refusal(bytes: Vec<u8>) -> GgufError {
    match Gguf::from_bytes("test.gguf", bytes) {
        Err(Error::Gguf { file, source }) => {
            assert_eq!(file.to_str(), Some("test.gguf"));
            source
        }
        other => panic!("expected a refusal, found {other:?}"),
    }
}

/// The refusal of the well-formed file after a change.
fn changed(change: impl FnOnce(&mut File)) -> GgufError {
    let mut file = File::default();
    change(&mut file);
    refusal(file.bytes())
}

macro_rules! assert_refused {
    ($error:expr, $pattern:pat $(if $guard:expr)?) => {
        let error = $error;
        assert!(matches!(&error, $pattern $(if $guard)?), "{error}");
    };
}

#[test]
fn what_is_not_gguf() {
    assert_refused!(refusal(vec![]), GgufError::TooShort { found: 0 });
    assert_refused!(
        refusal(b"GGUF\x03\0\0".into()),
        GgufError::TooShort { found: 7 }
    );
    let error = changed(|file| file.magic = *b"PK\x03\x04");
    assert_refused!(&error, GgufError::Magic { .. });
    assert!(error.to_string().contains(r"PK\x03\x04"), "{error}");
}

#[test]
fn versions_that_are_not_read() {
    for version in [0, 1, 4, 1000] {
        let error = changed(|file| file.version = version);
        assert_refused!(error, GgufError::Version { found } if *found == version);
    }
    for version in [2u32, 3] {
        let error = changed(|file| file.version = version.swap_bytes());
        assert_refused!(error, GgufError::BigEndian);
    }
}

#[test]
fn counts_larger_than_the_rest_of_the_file_could_hold() {
    for count in [1 << 20, u64::MAX] {
        let error = changed(|file| file.tensor_count = Some(count));
        assert_refused!(
            error,
            GgufError::Count {
                what: "tensors",
                ..
            }
        );
        let error = changed(|file| file.key_count = Some(count));
        assert_refused!(
            error,
            GgufError::Count {
                what: "metadata keys",
                ..
            }
        );
    }
    let mut header = File::default();
    header.tensors.clear();
    header.keys.clear();
    header.tensor_count = Some(1);
    header.alignment = 1;
    header.data = vec![0; 32];
    assert_refused!(
        refusal(header.bytes()),
        GgufError::Count {
            count: 1,
            left: 32,
            ..
        }
    );
}

#[test]
fn lengths_beyond_the_end() {
    let long = |length: u64| Bytes::default().u64(length).raw(b"abc").0;
    for length in [4096, u64::MAX] {
        let error = changed(|file| file.keys = vec![Key(b"k".into(), 8, long(length))]);
        assert_refused!(&error, GgufError::Ended { needed, .. } if *needed == length);
        assert!(error.to_string().contains("`k`"), "{error}");
        let error = changed(|file| file.keys = vec![Key::array("k", 4, length, &[])]);
        assert_refused!(
            error,
            GgufError::Ended { .. } | GgufError::ArrayOverflow { .. }
        );
        let error = changed(|file| file.keys = vec![Key::array("k", 8, length, &[])]);
        assert_refused!(error, GgufError::Ended { .. });
    }
    // A key, and a name, whose length is beyond the end.
    let mut bytes = File::default().bytes();
    bytes[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_refused!(
        refusal(bytes),
        GgufError::Ended {
            needed: u64::MAX,
            ..
        }
    );
    let mut file = File::default();
    file.keys.clear();
    let mut bytes = file.bytes();
    bytes[24..32].copy_from_slice(&(1u64 << 40).to_le_bytes());
    let error = refusal(bytes);
    assert_refused!(&error, GgufError::Ended { .. });
    assert!(error.to_string().contains("tensor number 0"), "{error}");
}

#[test]
fn keys_that_are_none() {
    let key = |key: Vec<u8>| changed(|file| file.keys[0].0 = key);
    assert_refused!(key(vec![]), GgufError::BadKey { index: 0, .. });
    assert_refused!(key(vec![b'k'; 65_536]), GgufError::BadKey { index: 0, .. });
    assert_refused!(key(vec![0xFF, 0xFE]), GgufError::BadKey { index: 0, .. });
    let twice = changed(|file| {
        file.keys = vec![Key::u32("b", 1), Key::u32("a", 1), Key::u32("b", 2)];
    });
    assert_refused!(twice, GgufError::DuplicateKey { key } if key == "b");
}

#[test]
fn the_longest_key_is_accepted() {
    let file = File {
        keys: vec![Key(vec![b'k'; 65_535], 7, vec![1])],
        ..File::default()
    };
    Gguf::from_bytes("t", file.bytes()).unwrap();
}

#[test]
fn values_that_are_none() {
    let value =
        |ty, bytes: &[u8]| changed(|file| file.keys = vec![Key(b"k".into(), ty, bytes.into())]);
    for id in [13, 255, u32::MAX] {
        assert_refused!(value(id, &[0; 8]), GgufError::UnknownValueType { key, id: found } if key == "k" && *found == id);
    }
    let element = |id: u32, count: u64, bytes: &[u8]| {
        changed(|file| file.keys = vec![Key::array("k", id, count, bytes)])
    };
    assert_refused!(
        element(13, 1, &[0; 8]),
        GgufError::UnknownValueType { id: 13, .. }
    );
    assert_refused!(element(9, 1, &[0; 12]), GgufError::NestedArray { key } if key == "k");
    assert_refused!(
        element(10, u64::MAX / 4, &[0; 8]),
        GgufError::ArrayOverflow { .. }
    );
    assert_refused!(value(7, &[2]), GgufError::BadBool { found: 2, .. });
    assert_refused!(
        element(7, 3, &[0, 1, 7]),
        GgufError::BadBool { found: 7, .. }
    );
}

#[test]
fn alignments_that_are_none() {
    for alignment in [0, 3, 48, 1 << 21, 1 << 30] {
        let error = changed(|file| file.keys.push(Key::u32("general.alignment", alignment)));
        assert_refused!(error, GgufError::Alignment { .. });
    }
    let of_type = |key| changed(|file| file.keys.push(key));
    let wide = Key(b"general.alignment".into(), 10, 32u64.to_le_bytes().into());
    assert_refused!(of_type(wide), GgufError::Alignment { .. });
    assert_refused!(
        of_type(Key::string("general.alignment", b"32")),
        GgufError::Alignment { .. }
    );
    let list = Key::array("general.alignment", 4, 1, &[32, 0, 0, 0]);
    assert_refused!(of_type(list), GgufError::Alignment { .. });
}

#[test]
fn names_that_are_none() {
    let name = |name: Vec<u8>| changed(|file| file.tensors[1].0 = name);
    assert_refused!(name(vec![]), GgufError::BadName { index: 1, .. });
    assert_refused!(name(vec![b'n'; 64]), GgufError::BadName { index: 1, .. });
    assert_refused!(name(vec![0xC0]), GgufError::BadName { index: 1, .. });
    assert_refused!(name(b"a".into()), GgufError::DuplicateTensor { tensor } if tensor == "a");
    let mut file = File::default();
    file.tensors[1].0 = vec![b'n'; 63];
    Gguf::from_bytes("t", file.bytes()).unwrap();
}

#[test]
fn dimensions_that_are_none() {
    let dims = |dims: &[u64]| changed(|file| file.tensors[0].1 = dims.into());
    assert_refused!(dims(&[]), GgufError::Dimensions { found: 0, .. });
    assert_refused!(
        dims(&[1, 1, 1, 1, 8]),
        GgufError::Dimensions { found: 5, .. }
    );
    for zero in [&[0][..], &[8, 0], &[0, u64::MAX]] {
        assert_refused!(dims(zero), GgufError::Shape { tensor, .. } if tensor == "a");
    }
    for huge in [
        &[u64::MAX][..],
        &[1 << 32, 1 << 32],
        &[1 << 62, 1],
        &[1 << 20, 1 << 20, 1 << 20, 1 << 20],
    ] {
        let error = dims(huge);
        assert_refused!(&error, GgufError::Shape { .. });
        assert!(error.to_string().contains("overflows"), "{error}");
    }
}

#[test]
fn types_that_no_file_holds() {
    let ty = |id| changed(|file| file.tensors[0].2 = id);
    for (ids, reason) in [
        (&[42, 200, u32::MAX][..], "unknown"),
        (&[4, 5, 31, 32, 33, 36, 37, 38], "removed"),
        (&[9, 15], "activations"),
    ] {
        for &id in ids {
            let error = ty(id);
            assert_refused!(&error, GgufError::Type { tensor, id: found, .. } if tensor == "a" && *found == id);
            assert!(error.to_string().contains(reason), "{error}");
        }
    }
}

#[test]
fn rows_that_are_no_whole_blocks() {
    for (id, block) in [(2, 32), (8, 32), (12, 256), (14, 256)] {
        let error =
            changed(|file| file.tensors[0] = Tensor(b"a".into(), vec![block - 8, 4], id, 0));
        assert_refused!(error, GgufError::PartialBlock { width, .. } if *width == block - 8);
    }
}

#[test]
fn offsets_that_are_wrong() {
    let error = changed(|file| file.tensors[1].3 = 33);
    assert_refused!(error, GgufError::Misaligned { tensor, offset: 33, alignment: 32 } if tensor == "b");
    let error = changed(|file| file.tensors[0].1 = vec![9]);
    assert_refused!(error, GgufError::Overlap { tensor, start: 32, other, other_end: 36 } if tensor == "b" && other == "a");
    let error = changed(|file| file.tensors[1].3 = 0);
    assert_refused!(error, GgufError::Overlap { .. });
    let error = changed(|file| file.tensors[1].3 = 64);
    assert_refused!(error, GgufError::Truncated { tensor, missing: 32 } if tensor == "b");
    let error = changed(|file| file.tensors[1].3 = u64::MAX - 31);
    assert_refused!(error, GgufError::Truncated { tensor, .. } if tensor == "b");
}

#[test]
fn data_shorter_than_a_tensor_names_the_first_such_tensor_and_the_missing_bytes() {
    let error = changed(|file| file.data.truncate(32 + 20));
    assert_refused!(&error, GgufError::Truncated { tensor, missing: 12 } if tensor == "b");
    assert!(error.to_string().contains("truncated download"), "{error}");
    let error = changed(|file| file.data.truncate(5));
    assert_refused!(error, GgufError::Truncated { tensor, missing: 27 } if tensor == "a");
}
