//! Six tokens and five experts, computed by hand.

use super::compensation::{Moments, Novice};
use super::layer::{Batch, Outputs};
use super::method::{best, drop_changes, naee_errors};
use super::statistics::LayerStatistics;
use causal_lm::mixture::{Routing, RoutingRule};

const EXPERTS: usize = 5;

fn rule(normalise: bool) -> RoutingRule {
    RoutingRule {
        chosen: 2,
        normalise,
    }
}

fn output(t: usize, e: usize) -> [f32; 2] {
    [0, 1].map(|c| (((3 * t + 5 * e + 7 * c + (t * e) % 3) % 13) as f32 - 6.0) / 4.0)
}

fn routing(normalise: bool) -> Routing {
    let logit = |t: usize, e: usize| match e {
        4 => -4.0,
        _ => (((5 * t + 3 * e + (t * e) % 4) % 11) as f32 - 5.0) / 2.0,
    };
    let tokens = (0..6).flat_map(|t| (0..EXPERTS).map(move |e| logit(t, e)));
    rule(normalise).route(tokens.collect(), EXPERTS).unwrap()
}

/// Calls `test` with all outputs of all tokens.
fn with_batch<T>(normalise: bool, test: impl FnOnce(Batch<'_>) -> T) -> T {
    let routing = routing(normalise);
    let mut outputs = Outputs::new(6, EXPERTS, 2);
    for expert in 0..EXPERTS {
        let rows: Vec<f32> = (0..6).flat_map(|t| output(t, expert)).collect();
        outputs.add(expert, &[0, 1, 2, 3, 4, 5], &rows);
    }
    test(Batch {
        rule: rule(normalise),
        routing: &routing,
        outputs: &outputs,
    })
}

fn statistics(normalise: bool) -> LayerStatistics {
    let routing = routing(normalise);
    let mut statistics = LayerStatistics::new(EXPERTS);
    statistics.add_routing(&routing);
    for (expert, (tokens, gates)) in routing.by_expert().into_iter().enumerate() {
        let rows: Vec<f32> = tokens
            .iter()
            .flat_map(|&t| output(t as usize, expert))
            .collect();
        statistics.experts[expert].add(&gates, &rows, 2);
    }
    statistics
}

fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let gap = (found - expected).abs();
        assert!(
            gap <= 2e-6 * expected.abs().max(0.1),
            "{found} is not {expected}"
        );
    }
}

#[test]
fn statistics_are_those_found_by_hand() {
    for (normalise, gates, reap, mone) in [
        (
            true,
            [1.278484, 2.587723, 0.1824255, 1.951367, 0.0],
            [0.6322969, 1.005593, 0.2039579, 0.4932138, 0.0],
            [0.4520125, 1.174548, 0.0, 0.4658825, 0.0],
        ),
        (
            false,
            [1.194230, 2.350725, 0.1734390, 1.816467, 0.0],
            [0.5904415, 0.9182480, 0.1939107, 0.4583251, 0.0],
            [0.4222239, 1.066977, 0.0, 0.4336756, 0.0],
        ),
    ] {
        let statistics = statistics(normalise);
        let each = |score: &dyn Fn(&super::ExpertStatistics) -> f64| -> Vec<f64> {
            statistics.experts.iter().map(score).collect()
        };
        close(&each(&|e| e.gates), &gates);
        let probabilities = [1.397135, 2.425215, 0.3212420, 1.844105, 0.01230333];
        close(&each(&|e| e.probabilities), &probabilities);
        close(
            &each(&|e| e.norms),
            &[4.060660, 3.467612, 1.118034, 6.581307, 0.0],
        );
        let count = |e: &super::ExpertStatistics| e.count.max(1) as f64;
        close(
            &each(&|e| e.squares / count(e)),
            &[1.875, 1.354167, 1.25, 1.75, 0.0],
        );
        close(&each(&|e| e.gated_norms / count(e)), &reap);
        close(&each(&|e| e.variance().sqrt() * e.gates / count(e)), &mone);
        let counts: Vec<usize> = statistics.experts.iter().map(|e| e.count).collect();
        assert_eq!(counts, [3, 3, 1, 5, 0]);
        let together = |a: usize, b: usize| statistics.together[a * EXPERTS + b];
        assert_eq!(
            [
                together(0, 1),
                together(0, 3),
                together(1, 3),
                together(2, 3)
            ],
            [1, 2, 2, 1]
        );
        assert_eq!(best(&reap, 2), [1, 0]);
        assert_eq!(
            (statistics.tokens_per_expert(), statistics.rarer_than(2)),
            ((0, 3), 2)
        );
    }
}

#[test]
fn what_dropping_one_expert_does_is_that_found_by_hand() {
    for (normalise, expected) in [
        (true, [0.4462430, 2.114012, 0.0296520, 0.5191646, 0.0]),
        (
            false,
            [0.3975203, 1.739799, 0.0339722, 0.4908602, 2.637552e-6],
        ),
    ] {
        let found = with_batch(normalise, drop_changes);
        let means: Vec<f64> = found.iter().map(|sum| sum / 6.0).collect();
        close(&means, &expected);
        if !normalise {
            assert!((found[4] / 6.0 - 2.637552e-6).abs() < 1e-11);
        }
    }
}

#[test]
fn the_best_subsets_are_those_found_by_hand() {
    let subsets: [&[usize]; 3] = [&[0, 1, 2, 3], &[0, 1, 3], &[0, 1]];
    for (normalise, expected) in [
        (true, [0.0, 0.1779121, 1.306933]),
        (false, [1.582531e-5, 0.2067621, 1.488339]),
    ] {
        let lists: Vec<Vec<usize>> = subsets.iter().map(|s| s.to_vec()).collect();
        let found = with_batch(normalise, |batch| naee_errors(batch, &lists));
        close(&found, &expected);
    }
}

#[test]
fn factors_of_experts_that_stay_are_those_found_by_hand() {
    for (normalise, one, factors, errors) in [
        (
            true,
            0.9147661,
            [0.9997951, 0.9666053, 0.7458777],
            [0.1779121, 0.1331944, 0.0482627],
        ),
        (
            false,
            0.8822359,
            [0.9511191, 0.9504937, 0.7175654],
            [0.2067621, 0.1265649, 0.0465481],
        ),
    ] {
        let mut moments = Moments::new(3);
        with_batch(normalise, |batch| {
            moments.add(batch, batch.rule, &[0, 1, 3])
        });
        let solved = moments.solve(0.01, 0).unwrap();
        close(&[moments.one_factor()], &[one]);
        close(&solved, &factors);
        let error = |factors: &[f64]| moments.error(factors);
        close(
            &[
                error(&[1.0; 3]),
                error(&[moments.one_factor(); 3]),
                error(&solved),
            ],
            &errors,
        );
    }
}

#[test]
fn errors_of_constants_are_those_found_by_hand() {
    for (normalise, expected) in [
        (true, [1.156652, 0.8825025]),
        (false, [1.015906, 0.7672619]),
    ] {
        let statistics = statistics(normalise);
        let mean = |expert: usize| -> Vec<f32> {
            let mean = statistics.experts[expert].mean();
            mean.into_iter().map(|x| x as f32).collect()
        };
        let error = |kept: &[usize]| {
            let gone = (0..EXPERTS).filter(|expert| !kept.contains(expert));
            let novices: Vec<Vec<f32>> = gone.map(mean).collect();
            with_batch(normalise, |batch| Novice::error_of(batch, kept, &novices))
        };
        close(&[error(&[0, 1]), error(&[1, 3])], &expected);
    }
}

#[test]
fn factors_of_fewer_experts_are_those_found_by_hand() {
    for (normalise, one, factors, errors) in [
        (
            true,
            0.6979962,
            [0.6734030, 0.7471366, 1.0, 0.6604357, 1.0],
            [1.274569, 0.3511056, 0.3362576],
        ),
        (
            false,
            0.8969854,
            [1.006903, 0.8681773, 1.0, 0.8055896, 1.0],
            [0.5338188, 0.4791037, 0.4498936],
        ),
    ] {
        let mut moments = Moments::new(EXPERTS);
        let fewer = RoutingRule {
            chosen: 1,
            normalise,
        };
        with_batch(normalise, |batch| {
            moments.add(batch, fewer, &[0, 1, 2, 3, 4])
        });
        let solved = moments.solve(0.01, 0).unwrap();
        close(&[moments.one_factor()], &[one]);
        close(&solved, &factors);
        let error = |factors: &[f64]| moments.error(factors);
        close(
            &[
                error(&[1.0; 5]),
                error(&[moments.one_factor(); 5]),
                error(&solved),
            ],
            &errors,
        );
    }
}
