//! Old PyTorch checkpoints, made by hand: a zip archive with a pickle of the state dict and one file per storage.

#[path = "common/pickle.rs"]
mod pickle;

use std::fs;
use std::path::Path;

use candle_core::Device;
use pickle::{state_dict, text, zip};
use tensor_io::{Checkpoint, CheckpointWriter, Dtype, Error, TensorSpec, WriteOptions};

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
                &state_dict(&[
                    ("w", "FloatStorage", &[2, 3]),
                    ("h", "HalfStorage", &[1, 2]),
                ]),
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
                &state_dict(&[("w", "FloatStorage", &[1, 2])]),
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
    let pickle = state_dict(&[("w", "FloatStorage", &[2, 3])]);
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
    let pickle = state_dict(&[("w", "FloatStorage", &[2, 3])]);
    // Cut at every length, and a shape that is larger than the file.
    let mut broken: Vec<Vec<u8>> = (0..pickle.len())
        .map(|length| pickle[..length].to_vec())
        .collect();
    broken.push(state_dict(&[("w", "FloatStorage", &[255, 1])]));
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
