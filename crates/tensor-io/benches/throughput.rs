//! Bytes per second of reading and writing, beside the rate at which memory and disk copy the same bytes. Times to
//! write include bringing everything to disk.

use std::fs::{self, File};
use std::hint::black_box;

use candle_core::{DType, Device};
use criterion::{BatchSize, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use tensor_io::{Checkpoint, CheckpointWriter, Config, Dtype, TensorSpec, WriteOptions};

const ELEMENTS: usize = 32 << 20;

/// A checkpoint with one tensor each of bf16, f16 and f32.
fn source(dir: &std::path::Path) -> Checkpoint {
    let dtypes = [Dtype::BF16, Dtype::F16, Dtype::F32];
    let specs = dtypes
        .iter()
        .map(|dtype| TensorSpec::new(dtype.to_string(), *dtype, [4096, ELEMENTS / 4096]))
        .collect();
    let mut writer = CheckpointWriter::create(
        dir.join("source"),
        &Config::default(),
        specs,
        &WriteOptions::default(),
    )
    .expect("temporary folder");
    for dtype in dtypes {
        let bytes: Vec<u8> = (0..ELEMENTS * dtype.bitsize() / 8)
            // Small exponents everywhere: all values are finite.
            .map(|i| (i % 61) as u8)
            .collect();
        writer
            .write_bytes(&dtype.to_string(), &bytes)
            .expect("temporary folder");
    }
    let written = writer.finish().expect("temporary folder");
    Checkpoint::open(written.dir).expect("just written")
}

fn read(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let source = source(dir.path());
    let mut group = c.benchmark_group("read");
    for (name, dtype) in [
        ("BF16", DType::F32),
        ("F16", DType::F32),
        ("F32", DType::F32),
        ("F32", DType::BF16),
        ("BF16", DType::BF16),
    ] {
        let stored = source.bytes(name).expect("present").len();
        group.throughput(Throughput::Bytes(
            (stored + ELEMENTS * dtype.size_in_bytes()) as u64,
        ));
        group.bench_function(format!("{name} as {}", dtype.as_str()), |b| {
            b.iter(|| source.tensor_as(black_box(name), dtype, &Device::Cpu));
        });
    }
    let bytes = source.bytes("F32").expect("present");
    group.throughput(Throughput::Bytes(2 * bytes.len() as u64));
    group.bench_function("bound: memory copy of F32", |b| {
        b.iter(|| black_box(&bytes).to_vec())
    });
}

fn write(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let source = source(dir.path());
    let specs: Vec<_> = source
        .names()
        .map(|name| {
            TensorSpec::new(
                name,
                source.info(name).expect("present").dtype,
                [4096, ELEMENTS / 4096],
            )
        })
        .collect();
    let mut group = c.benchmark_group("write");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.throughput(Throughput::Bytes(source.total_bytes()));
    // The last copy is removed outside the measured time.
    let dst = dir.path().join("copy");
    let remove_copy = || drop(fs::remove_dir_all(&dst));
    let copy = |()| {
        let options = WriteOptions::default();
        let mut writer = CheckpointWriter::create(&dst, source.config(), specs.clone(), &options)
            .expect("removed");
        for name in source.names() {
            writer.copy_tensor(name, &source).expect("declared alike");
        }
        writer.finish().expect("temporary folder")
    };
    group.bench_function("copy of a checkpoint", |b| {
        b.iter_batched(remove_copy, copy, BatchSize::PerIteration);
    });
    remove_copy();

    let plain = dir.path().join("plain");
    let remove_plain = || drop(fs::remove_file(&plain));
    let copy_plain = |()| {
        fs::copy(&source.shards()[0], &plain).expect("temporary folder");
        File::open(&plain)
            .and_then(|file| file.sync_all())
            .expect("temporary folder");
    };
    group.bench_function("bound: copy of its file by the system, and sync", |b| {
        b.iter_batched(remove_plain, copy_plain, BatchSize::PerIteration);
    });
}

criterion_group!(benches, read, write);
criterion_main!(benches);
