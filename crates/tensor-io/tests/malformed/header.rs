//! One safetensors file: its header and the places of its tensors.

use crate::common::{folder, safetensors};
use candle_core::Device;
use tensor_io::{Checkpoint, Header, HeaderError, MAX_HEADER_BYTES};

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
