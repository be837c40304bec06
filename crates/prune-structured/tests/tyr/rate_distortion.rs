//! Allocation by rate-distortion curves, computed and measured.

use crate::common::{KINDS, tiny, tiny_with, windows};
use crate::{Counter, calibrate, common, texts};
use candle_core::{DType, Tensor};
use causal_lm::Windows;
use causal_lm::testing::TestModel;
use prune_structured::allocation::UlUm;
use prune_structured::compensation::NoCompensation;
use prune_structured::obs::Problem;
use prune_structured::rate_distortion::{self, Distortion, Measure, RdDp, measure};
use prune_structured::stats::Part;
use prune_structured::{
    Allocation, AttentionUnit, Calibration, Compensation, Cost, Error, NoProgress, Plan, Ranking,
    Recipe, Score, Settings, write,
};
use std::path::Path;
use tensor_io::Checkpoint;

#[test]
fn rd_dp_never_exceeds_its_budget_and_no_other_allocation_has_less_error() {
    for kind in KINDS {
        let model = tiny(kind, DType::F32);
        let calibration = calibrate(&model, &windows(12), "gram");
        let decoder = model.decoder();
        for score in ["obs", "wifv", "wanda-sp"] {
            let score = Score::named(score).unwrap();
            for compensation in [Compensation::LEAST_SQUARES, NoCompensation.into()] {
                let mut recipe = Recipe::named("rd-dp", 0).unwrap();
                (recipe.score, recipe.compensation) = (score, Some(compensation));
                recipe.allocation = output_error_curves(false);
                let make = |recipe: &Recipe, ratio| {
                    Plan::make(&decoder, &calibration, recipe, ratio, &NoProgress).unwrap()
                };
                let rd_dp = make(&recipe, 0.35);
                let prunable: u64 = score
                    .rank(&decoder, &calibration, &recipe.shape, &NoProgress)
                    .unwrap()
                    .iter()
                    .map(Ranking::total)
                    .sum();
                let removed = |plan: &Plan| {
                    let cost = Cost::of(&decoder, plan).unwrap();
                    cost.total_before().parameters - cost.total_after().parameters
                };
                assert!(removed(&rd_dp) as f64 >= 0.35 * prunable as f64, "{kind}");
                let error = |plan: &Plan| output_error(&model, &calibration, plan);
                recipe.allocation = UlUm.into();
                // The uniform plan must not have spent more.
                let uniform = make(&recipe, 0.36);
                if removed(&uniform) >= removed(&rd_dp) {
                    assert!(
                        error(&rd_dp) <= error(&uniform) * (1.0 + 1e-6),
                        "{kind} {score:?}"
                    );
                }
            }
        }
    }
}

fn output_error_curves(convex: bool) -> Allocation {
    let distortion = match convex {
        true => Distortion::Relative,
        false => Distortion::Output,
    };
    RdDp { distortion, convex }.into()
}

/// Σ over sublayers of tr(ΔB ᵀ H ΔB) under the plan's compensation.
fn output_error(model: &TestModel, calibration: &Calibration, plan: &Plan) -> f64 {
    let decoder = model.decoder();
    let d = decoder.config().head_dim(0);
    let mut sum = 0.0;
    for (layer, plan_of) in plan.layers.iter().enumerate() {
        let heads = plan_of.heads.iter().flat_map(|h| h * d..(h + 1) * d);
        for (part, kept) in [
            (Part::Attention, heads.collect::<Vec<_>>()),
            (Part::Mlp, plan_of.neurons.clone()),
        ] {
            let gram = calibration
                .gram
                .as_ref()
                .unwrap()
                .load(layer, part)
                .unwrap();
            let weight = decoder.weight(layer, part.output()).unwrap().unwrap();
            let problem = Problem::new(&weight, &gram, 0.01, layer).unwrap();
            let mut order = kept.clone();
            order.extend((0..problem.columns()).filter(|c| !kept.contains(c)));
            let mean = vec![0.0; problem.columns()];
            let curve =
                prune_structured::obs::error_curve(&problem, &order, plan.compensation, (&mean, 0));
            sum += curve.unwrap()[kept.len()];
        }
    }
    sum
}

#[test]
fn the_obs_score_goes_with_every_allocation_and_unit() {
    for kind in KINDS {
        let model = tiny(kind, DType::F32);
        let calibration = calibrate(&model, &windows(12), "gram");
        for unit in [AttentionUnit::KvGroup, AttentionUnit::QueryHead] {
            for allocation in [
                Allocation::named("al-am").unwrap(),
                Allocation::named("al-mm").unwrap(),
                Allocation::named("ul-mm").unwrap(),
                Allocation::named("ul-um").unwrap(),
                output_error_curves(true),
            ] {
                let mut recipe = Recipe::named("rd-dp", 0).unwrap();
                recipe.allocation = allocation;
                recipe.shape.attention_unit = Some(unit);
                let plan =
                    Plan::make(&model.decoder(), &calibration, &recipe, 0.3, &NoProgress).unwrap();
                plan.check(&model.decoder()).unwrap();
                assert!(!plan.is_identity(&model.decoder()), "{kind} {allocation:?}");
            }
        }
    }
}

#[test]
fn measured_curves_fall_to_the_dense_model_and_are_what_the_pruned_model_diverges_by() {
    let model = tiny("llama", DType::F32);
    let texts = texts();
    let calibration = calibrate(&model, &texts.calibration, "gram");
    let decoder = model.decoder();
    let recipe = Recipe::named("rd-dp", 0).unwrap();
    let mut rankings = recipe
        .score
        .rank(&decoder, &calibration, &recipe.shape, &NoProgress)
        .unwrap();
    let dir = model.path("curves");
    let data = rate_distortion::Data {
        windows: &texts.search,
        dir: &dir,
        options: Measure::default(),
    };
    for (wrong, [points, top_k]) in [("points", [0, 512]), ("top_k", [8, 0])] {
        let mut data = data;
        (data.options.points, data.options.top_k) = (points, top_k);
        let nothing = measure(
            &decoder,
            &calibration,
            &recipe,
            &mut rankings,
            data,
            &NoProgress,
        );
        assert!(
            matches!(nothing, Err(Error::Search { option, .. }) if option == wrong),
            "{nothing:?}"
        );
    }
    let counter = Counter::default();
    measure(
        &decoder,
        &calibration,
        &recipe,
        &mut rankings,
        data,
        &counter,
    )
    .unwrap();
    assert_eq!(counter.announced.into_inner(), counter.done.into_inner());
    for ranking in &rankings {
        let errors = ranking.errors.as_ref().unwrap();
        assert_eq!(errors.len(), ranking.steps().len() + 1);
        assert!(errors.last().unwrap().abs() < 1e-6);
        assert!(errors[ranking.protected] > 1e-4);
    }
    let plan = Plan::allocate(&decoder, &rankings, &recipe, 0.3).unwrap();
    assert!(!plan.is_identity(&decoder));
    // Attention of the first layer alone at its least width, written and opened.
    let mut alone = plan.clone();
    for (layer, plan) in alone.layers.iter_mut().enumerate() {
        plan.neurons = (0..40).collect();
        (plan.heads, plan.kv_heads) = ((0..8).collect(), (0..4).collect());
        if layer == 0 {
            plan.kv_heads = rankings[0].kept(1);
            let kv = plan.kv_heads[0];
            plan.heads = vec![2 * kv, 2 * kv + 1];
        }
    }
    let dst = model.path("alone");
    write(
        &decoder,
        &alone,
        &dst,
        &Settings::new(&calibration),
        &NoProgress,
    )
    .unwrap();
    let measured = rankings[0].errors.as_ref().unwrap()[1];
    let written = divergence(
        model.checkpoint(),
        &Checkpoint::open(&dst).unwrap(),
        &texts.search,
    );
    assert!(
        (measured - written).abs() < 1e-4 * (1.0 + written),
        "{measured} {written}"
    );
}

/// KL divergence of two models over the whole vocabulary, by the textbook.
fn divergence(teacher: &Checkpoint, student: &Checkpoint, windows: &Windows) -> f64 {
    let log_softmax = |checkpoint: &Checkpoint| -> Vec<Vec<f64>> {
        let decoder = common::decoder(checkpoint);
        let hidden = causal_lm::run_blocks(
            &decoder,
            windows,
            &mut causal_lm::NoTap,
            &causal_lm::NoProgress,
        );
        let head = decoder.head().unwrap();
        let mut rows = Vec::new();
        for batch in hidden.unwrap().batches() {
            let (count, len, width) = batch.dims3().unwrap();
            let logits = head
                .forward(&batch.reshape((count * len, width)).unwrap())
                .unwrap();
            for (row, logits) in logits.to_vec2::<f32>().unwrap().iter().enumerate() {
                if row % len + 1 < len {
                    let sum: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
                    rows.push(logits.iter().map(|&z| f64::from(z) - sum.ln()).collect());
                }
            }
        }
        rows
    };
    let (p, q) = (log_softmax(teacher), log_softmax(student));
    let rows = p
        .iter()
        .zip(&q)
        .map(|(p, q)| -> f64 { p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum() });
    rows.sum::<f64>() / p.len() as f64
}

/// The curve of every sublayer, measured in `dir`.
fn measured(model: &TestModel, windows: &Windows, top_k: usize, dir: &Path) -> Vec<Vec<f64>> {
    let calibration = calibrate(model, windows, "gram");
    let decoder = model.decoder();
    let recipe = Recipe::named("rd-dp", 0).unwrap();
    let shape = &recipe.shape;
    let mut rankings = Score::named("wifv")
        .unwrap()
        .rank(&decoder, &calibration, shape, &NoProgress)
        .unwrap();
    let mut options = Measure::default();
    (options.points, options.top_k) = (2, top_k);
    let data = rate_distortion::Data {
        windows,
        dir,
        options,
    };
    measure(
        &decoder,
        &calibration,
        &recipe,
        &mut rankings,
        data,
        &NoProgress,
    )
    .unwrap();
    rankings.into_iter().map(|r| r.errors.unwrap()).collect()
}

#[test]
fn predictions_of_another_model_text_or_k_in_the_folder_are_not_used() {
    let model = tiny("llama", DType::F32);
    // Another model whose tensors are the same but for one entry far behind the first bytes.
    let other = tiny_with("llama", DType::F32, |name, tensor| {
        if name != "model.layers.2.mlp.down_proj.weight" {
            return tensor;
        }
        let mut rows = tensor.to_vec2::<f32>().unwrap();
        *rows.last_mut().unwrap().last_mut().unwrap() += 2.0;
        Tensor::new(rows, tensor.device()).unwrap()
    });
    let all = windows(8);
    let tail: Vec<u32> = all.iter().skip(4).flatten().copied().collect();
    let (first, second) = (all.first(4), Windows::cut(&tail, 16, None).unwrap());
    let shared = model.path("shared");
    let before = measured(&model, &first, 20, &shared);
    for (model, windows, top_k) in [
        (&other, &first, 20),
        (&model, &second, 20),
        (&model, &first, 10),
        (&model, &first, 20),
    ] {
        let fresh = tempfile::tempdir().unwrap();
        let expected = measured(model, windows, top_k, fresh.path());
        assert_eq!(measured(model, windows, top_k, &shared), expected);
    }
    assert_eq!(measured(&model, &first, 20, &shared), before);
}
