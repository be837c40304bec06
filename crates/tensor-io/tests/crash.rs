//! Writers that are killed, and disks that are full. The tests start this test program again as a child process.

#![cfg(unix)]

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tensor_io::{
    Checkpoint, CheckpointWriter, Config, Dtype, Error, TensorData, TensorSpec, WriteOptions,
    atomic, gguf,
};

/// Tells a child where to write; absent in an ordinary test run.
const DESTINATION: &str = "TENSOR_IO_TEST_DESTINATION";

const TENSORS: usize = 24;
const ELEMENTS: usize = 100_000;

fn destination() -> Option<PathBuf> {
    env::var_os(DESTINATION).map(PathBuf::from)
}

/// Writes a checkpoint in which configuration and every element say `generation`.
fn write_generation(dst: &Path, generation: usize) -> Result<(), Error> {
    let mut config = Config::default();
    config.set("generation", generation);
    let specs: Vec<_> = (0..TENSORS)
        .map(|i| TensorSpec::new(format!("layers.{i}.weight"), Dtype::F32, [ELEMENTS]))
        .collect();
    let options = WriteOptions::default()
        .with_overwrite(true)
        .with_max_shard_bytes(5 * 4 * ELEMENTS as u64);
    let mut writer = CheckpointWriter::create(dst, &config, specs, &options)?;
    let bytes = (generation as f32).to_le_bytes().repeat(ELEMENTS);
    for i in (0..TENSORS).rev() {
        writer.write_bytes(&format!("layers.{i}.weight"), &bytes)?;
    }
    writer.finish()?;
    Ok(())
}

/// Opens a checkpoint and checks that all of it is of one generation.
fn read_generation(dir: &Path) -> Result<usize, Error> {
    let checkpoint = Checkpoint::open(dir)?;
    let generation = checkpoint.config().usize("generation")?;
    let bytes = (generation as f32).to_le_bytes().repeat(ELEMENTS);
    assert_eq!(checkpoint.names().count(), TENSORS);
    for name in checkpoint.names() {
        assert!(
            *checkpoint.bytes(name)? == *bytes,
            "{name} is not of generation {generation}"
        );
    }
    Ok(generation)
}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn this_test(name: &str, dst: &Path) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", name, "--nocapture"])
        .env(DESTINATION, dst);
    command
}

#[test]
fn child_writes_generations_until_killed() {
    let Some(dst) = destination() else { return };
    // Killed between two renames, the one before has left the last checkpoint beside the destination.
    let old = dst.with_file_name(".m.tensor-io-old");
    let last = read_generation(&dst).or_else(|_| read_generation(&old));
    let first = last.map_or(1, |generation| generation + 1);
    for generation in first.. {
        write_generation(&dst, generation).unwrap();
    }
}

#[test]
fn a_killed_writer_leaves_a_whole_checkpoint_or_none() {
    let parent = tempfile::tempdir().unwrap();
    let dst = parent.path().join("m");
    let old = parent.path().join(".m.tensor-io-old");
    let mut newest = 0;
    let mut interrupted = 0;
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    for _ in 0..24 {
        let mut child = this_test("child_writes_generations_until_killed", &dst)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // xorshift64: kills between 5 and 305 ms after the start.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let lifetime = Duration::from_millis(5 + random % 300);
        let start = Instant::now();
        while start.elapsed() < lifetime {
            // The destination may be away for the moment between two renames; it is never half there.
            match Checkpoint::open(&dst) {
                Ok(checkpoint) => assert_eq!(checkpoint.names().count(), TENSORS),
                Err(error) => assert!(!dst.exists() || Checkpoint::open(&dst).is_ok(), "{error}"),
            }
            sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let left = listing(parent.path());
        interrupted += usize::from(left.iter().any(|name| name.ends_with("-partial")));
        let whole = if dst.exists() { &dst } else { &old };
        if whole.exists() {
            let generation = read_generation(whole).unwrap();
            assert!(generation >= newest, "{generation} after {newest}");
            newest = generation;
        } else {
            assert_eq!(
                newest, 0,
                "both the old and the new checkpoint are gone: {left:?}"
            );
        }
    }
    assert!(
        newest > 0,
        "no child lived long enough to finish a checkpoint"
    );
    assert!(interrupted > 0, "no child was killed while writing");
    eprintln!("24 children killed, {interrupted} of them while writing; {newest} generations");

    write_generation(&dst, newest + 1).unwrap();
    assert_eq!(read_generation(&dst).unwrap(), newest + 1);
    assert_eq!(listing(parent.path()), ["m"]);
}

#[test]
fn child_meets_a_full_disk() {
    let Some(dst) = destination() else { return };
    let parent = dst.parent().unwrap();
    let before = listing(parent);
    let error = write_generation(&dst, 2).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    println!("refused: {error}");
    assert_eq!(listing(parent), before);
    single_files_meet_a_full_disk(parent);
    assert_eq!(listing(parent), before);
    if before.contains(&"m".to_string()) {
        assert_eq!(read_generation(&dst).unwrap(), 1);
    }
}

/// Every writer of a single file is refused.
fn single_files_meet_a_full_disk(parent: &Path) {
    const BYTES: usize = 8 << 20;
    let bytes = vec![7; BYTES];
    let shape = [BYTES / 4];
    let data = TensorData::Bytes {
        dtype: Dtype::F32,
        shape: &shape,
        bytes: &bytes,
    };
    let of_tensors = tensor_io::write_file(
        parent.join("trace-0.safetensors"),
        [("q", data)],
        &BTreeMap::new(),
    );
    let specs = [gguf::TensorSpec::new(
        "q",
        gguf::BlockLayout::named("f32").unwrap(),
        shape.to_vec(),
    )];
    let of_gguf =
        gguf::Writer::create(parent.join("model.gguf"), &[], &specs).and_then(|mut file| {
            file.write("q", &bytes)?;
            file.finish()
        });
    let of_bytes = atomic::write(parent.join("report.html"), &bytes);
    let of_json = atomic::write_json(parent.join("state.json"), &bytes);
    for refused in [of_tensors, of_gguf.map(drop), of_bytes, of_json] {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }
}

/// Runs `child_meets_a_full_disk` under a shell line that limits it first; None if the shell line was refused.
fn run_limited(limit: &str, program: &[&str], dst: &Path) -> Option<String> {
    let child = this_test("child_meets_a_full_disk", dst);
    let output = Command::new(program[0])
        .args(&program[1..])
        .args([
            "sh",
            "-c",
            &format!("{limit} || exit 77; exec \"$0\" \"$@\""),
        ])
        .arg(child.get_program())
        .args(child.get_args())
        .env(DESTINATION, dst)
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) || text.contains("unshare") {
        eprintln!("skipped: {text}");
        return None;
    }
    assert!(output.status.success(), "{text}");
    Some(text)
}

#[test]
fn a_file_over_the_size_limit_leaves_the_destination_as_it_was() {
    let parent = tempfile::tempdir().unwrap();
    let dst = parent.path().join("m");
    // The limit's unit is half a KiB or one, by shell; either way less than one of the shards.
    let limit = "trap '' XFSZ && ulimit -f 1000";
    for _ in 0..2 {
        if let Some(text) = run_limited(limit, &["env"], &dst) {
            assert!(text.contains("File too large"), "{text}");
        }
        // The second time there is an older checkpoint to keep.
        write_generation(&dst, 1).unwrap();
    }
}

#[test]
fn a_full_disk_leaves_the_destination_as_it_was() {
    let parent = tempfile::tempdir().unwrap();
    // A file system of 4 MiB that only the child sees.
    let limit = format!(
        "mount -t tmpfs -o size=4m none '{}'",
        parent.path().display()
    );
    if let Some(text) = run_limited(&limit, &["unshare", "--mount"], &parent.path().join("m")) {
        assert!(text.contains("No space left"), "{text}");
    }
    assert!(listing(parent.path()).is_empty());
}
