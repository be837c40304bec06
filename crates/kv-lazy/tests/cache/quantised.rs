//! Quantised storage, against a second implementation of its formats and of which tokens are quantised when.

use crate::common::{Qkv, all_policies, distance, flat, naive, named, run, steps, with};
use candle_core::{DType, Device, Tensor};
use half::f16;
use kv_lazy::{
    Budget, CacheConfig, CacheSet, Error, LayerShape, NumberFormat, Prompt, StorageConfig,
};

pub(crate) fn shape(head_dim: usize) -> LayerShape {
    LayerShape {
        query_heads: 6,
        kv_heads: 2,
        head_dim,
        sliding_window: None,
    }
}

pub(crate) fn build(shape: LayerShape, config: &CacheConfig, batch: usize) -> CacheSet {
    CacheSet::new(&[shape], batch, DType::F32, &Device::Cpu, config).unwrap()
}

/// The normalised Walsh–Hadamard matrix times blocks of `row`, by its definition.
fn rotated(row: &[f64]) -> Vec<f64> {
    let b = 1 << row.len().trailing_zeros();
    let sign = |i: usize, j: usize| {
        if (i & j).count_ones().is_multiple_of(2) {
            1.0
        } else {
            -1.0
        }
    };
    row.chunks(b)
        .flat_map(|block| {
            (0..b).map(move |i| {
                let sum: f64 = block.iter().enumerate().map(|(j, x)| sign(i, j) * x).sum();
                sum / (b as f64).sqrt()
            })
        })
        .collect()
}

/// A group quantised and restored.
pub(crate) fn through(x: &[f64], bits: i32) -> Vec<f64> {
    let half = |x: f64| f16::from_f64(x).to_f64();
    if bits == 8 {
        let s = half(x.iter().fold(0.0, |m: f64, x| m.max(x.abs())) / 127.0);
        let code = |x: f64| {
            if s == 0.0 {
                0.0
            } else {
                (x / s).round_ties_even()
            }
        };
        return x
            .iter()
            .map(|&x| s * code(x).clamp(-127.0, 127.0))
            .collect();
    }
    let (least, most) = (
        x.iter().copied().fold(f64::INFINITY, f64::min),
        x.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    );
    let lo = half(least);
    let s = half((most - lo) / 15.0);
    let code = |x: f64| {
        if s == 0.0 {
            0.0
        } else {
            ((x - lo) / s).round_ties_even()
        }
    };
    x.iter()
        .map(|&x| lo + s * code(x).clamp(0.0, 15.0))
        .collect()
}

/// A token after it was quantised by the defaults for `bits`, or by f16 for 16.
pub(crate) fn stored(row: &[f32], bits: i32, group: usize) -> Vec<f32> {
    let half: Vec<f64> = row.iter().map(|&x| f16::from_f32(x).to_f64()).collect();
    let restored: Vec<f64> = match bits {
        16 => half,
        8 => half.chunks(group).flat_map(|x| through(x, 8)).collect(),
        _ => rotated(
            &rotated(&half)
                .chunks(group)
                .flat_map(|x| through(x, 4))
                .collect::<Vec<_>>(),
        ),
    };
    restored.into_iter().map(|x| x as f32).collect()
}

/// Which tokens of a row are quantised, by the rule: the first four never, the others 32 at a time once `residual` newer ones are there.
#[derive(Default, Clone)]
pub(crate) struct Residence {
    sinks: Vec<u32>,
    recent: Vec<u32>,
    quantised: Vec<u32>,
}

impl Residence {
    pub(crate) fn append(&mut self, ids: std::ops::Range<u32>) {
        for id in ids {
            if id < 4 {
                self.sinks.push(id);
            } else {
                self.recent.push(id);
            }
        }
    }
    pub(crate) fn keep(&mut self, held: &[u32]) {
        for part in [&mut self.sinks, &mut self.recent, &mut self.quantised] {
            part.retain(|id| held.contains(id));
        }
    }
    pub(crate) fn settle(&mut self, residual: usize) {
        while self.recent.len() >= residual + 32 {
            self.quantised.extend(self.recent.drain(..32));
        }
    }
    pub(crate) fn is_quantised(&self, id: u32) -> bool {
        self.quantised.contains(&id)
    }
}

/// Runs `all` through a cache of `storage` and compares each step with attention by its definition over what must be stored.
fn compare(
    shape: LayerShape,
    config: &CacheConfig,
    bits: (i32, i32),
    residual: usize,
    all: &[Qkv],
) {
    let d = shape.head_dim;
    let group = (8..=64)
        .rev()
        .step_by(8)
        .find(|g| d.is_multiple_of(*g))
        .unwrap();
    let batch = all[0].0.dim(0).unwrap();
    let mut cache = build(shape, config, batch);
    let rows = batch * 2;
    let mut residence = vec![Residence::default(); rows];
    // Every token that ever was, per row: in f16 and quantised.
    let mut keys: Vec<Vec<[Vec<f32>; 2]>> = vec![Vec::new(); rows];
    let mut values = keys.clone();
    let mut quantised = false;
    for (q, k, v) in all {
        let t = q.dim(2).unwrap();
        let before: Vec<Vec<u32>> = (0..rows)
            .map(|row| cache.positions(0, row / 2, row % 2).to_vec())
            .collect();
        let step = cache.begin(t).unwrap();
        let out = cache.attend(0, q, k, v, 0.3).unwrap();
        let (k, v) = (flat(k), flat(v));
        for row in 0..rows {
            let forms = |x: &[f32], bits| [16, bits].map(|bits| stored(x, bits, group));
            let new = |x: &[f32], bits| -> Vec<_> {
                let rows = x[row * t * d..(row + 1) * t * d].chunks(d);
                rows.map(|x| forms(x, bits)).collect()
            };
            keys[row].extend(new(&k, bits.0));
            values[row].extend(new(&v, bits.1));
            let first = step.position as u32;
            let after = cache.positions(0, row / 2, row % 2).to_vec();
            // Streaming makes room before a step, the others after it.
            let ahead = config.decode.name() == "streaming" && step.position > 0;
            let held = if ahead { &after } else { &before[row] };
            residence[row].keep(held);
            residence[row].append(first..first + t as u32);
            let part = |all: &[[Vec<f32>; 2]]| -> Tensor {
                let stored = all.iter().zip(0u32..).flat_map(|(forms, id)| {
                    let form = usize::from(residence[row].is_quantised(id));
                    forms[form].iter().copied()
                });
                let shape = (1, 1, all.len(), d);
                Tensor::from_vec(stored.collect(), shape, &Device::Cpu).unwrap()
            };
            let (k, v) = (part(&keys[row]), part(&values[row]));
            let heads = |x: &Tensor| {
                x.narrow(0, row / 2, 1)
                    .unwrap()
                    .narrow(1, row % 2 * 3, 3)
                    .unwrap()
            };
            let want = naive(&heads(q), &k, &v, 0.3, |i, j| {
                let new = j >= first as usize;
                j <= first as usize + i && (new || held.contains(&(j as u32)))
            });
            let far = distance(&flat(&heads(&out)), &want);
            assert!(
                far < 3e-5,
                "{config:?} d {d} step {step:?} row {row}: {far}"
            );
            residence[row].keep(&after);
            residence[row].settle(residual);
            quantised |= !residence[row].quantised.is_empty();
        }
    }
    assert!(quantised);
}

/// A prompt, steps of one token and of several: 217 tokens.
pub(crate) fn tokens() -> Vec<usize> {
    [&[150][..], &[1; 25], &[20, 7, 3], &[1; 12]].concat()
}

#[test]
fn a_quantised_full_cache_equals_attention_over_quantised_and_restored_tokens() {
    for (d, storage, bits) in [
        (64, StorageConfig::int8(), (8, 8)),
        (64, StorageConfig::k8v4(), (8, 4)),
        (64, StorageConfig::int4(), (4, 4)),
        (128, StorageConfig::int4(), (4, 4)),
        (96, StorageConfig::int4(), (4, 4)),
        (80, StorageConfig::k8v4(), (8, 4)),
        (40, StorageConfig::int8(), (8, 8)),
        (8, StorageConfig::int4(), (4, 4)),
        (
            64,
            StorageConfig::new(NumberFormat::F16, NumberFormat::Int4),
            (16, 4),
        ),
        (
            64,
            StorageConfig::new(NumberFormat::Int4, NumberFormat::F16),
            (4, 16),
        ),
    ] {
        let config = with(named("full", 1), |c| c.storage = storage);
        compare(
            shape(d),
            &config,
            bits,
            32,
            &steps(d as u64, 1, shape(d), &tokens()),
        );
    }
}

#[test]
fn evicting_from_quantised_storage_equals_masking_for_every_policy() {
    for config in all_policies(100) {
        for (storage, bits) in [
            (StorageConfig::int4(), (4, 4)),
            (StorageConfig::int8(), (8, 8)),
        ] {
            if config.keeps_all() {
                continue;
            }
            let config = with(config.clone(), |c| {
                c.storage = storage;
                c.prompt = Some(Prompt::Evictable);
            });
            // H2O protects half the budget.
            let residual = if config.decode.name() == "h2o" {
                50
            } else {
                32
            };
            let all = steps(5, 1, shape(16), &tokens());
            compare(shape(16), &config, bits, residual, &all);
        }
    }
    // Where the policy protects more, more stays in f16.
    let config = with(named("random", 150), |c| {
        c.recent = 70;
        c.storage = StorageConfig::k8v4();
    });
    compare(
        shape(32),
        &config,
        (8, 4),
        70,
        &steps(6, 1, shape(32), &tokens()),
    );
}

#[test]
fn tokens_are_quantised_once_and_stay_bit_identical_through_evictions() {
    for name in ["streaming", "random"] {
        let full = with(named("full", 1), |c| c.storage = StorageConfig::int4());
        let evicting = with(named(name, 110), |c| {
            c.storage = StorageConfig::int4();
            c.prompt = Some(Prompt::Evictable);
        });
        let mut caches = [full, evicting].map(|config| {
            CacheSet::external(&[shape(64)], 1, DType::F32, &Device::Cpu, &config).unwrap()
        });
        let all = steps(7, 1, shape(64), &tokens());
        let mut seen = 0;
        for (_, k, v) in &all {
            let [full, evicting] = &mut caches;
            let before = evicting.positions(0, 0, 1).to_vec();
            let parts = [&mut *full, &mut *evicting].map(|cache| {
                cache.begin(k.dim(2).unwrap()).unwrap();
                let (k, v) = cache.extend(0, k, v).unwrap();
                let row = |x: &Tensor| flat(&x.narrow(1, 1, 1).unwrap());
                (row(&k), row(&v))
            });
            // Positions that the tensors belong to: those before, or after what was evicted to make room.
            let after = evicting.positions(0, 0, 1).to_vec();
            let n = parts[1].0.len() / 64;
            let first = (full.logical_len() - k.dim(2).unwrap()) as u32;
            let old = if name == "streaming" { after } else { before };
            let ids: Vec<u32> = old.into_iter().filter(|&id| id < first).collect();
            if name == "random" {
                assert_eq!(ids.len() + k.dim(2).unwrap(), n);
            }
            // Far enough back in both to be quantised in both.
            for (slot, &id) in ids.iter().enumerate() {
                if id >= 4 && slot + 64 < ids.len() && id + 64 < first {
                    let at = |part: &[f32], i: usize| part[i * 64..(i + 1) * 64].to_vec();
                    assert_eq!(at(&parts[1].0, slot), at(&parts[0].0, id as usize));
                    assert_eq!(at(&parts[1].1, slot), at(&parts[0].1, id as usize));
                    seen += 1;
                }
            }
        }
        assert!(seen > 20, "{name}: {seen}");
    }
}

#[test]
fn bytes_are_those_of_codes_scales_and_what_stays_in_f16() {
    let layer = LayerShape {
        query_heads: 3,
        kv_heads: 3,
        head_dim: 64,
        sliding_window: None,
    };
    // (keys, values, residual, sinks, bytes a layer of 4096 tokens and 3 heads)
    for (storage, residual, sinks, want) in [
        ("f16", 0, 0, 3_145_728),
        ("int8", 0, 0, 1_622_016),
        ("int4", 0, 0, 884_736),
        ("int4", 64, 4, 922_272),
        ("k8v4", 64, 4, 1_284_792),
    ] {
        let mut storage: StorageConfig = storage.parse().unwrap();
        (storage.residual, storage.sinks) = (residual, sinks);
        let config = with(named("full", 1), |c| c.storage = storage);
        let mut cache = build(layer, &config, 1);
        let all = steps(8, 1, layer, &[4096]);
        cache.begin(4096).unwrap();
        cache.extend(0, &all[0].1, &all[0].2).unwrap();
        // Sinks are not counted among the newest, so up to a block more is still in f16.
        let more = (4096 - sinks - residual) % 32;
        let per_token = |bits: f64| 64.0 * bits / 8.0;
        let exact = 2.0 * per_token(16.0) * 3.0 * more as f64;
        let packed = (want as f64 - 3.0 * (sinks + residual) as f64 * 256.0)
            / (4096 - sinks - residual) as f64;
        let want = want as f64 + exact - packed * more as f64;
        // Room for the next tokens in f16.
        let room = if storage.is_quantised() {
            3 * 2 * 64 * 2 * 64
        } else {
            0
        };
        let got = cache.bytes();
        assert!(
            got as f64 >= want && got as f64 <= want + room as f64,
            "{storage:?} {got} {want}"
        );
        assert!(cache.peak_bytes() >= got);
    }
}

#[test]
fn quantised_caches_do_not_depend_on_batches_or_threads_and_restore_exactly() {
    let shape = shape(32);
    let mut configs = Vec::new();
    for storage in ["int8", "k8v4", "int4"] {
        for name in ["full", "h2o", "lazy", "r-kv", "streaming"] {
            // Enough tokens and few enough in f16 for blocks to be quantised.
            configs.push(with(named(name, 120), |c| {
                c.storage = storage.parse().unwrap();
                c.storage.residual = 8;
            }));
        }
    }
    configs.push(with(named("full", 1), |c| {
        c.storage = "int4-per-channel".parse().unwrap()
    }));
    for config in configs {
        let both = steps(9, 2, shape, &tokens());
        let mut cache = build(shape, &config, 2);
        let want = run(&mut cache, &both[..30]);
        let floats = with(config.clone(), |c| c.storage = "f16".parse().unwrap());
        let mut floats = build(shape, &floats, 2);
        run(&mut floats, &both[..30]);
        assert!(cache.bytes() < floats.bytes(), "{config:?}");
        let snapshot = cache.snapshot();
        let rest = run(&mut cache, &both[30..]);
        cache.restore(&snapshot).unwrap();
        assert_eq!(run(&mut cache, &both[30..]), rest, "{config:?}");
        for threads in [1, 4] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            cache.reset();
            let got = pool.install(|| run(&mut cache, &both[..30]));
            assert_eq!(got, want, "{threads} threads, {config:?}");
        }
        for b in 0..2 {
            let part = |x: &Tensor| x.narrow(0, b, 1).unwrap();
            let alone: Vec<_> = both[..30]
                .iter()
                .map(|(q, k, v)| (part(q), part(k), part(v)))
                .collect();
            let mut one = build(shape, &config, 1);
            for (all, one) in want.iter().zip(run(&mut one, &alone)) {
                assert_eq!(all[b * one.len()..][..one.len()], one[..], "{config:?}");
            }
        }
    }
}

/// The channels of 32 keys share a scale; values are as elsewhere.
#[test]
fn keys_quantised_along_channels_are_closer_than_along_tokens_where_channels_differ() {
    let shape = shape(64);
    let all: Vec<Qkv> = steps(10, 1, shape, &[200, 1, 1, 5])
        .into_iter()
        .map(|(q, k, v)| {
            let channels: Vec<f32> = (0..64)
                .map(|c| if c % 16 == 3 { 12.0 } else { 1.0 })
                .collect();
            let channels = Tensor::from_vec(channels, (1, 1, 1, 64), &Device::Cpu).unwrap();
            ((q * 0.2).unwrap(), k.broadcast_mul(&channels).unwrap(), v)
        })
        .collect();
    let outputs = |storage: &str| {
        let config = with(named("full", 1), |c| {
            c.storage = storage.parse().unwrap();
            c.storage.rotate_keys = Some(false);
            c.storage.values = Some(NumberFormat::F16);
        });
        run(&mut build(shape, &config, 1), &all)
    };
    let (exact, tokens, channels) = (outputs("f16"), outputs("int4"), outputs("int4-per-channel"));
    for step in 1..4 {
        let far = [&tokens, &channels].map(|x| distance(&x[step], &exact[step]));
        assert!(far[1] < 0.5 * far[0] && far[1] > 0.0, "{far:?}");
    }
}

#[test]
fn what_cannot_be_quantised_is_a_typed_error_and_changes_nothing() {
    let shape = shape(64);
    let config = with(named("full", 1), |c| c.storage = StorageConfig::int4());
    let mut cache = build(shape, &config, 1);
    let all = steps(11, 1, shape, &[40, 1, 1]);
    run(&mut cache, &all[..1]);
    let before = cache.bytes();
    for bad in [f64::NAN, f64::INFINITY, 1e9] {
        let (q, k, v) = &all[1];
        cache.begin(1).unwrap();
        let error = cache.attend(0, q, &(k * bad).unwrap(), v, 0.3).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Quantise {
                    layer: 0,
                    sequence: 0,
                    head: 0,
                    what: "keys"
                }
            ),
            "{error}"
        );
        assert_eq!((cache.physical_len(0), cache.bytes()), (40, before));
        let error = cache.attend(0, q, k, &(v * bad).unwrap(), 0.3).unwrap_err();
        assert!(
            matches!(error, Error::Quantise { what: "values", .. }),
            "{error}"
        );
        cache.attend(0, q, k, v, 0.3).unwrap();
        cache.reset();
        run(&mut cache, &all[..1]);
    }
    // Large, but within what a scale in f16 can say.
    let (q, k, v) = &all[1];
    let large = [k, v].map(|x| {
        ((x / x
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap() as f64)
            .unwrap()
            * 3e4)
            .unwrap()
    });
    cache.begin(1).unwrap();
    cache
        .attend(0, &(q * 1e-4).unwrap(), &large[0], &large[1], 0.3)
        .unwrap();
    let refused = |config: CacheConfig, shape: LayerShape| {
        let error = CacheSet::new(&[shape], 1, DType::F32, &Device::Cpu, &config).unwrap_err();
        assert!(matches!(error, Error::Setting { .. }), "{error}");
    };
    let per_channel = |name: &str| {
        with(named(name, 40), |c| {
            c.storage = "int4-per-channel".parse().unwrap()
        })
    };
    refused(per_channel("h2o"), shape);
    let sliding = LayerShape {
        sliding_window: Some(50),
        ..shape
    };
    refused(per_channel("full"), sliding);
    let odd = LayerShape {
        head_dim: 36,
        ..shape
    };
    refused(config.clone(), odd);
    refused(
        with(named("full", 1), |c| c.layer_storage = vec![]),
        LayerShape {
            head_dim: 0,
            ..shape
        },
    );
    let two = with(config, |c| c.layer_storage = vec![StorageConfig::int8()]);
    let error = CacheSet::new(&[shape; 2], 1, DType::F32, &Device::Cpu, &two).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Setting {
                name: "layer-storage",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn layers_may_differ_in_storage_and_snapshots_of_other_storage_are_refused() {
    let shapes = [shape(64); 3];
    let config = with(
        CacheConfig::new("full".parse().unwrap(), Budget::Tokens(1)),
        |c| {
            c.layer_storage = ["f32", "int8", "int4"]
                .map(|name| name.parse().unwrap())
                .to_vec();
        },
    );
    let mut cache = CacheSet::new(&shapes, 1, DType::F32, &Device::Cpu, &config).unwrap();
    let all = steps(12, 1, shapes[0], &[300, 1]);
    let mut outputs = Vec::new();
    for (q, k, v) in &all {
        cache.begin(q.dim(2).unwrap()).unwrap();
        outputs = (0..3)
            .map(|layer| flat(&cache.attend(layer, q, k, v, 0.1).unwrap()))
            .collect();
    }
    let far = |layer: usize| distance(&outputs[layer], &outputs[0]);
    assert!(
        far(1) > 0.0 && far(1) < far(2) && far(2) < 0.2,
        "{} {}",
        far(1),
        far(2)
    );
    let other = CacheSet::new(
        &shapes,
        1,
        DType::F32,
        &Device::Cpu,
        &with(config, |c| c.layer_storage[1] = StorageConfig::int4()),
    );
    assert!(matches!(
        cache.restore(&other.unwrap().snapshot()),
        Err(Error::Snapshot { .. })
    ));
}
