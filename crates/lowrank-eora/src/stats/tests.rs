use super::*;
use crate::testing::{Lcg, assert_close, assert_matrix_close};
use crate::{Error, solve};
use candle_core::{Device, Tensor};
use faer::{Mat, MatRef};
use proptest::prelude::*;

fn rows(lcg: &mut Lcg, tokens: usize, width: usize) -> Rows {
    let values = (0..tokens * width).map(|_| lcg.next() as f32).collect();
    Rows::new(values, width).expect("finite")
}

fn part(rows: &Rows, range: std::ops::Range<usize>) -> Rows {
    let values = range.flat_map(|token| rows.row(token).to_vec()).collect();
    Rows::new(values, rows.width()).expect("finite")
}

fn wide(rows: &Rows) -> Mat<f64> {
    Mat::from_fn(rows.width(), rows.tokens(), |i, j| {
        f64::from(rows.row(j)[i])
    })
}

fn gram(rows: &[Rows]) -> Gram {
    let mut collector = GramCollector::new(rows[0].width(), Accumulation::Sum).expect("valid");
    for rows in rows {
        collector.update(rows).expect("same width");
    }
    collector.finish()
}

#[test]
fn gram_is_the_sum_of_outer_products() {
    let rows = rows(&mut Lcg(1), 700, 150);
    let exact = Gram::of(wide(&rows).as_ref()).expect("finite");
    let found = gram(std::slice::from_ref(&rows));
    assert_matrix_close(found.matrix(), exact.matrix(), 1e-6);
    assert_eq!(found.tokens(), 700);
}

#[test]
fn weights_multiply_outer_products() {
    let rows = rows(&mut Lcg(2), 20, 5);
    let weights: Vec<f64> = (0..20).map(|t| f64::from(t) / 4.0).collect();
    let found = gram(&[rows.clone().weighted(&weights).expect("valid")]);
    let x = wide(&rows);
    let scaled = Mat::from_fn(5, 20, |i, j| x[(i, j)] * weights[j]);
    assert_matrix_close(found.matrix(), (&scaled * x.transpose()).as_ref(), 1e-6);
    assert_close(found.weight(), weights.iter().sum(), 1e-12);
}

proptest! {
    #[test]
    fn batching_changes_no_bit_and_merging_only_rounding(cut in 1usize..1199, seed in 0u64..50) {
        let all = rows(&mut Lcg(seed), 1200, 6);
        let parts = [part(&all, 0..cut), part(&all, cut..1200)];
        let whole = gram(std::slice::from_ref(&all));
        let split = gram(&parts);
        prop_assert_eq!(split.matrix(), whole.matrix());
        let mut merged = gram(&parts[..1]);
        merged.merge(&gram(&parts[1..])).expect("same width");
        assert_matrix_close(merged.matrix(), whole.matrix(), 5e-6);
        prop_assert_eq!(merged.tokens(), 1200);

        for importance in [Importance::Uniform, Importance::Mixture, Importance::Leverage { ridge: 0.1 }] {
            let sample = |batches: &[Rows]| {
                let mut sampler = Sampler::new(importance, 0.2, seed).expect("valid");
                let mut first = 0;
                let mut picks = Vec::new();
                for batch in batches {
                    for pick in sampler.pick(batch).expect("same width") {
                        picks.push((first + pick.token, pick.weight));
                    }
                    first += batch.tokens();
                }
                picks
            };
            let (one, two) = (sample(std::slice::from_ref(&all)), sample(&parts));
            let tokens = |picks: &[(usize, f64)]| picks.iter().map(|p| p.0).collect::<Vec<_>>();
            prop_assert_eq!(tokens(&one), tokens(&two));
        }
    }
}

#[test]
fn published_accumulation_is_exponentially_weighted() {
    let samples: Vec<Rows> = (0..6).map(|seed| rows(&mut Lcg(seed), 7, 4)).collect();
    let accumulation = Accumulation::EoraCompat {
        samples: 6,
        batch: 1,
    };
    let mut collector = GramCollector::new(4, accumulation).expect("valid");
    let mut expected = Mat::<f64>::zeros(4, 4);
    for (j, rows) in samples.iter().enumerate() {
        collector.update(rows).expect("same width");
        let weight = (6.0f64 / 7.0).powi(5 - j as i32) / 6.0;
        let x = wide(rows);
        expected += faer::Scale(weight) * (&x * x.transpose());
    }
    assert_matrix_close(collector.finish().matrix(), expected.as_ref(), 1e-6);
}

#[test]
fn channel_sums_match_their_formulas() {
    let batches = [rows(&mut Lcg(1), 30, 3), rows(&mut Lcg(2), 10, 3)];
    let mut diagonal = Diagonal::new(3);
    for batch in &batches {
        diagonal.update(batch).expect("same width");
    }
    for j in 0..3 {
        let column = |rows: &Rows| -> Vec<f64> {
            (0..rows.tokens())
                .map(|t| f64::from(rows.row(t)[j]))
                .collect()
        };
        let all: Vec<f64> = batches.iter().flat_map(column).collect();
        let mean_abs = |x: &[f64]| x.iter().map(|x| x.abs()).sum::<f64>() / x.len() as f64;
        let mean_square = all.iter().map(|x| x * x).sum::<f64>() / 40.0;
        assert_close(diagonal.mean_square()[j], mean_square, 1e-12);
        assert_close(diagonal.mean_abs()[j], mean_abs(&all), 1e-12);
        let largest = mean_abs(&column(&batches[0])).max(mean_abs(&column(&batches[1])));
        assert_close(diagonal.max_mean_abs[j], largest, 1e-12);
    }
}

#[test]
fn streamed_output_gram_equals_that_through_h() {
    let mut lcg = Lcg(4);
    let (d, rows) = (lcg.matrix(5, 30), rows(&mut lcg, 1100, 30));
    let mut collector = OutputCollector::new(d.as_ref()).expect("finite");
    collector.update(&part(&rows, 0..600)).expect("same width");
    collector
        .update(&part(&rows, 600..1100))
        .expect("same width");
    let dx = &d * wide(&rows);
    assert_matrix_close(
        collector.finish().matrix(),
        (&dx * dx.transpose()).as_ref(),
        1e-5,
    );
}

#[test]
fn streamed_factor_squares_to_h_for_few_and_many_tokens() {
    for tokens in [1, 4, 700] {
        let rows = rows(&mut Lcg(6), tokens, 6);
        let weights: Vec<f64> = (0..tokens).map(|t| 0.5 + t as f64).collect();
        let rows = rows.weighted(&weights).expect("valid");
        let mut whole = FactorCollector::new(6);
        whole.update(&rows).expect("fits");
        let t = whole.finish();
        assert_matrix_close((&t * t.transpose()).as_ref(), gram(&[rows]).matrix(), 1e-5);
    }
}

#[test]
fn energy_of_an_error_on_tokens_is_that_under_their_h() {
    let mut lcg = Lcg(8);
    let (e, rows) = (lcg.matrix(5, 6), rows(&mut lcg, 30, 6));
    let weights: Vec<f64> = (0..30).map(f64::from).collect();
    let rows = rows.weighted(&weights).expect("valid");
    let h = gram(std::slice::from_ref(&rows));
    let expected = solve::Weighting::Gram(h.matrix())
        .energy(e.as_ref())
        .expect("fits");
    let mut energy = EnergyCollector::new(e.as_ref()).expect("finite");
    for _ in 0..2 {
        energy.update(&rows).expect("fits");
    }
    assert_close(energy.finish(), 2.0 * expected, 1e-6);
}

#[test]
fn statistics_survive_their_file_and_go_on() {
    let mut lcg = Lcg(5);
    let (student, teacher) = (rows(&mut lcg, 40, 6), rows(&mut lcg, 40, 6));
    let collect = Collect {
        gram: true,
        cross: true,
    };
    let mut collector = InputCollector::new(6, collect, Accumulation::Sum).expect("valid");
    collector.update(&student, Some(&teacher)).expect("fits");
    let stats = collector.clone().finish();
    let cross = &wide(&teacher) * wide(&student).transpose();
    assert_matrix_close(
        stats.cross.as_ref().expect("collected").as_ref(),
        cross.as_ref(),
        1e-6,
    );

    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("stats.safetensors");
    stats.save(&path).expect("saves");
    let loaded = InputStats::load(&path).expect("loads");
    assert_eq!(loaded.diagonal, stats.diagonal);
    assert_eq!(loaded.cross, stats.cross);
    let h = |stats: &InputStats| stats.gram.as_ref().expect("collected").matrix().to_owned();
    assert_eq!(h(&loaded), h(&stats));

    let mut resumed = InputCollector::resume(loaded, Accumulation::Sum).expect("valid");
    for collector in [&mut collector, &mut resumed] {
        collector.update(&teacher, Some(&student)).expect("fits");
    }
    let (one, two) = (collector.finish(), resumed.finish());
    assert_matrix_close(h(&one).as_ref(), h(&two).as_ref(), 1e-6);
    assert_eq!(one.diagonal, two.diagonal);
}

#[test]
fn a_file_without_statistics_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("other.safetensors");
    let square = Tensor::new(&[1f64, 2.0], &Device::Cpu).expect("a tensor");
    tensor_io::write_file(&path, [("square", &square)], &Default::default()).expect("writes");
    let error = InputStats::load(&path).expect_err("no statistics");
    assert!(error.to_string().contains("other.safetensors"), "{error}");
}

#[test]
fn a_nan_activation_is_named_by_token_and_channel() {
    let mut values = vec![0f32; 12];
    values[7] = f32::NAN;
    let error = Rows::new(values, 3).expect_err("a NaN");
    assert!(matches!(
        error,
        Error::Activation {
            token: 2,
            channel: 1,
            ..
        }
    ));
}

/// Squared loss of the best correction of rank r for H estimated from a sample, relative to the
/// best for the full H.
fn excess(x: &Mat<f64>, importance: Importance, share: f64) -> f64 {
    let n = x.nrows();
    let d = Lcg(77).matrix(n, n);
    let full = Gram::of(x.as_ref()).expect("finite");
    let values: Vec<f32> = (0..x.ncols())
        .flat_map(|t| (0..n).map(move |j| (t, j)))
        .map(|(t, j)| x[(j, t)] as f32)
        .collect();
    let rows = Rows::new(values, n).expect("finite");
    let losses = (0..5).map(|seed| {
        let mut sampler = Sampler::new(importance, share, seed).expect("valid");
        let sampled = gram(&[sampler.sample(&rows).expect("fits")]);
        let loss = |h: MatRef<'_, f64>| {
            let weighting = solve::Weighting::Gram(h);
            let solution = solve::solve(d.as_ref(), &weighting, 4, &Default::default());
            let error = solution.expect("solves").factors.error(d.as_ref());
            solve::Weighting::Gram(full.matrix())
                .energy(error.as_ref())
                .expect("fits")
        };
        loss(sampled.matrix()) / loss(full.matrix()) - 1.0
    });
    losses.sum::<f64>() / 5.0
}

#[test]
fn importance_sampling_keeps_rare_large_tokens_that_uniform_sampling_loses() {
    let mut lcg = Lcg(9);
    let mut x = lcg.matrix(24, 2048);
    for t in (100..2048).step_by(500) {
        x.col_mut(t).iter_mut().for_each(|x| *x *= 100.0);
    }
    let mixture = excess(&x, Importance::Mixture, 0.125);
    assert!(mixture < 0.05, "{mixture}");
    assert!(excess(&x, Importance::Uniform, 0.125) > 4.0 * mixture);
    assert!(excess(&x, Importance::Norm, 0.125) < 0.3);
    assert!(excess(&x, Importance::Leverage { ridge: 0.1 }, 0.125) < 0.3);
}

#[test]
fn a_pick_of_another_batch_is_refused() {
    let pick = Pick {
        token: 3,
        weight: 1.0,
    };
    let error = rows(&mut Lcg(1), 3, 2).picked(&[pick]);
    assert!(matches!(error, Err(Error::Setting { .. })));
}

#[test]
fn sampled_sums_are_unbiased() {
    let rows = rows(&mut Lcg(3), 400, 3);
    let exact = gram(std::slice::from_ref(&rows));
    for importance in [Importance::Uniform, Importance::Norm, Importance::Mixture] {
        let mut mean = Mat::<f64>::zeros(3, 3);
        for seed in 0..200 {
            let mut sampler = Sampler::new(importance, 0.25, seed).expect("valid");
            let sampled = sampler.sample(&rows).expect("fits");
            assert!(
                (90..=110).contains(&sampled.tokens()),
                "{}",
                sampled.tokens()
            );
            mean += faer::Scale(1.0 / 200.0) * gram(&[sampled]).matrix();
        }
        assert_matrix_close(mean.as_ref(), exact.matrix(), 0.02);
    }
}
