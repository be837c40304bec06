//! The cache of one layer, as an attention block uses it.

use crate::common::{named, steps, with};
use candle_core::{DType, Device, Tensor};
use kv_lazy::{
    Budget, CacheConfig, CacheSet, Error, LayerCache, LayerShape, LayerSnapshot, Prompt,
    bottom_right_mask,
};

const SHAPE: LayerShape = LayerShape {
    query_heads: 4,
    kv_heads: 2,
    head_dim: 16,
    sliding_window: None,
};

fn tokens() -> Vec<usize> {
    [vec![30], vec![1; 40]].concat()
}

fn bits(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn attend_on_single_layers_equals_a_set_of_all_layers() {
    for name in ["random", "keydiff", "lazy", "snapkv", "full", "vase-dkv"] {
        let config = named(name, 24);
        let mut set = CacheSet::new(&[SHAPE; 2], 2, DType::F32, &Device::Cpu, &config).unwrap();
        let mut alone = [0, 1].map(|layer| LayerCache::new(&config, layer).unwrap());
        for (q, k, v) in steps(5, 2, SHAPE, &tokens()) {
            set.begin(q.dim(2).unwrap()).unwrap();
            for (layer, cache) in alone.iter_mut().enumerate() {
                let want = set.attend(layer, &q, &k, &v, 0.25).unwrap();
                let got = cache.attend(&q, &k, &v, 0.25).unwrap();
                assert_eq!(bits(&got), bits(&want), "{name} {layer}");
                for sequence in 0..2 {
                    assert_eq!(
                        cache.positions(sequence, 1),
                        set.positions(layer, sequence, 1)
                    );
                }
            }
        }
        assert_eq!(alone[0].current_seq_len(), 70);
        assert_eq!(alone[0].len(), set.physical_len(0));
    }
}

#[test]
fn append_returns_what_the_policy_holds_and_leaves_earlier_tensors_alone() {
    for (name, storage, budget) in [
        ("full", "f32", 24),
        ("streaming", "f32", 24),
        ("keydiff", "f16", 24),
        ("lagkv", "f32", 24),
        ("random", "int8", 120),
    ] {
        let tokens = [vec![budget + 6], vec![1; 40]].concat();
        let config = with(named(name, budget), |c| {
            c.storage = storage.parse().unwrap();
            c.storage.residual = 8;
        });
        let mut cache = LayerCache::new(&config, 0).unwrap().for_append().unwrap();
        let mut set = CacheSet::new(
            &[LayerShape {
                query_heads: 2,
                ..SHAPE
            }],
            2,
            DType::F32,
            &Device::Cpu,
            &config,
        )
        .unwrap();
        let mut earlier: Option<(Tensor, Vec<f32>)> = None;
        for (_, k, v) in steps(6, 2, SHAPE, &tokens) {
            let t = k.dim(2).unwrap();
            let (keys, values) = cache.append(&k, &v).unwrap();
            set.begin(t).unwrap();
            let (want_keys, want_values) = set.extend(0, &k, &v).unwrap();
            for tensor in [&keys, &values, &want_keys, &want_values] {
                assert_eq!(tensor.dtype(), DType::F32, "{name} {storage}");
            }
            let f32 = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
            assert_eq!(
                bits(&f32(&keys)),
                bits(&f32(&want_keys)),
                "{name} {storage}"
            );
            assert_eq!(
                bits(&f32(&values)),
                bits(&f32(&want_values)),
                "{name} {storage}"
            );
            if storage == "f32" {
                let new = keys.narrow(2, keys.dim(2).unwrap() - t, t).unwrap();
                assert!(
                    name == "streaming" || bits(&new) == bits(&k),
                    "{name}: the new tokens are the last"
                );
            }
            if let Some((tensor, numbers)) = &earlier {
                assert_eq!(
                    &bits(&f32(tensor)),
                    numbers,
                    "{name}: an earlier step's tensors have changed"
                );
            }
            earlier = Some((keys.clone(), bits(&f32(&keys))));
        }
        assert!(
            cache.len() == 70 || cache.len() <= budget + 8,
            "{name} {}",
            cache.len()
        );
        if storage == "int8" {
            let f16 = 2 * 2 * cache.len() * 2 * 16 * 2;
            assert!(cache.bytes() < f16, "{} of {f16}", cache.bytes());
        }
    }
}

#[test]
fn appending_one_token_does_not_copy_what_is_held() {
    let config = CacheConfig::new("full".parse().unwrap(), Budget::Tokens(1));
    let mut cache = LayerCache::new(&config, 0).unwrap();
    let kv = |t| Tensor::randn(0f32, 1.0, (1, 2, t, 16), &Device::Cpu).unwrap();
    cache.append(&kv(100), &kv(100)).unwrap();
    let (first, _) = cache.append(&kv(1), &kv(1)).unwrap();
    let (second, _) = cache.append(&kv(1), &kv(1)).unwrap();
    let address = |x: &Tensor| {
        let (storage, _) = x.storage_and_layout();
        match &*storage {
            candle_core::Storage::Cpu(storage) => storage.as_slice::<f32>().unwrap().as_ptr(),
            _ => unreachable!("on the CPU"),
        }
    };
    assert_eq!(address(&first), address(&second), "views of one storage");
    assert_eq!(second.dims(), [1, 2, 102, 16]);
    assert!(cache.bytes() <= 2 * 2 * 16 * 4 * (100 + 32));
}

#[test]
fn what_append_cannot_give_is_refused_when_the_cache_is_built() {
    for name in [
        "h2o",
        "tova",
        "snapkv",
        "r-kv",
        "dropkv",
        "vase-attnv",
        "tri-attention",
    ] {
        let built = LayerCache::new(&named(name, 24), 0).unwrap().for_append();
        assert!(
            matches!(built, Err(Error::NeedUnavailable { .. })),
            "{name}"
        );
    }
    for name in [
        "full",
        "streaming",
        "random",
        "knorm",
        "keydiff",
        "lagkv",
        "vase-dkv",
    ] {
        assert!(
            LayerCache::new(&named(name, 24), 0)
                .unwrap()
                .for_append()
                .is_ok(),
            "{name}"
        );
    }
    let mut unrotated = named("tri-attention", 24);
    unrotated.rotary = None;
    assert!(matches!(
        LayerCache::new(&unrotated, 0),
        Err(Error::NeedUnavailable { .. })
    ));
}

#[test]
fn several_tokens_after_an_eviction_need_masks_that_are_aligned_to_the_last_key() {
    let kv = |t| Tensor::randn(0f32, 1.0, (1, 2, t, 16), &Device::Cpu).unwrap();
    let new = || LayerCache::new(&named("keydiff", 12), 0).unwrap();
    let mut cache = new();
    cache.append(&kv(30), &kv(30)).unwrap();
    assert!(cache.append(&kv(3), &kv(3)).is_err());
    cache.append(&kv(1), &kv(1)).unwrap();
    let mut cache = new().with_bottom_right_masks();
    cache.append(&kv(30), &kv(30)).unwrap();
    let (k, _) = cache.append(&kv(3), &kv(3)).unwrap();
    let mask = bottom_right_mask(3, k.dim(2).unwrap(), &Device::Cpu).unwrap();
    let rows: Vec<Vec<u8>> = mask.to_vec2().unwrap();
    let hidden: Vec<usize> = rows
        .iter()
        .map(|row| row.iter().filter(|&&x| x == 1).count())
        .collect();
    assert_eq!(hidden, [2, 1, 0]);
}

#[test]
fn a_snapshot_returns_and_reset_forgets() {
    let config = named("keydiff", 24);
    let mut cache = LayerCache::new(&config, 0).unwrap();
    let all = steps(7, 1, SHAPE, &tokens());
    for (q, k, v) in &all[..20] {
        cache.attend(q, k, v, 0.25).unwrap();
    }
    let held = cache.snapshot();
    let rest = |cache: &mut LayerCache| -> Vec<Vec<f32>> {
        let out = all[20..]
            .iter()
            .map(|(q, k, v)| bits(&cache.attend(q, k, v, 0.25).unwrap()));
        out.collect()
    };
    let want = rest(&mut cache);
    cache.restore(&held).unwrap();
    assert_eq!(rest(&mut cache), want);
    cache.reset();
    assert!(cache.is_empty() && cache.bytes() == 0);
    cache.restore(&held).unwrap();
    assert_eq!(rest(&mut cache), want);
    let mut other = LayerCache::new(&named("keydiff", 20), 0).unwrap();
    assert!(matches!(other.restore(&held), Err(Error::Snapshot { .. })));
    let (q, k, v) = &all[0];
    assert!(other.append(k, v).is_ok());
    assert!(
        other.attend(q, k, v, 0.25).is_err(),
        "append and attend do not mix"
    );
    other.reset();
    assert!(other.attend(q, k, v, 0.25).is_ok(), "a new beginning");
    let mut appending = LayerCache::new(&config, 0).unwrap().for_append().unwrap();
    appending.reset();
    assert!(appending.attend(q, k, v, 0.25).is_err());
    // Layers may have budgets of their own, which the shape does not tell.
    let mut second = LayerCache::new(&config, 1).unwrap();
    let refused = second.restore(&held);
    assert!(
        matches!(refused, Err(Error::Snapshot { .. })),
        "{refused:?}"
    );
    assert!(second.is_empty());
}

#[test]
fn a_sliding_window_is_attended_as_in_a_set_of_such_layers() {
    let shape = LayerShape {
        sliding_window: Some(8),
        ..SHAPE
    };
    let config = named("full", 24);
    let mut set = CacheSet::new(&[shape], 1, DType::F32, &Device::Cpu, &config).unwrap();
    let sliding = |window| {
        LayerCache::new(&config, 0)
            .unwrap()
            .with_sliding_window(window)
    };
    let (mut alone, mut whole) = (sliding(8).unwrap(), LayerCache::new(&config, 0).unwrap());
    let mut differs = false;
    let tokens = [vec![30], vec![1; 200]].concat();
    for (q, k, v) in steps(9, 1, SHAPE, &tokens) {
        set.begin(q.dim(2).unwrap()).unwrap();
        let want = bits(&set.attend(0, &q, &k, &v, 0.25).unwrap());
        assert_eq!(bits(&alone.attend(&q, &k, &v, 0.25).unwrap()), want);
        differs |= bits(&whole.attend(&q, &k, &v, 0.25).unwrap()) != want;
    }
    assert!(differs);
    assert!(
        alone.bytes() < whole.bytes(),
        "what no token attends is dropped"
    );
    assert!(matches!(sliding(0), Err(Error::Setting { .. })));
}

#[test]
fn snapshots_of_another_window_or_path_are_refused_and_masks_come_back() {
    let config = named("full", 24);
    let handle = || LayerCache::new(&config, 0).unwrap();
    let all = steps(14, 1, SHAPE, &[20, 4, 9]);
    let mut sliding = handle().with_sliding_window(8).unwrap();
    let mut attended = handle();
    for (q, k, v) in &all {
        sliding.attend(q, k, v, 0.25).unwrap();
        attended.attend(q, k, v, 0.25).unwrap();
    }
    let problem = |mut cache: LayerCache, snapshot: &LayerSnapshot| match cache.restore(snapshot) {
        Err(Error::Snapshot { problem }) => problem.to_owned(),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        problem(handle(), &sliding.snapshot()),
        "another sliding window"
    );
    let for_append = handle().for_append().unwrap();
    assert!(problem(for_append, &attended.snapshot()).contains("append"));
    let mut appended = handle().with_bottom_right_masks();
    appended.append(&all[0].1, &all[0].2).unwrap();
    appended.append(&all[1].1, &all[1].2).unwrap();
    let (snapshot, mask) = (appended.snapshot(), appended.mask(4).unwrap().unwrap());
    appended.append(&all[2].1, &all[2].2).unwrap();
    for mut cache in [appended, handle()] {
        cache.restore(&snapshot).unwrap();
        let again = cache.mask(4).unwrap().unwrap();
        assert_eq!(
            again.to_vec2::<u8>().unwrap(),
            mask.to_vec2::<u8>().unwrap()
        );
    }
}

#[test]
fn errors_name_the_layer_of_the_handle() {
    let mut cache = LayerCache::new(&named("full", 24), 7).unwrap();
    let (q, k, v) = &steps(15, 1, SHAPE, &[3])[0];
    let wide = Tensor::cat(&[q, q], 1).unwrap();
    cache.attend(q, k, v, 0.25).unwrap();
    cache.attend(&wide, k, v, 0.25).unwrap_err();
    let error = cache.attend(q, k, v, 0.25).unwrap_err().to_string();
    assert!(error.contains("layer 7"), "{error}");
}

#[test]
fn keys_and_values_can_be_looked_at() {
    let mut cache = LayerCache::new(&named("streaming", 24), 0).unwrap();
    assert!(cache.k().unwrap().is_none() && cache.v().unwrap().is_none());
    let mut last = None;
    for (_, k, v) in steps(10, 2, SHAPE, &[20, 1, 1]) {
        last = Some(cache.append(&k, &v).unwrap());
    }
    let (keys, values) = last.unwrap();
    assert_eq!(bits(&cache.k().unwrap().unwrap()), bits(&keys));
    assert_eq!(bits(&cache.v().unwrap().unwrap()), bits(&values));
}

#[test]
fn a_prompt_of_known_length_comes_in_any_calls() {
    let config = with(named("streaming", 24), |c| c.prompt = Some(Prompt::Keep));
    let run = |prompt: Option<usize>, tokens: &[usize]| -> (Vec<u32>, bool) {
        let mut cache = LayerCache::new(&config, 0).unwrap();
        if let Some(prompt) = prompt {
            cache = cache.with_prompt_len(prompt);
        }
        for (q, k, v) in steps(12, 1, SHAPE, tokens) {
            cache.attend(&q, &k, &v, 0.25).unwrap();
        }
        (cache.positions(0, 0).to_vec(), cache.is_decoding())
    };
    let (kept, decoding) = run(Some(12), &[&[5, 1, 1, 4, 1][..], &[1; 40]].concat());
    assert!(decoding && (0..12).all(|id| kept.contains(&id)), "{kept:?}");
    assert!(!run(Some(12), &[5, 1, 1, 4]).1, "the prompt goes on");
    // What follows a prompt of known length is no prompt, however many tokens come at once.
    assert!(run(Some(12), &[12, 3]).1 && !run(None, &[12, 3]).1);
    let (guessed, _) = run(None, &[&[5, 1, 1, 4, 1][..], &[1; 40]].concat());
    assert!((5..12).any(|id| !guessed.contains(&id)), "{guessed:?}");
}

#[test]
fn masks_are_those_of_what_the_last_call_returned() {
    let kv = |t| Tensor::randn(0f32, 1.0, (1, 2, t, 16), &Device::Cpu).unwrap();
    let mut cache = LayerCache::new(&named("keydiff", 12), 0)
        .unwrap()
        .with_bottom_right_masks();
    assert!(cache.mask(3).unwrap().is_none(), "nothing has come yet");
    for tokens in [30, 3, 1, 5] {
        let (k, _) = cache.append(&kv(tokens), &kv(tokens)).unwrap();
        match cache.mask(tokens).unwrap() {
            None => assert_eq!(tokens, 1),
            Some(mask) => {
                let want = bottom_right_mask(tokens, k.dim(2).unwrap(), &Device::Cpu).unwrap();
                assert_eq!(mask.to_vec2::<u8>().unwrap(), want.to_vec2::<u8>().unwrap());
            }
        }
    }
}

#[test]
fn a_shape_that_cannot_be_served_is_found_before_the_first_token() {
    let config = with(named("keydiff", 24), |c| {
        c.storage = "int8".parse().unwrap()
    });
    let of = |shape: LayerShape| {
        LayerCache::new(&config, 0)
            .unwrap()
            .with_shape(1, shape, DType::F32, &Device::Cpu)
    };
    assert!(of(SHAPE).is_ok());
    let odd = LayerShape {
        head_dim: 12,
        ..SHAPE
    };
    assert!(matches!(of(odd), Err(Error::Setting { name: "group", .. })));
    let uneven = LayerShape {
        query_heads: 3,
        ..SHAPE
    };
    assert!(matches!(of(uneven), Err(Error::HeadGroups { .. })));
    // A window of the shape is that of the cache.
    let sliding = LayerShape {
        sliding_window: Some(8),
        ..SHAPE
    };
    let full = LayerCache::new(&named("full", 24), 0).unwrap();
    let mut cache = (full.with_shape(1, sliding, DType::F32, &Device::Cpu)).unwrap();
    for (q, k, v) in steps(13, 1, SHAPE, &[&[30][..], &[1; 200]].concat()) {
        cache.attend(&q, &k, &v, 0.25).unwrap();
    }
    assert!(cache.len() < 150, "what no token attends is dropped");
}
