//! Models split over several files.

use std::fs;
use std::path::{Path, PathBuf};

use tensor_io::Error;
use tensor_io::gguf::{Gguf, GgufError};

use crate::builder::{File, Key, Tensor};

/// Writes three parts with one vector each; `change` may alter any of them.
fn write(dir: &Path, change: impl Fn(usize, &mut File)) -> Vec<PathBuf> {
    (0..3usize)
        .map(|number| {
            let mut file = File::default();
            if number > 0 {
                file.keys.clear();
            }
            file.keys.push(Key::u16("split.no", number as u16));
            file.keys.push(Key::u16("split.count", 3));
            file.keys.push(Key::i32("split.tensors.count", 3));
            file.tensors = vec![Tensor::f32(&format!("t{number}"), 8, 0)];
            change(number, &mut file);
            let path = dir.join(format!("model-{:05}-of-00003.gguf", number + 1));
            fs::write(&path, file.bytes()).unwrap();
            path
        })
        .collect()
}

fn refusal(path: &Path) -> GgufError {
    match Gguf::open(path) {
        Err(Error::Gguf { source, .. }) => source,
        other => panic!("expected a refusal, found {other:?}"),
    }
}

#[test]
fn any_part_opens_the_whole_model() {
    let dir = tempfile::tempdir().unwrap();
    for path in write(dir.path(), |_, _| {}) {
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.parts().count(), 3);
        let names: Vec<_> = gguf
            .tensors()
            .iter()
            .map(|info| (&info.name[..], info.part))
            .collect();
        assert_eq!(names, [("t0", 0), ("t1", 1), ("t2", 2)]);
        assert_eq!(
            gguf.metadata().get_str("general.architecture").unwrap(),
            Some("llama")
        );
        assert_eq!(gguf.floats("t2").unwrap(), [0., 1., 2., 3., 4., 5., 6., 7.]);
    }
}

#[test]
fn a_missing_part_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let paths = write(dir.path(), |_, _| {});
    fs::remove_file(&paths[1]).unwrap();
    let error = refusal(&paths[2]);
    assert!(
        matches!(&error, GgufError::MissingPart { path, number: 2, count: 3 } if *path == paths[1]),
        "{error}"
    );
}

#[test]
fn parts_that_contradict_each_other_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let count = |number: usize, file: &mut File| {
        if number == 1 {
            file.keys[1] = Key::u16("split.count", 4);
        }
    };
    let paths = write(dir.path(), count);
    assert!(matches!(
        refusal(&paths[0]),
        GgufError::Split {
            key: "split.count",
            ..
        }
    ));
    let order = |number: usize, file: &mut File| {
        if number == 2 {
            file.keys[0] = Key::u16("split.no", 1);
        }
    };
    let paths = write(dir.path(), order);
    assert!(matches!(
        refusal(&paths[0]),
        GgufError::Split {
            key: "split.no",
            ..
        }
    ));
    let paths = write(dir.path(), |_, file| {
        file.keys.retain(|key| key.0 != b"split.tensors.count");
        file.keys.push(Key::i32("split.tensors.count", 4));
    });
    assert!(matches!(
        refusal(&paths[0]),
        GgufError::Split {
            key: "split.tensors.count",
            ..
        }
    ));
    let paths = write(dir.path(), |_, file| file.tensors[0].0 = b"same".into());
    let twice = Gguf::open(&paths[0]).unwrap_err();
    assert!(
        matches!(&twice, Error::DuplicateTensor { tensor, .. } if tensor == "same"),
        "{twice}"
    );
    let paths = write(dir.path(), |number, file| {
        file.keys.retain(|key| key.0 != b"split.no");
        file.keys.push(Key::u16("split.no", number as u16 + 3));
    });
    assert!(matches!(refusal(&paths[0]), GgufError::Value { .. }));
}

#[test]
fn a_part_under_another_name_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let paths = write(dir.path(), |_, _| {});
    let renamed = dir.path().join("model.gguf");
    fs::rename(&paths[0], &renamed).unwrap();
    let error = refusal(&renamed);
    assert!(
        matches!(
            error,
            GgufError::SplitName {
                number: 1,
                count: 3
            }
        ),
        "{error}"
    );
}

#[test]
fn a_folder_is_no_file() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Gguf::open(dir.path()), Err(Error::Io { .. })));
}
