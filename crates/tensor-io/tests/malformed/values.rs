//! Values and shapes of tensors.

use crate::common::{f32_bytes, folder, safetensors};
use crate::open_one;
use candle_core::{DType, Device};
use tensor_io::{Checkpoint, Dtype, Error};

#[test]
fn the_first_value_that_is_not_finite_is_located() {
    let mut values = vec![0.5f32; 40_000 * 3];
    values[100_000] = f32::NEG_INFINITY;
    values[100_001] = f32::NAN;
    let file = open_one("F32", &[40_000, 3], &f32_bytes(&values));
    for result in [
        file.tensor("w", &Device::Cpu).map(drop),
        file.tensor_as("w", DType::BF16, &Device::Cpu).map(drop),
        file.tensor_as("w", DType::F64, &Device::Cpu).map(drop),
        file.finite_rows("w", 0..40_000).map(drop),
        file.finite_rows("w", 33_333..33_334).map(drop),
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
        let file = open_one(dtype, &[1], bytes);
        // Bytes of dtypes that are no floats are as good as any.
        let rows = file.finite_rows("w", 0..1);
        assert_eq!(rows.is_err(), dtype != "F8_E4M3", "{dtype}");
        let error = file.tensor("w", &Device::Cpu).unwrap_err();
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
