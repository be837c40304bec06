//! Generated traces, and what calibration finds in traces.

use crate::{SIZES, generators, planted};
use kv_lazy::attention::Reduce;
use kv_lazy::calibrate::{ALPHAS, calibrate, queries};
use kv_lazy::policy::Threshold;
use kv_lazy::policy::tri_attention::QueryStatistics;
use kv_lazy::trace::replay::{ReplayOptions, replay};
use kv_lazy::trace::synth::{Planted, Sizes};
use kv_lazy::trace::{file, mri};
use kv_lazy::{Budget, CacheConfig, Pairs, Rotary};
use tensor_io::NoProgress;

#[test]
fn planted_tokens_are_attended_when_scheduled_and_inactive_between() {
    let (trace, schedules) = planted().with_schedule(5);
    let layer = &trace.layers[&0];
    for (head, schedule) in schedules.iter().enumerate() {
        assert!(schedule.len() > 50);
        for &(token, t) in schedule {
            let (weights, _) = layer.attention(head * layer.group(), t, 1.0).unwrap();
            assert!(weights[token] > 0.01, "{token} at {t}: {}", weights[token]);
        }
    }
}

#[test]
fn generators_repeat_by_seed_and_state_their_recurrence() {
    assert_eq!(planted().trace(1), planted().trace(1));
    assert_ne!(planted().trace(1), planted().trace(2));
    for trace in generators() {
        trace.check("generated").unwrap();
        let histogram =
            mri::of_trace(&trace, Threshold::Absolute(1e-4), Reduce::Max, &NoProgress).unwrap();
        assert_eq!(histogram.tokens(), 2 * SIZES.tokens as u64);
        assert!(histogram.percentile(0.8).unwrap() >= 1);
    }
}

#[test]
fn calibration_finds_the_planted_period() {
    let sizes = Sizes {
        tokens: 900,
        kv_heads: 1,
        group: 1,
        ..SIZES
    };
    let planted = Planted {
        sizes,
        recurring: 24,
        period: 20.0,
        sigma: 0.3,
        heavy: 0,
        decay: 8.0,
    };
    let trace = planted.trace(6);
    let found = calibrate(
        std::slice::from_ref(&trace),
        &ALPHAS,
        Reduce::Max,
        &NoProgress,
    )
    .unwrap();
    assert!(ALPHAS.contains(&found.alpha));
    assert_eq!(found.layers[&0].len(), 1);
    let again = mri::of_trace(
        &trace,
        Threshold::Absolute(found.alpha),
        Reduce::Max,
        &NoProgress,
    )
    .unwrap();
    assert_eq!(again.percentile(0.8), Some(found.window as u32));
    assert!(calibrate(&[], &ALPHAS, Reduce::Max, &NoProgress).is_err());
}

#[test]
fn statistics_of_queries_survive_their_file_and_serve_under_the_same_rotation_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("statistics.safetensors");
    let mut trace = planted().trace(2);
    trace.meta.model_hash = Some("a1b2".into());
    let rotary = Rotary::plain(10_000.0, 32);
    let statistics = queries(std::slice::from_ref(&trace), |_| Some(&rotary)).unwrap();
    assert_eq!(statistics.model_hash.as_deref(), Some("a1b2"));
    statistics.write(&path).unwrap();
    assert_eq!(QueryStatistics::read(&path).unwrap(), statistics);
    let with = |rotary: &Rotary| {
        let mut config = CacheConfig::new("tri-attention".parse().unwrap(), Budget::Tokens(96));
        *config.decode.calibration_mut().unwrap() = Some(statistics.clone());
        config.rotary = Some(rotary.clone());
        replay(&trace, 0, &config, &ReplayOptions::default(), &NoProgress)
    };
    assert!(with(&rotary).is_ok());
    let neighbours = Rotary::new(rotary.frequencies.clone(), Pairs::Neighbours);
    for other in [
        Rotary::plain(1e6, 32),
        Rotary::plain(10_000.0, 16),
        neighbours,
    ] {
        let refused = with(&other).unwrap_err().to_string();
        assert!(refused.contains("another rotation"), "{refused}");
    }
    let mut other = trace.clone();
    other.meta.model_hash = None;
    let mixed = queries(&[trace.clone(), other], |_| Some(&rotary)).unwrap();
    assert_eq!(mixed.model_hash, None, "traces of different models");
    file::write(&trace, &path).unwrap();
    let refused = QueryStatistics::read(&path).unwrap_err().to_string();
    assert!(refused.contains("not statistics of queries"), "{refused}");
}
