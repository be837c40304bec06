//! Whose state is whose: sequences of a batch, snapshots, resets, threads, devices, a policy's own memory.

use crate::common::{all_configurations, lazy, named, run, steps};
use candle_core::{DType, Device, Tensor};
use kv_lazy::attention::Reduce;
use kv_lazy::policy::{
    Clock, Needs, Phase, Place, Policy, Rows, Rule, Score, Seen, Trigger, lazy as lazy_eviction,
};
use kv_lazy::store::{Layout, Relocation};
use kv_lazy::{Budget, CacheConfig, CacheSet, Error, LayerShape, PolicyConfig, Result};

const SHAPE: LayerShape = LayerShape {
    query_heads: 4,
    kv_heads: 2,
    head_dim: 16,
    sliding_window: None,
};

fn build(config: &CacheConfig, batch: usize) -> CacheSet {
    CacheSet::new(&[SHAPE], batch, DType::F32, &Device::Cpu, config).unwrap()
}

fn tokens() -> Vec<usize> {
    [&[30][..], &[1; 20], &[5], &[1; 20]].concat()
}

#[test]
fn a_sequence_of_a_batch_is_what_it_is_alone() {
    for config in all_configurations(20) {
        let both = steps(1, 2, SHAPE, &tokens());
        let batched = run(&mut build(&config, 2), &both);
        for b in 0..2 {
            let part = |x: &Tensor| x.narrow(0, b, 1).unwrap();
            let alone: Vec<_> = both
                .iter()
                .map(|(q, k, v)| (part(q), part(k), part(v)))
                .collect();
            // What draws, draws for the sequence's number.
            let mut single = build(&config, 1).numbered_from(b).unwrap();
            for (all, one) in batched.iter().zip(run(&mut single, &alone)) {
                assert_eq!(all[b * one.len()..][..one.len()], one[..], "{config:?}");
            }
        }
    }
}

#[test]
fn a_reset_cache_is_a_fresh_one_and_a_restored_one_has_forgotten_nothing() {
    for config in all_configurations(20) {
        let steps = steps(2, 2, SHAPE, &tokens());
        let mut cache = build(&config, 2);
        let first = run(&mut cache, &steps[..33]);
        let snapshot = cache.snapshot();
        let rest = run(&mut cache, &steps[33..]);
        let len = cache.physical_len(0);
        cache.restore(&snapshot).unwrap();
        assert_eq!(run(&mut cache, &steps[33..]), rest, "{config:?}");
        cache.reset();
        assert_eq!(run(&mut cache, &steps[..33]), first, "{config:?}");
        assert_eq!(run(&mut cache, &steps[33..]), rest, "{config:?}");
        assert_eq!(cache.physical_len(0), len);
    }
    let mut other = CacheSet::full(&[SHAPE], 1, DType::F32, &Device::Cpu).unwrap();
    let foreign = CacheSet::full(&[SHAPE], 2, DType::F32, &Device::Cpu)
        .unwrap()
        .snapshot();
    assert!(matches!(
        other.restore(&foreign),
        Err(Error::Snapshot {
            problem: "another batch size"
        })
    ));
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let shape = LayerShape {
        query_heads: 8,
        kv_heads: 2,
        head_dim: 64,
        sliding_window: None,
    };
    let steps = steps(3, 2, shape, &[&[1100][..], &[1; 20]].concat());
    let configs = [
        CacheConfig::new(lazy(6, 1e-4), Budget::Tokens(1050)),
        named("h2o", 1050),
    ];
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            configs.clone().map(|config| {
                let mut cache =
                    CacheSet::new(&[shape], 2, DType::F32, &Device::Cpu, &config).unwrap();
                let outputs = run(&mut cache, &steps);
                let held: Vec<_> = (0..4)
                    .map(|row| cache.positions(0, row / 2, row % 2).to_vec())
                    .collect();
                (outputs, held)
            })
        })
    };
    let one = on(1);
    assert_eq!(on(2), one);
    assert_eq!(on(5), one);
}

#[test]
fn with_one_query_head_per_group_every_reduction_is_the_same() {
    let shape = LayerShape {
        query_heads: 2,
        ..SHAPE
    };
    let steps = steps(4, 1, shape, &tokens());
    let outputs = [Reduce::Max, Reduce::Mean, Reduce::Sum].map(|reduce| {
        let mut settings = lazy_eviction::Settings::default();
        settings.reduce = reduce;
        let config = CacheConfig::new(PolicyConfig::Lazy(settings), Budget::Tokens(20));
        run(
            &mut CacheSet::new(&[shape], 1, DType::F32, &Device::Cpu, &config).unwrap(),
            &steps,
        )
    });
    assert_eq!(outputs[0], outputs[1]);
    assert_eq!(outputs[0], outputs[2]);
}

/// Keeps each token's position by itself and checks it against the cache's at every eviction.
#[derive(Debug, Clone)]
struct Shadow {
    layout: Layout,
    trigger: Trigger,
    heads: Vec<Vec<u32>>,
}

impl Policy for Shadow {
    fn name(&self) -> &'static str {
        "shadow"
    }
    fn needs(&self) -> Needs {
        Needs::keys().with_values()
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            layout: self.layout,
            decode: self.trigger,
            ..Rule::STEPWISE
        }
    }
    fn start(&mut self, place: Place) {
        self.heads = vec![Vec::new(); place.heads];
    }
    fn append(&mut self, clock: &Clock) {
        for head in &mut self.heads {
            head.extend(clock.next - clock.tokens..clock.next);
        }
    }
    fn observe(&mut self, _: usize, _: Seen<'_>, _: &Clock) {}
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        assert_eq!(self.heads[head], rows.ids(head));
        for (slot, row) in rows.values(head, 0)?.chunks(rows.head_dim()).enumerate() {
            assert_eq!(
                row[0], self.heads[head][slot] as f32,
                "value and position part ways"
            );
        }
        for (slot, row) in rows.keys(head, 0)?.chunks(rows.head_dim()).enumerate() {
            assert_eq!(
                row[0],
                -(self.heads[head][slot] as f32),
                "key and position part ways"
            );
        }
        for (score, id) in scores.iter_mut().zip(rows.ids(head)) {
            // Anything that differs between heads and steps.
            score.tie = id
                .wrapping_mul(2_654_435_761)
                .rotate_left(head as u32 * 7 + clock.step);
        }
        Ok(())
    }
    fn relocate(&mut self, head: usize, moves: &Relocation) {
        moves.apply(&mut self.heads[head], 1);
    }
    fn state_bytes(&self) -> usize {
        0
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}

#[test]
fn positions_and_a_policys_memory_move_with_keys_and_values_in_every_layout() {
    for layout in [Layout::Compact, Layout::SlotReuse, Layout::SinkRing] {
        for trigger in [Trigger::EveryStep, Trigger::Every(7)] {
            let shadow = Shadow {
                layout,
                trigger,
                heads: Vec::new(),
            };
            let mut cache = CacheSet::with_policies(&[SHAPE], 2, DType::F32, &Device::Cpu, |_| {
                Ok((
                    Box::new(shadow.clone()) as Box<dyn Policy>,
                    Budget::Tokens(15),
                ))
            })
            .unwrap();
            let mut position = 0;
            for (q, k, v) in &steps(5, 2, SHAPE, &tokens()) {
                let t = q.dim(2).unwrap();
                let ids: Vec<f32> = (position..position + t).map(|p| p as f32).collect();
                let ids = Tensor::from_vec(ids, (1, 1, t, 1), &Device::Cpu).unwrap();
                let k = (k.zeros_like().unwrap().broadcast_sub(&ids)).unwrap();
                let v = (v.zeros_like().unwrap().broadcast_add(&ids)).unwrap();
                cache.begin(t).unwrap();
                cache.attend(0, &(q * 0.0).unwrap(), &k, &v, 1.0).unwrap();
                position += t;
            }
            assert!(cache.physical_len(0) < 15 + 12);
        }
    }
}

#[test]
fn a_layer_without_heads_carries_a_state_that_snapshots_and_resets_know() {
    let shapes = [LayerShape {
        kv_heads: 0,
        query_heads: 0,
        ..SHAPE
    }; 2];
    let mut cache = CacheSet::new(
        &shapes,
        2,
        DType::F32,
        &Device::Cpu,
        &named("streaming", 20),
    )
    .unwrap();
    let step = |cache: &mut CacheSet, tokens: usize| -> Vec<f32> {
        cache.begin(tokens).unwrap();
        let state = cache.state(1, 3).unwrap();
        let before = state.to_vec();
        state.iter_mut().for_each(|x| *x += tokens as f32);
        before
    };
    assert_eq!(step(&mut cache, 5), [0.0; 6]);
    let snapshot = cache.snapshot();
    assert_eq!(step(&mut cache, 1), [5.0; 6]);
    // Layer 0 never asks for one.
    assert_eq!((cache.recurrent_bytes(), cache.state_bytes()), (24, 24));
    assert_eq!((cache.bytes(), cache.peak_bytes()), (0, 0));
    cache.restore(&snapshot).unwrap();
    assert_eq!(step(&mut cache, 2), [5.0; 6]);
    cache.reset();
    assert_eq!(cache.recurrent_bytes(), 0);
    assert_eq!(step(&mut cache, 1), [0.0; 6]);
}

#[test]
fn a_state_is_brought_forward_once_in_every_step() {
    let none = LayerShape {
        kv_heads: 0,
        query_heads: 0,
        ..SHAPE
    };
    let build = || CacheSet::full(&[none, SHAPE], 1, DType::F32, &Device::Cpu).unwrap();
    let refused = |cache: &mut CacheSet, (layer, numbers), says: &str| {
        let error = cache.state(layer, numbers).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    let mut cache = build();
    refused(&mut cache, (0, 4), "before begin");
    cache.begin(3).unwrap();
    refused(&mut cache, (1, 4), "layer 1: it has keys and values");
    refused(&mut cache, (2, 4), "2 layers");
    cache.state(0, 4).unwrap();
    refused(&mut cache, (0, 4), "twice");
    for (q, k, v) in &steps(1, 1, SHAPE, &[3]) {
        cache.attend(1, q, k, v, 0.25).unwrap();
    }
    cache.begin(1).unwrap();
    refused(&mut cache, (0, 5), "4 numbers for each sequence, not 5");
    let missed = cache.end().unwrap_err().to_string();
    assert!(missed.contains("layer 0"), "{missed}");

    let mut cache = build();
    for (q, k, v) in &steps(1, 1, SHAPE, &[3]) {
        cache.begin(3).unwrap();
        cache.attend(1, q, k, v, 0.25).unwrap();
    }
    cache.begin(1).unwrap();
    refused(&mut cache, (0, 4), "after the first step");
}
