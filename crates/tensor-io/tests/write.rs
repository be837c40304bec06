//! Checkpoints written and read back.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use tensor_io::{
    Checkpoint, CheckpointWriter, Config, Dtype, Error, TensorData, TensorSpec, WriteOptions,
    write_file,
};

use common::{f32_bytes, folder, safetensors, vectors};

fn specs_of(source: &Checkpoint) -> Vec<TensorSpec> {
    source
        .names()
        .map(|name| {
            let info = source.info(name).unwrap();
            TensorSpec::new(name, info.dtype, info.shape.clone())
        })
        .collect()
}

fn copy(source: &Checkpoint, dst: &Path, options: &WriteOptions) -> tensor_io::Written {
    let mut writer =
        CheckpointWriter::create(dst, source.config(), specs_of(source), options).unwrap();
    writer.carry_from(source).unwrap();
    for name in source.names() {
        writer
            .write_bytes(name, &source.bytes(name).unwrap())
            .unwrap();
    }
    writer.finish().unwrap()
}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn one_vector(config: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    folder(
        dir.path(),
        &[
            ("config.json", config.as_bytes()),
            ("model.safetensors", &vectors(&[("w", &[1.0, 2.0, 3.0])])),
        ],
    );
    dir
}

#[shared_data::needed("models/small-lm")]
#[test]
fn a_copied_model_is_byte_identical() {
    let dir = Path::new(shared_data::path!("models/small-lm"));
    let source = Checkpoint::open(dir).unwrap();
    let out = tempfile::tempdir().unwrap();
    let dst = out.path().join("copy");
    let written = copy(&source, &dst, &WriteOptions::default());
    assert_eq!(written.bytes, source.total_bytes());
    assert_eq!(written.parameters, source.parameters());
    assert_eq!(written.shards, 1);
    for file in [
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        assert!(
            fs::read(dir.join(file)).unwrap() == fs::read(dst.join(file)).unwrap(),
            "{file}"
        );
    }
    let copied = Checkpoint::open(&dst).unwrap();
    assert_eq!(copied.config().raw(), source.config().raw());
    assert!(
        copied
            .config()
            .raw()
            .keys()
            .eq(source.config().raw().keys())
    );
    assert_eq!(listing(out.path()), ["copy"]);
}

#[shared_data::needed("models/small-lm")]
#[test]
fn shards_hold_the_same_tensors_as_one_file() {
    let dir = Path::new(shared_data::path!("models/small-lm"));
    let source = Checkpoint::open(dir).unwrap();
    let out = tempfile::tempdir().unwrap();
    let options = WriteOptions::default().with_max_shard_bytes(1_000_000);
    let written = copy(&source, &out.path().join("sharded"), &options);
    assert!(written.shards > 5);
    let sharded = Checkpoint::open(&written.dir).unwrap();
    assert_eq!(sharded.shards().len(), written.shards);
    assert!(
        sharded.shards()[0].ends_with(format!("model-00001-of-{:05}.safetensors", written.shards))
    );
    assert_eq!(sharded.total_bytes(), source.total_bytes());
    for name in source.names() {
        assert!(
            sharded.bytes(name).unwrap() == source.bytes(name).unwrap(),
            "{name}"
        );
    }
    let index: serde_json::Value = serde_json::from_slice(
        &fs::read(written.dir.join("model.safetensors.index.json")).unwrap(),
    )
    .unwrap();
    assert_eq!(index["metadata"]["total_size"], source.total_bytes());

    let single = copy(
        &sharded,
        &out.path().join("single"),
        &WriteOptions::default(),
    );
    assert_eq!(single.shards, 1);
}

#[test]
fn a_shard_is_only_larger_than_the_limit_for_a_tensor_that_is() {
    let out = tempfile::tempdir().unwrap();
    let sizes = [10, 30, 120, 10, 50, 40, 41];
    let specs: Vec<_> = sizes
        .iter()
        .enumerate()
        .map(|(i, &n)| TensorSpec::new(format!("t{i}"), Dtype::U8, [n]))
        .collect();
    let options = WriteOptions::default().with_max_shard_bytes(100);
    let mut writer =
        CheckpointWriter::create(out.path().join("m"), &Config::default(), specs, &options)
            .unwrap();
    for (i, &n) in sizes.iter().enumerate() {
        writer
            .write_bytes(&format!("t{i}"), &vec![i as u8; n])
            .unwrap();
    }
    let written = writer.finish().unwrap();
    let read = Checkpoint::open(written.dir).unwrap();
    let shards: Vec<usize> = (0..7)
        .map(|i| read.info(&format!("t{i}")).unwrap().shard)
        .collect();
    assert_eq!(shards, [0, 0, 1, 2, 2, 2, 3]);
}

#[test]
fn wider_dtypes_come_first_in_a_file_and_every_tensor_is_aligned() {
    let out = tempfile::tempdir().unwrap();
    let specs = vec![
        TensorSpec::new("a", Dtype::U8, [3]),
        TensorSpec::new("b", DType::BF16, [5]),
        TensorSpec::new("c", DType::F64, [1]),
        TensorSpec::new("d", DType::F32, [1]),
        TensorSpec::new("e", DType::F16, [1]),
    ];
    let mut writer = CheckpointWriter::create(
        out.path().join("m"),
        &Config::default(),
        specs.clone(),
        &WriteOptions::default(),
    )
    .unwrap();
    for spec in &specs {
        let bytes = spec.dtype.bitsize() / 8 * spec.shape[0];
        writer.write_bytes(&spec.name, &vec![0; bytes]).unwrap();
    }
    let written = writer.finish().unwrap();
    let read = Checkpoint::open(&written.dir).unwrap();
    assert!(read.names().eq(["c", "d", "b", "e", "a"]));
    for name in read.names() {
        let size = read.info(name).unwrap().dtype.bitsize() / 8;
        assert_eq!(
            read.bytes(name).unwrap().as_ptr() as usize % size,
            0,
            "{name}"
        );
    }
    let file = fs::read(written.dir.join("model.safetensors")).unwrap();
    let header_length = u64::from_le_bytes(file[..8].try_into().unwrap());
    assert_eq!(header_length % 8, 0);
    assert!(safetensors::SafeTensors::deserialize(&file).is_ok());
    assert_eq!(read.metadata()["format"], "pt");
}

#[test]
fn a_tensor_is_written_in_the_declared_dtype_whatever_its_strides() {
    let out = tempfile::tempdir().unwrap();
    let matrix = Tensor::from_vec(
        (0..12).map(|i| i as f32 / 7.0).collect::<Vec<_>>(),
        (3, 4),
        &Device::Cpu,
    )
    .unwrap();
    let transposed = matrix.t().unwrap();
    let narrowed = matrix.narrow(1, 1, 2).unwrap().narrow(0, 1, 2).unwrap();
    let specs = vec![
        TensorSpec::new("transposed", DType::BF16, [4, 3]),
        TensorSpec::new("narrowed", DType::F16, [2, 2]),
        TensorSpec::new("row", DType::F32, [1, 4]),
        TensorSpec::new("ids", DType::F32, [3]),
        TensorSpec::new("mask", Dtype::BOOL, [2]),
    ];
    let mut writer = CheckpointWriter::create(
        out.path().join("m"),
        &Config::default(),
        specs,
        &WriteOptions::default(),
    )
    .unwrap();
    writer.write_tensor("narrowed", &narrowed).unwrap();
    writer.write_tensor("transposed", &transposed).unwrap();
    writer
        .write_tensor("row", &matrix.narrow(0, 2, 1).unwrap())
        .unwrap();
    writer
        .write_tensor("ids", &Tensor::new(&[1u32, 2, 3], &Device::Cpu).unwrap())
        .unwrap();
    writer
        .write_tensor("mask", &Tensor::new(&[1u8, 0], &Device::Cpu).unwrap())
        .unwrap();
    let read = Checkpoint::open(writer.finish().unwrap().dir).unwrap();

    let same = |name: &str, expected: &Tensor| {
        let found = read.tensor(name, &Device::Cpu).unwrap();
        assert_eq!(found.dtype(), expected.dtype());
        assert_eq!(found.dims(), expected.dims());
        let difference =
            (found.to_dtype(DType::F32).unwrap() - expected.to_dtype(DType::F32).unwrap()).unwrap();
        let largest = difference
            .abs()
            .unwrap()
            .flatten_all()
            .unwrap()
            .max(0)
            .unwrap();
        assert_eq!(largest.to_scalar::<f32>().unwrap(), 0.0);
    };
    same("transposed", &transposed.to_dtype(DType::BF16).unwrap());
    same("narrowed", &narrowed.to_dtype(DType::F16).unwrap());
    same("row", &matrix.narrow(0, 2, 1).unwrap());
    same("ids", &Tensor::new(&[1f32, 2., 3.], &Device::Cpu).unwrap());
    same("mask", &Tensor::new(&[1u8, 0], &Device::Cpu).unwrap());
}

#[test]
fn an_existing_destination_is_kept_unless_overwriting() {
    let source_dir = one_vector(r#"{"version": 2}"#);
    let source = Checkpoint::open(source_dir.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let dst = out.path().join("m");
    fs::create_dir(&dst).unwrap();
    fs::write(dst.join("config.json"), r#"{"version": 1}"#).unwrap();
    fs::write(dst.join("stale.txt"), "old").unwrap();

    let refused = CheckpointWriter::create(
        &dst,
        source.config(),
        specs_of(&source),
        &WriteOptions::default(),
    );
    assert!(matches!(refused, Err(Error::Exists { path }) if path.ends_with("m")));
    assert_eq!(listing(&dst), ["config.json", "stale.txt"]);

    let options = WriteOptions::default().with_overwrite(true);
    for name in [
        "train.py",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model-q4_0.gguf",
    ] {
        fs::write(dst.join(name), "old").unwrap();
    }
    fs::create_dir(dst.join("plots")).unwrap();
    copy(&source, &dst, &options);
    // The old checkpoint's files are gone, the user's are not.
    assert_eq!(
        listing(&dst),
        [
            "config.json",
            "model.safetensors",
            "plots",
            "stale.txt",
            "train.py"
        ]
    );
    assert_eq!(
        Checkpoint::open(&dst)
            .unwrap()
            .config()
            .usize("version")
            .unwrap(),
        2
    );
    assert_eq!(listing(out.path()), ["m"]);
}

#[test]
fn a_checkpoint_can_be_replaced_while_it_is_read() {
    let dir = one_vector("{}");
    let dst = dir.path().join("m");
    let options = WriteOptions::default().with_overwrite(true);
    copy(&Checkpoint::open(dir.path()).unwrap(), &dst, &options);
    let source = Checkpoint::open(&dst).unwrap();
    copy(&source, &dst, &options);
    assert_eq!(
        &source.bytes("w").unwrap()[..],
        &f32_bytes(&[1.0, 2.0, 3.0])[..]
    );
    assert!(Checkpoint::open(&dst).is_ok());
}

#[test]
fn a_folder_that_is_no_checkpoint_is_never_replaced() {
    let out = tempfile::tempdir().unwrap();
    let dst = out.path().join("photos");
    fs::create_dir(&dst).unwrap();
    fs::write(dst.join("cat.jpg"), "meow").unwrap();
    let options = WriteOptions::default().with_overwrite(true);
    let refused = CheckpointWriter::create(&dst, &Config::default(), Vec::new(), &options);
    assert!(matches!(refused, Err(Error::NotReplaceable { .. })));
    assert_eq!(listing(&dst), ["cat.jpg"]);
    assert_eq!(listing(out.path()), ["photos"]);
}

#[cfg(unix)]
#[test]
fn a_link_to_a_folder_keeps_leading_to_it() {
    let source_dir = one_vector("{}");
    let source = Checkpoint::open(source_dir.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let real = out.path().join("real");
    let link = out.path().join("link");
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let options = WriteOptions::default().with_overwrite(true);
    copy(&source, &link, &options);
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert!(real.join("model.safetensors").exists());
}

#[test]
fn an_unfinished_writer_leaves_nothing() {
    let out = tempfile::tempdir().unwrap();
    let specs = vec![
        TensorSpec::new("a", DType::F32, [2]),
        TensorSpec::new("b", DType::F32, [2]),
        TensorSpec::new("c", DType::F32, [2]),
    ];
    let create = || {
        CheckpointWriter::create(
            out.path().join("deep/m"),
            &Config::default(),
            specs.clone(),
            &WriteOptions::default(),
        )
        .unwrap()
    };
    drop(create());
    assert!(listing(&out.path().join("deep")).is_empty());

    let mut writer = create();
    writer.write_bytes("b", &[0; 8]).unwrap();
    let Err(Error::NotWritten { tensors, .. }) = writer.finish() else {
        panic!("finished without all tensors")
    };
    assert_eq!(tensors, ["a", "c"]);
    assert!(listing(&out.path().join("deep")).is_empty());
}

#[test]
fn one_destination_has_one_writer_at_a_time() {
    let out = tempfile::tempdir().unwrap();
    let create = || {
        CheckpointWriter::create(
            out.path().join("m"),
            &Config::default(),
            Vec::new(),
            &WriteOptions::default(),
        )
    };
    let first = create().unwrap();
    assert!(matches!(create(), Err(Error::Busy { .. })));
    first.finish().unwrap();
    assert!(matches!(create(), Err(Error::Exists { .. })));
}

#[test]
fn leftovers_of_a_killed_writer_are_put_right() {
    let source_dir = one_vector("{}");
    let source = Checkpoint::open(source_dir.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let dst = out.path().join("m");
    let partial = out.path().join(".m.tensor-io-partial");
    let old = out.path().join(".m.tensor-io-old");

    // Killed while writing.
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("model.safetensors"), "half").unwrap();
    fs::write(out.path().join(".m.tensor-io-lock"), "").unwrap();
    copy(&source, &dst, &WriteOptions::default());
    assert_eq!(listing(out.path()), ["m"]);

    // Killed between renaming the old checkpoint away and the new one in: the old one comes back.
    fs::rename(&dst, &old).unwrap();
    let refused = CheckpointWriter::create(
        &dst,
        source.config(),
        specs_of(&source),
        &WriteOptions::default(),
    );
    assert!(matches!(refused, Err(Error::Exists { .. })));
    assert!(Checkpoint::open(&dst).is_ok());
    assert_eq!(listing(out.path()), ["m"]);
}

#[test]
fn wrong_use_of_a_writer_is_an_error_that_names_the_tensor() {
    let out = tempfile::tempdir().unwrap();
    let cpu = Device::Cpu;
    let specs = vec![
        TensorSpec::new("w", DType::F32, [2, 2]),
        TensorSpec::new("ids", DType::I64, [2]),
        TensorSpec::new("half", DType::F16, [2, 2]),
        TensorSpec::new("mask", Dtype::BOOL, [2]),
    ];
    let mut writer = CheckpointWriter::create(
        out.path().join("m"),
        &Config::default(),
        specs,
        &WriteOptions::default(),
    )
    .unwrap();
    let float = |values: &[f32; 4]| Tensor::from_slice(values, (2, 2), &cpu).unwrap();

    assert!(
        matches!(writer.write_bytes("v", &[]), Err(Error::NotDeclared { tensor, .. }) if tensor == "v")
    );
    assert!(matches!(
        writer.write_bytes("w", &[0; 15]),
        Err(Error::WrongLength { tensor, expected: 16, found: 15, .. }) if tensor == "w"
    ));
    assert!(matches!(
        writer.write_tensor("w", &float(&[0.; 4]).flatten_all().unwrap()),
        Err(Error::WrongShape { tensor, expected, found, .. }) if tensor == "w" && expected == [2, 2] && found == [4]
    ));
    assert!(matches!(
        writer.write_tensor("ids", &Tensor::new(&[0f32, 1.], &cpu).unwrap()),
        Err(Error::WrongDtype { tensor, expected: Dtype::I64, .. }) if tensor == "ids"
    ));
    assert!(matches!(
        writer.write_tensor("mask", &Tensor::new(&[0u8, 2], &cpu).unwrap()),
        Err(Error::WrongDtype { tensor, .. }) if tensor == "mask"
    ));
    assert!(matches!(
        writer.write_tensor("w", &float(&[0., 1., f32::NAN, f32::NAN])),
        Err(Error::NonFinite { tensor, element: 2, index, value, .. })
            if tensor == "w" && index == [1, 0] && value.is_nan()
    ));
    assert!(matches!(
        writer.write_tensor("half", &float(&[0., 65520., 0., 0.])),
        Err(Error::TooLarge { tensor, element: 1, index, value: 65520., dtype: DType::F16, .. })
            if tensor == "half" && index == [0, 1]
    ));
    // None of these counted as writing it.
    writer.write_tensor("w", &float(&[1., 2., 3., 4.])).unwrap();
    assert!(
        matches!(writer.write_bytes("w", &[0; 16]), Err(Error::WrittenTwice { tensor, .. }) if tensor == "w")
    );
}

#[test]
fn impossible_declarations_are_refused_before_anything_is_written() {
    let out = tempfile::tempdir().unwrap();
    for specs in [
        vec![
            TensorSpec::new("w", DType::F32, [1]),
            TensorSpec::new("w", DType::F16, [1]),
        ],
        vec![TensorSpec::new("__metadata__", DType::F32, [1])],
        vec![TensorSpec::new("w", DType::F32, [usize::MAX, 2])],
        vec![TensorSpec::new("w", DType::F64, [usize::MAX / 4])],
        vec![TensorSpec::new("w", Dtype::F4, [3])],
    ] {
        let refused = CheckpointWriter::create(
            out.path().join("m"),
            &Config::default(),
            specs,
            &WriteOptions::default(),
        );
        assert!(matches!(refused, Err(Error::BadDeclaration { .. })));
        assert!(listing(out.path()).is_empty());
    }
}

#[test]
fn added_files_stay_inside_the_folder_and_off_the_writers_own() {
    let out = tempfile::tempdir().unwrap();
    let mut writer = CheckpointWriter::create(
        out.path().join("m"),
        &Config::default(),
        Vec::new(),
        &WriteOptions::default(),
    )
    .unwrap();
    for name in [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc/passwd",
        "c:x",
        "config.json",
        "model.safetensors",
    ] {
        assert!(
            matches!(writer.add_file(name, b""), Err(Error::FileName { .. })),
            "{name}"
        );
    }
    writer.add_file("plan.json", b"{}").unwrap();
    writer.add_file("plan.json", b"[]").unwrap();
    let dir = writer.finish().unwrap().dir;
    assert_eq!(fs::read(dir.join("plan.json")).unwrap(), b"[]");
}

#[test]
fn copying_a_tensor_checks_its_form() {
    let dir = one_vector("{}");
    let source = Checkpoint::open(dir.path()).unwrap();
    let create = |dtype: DType, n: usize| {
        let specs = vec![TensorSpec::new("w", dtype, [n])];
        CheckpointWriter::create(
            dir.path().join("m"),
            &Config::default(),
            specs,
            &WriteOptions::default(),
        )
        .unwrap()
    };
    assert!(matches!(
        create(DType::U32, 3).copy_tensor("w", &source),
        Err(Error::WrongDtype { .. })
    ));
    assert!(matches!(
        create(DType::F32, 4).copy_tensor("w", &source),
        Err(Error::WrongShape { .. })
    ));
    let mut writer = create(DType::F32, 3);
    writer.copy_tensor("w", &source).unwrap();
    let copied = Checkpoint::open(writer.finish().unwrap().dir).unwrap();
    assert_eq!(copied.bytes("w").unwrap(), source.bytes("w").unwrap());
}

#[test]
fn one_file_of_tensors_and_bytes_reads_back() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("stats.safetensors");
    let sums = Tensor::new(&[[1f64, 2.], [3., 4.]], &Device::Cpu).unwrap();
    let metadata = BTreeMap::from([
        ("rows".to_string(), "2".to_string()),
        ("a".to_string(), "ü".to_string()),
    ]);
    let tensors = [
        (
            "mask",
            TensorData::Bytes {
                dtype: Dtype::BOOL,
                shape: &[3],
                bytes: &[1, 0, 1],
            },
        ),
        ("sums", TensorData::from(&sums)),
    ];
    write_file(&path, tensors, &metadata).unwrap();
    write_file(&path, tensors, &metadata).unwrap();
    let read = Checkpoint::open_file(&path).unwrap();
    assert_eq!(read.metadata(), &metadata);
    assert_eq!(
        read.tensor("sums", &Device::Cpu)
            .unwrap()
            .to_vec2::<f64>()
            .unwrap(),
        [[1., 2.], [3., 4.]]
    );
    assert_eq!(&read.bytes("mask").unwrap()[..], [1, 0, 1]);
    assert_eq!(listing(out.path()), ["stats.safetensors"]);

    let twice = write_file(&path, [("sums", &sums), ("sums", &sums)], &metadata);
    assert!(matches!(twice, Err(Error::BadDeclaration { tensor, .. }) if tensor == "sums"));
    let infinite = Tensor::new(&[f64::INFINITY], &Device::Cpu).unwrap();
    assert!(matches!(
        write_file(&path, [("x", &infinite)], &metadata),
        Err(Error::NonFinite { .. })
    ));
    assert_eq!(listing(out.path()), ["stats.safetensors"]);
    assert!(Checkpoint::open_file(&path).is_ok());
}

#[test]
fn hand_made_files_and_written_files_have_the_same_bytes() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("w.safetensors");
    let w = Tensor::new(&[1f32, 2.], &Device::Cpu).unwrap();
    write_file(&path, [("w", &w)], &BTreeMap::new()).unwrap();
    let header = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  "#;
    assert_eq!(header.len() % 8, 0);
    assert_eq!(
        fs::read(path).unwrap(),
        safetensors(header, &f32_bytes(&[1.0, 2.0]))
    );
}

#[test]
fn a_tensor_written_in_parts_is_the_same_and_parts_that_do_not_fit_are_refused() {
    let out = tempfile::tempdir().unwrap();
    let values = f32_bytes(&[1.0, 2.0, 3.0, 4.0, 5.0]);
    let spec = |name: &str| TensorSpec::new(name, Dtype::F32, vec![5]);
    let specs = vec![spec("a"), spec("b")];
    let (config, options) = (Config::default(), WriteOptions::default());
    let dst = out.path().join("parts");
    let mut writer = CheckpointWriter::create(&dst, &config, specs, &options).unwrap();
    let parts = |lengths: &[usize]| -> Vec<Result<Vec<u8>, Error>> {
        let mut from = 0;
        let part = |&length: &usize| {
            from += length;
            Ok((0..length)
                .map(|at| values[(from - length + at) % 20])
                .collect())
        };
        lengths.iter().map(part).collect()
    };
    for lengths in [&[8, 8][..], &[8, 16], &[]] {
        let found: usize = lengths.iter().sum();
        let error = writer.write_parts("a", parts(lengths)).unwrap_err();
        let expected = matches!(&error, Error::WrongLength { tensor, expected: 20, found: f, .. } if tensor == "a" && *f == found);
        assert!(expected, "{error}");
    }
    let mut failing = parts(&[8]);
    failing.push(Err(Error::NotWritten {
        path: dst.clone(),
        tensors: vec![],
    }));
    assert!(matches!(
        writer.write_parts("a", failing),
        Err(Error::NotWritten { .. })
    ));
    // The tensor counts as not written, and the next one is whole.
    writer.write_bytes("b", &values).unwrap();
    writer.write_parts("a", parts(&[8, 0, 12])).unwrap();
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(&dst).unwrap();
    for name in ["a", "b"] {
        assert_eq!(checkpoint.bytes(name).unwrap()[..], values[..], "{name}");
    }
}
