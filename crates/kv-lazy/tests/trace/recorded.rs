//! Traces in files, and what a recorder hands back.

use crate::{lazily, live, planted, shape};
use candle_core::{DType, Device, Tensor};
use kv_lazy::attention::Scores;
use kv_lazy::trace::replay::{ReplayOptions, replay};
use kv_lazy::trace::{Recorder, TraceMeta, file};
use kv_lazy::{Budget, CacheConfig, CacheSet, Error};
use std::sync::Arc;
use tensor_io::NoProgress;

#[test]
fn a_trace_survives_its_file_up_to_f16() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.safetensors");
    let mut trace = planted().trace(2);
    trace.segments = Some(trace.tokens.iter().map(|t| t / 100).collect());
    file::write(&trace, &path).unwrap();
    let read = file::read(&path).unwrap();
    assert_eq!(
        (&read.meta, &read.tokens, &read.segments),
        (&trace.meta, &trace.tokens, &trace.segments)
    );
    let (a, b) = (&read.layers[&0], &trace.layers[&0]);
    let far =
        a.k.iter()
            .zip(&b.k)
            .map(|(x, y)| (x - y).abs() / y.abs().max(1.0))
            .fold(0.0, f32::max);
    assert!(far > 0.0 && far < 1e-3);
    // What was read back is already rounded and stays as it is.
    file::write(&read, &path).unwrap();
    assert_eq!(file::read(&path).unwrap(), read);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn broken_trace_files_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("broken.safetensors");
    assert!(matches!(file::read(&path), Err(Error::Io { .. })));
    std::fs::write(&path, b"not a trace at all").unwrap();
    assert!(matches!(file::read(&path), Err(Error::Trace { .. })));
    let mut trace = planted().trace(2);
    let mut layer = (*trace.layers[&0]).clone();
    layer.k[70] = f32::NAN;
    trace.layers.insert(0, Arc::new(layer.clone()));
    let error = file::write(&trace, &path).unwrap_err().to_string();
    assert!(
        error.contains("k is not finite at head 0, position 2"),
        "{error}"
    );
    layer.k[70] = 1e6;
    trace.layers.insert(0, Arc::new(layer));
    assert!(
        file::write(&trace, &path)
            .unwrap_err()
            .to_string()
            .contains("does not fit f16")
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"not a trace at all");
    trace.meta.prompt_len = 1000;
    assert!(
        trace
            .check("x")
            .unwrap_err()
            .to_string()
            .contains("prompt of 1000")
    );
    assert!(matches!(
        replay(
            &trace,
            9,
            &CacheConfig::new("full".parse().unwrap(), Budget::Tokens(1)),
            &ReplayOptions::default(),
            &NoProgress
        ),
        Err(Error::Trace { .. })
    ));
}

#[test]
fn a_recorder_hands_back_what_the_cache_was_given() {
    let trace = planted().trace(4);
    let config = CacheConfig::new(lazily(8), Budget::Tokens(64));
    let shapes = [shape(&trace.layers[&0])];
    let mut cache = CacheSet::new(&shapes, 1, DType::F32, &Device::Cpu, &config).unwrap();
    cache.record(Recorder::new()).unwrap();
    live(&trace, &mut cache);
    assert!(matches!(
        cache.record(Recorder::new()),
        Err(Error::NotReset { .. })
    ));
    let recorder = cache.take_recorder().unwrap();
    let meta = TraceMeta::new("recorded", trace.meta.prompt_len, 0.0);
    let recorded = recorder.into_trace(meta, trace.tokens.clone()).unwrap();
    assert_eq!(recorded.meta.scale, trace.meta.scale);
    let (a, b) = (&recorded.layers[&0], &trace.layers[&0]);
    for (x, y) in
        a.q.iter()
            .chain(&a.k)
            .chain(&a.v)
            .zip(b.q.iter().chain(&b.k).chain(&b.v))
    {
        assert!((x - y).abs() <= 1e-3 * y.abs().max(1e-3));
    }
    let mut pair = CacheSet::full(&shapes, 2, DType::F32, &Device::Cpu).unwrap();
    assert!(pair.record(Recorder::new()).is_err());
    assert!(
        Recorder::new()
            .into_trace(TraceMeta::new("x", 1, 1.0), vec![0])
            .is_err()
    );
}

#[test]
fn what_a_recorder_hands_back_fills_another_cache_exactly() {
    let trace = planted().trace(4);
    let layer = &trace.layers[&0];
    let shapes = [shape(layer)];
    let full = || CacheSet::full(&shapes, 1, DType::F32, &Device::Cpu).unwrap();
    let tensor = |numbers: &[f32], heads| {
        let shape = (1, heads, layer.tokens, layer.head_dim);
        Tensor::from_slice(numbers, shape, &Device::Cpu).unwrap()
    };
    // Beyond f16, and with logits that are capped.
    let k: Vec<f32> = layer.k.iter().map(|x| 1e5 * x).collect();
    let (q, k, v) = (
        tensor(&layer.q, layer.query_heads),
        tensor(&k, layer.kv_heads),
        tensor(&layer.v, layer.kv_heads),
    );
    let scores = Scores {
        scale: 1e-5 * trace.meta.scale,
        softcap: Some(30.0),
    };
    let mut cache = full();
    cache.record(Recorder::new()).unwrap();
    cache.begin(layer.tokens).unwrap();
    cache.attend(0, &q, &k, &v, scores).unwrap();
    let recorder = cache.take_recorder().unwrap();
    let refused = recorder
        .clone()
        .into_trace(trace.meta.clone(), trace.tokens.clone());
    assert!(refused.unwrap_err().to_string().contains("caps attention"));
    let layers = recorder.into_layers().unwrap();
    assert_eq!(
        (layers.len(), layers[0].layer, layers[0].scores),
        (1, 0, scores)
    );
    let mut fed = full();
    fed.begin(layer.tokens).unwrap();
    let given = &layers[0];
    fed.feed(0, &given.q, &given.k, &given.v, given.scores)
        .unwrap();
    let step = |tensor: &Tensor| tensor.narrow(2, 7, 1).unwrap();
    let next = |cache: &mut CacheSet| {
        cache.begin(1).unwrap();
        let out = cache.attend(0, &step(&q), &step(&k), &step(&v), scores);
        out.unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
    };
    assert_eq!(next(&mut cache), next(&mut fed));
}
