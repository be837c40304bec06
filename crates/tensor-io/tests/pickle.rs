//! Old PyTorch checkpoints, made by hand: a zip archive with a pickle of the state dict and one file per storage.

use std::fs;
use std::path::Path;

use candle_core::Device;
use tensor_io::{Checkpoint, CheckpointWriter, Dtype, Error, TensorSpec, WriteOptions};

/// A zip archive of uncompressed files.
fn zip(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut directory = Vec::new();
    for (name, contents) in files {
        // Versions and method, then checksum and sizes; a file's entry in the directory shares this part of its header.
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0];
        common.extend(crc32(contents).to_le_bytes());
        common.extend((contents.len() as u32).to_le_bytes());
        common.extend((contents.len() as u32).to_le_bytes());
        common.extend((name.len() as u16).to_le_bytes());
        common.extend([0, 0]);
        let offset = archive.len() as u32;
        archive.extend(b"PK\x03\x04");
        archive.extend(&common);
        archive.extend(name.as_bytes());
        archive.extend(*contents);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let count = (files.len() as u16).to_le_bytes();
    let start = archive.len() as u32;
    archive.extend(&directory);
    archive.extend(b"PK\x05\x06\0\0\0\0");
    archive.extend([count, count].concat());
    archive.extend((directory.len() as u32).to_le_bytes());
    archive.extend(start.to_le_bytes());
    archive.extend([0, 0]);
    archive
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

fn text(value: &str) -> Vec<u8> {
    [
        b"X",
        &(value.len() as u32).to_le_bytes()[..],
        value.as_bytes(),
    ]
    .concat()
}

/// A state dict of matrices: name, storage class, shape (both below 256).
fn state_dict(tensors: &[(&str, &str, [u8; 2])]) -> Vec<u8> {
    let mut pickle = b"\x80\x02}(".to_vec();
    for (i, (name, class, [rows, columns])) in tensors.iter().enumerate() {
        pickle.extend(text(name));
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        pickle.extend(text("storage"));
        pickle.extend(format!("ctorch\n{class}\n").as_bytes());
        pickle.extend(text(&i.to_string()));
        pickle.extend(text("cpu"));
        pickle.extend([b'K', rows * columns]);
        pickle.extend(b"tQK\x00");
        pickle.extend([b'K', *rows, b'K', *columns, 0x86]);
        pickle.extend([b'K', *columns, b'K', 1, 0x86]);
        pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    pickle.extend(b"u.");
    pickle
}

fn write_old_checkpoint(dir: &Path, weights: &[u8]) {
    fs::write(dir.join("config.json"), "{}").unwrap();
    fs::write(dir.join("pytorch_model.bin"), weights).unwrap();
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[test]
fn an_old_checkpoint_is_read_and_can_be_written_as_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    let w = f32_bytes(&[1., 2., 3., 4., 5., 6.]);
    let half = [0x00, 0x3C, 0x00, 0xC0];
    write_old_checkpoint(
        dir.path(),
        &zip(&[
            (
                "archive/data.pkl",
                &state_dict(&[("w", "FloatStorage", [2, 3]), ("h", "HalfStorage", [1, 2])]),
            ),
            ("archive/data/0", &w),
            ("archive/data/1", &half),
        ]),
    );
    let old = Checkpoint::open(dir.path()).unwrap();
    assert!(old.names().eq(["h", "w"]));
    assert_eq!(old.info("w").unwrap().shape, [2, 3]);
    assert_eq!(old.info("h").unwrap().dtype, Dtype::F16);
    assert_eq!(
        old.tensor("w", &Device::Cpu)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap(),
        [[1., 2., 3.], [4., 5., 6.]]
    );
    old.release(["w"]);

    let specs = old
        .names()
        .map(|name| {
            TensorSpec::new(
                name,
                old.info(name).unwrap().dtype,
                old.info(name).unwrap().shape.clone(),
            )
        })
        .collect();
    let mut writer = CheckpointWriter::create(
        dir.path().join("new"),
        old.config(),
        specs,
        &WriteOptions::default(),
    )
    .unwrap();
    for name in old.names() {
        writer.copy_tensor(name, &old).unwrap();
    }
    let new = Checkpoint::open(writer.finish().unwrap().dir).unwrap();
    assert_eq!(*new.bytes("w").unwrap(), *w);
    assert_eq!(*new.bytes("h").unwrap(), half);
}

#[test]
fn values_of_an_old_checkpoint_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    write_old_checkpoint(
        dir.path(),
        &zip(&[
            (
                "archive/data.pkl",
                &state_dict(&[("w", "FloatStorage", [1, 2])]),
            ),
            ("archive/data/0", &f32_bytes(&[1.0, f32::NAN])),
        ]),
    );
    let error = Checkpoint::open(dir.path())
        .unwrap()
        .tensor("w", &Device::Cpu)
        .unwrap_err();
    assert!(
        matches!(error, Error::NonFinite { element: 1, .. }),
        "{error}"
    );
}

#[test]
fn a_storage_that_is_too_short_or_absent_is_an_error() {
    let pickle = state_dict(&[("w", "FloatStorage", [2, 3])]);
    let short = zip(&[("archive/data.pkl", &pickle), ("archive/data/0", &[0; 8])]);
    let absent = zip(&[("archive/data.pkl", &pickle)]);
    for weights in [short, absent] {
        let dir = tempfile::tempdir().unwrap();
        write_old_checkpoint(dir.path(), &weights);
        let old = Checkpoint::open(dir.path()).unwrap();
        assert!(matches!(old.bytes("w"), Err(Error::Pickle { .. })));
    }
}

#[test]
fn malformed_pickles_are_errors() {
    let pickle = state_dict(&[("w", "FloatStorage", [2, 3])]);
    // Cut at every length, and a shape that is larger than the file.
    let mut broken: Vec<Vec<u8>> = (0..pickle.len())
        .map(|length| pickle[..length].to_vec())
        .collect();
    broken.push(state_dict(&[("w", "FloatStorage", [255, 1])]));
    // A call of _rebuild_tensor_v2 without arguments.
    let call: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n)Ru.";
    broken.push([b"\x80\x02}(", &text("w")[..], call].concat());
    for pickle in broken {
        let dir = tempfile::tempdir().unwrap();
        write_old_checkpoint(
            dir.path(),
            &zip(&[("archive/data.pkl", &pickle), ("archive/data/0", &[0; 24])]),
        );
        assert!(matches!(
            Checkpoint::open(dir.path()),
            Err(Error::Pickle { .. })
        ));
    }
}
