//! Replay against a live cache; files, recording and generators in the modules.

mod generated;
mod recorded;

use candle_core::{DType, Device, Tensor};
use kv_lazy::attention::Reduce;
use kv_lazy::calibrate::calibrate;
use kv_lazy::policy::{NAMES, Threshold, lazy, oracle, streaming};
use kv_lazy::trace::replay::{LayerReport, ReplayOptions, Summary, replay, replay_all};
use kv_lazy::trace::synth::{Drifting, HeavyHitters, Planted, Sizes};
use kv_lazy::trace::{LayerTrace, Trace, TraceMeta, mri};
use kv_lazy::{Budget, CacheConfig, CacheSet, Error, LayerShape, PolicyConfig, Positions, Rotary};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tensor_io::{Cancelled, NoProgress, Progress};

const SIZES: Sizes = Sizes {
    tokens: 400,
    prompt: 40,
    kv_heads: 2,
    group: 2,
    head_dim: 32,
};

fn planted() -> Planted {
    Planted {
        sizes: SIZES,
        recurring: 24,
        ..Planted::default()
    }
}

fn generators() -> Vec<Trace> {
    vec![
        planted().trace(1),
        Drifting {
            sizes: SIZES,
            ..Drifting::default()
        }
        .trace(1),
        HeavyHitters {
            sizes: SIZES,
            ..HeavyHitters::default()
        }
        .trace(1),
    ]
}

fn lazily(window: usize) -> PolicyConfig {
    let mut settings = lazy::Settings::default();
    settings.window = Some(window);
    PolicyConfig::Lazy(settings)
}

fn run(trace: &Trace, config: &CacheConfig) -> LayerReport {
    replay(trace, 0, config, &ReplayOptions::default(), &NoProgress).unwrap()
}

/// Runs a layer of a trace through a cache; outputs `[Hq, 1, d]` of the decode steps.
fn live(trace: &Trace, cache: &mut CacheSet) -> Vec<Vec<f32>> {
    let layer = &trace.layers[&0];
    let prompt = trace.meta.prompt_len;
    let mut outputs = Vec::new();
    let mut from = 0;
    while from < layer.tokens {
        let count = if from == 0 { prompt } else { 1 };
        let part = |data: &[f32], heads: usize| {
            let shape = (1, heads, layer.tokens, layer.head_dim);
            let all = Tensor::from_slice(data, shape, &Device::Cpu).unwrap();
            all.narrow(2, from, count).unwrap()
        };
        let (q, k, v) = (
            part(&layer.q, layer.query_heads),
            part(&layer.k, layer.kv_heads),
            part(&layer.v, layer.kv_heads),
        );
        cache.begin(count).unwrap();
        let out = cache.attend(0, &q, &k, &v, trace.meta.scale).unwrap();
        if from > 0 {
            outputs.push(out.flatten_all().unwrap().to_vec1().unwrap());
        }
        from += count;
    }
    outputs
}

fn shape(layer: &LayerTrace) -> LayerShape {
    LayerShape {
        query_heads: layer.query_heads,
        kv_heads: layer.kv_heads,
        head_dim: layer.head_dim,
        sliding_window: None,
    }
}

/// Relative errors of the outputs that a live cache of `config` gives, mean over steps and group, of each KV head.
fn live_errors(trace: &Trace, config: &CacheConfig) -> Vec<f64> {
    let layer = &trace.layers[&0];
    let shapes = [shape(layer)];
    let mut full = CacheSet::full(&shapes, 1, DType::F32, &Device::Cpu).unwrap();
    let reference = live(trace, &mut full);
    let mut cache = CacheSet::new(&shapes, 1, DType::F32, &Device::Cpu, config).unwrap();
    let outputs = live(trace, &mut cache);
    let head = |head: usize| {
        let mut error = 0.0;
        for (full, here) in reference.iter().zip(&outputs) {
            for g in 0..layer.group() {
                let at = (head * layer.group() + g) * layer.head_dim;
                let range = at..at + layer.head_dim;
                let square = |x: f32| f64::from(x) * f64::from(x);
                let size: f64 = full[range.clone()].iter().map(|&x| square(x)).sum();
                let gap: f64 = full[range.clone()]
                    .iter()
                    .zip(&here[range])
                    .map(|(a, b)| square(a - b))
                    .sum();
                error += (gap / size).sqrt() / layer.group() as f64;
            }
        }
        error / outputs.len() as f64
    };
    (0..layer.kv_heads).map(head).collect()
}

fn replays_as_it_runs(trace: &Trace, config: &CacheConfig) -> LayerReport {
    let report = run(trace, config);
    for (head, error) in report.heads.iter().zip(live_errors(trace, config)) {
        let got = head.output_error;
        // Rounding can turn a tie; a policy that chose differently would be far off.
        assert!(
            (got - error).abs() < 1e-3 + 0.01 * error,
            "{} {} head {}: {got} {error}",
            trace.meta.model,
            config.decode,
            head.head
        );
    }
    report
}

#[test]
fn replay_loses_exactly_what_a_live_cache_loses() {
    for trace in generators() {
        for &name in NAMES.iter().filter(|name| **name != "oracle") {
            let mut config = CacheConfig::new(name.parse().unwrap(), Budget::Tokens(96));
            config.rotary = Some(Rotary::plain(10_000.0, 4));
            replays_as_it_runs(&trace, &config);
        }
    }
}

#[test]
fn replay_has_the_storage_budgets_and_positions_of_its_configuration() {
    let trace = planted().trace(9);
    let of = |name: &str| CacheConfig::new(name.parse().unwrap(), Budget::Tokens(96));
    let stored = |name: &str, storage: &str| {
        let mut config = of(name);
        config.storage = storage.parse().unwrap();
        replays_as_it_runs(&trace, &config)
    };
    let error = |report: &LayerReport| report.mean(|head| head.output_error);
    let [f32, int8, int4] = ["f32", "int8", "int4"].map(|storage| stored("full", storage));
    assert!(error(&f32) < 1e-5 && error(&int8) > 1e-4 && error(&int4) > 2.0 * error(&int8));
    assert!(int4.kv_bytes < int8.kv_bytes && 3 * int8.kv_bytes < f32.kv_bytes);
    assert_eq!(
        int4.mean(|h| h.retained_mass),
        f32.mean(|h| h.retained_mass)
    );
    let evicted = stored("keydiff", "int4");
    assert!(error(&evicted) > error(&int4) && evicted.kv_bytes < int4.kv_bytes);

    // Heads that share their budgets hold different numbers of tokens, together no more.
    let mut shared = of("dropkv");
    shared.shared_budget = Some(0.2);
    let shared = replays_as_it_runs(&trace, &shared);
    let alone = replays_as_it_runs(&trace, &of("dropkv"));
    assert!(shared.peak_tokens > alone.peak_tokens);
    assert!(shared.mean_tokens <= alone.mean_tokens + 1.0);

    let mut consecutive = of("streaming");
    consecutive.rotary = Some(Rotary::plain(10_000.0, 32));
    let kept = replays_as_it_runs(&trace, &consecutive);
    consecutive.positions = Positions::Consecutive;
    let moved = replays_as_it_runs(&trace, &consecutive);
    assert_ne!(error(&moved), error(&kept));
    assert_eq!(
        moved.mean(|h| h.retained_mass),
        kept.mean(|h| h.retained_mass)
    );
    consecutive.shared_budget = Some(0.2);
    let refused = replay(
        &trace,
        0,
        &consecutive,
        &ReplayOptions::default(),
        &NoProgress,
    );
    assert!(matches!(refused, Err(Error::Setting { .. })));
}

#[test]
fn the_oracle_retains_at_least_what_every_policy_does_and_the_ideal_set_more() {
    for trace in generators() {
        let mut oracle = oracle::Settings::default();
        oracle.window = Some(16);
        let oracle = PolicyConfig::Oracle(oracle);
        let oracle = run(&trace, &CacheConfig::new(oracle, Budget::Tokens(96)));
        for &name in NAMES {
            if matches!(name, "full" | "snapkv" | "oracle") {
                continue; // They hold more than the budget, or are the oracle.
            }
            let config = match name.parse().unwrap() {
                PolicyConfig::Lazy(_) => CacheConfig::new(lazily(16), Budget::Tokens(96)),
                policy => {
                    let mut config = CacheConfig::new(policy, Budget::Tokens(96));
                    config.evict_every = Some(16);
                    config.rotary = Some(Rotary::plain(10_000.0, 4));
                    config
                }
            };
            let report = run(&trace, &config);
            let gap = report.oracle_gap(&oracle);
            assert!(gap > -1e-3, "{} {name}: {gap}", trace.meta.model);
            assert!(
                report
                    .heads
                    .iter()
                    .all(|h| h.retained_mass <= h.ideal_mass + 1e-6)
            );
            assert!(report.mean_tokens <= 96.0 + 16.0);
        }
        assert!(
            oracle
                .heads
                .iter()
                .all(|h| h.retained_mass <= h.ideal_mass + 1e-6)
        );
    }
}

#[test]
fn the_full_cache_loses_nothing() {
    let options = ReplayOptions::default()
        .with_threshold(Threshold::Absolute(0.02))
        .with_gap(16);
    let config = CacheConfig::new("full".parse().unwrap(), Budget::Tokens(1));
    let report = replay(&planted().trace(3), 0, &config, &options, &NoProgress).unwrap();
    for head in &report.heads {
        assert!((head.retained_mass - 1.0).abs() < 1e-5);
        assert_eq!((head.recall, head.recurring_hit_rate), (1.0, Some(1.0)));
        assert!(head.output_error < 1e-5 && head.regret.total() == 0.0);
    }
    assert_eq!(report.kv_bytes, report.kv_bytes_full);
}

/// Four tokens of weights .50, .30, .15, .05 with values 1, 1, 1 and x: without the last, the output goes to 1.
#[test]
fn output_error_sees_a_value_outlier_that_mass_hides() {
    for (x, moved) in [(-10.0f32, 0.55), (0.5, 0.025)] {
        let d = 8;
        let mut layer = LayerTrace {
            query_heads: 1,
            kv_heads: 1,
            head_dim: d,
            tokens: 5,
            q: vec![0.0; 5 * d],
            k: vec![0.0; 5 * d],
            v: vec![0.0; 5 * d],
        };
        // The last position asks; its own weight is nil.
        let weights = [0.50f32, 0.30, 0.15, 0.05, 1e-20];
        for (t, w) in weights.into_iter().enumerate() {
            layer.k[t * d] = w.ln();
            layer.v[t * d] = if t == 3 { x } else { 1.0 };
            layer.q[t * d] = if t == 4 { 1.0 } else { 0.0 };
        }
        let trace = Trace {
            meta: TraceMeta::new("four tokens", 4, 1.0),
            tokens: vec![0; 5],
            segments: None,
            layers: BTreeMap::from([(0, Arc::new(layer))]),
        };
        // Of the prompt's four tokens, the first three stay.
        let mut sinks = streaming::Settings::default();
        sinks.sinks = 3;
        let config = CacheConfig::new(PolicyConfig::Streaming(sinks), Budget::Tokens(4));
        let report = run(&trace, &config);
        let head = &report.heads[0];
        let output = 0.95 + 0.05 * f64::from(x);
        assert!((head.retained_mass - 0.95).abs() < 1e-5);
        assert!(
            (head.output_error * output.abs() - moved).abs() < 1e-4,
            "{head:?}"
        );
        assert!((head.lost_values * output.abs() - 0.05 * f64::from(x.abs())).abs() < 1e-4);
        assert!((head.renormalisation * output.abs() - 0.05).abs() < 1e-4);
        assert!((head.cosine - f64::from(x.signum())).abs() < 1e-6);
        assert!((head.regret.total() - 0.05).abs() < 1e-5);
    }
}

#[test]
fn summaries_order_their_quantiles() {
    let trace = planted().trace(7);
    let config = CacheConfig::new("h2o".parse().unwrap(), Budget::Tokens(64));
    let reports = replay_all(&trace, &config, &ReplayOptions::default(), &NoProgress).unwrap();
    let s = Summary::of(&reports, |h| h.retained_mass).unwrap();
    assert!(s.min <= s.p10 && s.p10 <= s.median && s.median <= s.p90 && s.p90 <= s.max);
    assert!(s.min < 1.0 && s.min > 0.0);
    assert!(Summary::of(&[], |h| h.recall).is_none());
}

/// Counts the steps that were announced and done, and cancels after some.
struct Counted {
    announced: AtomicU64,
    done: AtomicU64,
    cancel_after: u64,
}

impl Progress for Counted {
    fn begin(&self, _: &str, steps: u64) {
        self.announced.fetch_add(steps, Ordering::Relaxed);
    }
    fn advance(&self, steps: u64) -> Result<(), Cancelled> {
        let done = self.done.fetch_add(steps, Ordering::Relaxed) + steps;
        if done > self.cancel_after {
            return Err(Cancelled);
        }
        Ok(())
    }
}

#[test]
fn long_calls_report_all_their_steps_and_can_be_cancelled() {
    let trace = planted().trace(8);
    let call = |which: usize, progress: &Counted| match which {
        0 => {
            let config = CacheConfig::new("oracle".parse().unwrap(), Budget::Tokens(64));
            replay_all(&trace, &config, &ReplayOptions::default(), progress).map(|_| ())
        }
        1 => calibrate(std::slice::from_ref(&trace), &[1e-3], Reduce::Max, progress).map(|_| ()),
        _ => mri::of_trace(&trace, Threshold::Absolute(1e-4), Reduce::Max, progress).map(|_| ()),
    };
    for which in 0..3 {
        let counted = |cancel_after| Counted {
            announced: AtomicU64::new(0),
            done: AtomicU64::new(0),
            cancel_after,
        };
        let all = counted(u64::MAX);
        call(which, &all).unwrap();
        let announced = all.announced.into_inner();
        assert!(announced > 300);
        assert_eq!(announced, all.done.into_inner());
        assert!(matches!(
            call(which, &counted(10)),
            Err(Error::Cancelled(_))
        ));
    }
}
