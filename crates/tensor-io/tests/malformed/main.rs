//! Malformed checkpoints: each an error that names file and tensor, none a panic.

#[path = "../common/mod.rs"]
mod common;
mod header;
mod shards;
mod values;

use candle_core::Device;
use common::{f32_bytes, folder, safetensors, vectors};
use std::fs;
use std::path::Path;
use tensor_io::{Checkpoint, Config, Error};

fn open_folder(files: &[(&str, &[u8])]) -> Result<Checkpoint, Error> {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path(), files);
    Checkpoint::open(dir.path())
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
