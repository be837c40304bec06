//! The cache that keeps everything, against attention by its definition.

use crate::common::{distance, flat, naive, rng, tensor};
use candle_core::{DType, Device, Tensor};
use kv_lazy::{CacheSet, Error, LayerShape, attention};

fn shape(query_heads: usize, kv_heads: usize, head_dim: usize) -> LayerShape {
    LayerShape {
        query_heads,
        kv_heads,
        head_dim,
        sliding_window: None,
    }
}

#[test]
fn prefill_equals_the_definition_for_all_head_sizes_and_offsets() {
    for (case, &(b, hq, hkv, t, offset, d)) in [
        (1, 1, 1, 1, 0, 8),
        (2, 4, 2, 37, 0, 8),
        (1, 6, 2, 16, 5, 20),
        (1, 3, 3, 130, 0, 32),
        (1, 4, 1, 33, 300, 64),
        (1, 2, 1, 40, 7, 129),
    ]
    .iter()
    .enumerate()
    {
        let mut r = rng(case as u64);
        let q = tensor(&mut r, [b, hq, t, d]);
        let k = tensor(&mut r, [b, hkv, offset + t, d]);
        let v = tensor(&mut r, [b, hkv, offset + t, d]);
        for window in [None, Some(1), Some(9), Some(1000)] {
            let got = attention::prefill(&q, &k, &v, 0.7, offset, window).unwrap();
            let want = naive(&q, &k, &v, 0.7, |i, j| {
                j <= offset + i && window.is_none_or(|w| offset + i < j + w)
            });
            assert!(
                distance(&flat(&got), &want) < 2e-6,
                "case {case} window {window:?}"
            );
        }
    }
}

#[test]
fn decode_after_prefill_equals_the_definition() {
    for (hq, hkv, d, window) in [
        (4, 2, 8, None),
        (3, 1, 32, None),
        (8, 1, 64, Some(11)),
        (5, 5, 36, Some(600)),
    ] {
        let layer = LayerShape {
            sliding_window: window,
            ..shape(hq, hkv, d)
        };
        let mut cache = CacheSet::full(&[layer], 2, DType::F32, &Device::Cpu).unwrap();
        let mut r = rng(7);
        let (mut keys, mut values): (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
        // 700 positions cross the boundary between chunks.
        for tokens in [690, 1, 1, 5, 1, 1, 1] {
            let q = tensor(&mut r, [2, hq, tokens, d]);
            let k = tensor(&mut r, [2, hkv, tokens, d]);
            let v = tensor(&mut r, [2, hkv, tokens, d]);
            let step = cache.begin(tokens).unwrap();
            let got = cache.attend(0, &q, &k, &v, 0.4).unwrap();
            keys.push(k);
            values.push(v);
            let (k, v) = (
                Tensor::cat(&keys, 2).unwrap(),
                Tensor::cat(&values, 2).unwrap(),
            );
            let want = naive(&q, &k, &v, 0.4, |i, j| {
                j <= step.position + i && window.is_none_or(|w| step.position + i < j + w)
            });
            assert!(
                distance(&flat(&got), &want) < 3e-6,
                "{hq} {hkv} {d} {window:?} {tokens}"
            );
        }
        assert_eq!(cache.logical_len(), 700);
        assert_eq!(cache.physical_len(0) == 700, window != Some(11));
    }
}

#[test]
fn half_precision_storage_costs_half_the_bytes_and_only_its_rounding() {
    let mut r = rng(3);
    let q = tensor(&mut r, [1, 4, 1, 32]);
    let k = tensor(&mut r, [1, 2, 64, 32]);
    let v = tensor(&mut r, [1, 2, 64, 32]);
    let long_q = tensor(&mut r, [1, 4, 64, 32]);
    let mut bytes = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut cache = CacheSet::full(&[shape(4, 2, 32)], 1, dtype, &Device::Cpu).unwrap();
        cache.begin(64).unwrap();
        cache.attend(0, &long_q, &k, &v, 0.2).unwrap();
        cache.begin(1).unwrap();
        let (k1, v1) = (k.narrow(2, 0, 1).unwrap(), v.narrow(2, 0, 1).unwrap());
        let got = cache.attend(0, &q, &k1, &v1, 0.2).unwrap();
        let rounded = |x: &Tensor, one: &Tensor| {
            Tensor::cat(&[x, one], 2)
                .unwrap()
                .to_dtype(dtype)
                .unwrap()
                .to_dtype(DType::F32)
                .unwrap()
        };
        let want = naive(&q, &rounded(&k, &k1), &rounded(&v, &v1), 0.2, |_, _| true);
        assert!(distance(&flat(&got), &want) < 2e-6);
        bytes.push(cache.bytes());
    }
    assert_eq!(bytes[0], 2 * bytes[1]);
    assert_eq!(bytes[1], bytes[2]);
}

#[test]
fn decode_of_half_precision_equals_the_definition_for_head_counts_and_sizes_that_fill_no_vectors() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (hq, hkv, d) in [(8, 1, 128), (14, 2, 40), (3, 3, 21), (6, 1, 8)] {
            let mut r = rng(d as u64);
            let q = tensor(&mut r, [1, hq, 1, d]);
            // 600 positions cross the boundary between chunks and fill no block.
            let [k, v] = [0; 2].map(|_| {
                let x = tensor(&mut r, [1, hkv, 600, d]);
                x.to_dtype(dtype).unwrap()
            });
            let got = attention::prefill(&q, &k, &v, 0.2, 599, None).unwrap();
            let [k, v] = [k, v].map(|x| x.to_dtype(DType::F32).unwrap());
            let want = naive(&q, &k, &v, 0.2, |_, _| true);
            assert!(
                distance(&flat(&got), &want) < 3e-6,
                "{dtype:?} {hq} {hkv} {d}"
            );
        }
    }
}

#[test]
fn misuse_is_a_typed_error() {
    let device = Device::Cpu;
    assert!(matches!(
        CacheSet::full(&[shape(3, 2, 8)], 1, DType::F32, &device),
        Err(Error::HeadGroups {
            layer: 0,
            query_heads: 3,
            kv_heads: 2
        })
    ));
    assert!(matches!(
        CacheSet::full(&[shape(2, 2, 8)], 1, DType::U8, &device),
        Err(Error::DType { .. })
    ));
    let layers = [shape(2, 2, 8), shape(0, 0, 8)];
    let mut cache = CacheSet::full(&layers, 1, DType::F32, &device).unwrap();
    let x = tensor(&mut rng(0), [1, 2, 3, 8]);
    let attend = |cache: &mut CacheSet, layer| cache.attend(layer, &x, &x, &x, 1.0);
    assert!(matches!(attend(&mut cache, 0), Err(Error::Step { .. })));
    cache.begin(3).unwrap();
    assert!(matches!(
        attend(&mut cache, 1),
        Err(Error::Layer {
            without_heads: true,
            ..
        })
    ));
    assert!(matches!(
        attend(&mut cache, 2),
        Err(Error::Layer {
            without_heads: false,
            ..
        })
    ));
    assert!(matches!(cache.begin(1), Err(Error::Step { layer: 0, .. })));
    attend(&mut cache, 0).unwrap();
    assert!(matches!(attend(&mut cache, 0), Err(Error::Step { .. })));
    cache.begin(2).unwrap();
    assert!(matches!(
        attend(&mut cache, 0),
        Err(Error::Shape { what: "q", .. })
    ));
    cache.reset();
    cache.begin(3).unwrap();
    attend(&mut cache, 0).unwrap();
    assert!(matches!(
        cache.begin_at(0, 3),
        Err(Error::NotReset { held: 3 })
    ));
    let nan = (&x * f64::NAN).unwrap();
    cache.begin(3).unwrap();
    assert!(matches!(
        cache.attend(0, &nan, &x, &x, 1.0),
        Err(Error::NonFinite {
            layer: 0,
            sequence: 0,
            head: 0
        })
    ));
}
