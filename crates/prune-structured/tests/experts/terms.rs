//! Fewer experts for each token with a linear term beside them.

use super::common::{KINDS, Mixture, config, decoder, gap, logits_of, windows};
use candle_core::{DType, Device, Tensor};
use causal_lm::mixture::{ExpertInputs, LinearTerm};
use causal_lm::names::ExpertLayout;
use causal_lm::{Decoder, Hidden};
use faer::Mat;
use linalg::Cholesky;
use prune_structured::experts::{
    Aim, ExpertPlan, ExpertRecipe, ExpertSettings, FewerExperts, FittedTerm, fewer,
    fewer_with_terms, write,
};
use prune_structured::gguf::{self, Precision};
use prune_structured::{Error, NoProgress};
use serde_json::json;
use tensor_io::Checkpoint;

const HIDDEN: usize = 24;

fn fitted(decoder: &Decoder<'_>, rank: usize) -> (ExpertPlan, Vec<Option<FittedTerm>>) {
    fewer_with_terms(decoder, &windows(), 1, rank, &NoProgress).unwrap()
}

fn terms(fitted: &[Option<FittedTerm>]) -> Vec<Option<LinearTerm>> {
    let term = |fitted: &Option<FittedTerm>| fitted.as_ref().map(|fitted| fitted.term.clone());
    fitted.iter().map(term).collect()
}

/// Rows of a matrix.
fn rows(x: &Tensor) -> Vec<Vec<f64>> {
    let x = x.to_dtype(DType::F64).unwrap();
    x.to_vec2().unwrap()
}

/// What the first layer puts out for all tokens, and what its experts read.
fn first_layer(decoder: &Decoder<'_>) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let mut hidden = Hidden::embed(decoder, &windows()).unwrap();
    let mut seen = ExpertInputs::default();
    hidden.advance_stored(decoder, 0, &mut seen).unwrap();
    let flat = |x: &Tensor| rows(&x.reshape(((), HIDDEN)).unwrap());
    let outputs = hidden.batches().iter().flat_map(flat).collect();
    (outputs, seen.inputs.iter().flat_map(flat).collect())
}

fn square(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(a, b)| (a - b).powi(2)).sum()
}

fn near(found: f64, expected: f64, scale: f64) {
    assert!(
        (found - expected).abs() < 1e-5 * scale,
        "{found} is not {expected}"
    );
}

#[test]
fn a_term_adds_its_product_with_what_the_experts_read() {
    for (kind, layout) in KINDS {
        let model = Mixture::random(&config(kind, json!({})), layout);
        let plain = model.decoder();
        let number = |i: usize, j: usize| ((5 * i + 3 * j) % 7) as f32 / 7.0 - 0.4;
        let tensor = |rows: usize, columns: usize| {
            let values: Vec<f32> = (0..rows * columns)
                .map(|at| number(at / columns, at % columns))
                .collect();
            Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
        };
        let (a, b) = (tensor(2, HIDDEN), tensor(HIDDEN, 2));
        let layers = plain.config().layers();
        let has = |layer: usize| plain.config().mixtures[layer].is_some();
        let term = |layer| has(layer).then(|| LinearTerm::new(a.clone(), b.clone()));
        let terms: Vec<_> = (0..layers).map(term).collect();
        let with = model.decoder().with_terms(&terms).unwrap();
        let (expected, x) = first_layer(&plain);
        let (found, same) = first_layer(&with);
        assert_eq!(x, same);
        let (a, b, scale) = (rows(&a), rows(&b), plain.block(0).unwrap().mlp.scale);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for ((found, expected), x) in found.iter().zip(&expected).zip(&x) {
            let inner: Vec<f64> = a.iter().map(|a| dot(a, x)).collect();
            for ((found, expected), b) in found.iter().zip(expected).zip(&b) {
                near(
                    *found,
                    expected + scale * dot(b, &inner),
                    1.0 + expected.abs(),
                );
            }
        }
        let tokens = [3, 1, 4, 1, 5];
        assert!(
            gap(&logits_of(&plain, &tokens), &logits_of(&with, &tokens)) > 1e-4,
            "{kind}"
        );
    }
}

#[test]
fn terms_leave_less_of_the_dense_output_than_a_factor_and_full_rank_is_least_squares() {
    for kind in ["mixtral", "qwen2_moe", "olmoe"] {
        let model = Mixture::random(&config(kind, json!({})), ExpertLayout::Alone);
        let dense = model.decoder();
        let scaled = fewer(&dense, &windows(), 1, FewerExperts::Scale, &NoProgress).unwrap();
        let (target, x) = first_layer(&dense);
        let mut before = f64::INFINITY;
        for rank in [1, 4, HIDDEN] {
            let (plan, found) = fitted(&dense, rank);
            for (a, b) in plan
                .layers
                .iter()
                .flatten()
                .zip(scaled.layers.iter().flatten())
            {
                near(a.factors[0][0], b.factors[0][0], 1.0);
            }
            let folder = model.written(&plan, &format!("rank-{rank}"));
            let checkpoint = Checkpoint::open(&folder).unwrap();
            let fewer = decoder(&checkpoint);
            let (without, _) = first_layer(&fewer);
            let with = fewer.with_terms(&terms(&found)).unwrap();
            let (repaired, _) = first_layer(&with);
            let first = found[0].as_ref().unwrap();
            near(square(&without, &target), first.scaled, first.scaled);
            near(square(&repaired, &target), first.left, first.scaled);
            assert!(
                first.left < before && first.left < first.scaled,
                "{kind} {rank}"
            );
            assert!(first.scaled < first.output);
            before = first.left;
            if rank == HIDDEN {
                let residual = |t: usize, c: usize| target[t][c] - without[t][c];
                let sum = |of: &dyn Fn(usize) -> f64| (0..x.len()).map(of).sum::<f64>();
                let h = Mat::from_fn(HIDDEN, HIDDEN, |i, j| sum(&|t| x[t][i] * x[t][j]));
                let right = Mat::from_fn(HIDDEN, HIDDEN, |i, j| sum(&|t| x[t][i] * residual(t, j)));
                let w = Cholesky::new(h).unwrap().solve(right);
                let left = |t: usize, c: usize| {
                    let linear: f64 = (0..HIDDEN).map(|i| w[(i, c)] * x[t][i]).sum();
                    (residual(t, c) - linear).powi(2)
                };
                let left: f64 = (0..x.len())
                    .flat_map(|t| (0..HIDDEN).map(move |c| (t, c)))
                    .map(|(t, c)| left(t, c))
                    .sum();
                near(first.left, left, first.scaled);
            }
        }
    }
}

#[test]
fn a_model_with_terms_is_not_written() {
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Alone);
    let (_, found) = fitted(&model.decoder(), 2);
    let with = model.decoder().with_terms(&terms(&found)).unwrap();
    let plan = ExpertPlan::whole(&with);
    let dst = model.path("never");
    let settings = ExpertSettings::default();
    let written = write(&with, &plan, &dst, &settings, &NoProgress).map(drop);
    let exported = gguf::export(&with, Precision::F32, &dst, &NoProgress).map(drop);
    for error in [written, exported].map(Result::unwrap_err) {
        assert!(error.to_string().contains("layer 0"), "{error}");
        assert!(error.to_string().contains("in memory alone"), "{error}");
    }
    assert!(!dst.exists());
    // As it is without them, it can be.
    let none = model.decoder().with_terms(&[None, None, None]).unwrap();
    assert!(write(&none, &plan, &dst, &settings, &NoProgress).is_ok());
}

#[test]
fn terms_that_do_not_fit_and_ranks_that_cannot_be_are_refused() {
    let mixed = Mixture::random(&config("qwen2_moe", json!({})), ExpertLayout::Alone);
    let term = |rank: usize, hidden: usize| {
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        Some(LinearTerm::new(
            zeros((rank, hidden)),
            zeros((hidden, rank)),
        ))
    };
    // The second layer has no experts.
    for (terms, expected) in [
        (vec![None; 2], "layer 2"),
        (vec![None, term(2, HIDDEN), None], "layer 1"),
        (vec![None, None, term(2, 23)], "[2, 23]"),
    ] {
        let error = mixed.decoder().with_terms(&terms).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let decoder = mixed.decoder();
    for rank in [0, HIDDEN + 1] {
        let found = fewer_with_terms(&decoder, &windows(), 1, rank, &NoProgress);
        assert!(matches!(found, Err(Error::Option { option: "rank", .. })));
        let recipe = ExpertRecipe::named("topk-lowrank", 0).unwrap();
        let recipe = recipe.with_term_rank(rank);
        assert_eq!(recipe.term_rank(), Some(rank));
        assert!(recipe.check(&decoder, Aim::Chosen(1)).is_err());
    }
    let recipe = ExpertRecipe::named("topk-lowrank", 0).unwrap();
    assert!(recipe.is_control() && recipe.is_fewer());
    assert!(recipe.check(&decoder, Aim::Chosen(1)).is_ok());
    let (plan, none) = fewer_with_terms(&decoder, &windows(), 2, 4, &NoProgress).unwrap();
    assert!(plan.is_identity() && none.iter().all(Option::is_none));
}
