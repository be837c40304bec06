//! What reading and writing cost in resident memory. One test to a process: it looks at the process as a whole.
#![cfg(target_os = "linux")]

use std::fs;

use tensor_io::{Checkpoint, CheckpointWriter, Config, Dtype, TensorSpec, WriteOptions};

const TENSORS: usize = 16;
const TENSOR_BYTES: usize = 8 << 20;
const ROWS: usize = 64;

/// Resident memory of this process, mapped files included.
fn resident_bytes() -> usize {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[test]
fn a_copy_holds_about_one_tensor_and_released_tensors_and_rows_hold_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..TENSORS).map(|i| format!("t{i}")).collect();
    let specs: Vec<_> = names
        .iter()
        .map(|name| TensorSpec::new(name, Dtype::F32, [ROWS, TENSOR_BYTES / 4 / ROWS]))
        .collect();
    let create = |name: &str| {
        CheckpointWriter::create(
            dir.path().join(name),
            &Config::default(),
            specs.clone(),
            &WriteOptions::default(),
        )
        .unwrap()
    };
    let mut writer = create("source");
    for (i, name) in names.iter().enumerate() {
        writer
            .write_bytes(name, &vec![i as u8; TENSOR_BYTES])
            .unwrap();
    }
    let source = Checkpoint::open(writer.finish().unwrap().dir).unwrap();

    let start = resident_bytes();
    let sum: u64 = names
        .iter()
        .flat_map(|name| {
            source
                .bytes(name)
                .unwrap()
                .iter()
                .copied()
                .step_by(1024)
                .collect::<Vec<_>>()
        })
        .map(u64::from)
        .sum();
    assert_eq!(
        sum,
        (TENSOR_BYTES / 1024 * (0..TENSORS).sum::<usize>()) as u64
    );
    let read = resident_bytes();
    assert!(
        read > start + TENSORS * TENSOR_BYTES * 9 / 10,
        "{start} {read}"
    );
    source.release(names.iter().map(String::as_str));
    let released = resident_bytes();
    assert!(released < start + TENSOR_BYTES, "{start} {released}");
    assert!(source.bytes("t7").unwrap().iter().all(|&byte| byte == 7));
    let whole = resident_bytes();
    source.release_rows("t7", ROWS / 4..ROWS);
    source.release_rows("t7", 0..ROWS + 1);
    source.release_rows("none", 0..1);
    let quarter = resident_bytes();
    assert!(quarter + TENSOR_BYTES * 2 / 3 < whole, "{whole} {quarter}");
    assert!(quarter + TENSOR_BYTES * 5 / 6 > whole, "{whole} {quarter}");
    assert!(source.bytes("t7").unwrap().iter().all(|&byte| byte == 7));
    source.release(["t7"]);

    let mut peak = 0;
    let mut writer = create("copy");
    for name in &names {
        writer.copy_tensor(name, &source).unwrap();
        peak = peak.max(resident_bytes());
    }
    writer.finish().unwrap();
    assert!(peak < start + 2 * TENSOR_BYTES, "{start} {peak}");
}
