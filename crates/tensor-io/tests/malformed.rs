//! Malformed checkpoints: each an error that names file and tensor, none a panic.

mod common;

use std::fs;
use std::path::Path;

use candle_core::{DType, Device};
use tensor_io::{
    Checkpoint, Config, Dtype, Error, Header, HeaderError, Index, IndexError, MAX_HEADER_BYTES,
};

use common::{f32_bytes, folder, safetensors, vectors};

fn header_error(file: &[u8]) -> HeaderError {
    Header::parse(file).expect_err("malformed")
}

/// Two f32 tensors of four elements: 32 bytes of data.
const TWO: &str = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[2,2],"data_offsets":[16,32]}}"#;

#[test]
fn a_well_formed_file_is_read() {
    let header = Header::parse(&safetensors(TWO, &[0; 32])).unwrap();
    assert_eq!(header.entries.len(), 2);
    assert_eq!((header.entries[1].start, header.entries[1].end), (16, 32));
    assert_eq!(header.entries[1].shape, [2, 2]);
}

#[test]
fn an_empty_or_tiny_file_is_too_short() {
    assert!(matches!(
        header_error(b""),
        HeaderError::TooShort { found: 0 }
    ));
    assert!(matches!(
        header_error(b"1234567"),
        HeaderError::TooShort { found: 7 }
    ));
}

#[test]
fn a_header_beyond_the_file_is_refused() {
    let mut file = safetensors(TWO, &[]);
    file.truncate(40);
    assert!(matches!(
        header_error(&file),
        HeaderError::BeyondFile { file_bytes: 40, .. }
    ));
}

#[test]
fn a_header_over_the_limit_is_refused_without_reading_it() {
    for length in [MAX_HEADER_BYTES + 1, u64::MAX] {
        let file = [&length.to_le_bytes()[..], b"{}"].concat();
        assert!(
            matches!(header_error(&file), HeaderError::TooLarge { length: found } if found == length)
        );
    }
    let at_limit = [&MAX_HEADER_BYTES.to_le_bytes()[..], b"{}"].concat();
    assert!(matches!(
        header_error(&at_limit),
        HeaderError::BeyondFile { .. }
    ));
}

#[test]
fn text_that_is_no_header_is_refused() {
    let mut not_utf8 = safetensors("{\"aa\":1}", &[]);
    not_utf8[10] = 0xFF;
    assert!(matches!(header_error(&not_utf8), HeaderError::NotUtf8(_)));
    for text in [
        "",
        "{",
        "[]",
        "null",
        "{} {}",
        r#"{"a":1}"#,
        r#"{"a":{"dtype":"F32","shape":[1]}}"#,
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}"#,
        r#"{"__metadata__":{"a":1}}"#,
        r#"{"__metadata__":{},"__metadata__":{}}"#,
    ] {
        assert!(
            matches!(
                header_error(&safetensors(text, &[0; 4])),
                HeaderError::Json(_)
            ),
            "{text}"
        );
    }
    let nested = safetensors(&"[".repeat(1 << 20), &[]);
    assert!(matches!(header_error(&nested), HeaderError::Json(_)));
}

#[test]
fn a_fault_in_one_entry_names_the_tensor() {
    let text = r#"{"layer.7.weight":{"dtype":"F32","shape":"x","data_offsets":[0,4]}}"#;
    assert!(
        header_error(&safetensors(text, &[0; 4]))
            .to_string()
            .contains("`layer.7.weight`")
    );
}

#[test]
fn a_truncated_file_names_the_tensor_that_is_cut() {
    let error = header_error(&safetensors(TWO, &[0; 31]));
    assert!(
        matches!(&error, HeaderError::Truncated { tensor, end: 32, data_bytes: 31 } if tensor == "b"),
        "{error}"
    );
}

#[test]
fn bytes_of_no_tensor_are_refused() {
    assert!(matches!(
        header_error(&safetensors(TWO, &[0; 33])),
        HeaderError::Trailing { extra: 1 }
    ));
    let hole = TWO.replace("[16,32]", "[20,36]");
    assert!(matches!(
        header_error(&safetensors(&hole, &[0; 36])),
        HeaderError::Hole { tensor, from: 16, to: 20 } if tensor == "b"
    ));
    let front = TWO
        .replace("[0,16]", "[4,20]")
        .replace("[16,32]", "[20,36]");
    assert!(matches!(
        header_error(&safetensors(&front, &[0; 36])),
        HeaderError::Hole { tensor, from: 0, to: 4 } if tensor == "a"
    ));
}

#[test]
fn overlapping_tensors_are_refused() {
    let overlap = TWO.replace("[16,32]", "[12,28]");
    assert!(matches!(
        header_error(&safetensors(&overlap, &[0; 32])),
        HeaderError::Overlap { tensor, start: 12, other, other_end: 16 } if tensor == "b" && other == "a"
    ));
    let same = TWO.replace("[16,32]", "[0,16]");
    assert!(matches!(
        header_error(&safetensors(&same, &[0; 16])),
        HeaderError::Overlap { .. }
    ));
}

#[test]
fn offsets_out_of_range_are_refused() {
    let far = TWO.replace("[16,32]", "[1000,1016]");
    assert!(matches!(
        header_error(&safetensors(&far, &[0; 32])),
        HeaderError::Truncated { tensor, end: 1016, .. } if tensor == "b"
    ));
    let huge = TWO.replace("[16,32]", "[18446744073709551599,18446744073709551615]");
    assert!(matches!(
        header_error(&safetensors(&huge, &[0; 32])),
        HeaderError::Truncated { .. }
    ));
    let backwards = TWO.replace("[16,32]", "[32,16]");
    assert!(matches!(
        header_error(&safetensors(&backwards, &[0; 32])),
        HeaderError::Backwards { tensor, start: 32, end: 16 } if tensor == "b"
    ));
}

#[test]
fn offsets_that_do_not_fit_the_shape_are_refused() {
    for (from, to) in [("[2,2]", "[2,3]"), ("[2,2]", "[]"), ("\"F32\"", "\"F64\"")] {
        let text = TWO.replace(from, to);
        assert!(
            matches!(
                header_error(&safetensors(&text, &[0; 32])),
                HeaderError::SizeMismatch { .. }
            ),
            "{text}"
        );
    }
}

#[test]
fn overflowing_shapes_are_refused() {
    for shape in [
        "[18446744073709551615,2]",
        "[9223372036854775807]",
        "[4294967296,4294967296,0]",
    ] {
        let text = TWO.replace("[2,2]", shape);
        assert!(
            matches!(header_error(&safetensors(&text, &[0; 32])), HeaderError::Overflow { tensor, .. } if tensor == "b"),
            "{shape}"
        );
    }
}

#[test]
fn elements_below_a_byte_must_fill_bytes() {
    let odd = r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#;
    assert!(matches!(
        header_error(&safetensors(odd, &[0; 2])),
        HeaderError::PartialByte { .. }
    ));
    let even = r#"{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}"#;
    assert!(Header::parse(&safetensors(even, &[0; 2])).is_ok());
}

#[test]
fn a_tensor_twice_in_one_header_is_refused() {
    let twice = TWO.replace("\"b\"", "\"a\"");
    let file = safetensors(&twice, &[0; 32]);
    assert!(matches!(header_error(&file), HeaderError::Duplicate { tensor } if tensor == "a"));
    let escaped = TWO.replace("\"b\"", "\"\\u0061\"");
    assert!(matches!(
        header_error(&safetensors(&escaped, &[0; 32])),
        HeaderError::Duplicate { .. }
    ));
}

#[test]
fn an_unknown_dtype_is_refused_by_name() {
    let text = TWO.replacen("F32", "Q4_0", 1);
    assert!(matches!(
        header_error(&safetensors(&text, &[0; 32])),
        HeaderError::UnknownDtype { tensor, dtype } if tensor == "a" && dtype == "Q4_0"
    ));
}

#[test]
fn empty_tensors_and_scalars_are_fine() {
    let text = r#"{"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"e":{"dtype":"F32","shape":[0,5],"data_offsets":[0,0]},"f":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}"#;
    let dir = tempfile::tempdir().unwrap();
    folder(
        dir.path(),
        &[("x.safetensors", &safetensors(text, &1f32.to_le_bytes()))],
    );
    let file = Checkpoint::open_file(dir.path().join("x.safetensors")).unwrap();
    assert_eq!(
        file.tensor("s", &Device::Cpu)
            .unwrap()
            .to_scalar::<f32>()
            .unwrap(),
        1.0
    );
    assert_eq!(file.tensor("e", &Device::Cpu).unwrap().dims(), [0, 5]);
    assert_eq!(file.parameters(), 1);
    file.release(["s", "e", "f", "unknown"]);
    assert_eq!(&file.bytes("s").unwrap()[..], 1f32.to_le_bytes());
}

const INDEX: &str = r#"{"metadata":{"total_size":12},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

fn open_sharded(
    index: &str,
    first: Option<&[u8]>,
    second: Option<&[u8]>,
) -> Result<Checkpoint, Error> {
    let dir = tempfile::tempdir().unwrap();
    folder(
        dir.path(),
        &[
            ("config.json", b"{}"),
            ("model.safetensors.index.json", index.as_bytes()),
        ],
    );
    for (name, contents) in [(FIRST, first), (SECOND, second)] {
        if let Some(contents) = contents {
            folder(dir.path(), &[(name, contents)]);
        }
    }
    Checkpoint::open(dir.path())
}

#[test]
fn shards_that_agree_with_their_index_open() {
    let (first, second) = (vectors(&[("a", &[1.0])]), vectors(&[("b", &[2.0, 3.0])]));
    let checkpoint = open_sharded(INDEX, Some(&first), Some(&second)).unwrap();
    assert!(checkpoint.names().eq(["a", "b"]));
    assert_eq!(checkpoint.info("b").unwrap().shard, 1);
    assert_eq!((checkpoint.parameters(), checkpoint.total_bytes()), (3, 12));
}

#[test]
fn a_missing_shard_is_named() {
    let first = vectors(&[("a", &[1.0])]);
    let error = open_sharded(INDEX, Some(&first), None).unwrap_err();
    assert!(
        matches!(error, Error::MissingShard { index, shard } if shard == SECOND && index.ends_with("model.safetensors.index.json"))
    );
}

#[test]
fn a_tensor_that_its_shard_lacks_is_named() {
    let (first, second) = (vectors(&[("a", &[1.0])]), vectors(&[]));
    let error = open_sharded(INDEX, Some(&first), Some(&second)).unwrap_err();
    assert!(
        matches!(error, Error::NotInShard { tensor, shard, .. } if tensor == "b" && shard == SECOND)
    );
}

#[test]
fn a_tensor_that_the_index_does_not_list_is_named() {
    let (first, second) = (
        vectors(&[("a", &[1.0]), ("c", &[1.0])]),
        vectors(&[("b", &[2.0])]),
    );
    let error = open_sharded(INDEX, Some(&first), Some(&second)).unwrap_err();
    assert!(
        matches!(error, Error::NotInIndex { tensor, shard, .. } if tensor == "c" && shard.ends_with(FIRST))
    );
}

#[test]
fn a_tensor_in_another_shard_than_indexed_is_named() {
    let (first, second) = (vectors(&[("a", &[1.0]), ("b", &[2.0])]), vectors(&[]));
    let error = open_sharded(INDEX, Some(&first), Some(&second)).unwrap_err();
    assert!(matches!(
        error,
        Error::Misplaced { tensor, shard, indexed, .. } if tensor == "b" && shard.ends_with(FIRST) && indexed == SECOND
    ));
}

#[test]
fn a_tensor_in_two_shards_is_named() {
    let (first, second) = (
        vectors(&[("a", &[1.0])]),
        vectors(&[("b", &[2.0]), ("a", &[1.0])]),
    );
    let error = open_sharded(INDEX, Some(&first), Some(&second)).unwrap_err();
    assert!(matches!(
        error,
        Error::DuplicateTensor { tensor, first, second } if tensor == "a" && first.ends_with(FIRST) && second.ends_with(SECOND)
    ));
}

#[test]
fn a_malformed_shard_is_named() {
    let (first, second) = (vectors(&[("a", &[1.0])]), vectors(&[("b", &[2.0])]));
    let error = open_sharded(INDEX, Some(&first), Some(&second[..second.len() - 1])).unwrap_err();
    assert!(matches!(
        &error,
        Error::Header { file, source: HeaderError::Truncated { tensor, .. } } if tensor == "b" && file.ends_with(SECOND)
    ));
    assert!(error.to_string().contains(SECOND));
    let error = open_sharded(INDEX, Some(&first), Some(b"")).unwrap_err();
    assert!(matches!(
        error,
        Error::Header {
            source: HeaderError::TooShort { found: 0 },
            ..
        }
    ));
}

#[test]
fn an_index_that_is_no_index_is_refused() {
    for text in [
        "",
        "[]",
        "{}",
        r#"{"weight_map":[]}"#,
        r#"[{"a":"x"}]"#,
        r#"{"weight_map":{"a":1}}"#,
        r#"{"weight_map":{"a":"x","a":"x"}}"#,
        r#"{"weight_map":{},"weight_map":{}}"#,
    ] {
        assert!(
            matches!(Index::parse(text.as_bytes()), Err(IndexError::Json(_))),
            "{text}"
        );
    }
    for bytes in [
        &b"{\"weight_map\":{\"\xFF\":\"x\"}}"[..],
        b"{\"metadata\":{\"\xFF\":1},\"weight_map\":{}}",
    ] {
        assert!(matches!(Index::parse(bytes), Err(IndexError::NotUtf8(_))));
    }
    let error = open_sharded("{", None, None).unwrap_err();
    assert!(
        matches!(error, Error::Index { file, .. } if file.ends_with("model.safetensors.index.json"))
    );
    let error = Index::parse(br#"{"weight_map":{"w.7":"x","w.7":"x"}}"#).unwrap_err();
    assert!(error.to_string().contains("`w.7`"));
}

#[test]
fn an_index_cannot_lead_out_of_the_folder() {
    for name in [
        "../x.safetensors",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "a\\\\b",
        "c:x",
        "x/",
        "./x",
        "a\\u0000b",
    ] {
        let text = format!(r#"{{"weight_map":{{"w":"{name}"}}}}"#);
        assert!(
            matches!(Index::parse(text.as_bytes()), Err(IndexError::UnsafeName { tensor, .. }) if tensor == "w"),
            "{name}"
        );
    }
}

fn open_folder(files: &[(&str, &[u8])]) -> Result<Checkpoint, Error> {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path(), files);
    Checkpoint::open(dir.path())
}

#[test]
fn what_is_no_checkpoint_folder_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let absent = Checkpoint::open(dir.path().join("nowhere")).unwrap_err();
    assert!(matches!(&absent, Error::Io { path, .. } if path.ends_with("nowhere")));

    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(
        Checkpoint::open(&file),
        Err(Error::NotAFolder { .. })
    ));

    assert!(matches!(open_folder(&[]), Err(Error::MissingConfig { .. })));
    assert!(matches!(
        open_folder(&[("config.json", b"{}")]),
        Err(Error::NoWeights { .. })
    ));
    assert!(matches!(
        open_folder(&[("config.json", b"{,")]),
        Err(Error::ConfigJson { .. })
    ));
    assert!(matches!(
        open_folder(&[("config.json", b"\xFF")]),
        Err(Error::ConfigJson { .. })
    ));
    assert!(matches!(
        open_folder(&[("config.json", b"[1]")]),
        Err(Error::ConfigNotObject {
            found: "an array",
            ..
        })
    ));

    let weights = dir.path().join("model.safetensors");
    fs::create_dir(&weights).unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert!(matches!(Checkpoint::open(dir.path()), Err(Error::Io { path, .. }) if path == weights));
}

#[cfg(unix)]
#[test]
fn a_file_without_permission_is_an_error_with_its_name() {
    use std::io::ErrorKind;
    use std::os::unix::fs::{PermissionsExt, chown};
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    const AS_NOBODY: &str = "TENSOR_IO_TEST_UNREADABLE";
    let check = |dir: &Path| {
        let error = Checkpoint::open(dir).unwrap_err();
        assert!(matches!(
            error,
            Error::Io { path, source, .. }
                if path.ends_with("model.safetensors") && source.kind() == ErrorKind::PermissionDenied
        ));
    };
    if let Some(dir) = std::env::var_os(AS_NOBODY) {
        return check(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    folder(
        dir.path(),
        &[
            ("config.json", b"{}"),
            ("model.safetensors", &vectors(&[("a", &[1.0])])),
        ],
    );
    let weights = dir.path().join("model.safetensors");
    fs::set_permissions(&weights, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::File::open(&weights).is_err() {
        return check(dir.path());
    }
    // This user may read everything: ask again as one who may not.
    const NOBODY: u32 = 65_534;
    chown(dir.path(), Some(NOBODY), None).unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_file_without_permission_is_an_error_with_its_name",
        ])
        .env(AS_NOBODY, dir.path())
        .uid(NOBODY)
        .output();
    match child {
        Ok(output) => assert!(output.status.success(), "{output:?}"),
        Err(error) => eprintln!("skipped: cannot run this test as another user: {error}"),
    }
}

#[cfg(unix)]
#[test]
fn weights_behind_a_link_are_read_and_a_link_that_leads_nowhere_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("model.safetensors");
    std::os::unix::fs::symlink("blob", &link).unwrap();
    folder(dir.path(), &[("config.json", b"{}")]);
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Io { path, .. } if path == link));
    folder(dir.path(), &[("blob", &vectors(&[("a", &[1.0])]))]);
    assert!(Checkpoint::open(dir.path()).unwrap().contains("a"));
}

#[test]
fn a_checkpoint_is_read_by_several_threads_at_once() {
    let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let file = open_one("F32", &[1000], &f32_bytes(&values));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    let read = file
                        .tensor("w", &Device::Cpu)
                        .unwrap()
                        .to_vec1::<f32>()
                        .unwrap();
                    assert_eq!(read, values);
                    file.release(["w"]);
                }
            });
        }
    });
}

fn open_one(dtype: &str, shape: &[usize], data: &[u8]) -> Checkpoint {
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        r#"{{"w":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[0,{}]}}}}"#,
        data.len()
    );
    let path = dir.path().join("one.safetensors");
    fs::write(&path, safetensors(&text, data)).unwrap();
    Checkpoint::open_file(path).unwrap()
}

#[test]
fn the_first_value_that_is_not_finite_is_located() {
    let mut values = vec![0.5f32; 40_000 * 3];
    values[100_000] = f32::NEG_INFINITY;
    values[100_001] = f32::NAN;
    let file = open_one("F32", &[40_000, 3], &f32_bytes(&values));
    for result in [
        file.tensor("w", &Device::Cpu),
        file.tensor_as("w", DType::BF16, &Device::Cpu),
        file.tensor_as("w", DType::F64, &Device::Cpu),
    ] {
        let error = result.unwrap_err();
        assert!(
            error
                .to_string()
                .contains("one.safetensors: tensor `w`: -inf at [33333, 1]"),
            "{error}"
        );
        assert!(matches!(
            error,
            Error::NonFinite { element: 100_000, index, value, .. } if index == [33_333, 1] && value == f64::NEG_INFINITY
        ));
    }
}

#[test]
fn every_float_dtype_is_checked() {
    let infinities: [(&str, &[u8]); 5] = [
        ("F16", &[0x00, 0x7C]),
        ("BF16", &[0x80, 0xFF]),
        ("F32", &[0x00, 0x00, 0x80, 0x7F]),
        ("F64", &[0, 0, 0, 0, 0, 0, 0xF0, 0x7F]),
        ("F8_E4M3", &[0xFF]),
    ];
    for (dtype, bytes) in infinities {
        let error = open_one(dtype, &[1], bytes)
            .tensor("w", &Device::Cpu)
            .unwrap_err();
        assert!(
            matches!(error, Error::NonFinite { element: 0, .. }),
            "{dtype}: {error}"
        );
    }
}

#[test]
fn a_value_too_large_for_the_target_is_located() {
    let file = open_one("F32", &[2], &f32_bytes(&[1.0, 70_000.0]));
    assert!(file.tensor_as("w", DType::BF16, &Device::Cpu).is_ok());
    assert!(matches!(
        file.tensor_as("w", DType::F16, &Device::Cpu),
        Err(Error::TooLarge {
            element: 1,
            value: 70_000.0,
            dtype: DType::F16,
            ..
        })
    ));
}

#[test]
fn a_dtype_without_a_tensor_form_still_gives_its_bytes() {
    let file = open_one("C64", &[1], &[1; 8]);
    assert!(matches!(
        file.tensor("w", &Device::Cpu),
        Err(Error::UnsupportedDtype {
            dtype: Dtype::C64,
            ..
        })
    ));
    assert!(matches!(
        file.tensor_as("w", DType::F32, &Device::Cpu),
        Err(Error::UnsupportedDtype { .. })
    ));
    assert_eq!(&file.bytes("w").unwrap()[..], [1; 8]);
    assert!(matches!(
        open_one("F32", &[1], &[0; 4]).tensor_as("w", DType::U8, &Device::Cpu),
        Err(Error::UnsupportedDtype {
            dtype: Dtype::F32,
            wanted: "u8",
            ..
        })
    ));
}

#[test]
fn an_unexpected_shape_or_name_is_an_error() {
    let file = open_one("F32", &[2, 1], &[0; 8]);
    assert_eq!(file.expect_shape("w", &[2, 1]).unwrap().bytes, 8);
    assert!(matches!(
        file.expect_shape("w", &[2]),
        Err(Error::WrongShape { tensor, expected, found, .. }) if tensor == "w" && expected == [2] && found == [2, 1]
    ));
    assert!(
        matches!(file.tensor("v", &Device::Cpu), Err(Error::UnknownTensor { tensor, .. }) if tensor == "v")
    );
    assert!(!file.contains("v"));
}

#[test]
fn a_file_whose_header_is_not_padded_is_read_all_the_same() {
    let text = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    assert_ne!(text.len() % 4, 0);
    let dir = tempfile::tempdir().unwrap();
    folder(
        dir.path(),
        &[(
            "x.safetensors",
            &safetensors(text, &f32_bytes(&[1.5, -2.0])),
        )],
    );
    let file = Checkpoint::open_file(dir.path().join("x.safetensors")).unwrap();
    assert_eq!(
        file.tensor("w", &Device::Cpu)
            .unwrap()
            .to_vec1::<f32>()
            .unwrap(),
        [1.5, -2.0]
    );
}

#[test]
fn a_pickle_that_cannot_be_read_says_how_to_convert_it() {
    for contents in [&b""[..], b"\x80\x02}q\x00.", b"PK\x03\x04 not a zip"] {
        let error =
            open_folder(&[("config.json", b"{}"), ("pytorch_model.bin", contents)]).unwrap_err();
        assert!(
            matches!(&error, Error::Pickle { file, .. } if file.ends_with("pytorch_model.bin"))
        );
        assert!(error.to_string().contains("save_pretrained"));
    }
}

#[test]
fn a_config_field_of_another_kind_is_named_with_file_and_kind() {
    let dir = tempfile::tempdir().unwrap();
    let text = r#"{"layers": 4, "eps": 1e-5, "tied": true, "type": "llama", "pad": null, "heads": -1, "widths": [3, 5], "rope": {"theta": 1e4, "type": 7}}"#;
    folder(dir.path(), &[("config.json", text.as_bytes())]);
    let config = Config::read_folder(dir.path()).unwrap();
    assert_eq!(config.usize("layers").unwrap(), 4);
    assert_eq!(config.f64("eps").unwrap(), 1e-5);
    assert_eq!(config.f64("layers").unwrap(), 4.0);
    assert!(config.bool("tied").unwrap());
    assert_eq!(config.str("type").unwrap(), "llama");
    assert_eq!(config.usizes("widths").unwrap(), [3, 5]);
    assert_eq!(config.section("rope").unwrap().f64("theta").unwrap(), 1e4);
    assert_eq!(config.opt_usize("pad").unwrap(), None);
    assert_eq!(config.opt_str("absent").unwrap(), None);
    assert!(config.opt_section("absent").unwrap().is_none());

    let message = |error: Error| error.to_string();
    let absent = message(config.usize("absent").unwrap_err());
    assert!(absent.ends_with(
        "config.json: field `absent`: expected a whole number, not negative, found nothing"
    ));
    assert!(message(config.usize("heads").unwrap_err()).contains("found -1"));
    assert!(message(config.opt_usize("type").unwrap_err()).contains("found \"llama\""));
    assert!(message(config.usize("pad").unwrap_err()).contains("found null"));
    assert!(
        message(config.opt_bool("layers").unwrap_err()).contains("expected true or false, found 4")
    );
    let nested = message(config.section("rope").unwrap().str("type").unwrap_err());
    assert!(
        nested.contains("config.json: field `rope.type`"),
        "{nested}"
    );

    let mut made = Config::default();
    made.set("layers", "two");
    assert!(message(made.usize("layers").unwrap_err()).starts_with("config: field `layers`"));
}

#[test]
fn carried_files_are_listed_and_weights_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let carried = [
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ];
    for name in carried {
        fs::write(dir.path().join(name), "x").unwrap();
    }
    folder(
        dir.path(),
        &[
            ("config.json", b"{}"),
            ("model.safetensors", &vectors(&[])),
            ("README.md", b""),
            ("pytorch_model.bin", b""),
            ("optimizer.pt", b""),
        ],
    );
    fs::create_dir(dir.path().join("tokenizer.dir")).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let names: Vec<_> = checkpoint
        .files_to_carry()
        .iter()
        .map(|path| path.file_name().unwrap())
        .collect();
    assert_eq!(names, carried);
    assert_eq!(checkpoint.dir(), Path::new(dir.path()));
}
