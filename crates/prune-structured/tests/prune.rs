//! Pruning as its users see it: calibrate, plan, write, open again.

mod common;

use candle_core::{DType, Tensor};
use causal_lm::testing::TestModel;
use common::{KINDS, decoder, gap, logits, overwrite, tiny, tiny_with, windows};
use prune_structured::allocation::UlUm;
use prune_structured::compensation::{Bias, LeastSquares, NoCompensation};
use prune_structured::score::Ifv;
use prune_structured::stats::{Needs, Part};
use prune_structured::{
    Allocation, AttentionUnit, Calibration, Collect, Compensation, Cost, Error, Form, LayerPlan,
    Loading, NoProgress, Plan, Recipe, Score, Settings, write,
};
use tensor_io::Checkpoint;

const LEAST_SQUARES: Compensation = Compensation::LEAST_SQUARES;
const NONE: Compensation = Compensation::None(NoCompensation);
const BIAS: Compensation = Compensation::Bias(Bias);

fn calibrate(model: &TestModel) -> Calibration {
    let dir = model.path("gram");
    std::fs::create_dir_all(&dir).unwrap();
    let everything = Needs {
        fluctuation: true,
        gram: true,
    };
    let collect = Collect::new(everything, dir);
    Calibration::run(&model.decoder(), &windows(12), &collect, &NoProgress).unwrap()
}

fn recipe(name: &str) -> Recipe {
    Recipe::named(name, 3).unwrap()
}

fn save(
    model: &TestModel,
    plan: &Plan,
    calibration: &Calibration,
    form: Form,
    name: &str,
) -> std::path::PathBuf {
    let dst = model.path(name);
    let settings = Settings::new(calibration).form(form).files(overwrite());
    write(&model.decoder(), plan, &dst, &settings, &NoProgress).unwrap();
    dst
}

#[allow(clippy::result_large_err)]
/// A plan by a method that takes no time.
fn make(
    model: &TestModel,
    calibration: &Calibration,
    recipe: &Recipe,
    ratio: f64,
) -> prune_structured::Result<Plan> {
    Plan::make(&model.decoder(), calibration, recipe, ratio, &NoProgress)
}

#[test]
fn ratio_0_copies_every_byte_and_leaves_the_config_alone() {
    for kind in KINDS {
        for dtype in [DType::F32, DType::BF16] {
            let model = tiny(kind, dtype);
            let calibration = calibrate(&model);
            for name in Recipe::NAMES {
                let plan = make(&model, &calibration, &recipe(name), 0.0).unwrap();
                let copy =
                    Checkpoint::open(save(&model, &plan, &calibration, Form::Sliced, "copy"))
                        .unwrap();
                assert_eq!(
                    copy.config().raw(),
                    model.checkpoint().config().raw(),
                    "{kind} {name}"
                );
                assert!(copy.names().eq(model.checkpoint().names()));
                for tensor in copy.names() {
                    assert_eq!(
                        copy.bytes(tensor).unwrap(),
                        model.checkpoint().bytes(tensor).unwrap(),
                        "{tensor}"
                    );
                }
            }
        }
    }
}

#[test]
fn masked_and_sliced_models_give_the_same_logits() {
    for kind in KINDS {
        let model = tiny(kind, DType::F32);
        let calibration = calibrate(&model);
        for unit in [AttentionUnit::KvGroup, AttentionUnit::QueryHead] {
            for compensation in [NONE, BIAS, LEAST_SQUARES] {
                for allocation in ["al-am", "al-mm", "ul-mm", "ul-um"] {
                    let allocation = Allocation::named(allocation).unwrap();
                    let mut recipe = recipe("flap");
                    recipe.shape.attention_unit = Some(unit);
                    (recipe.allocation, recipe.compensation) = (allocation, Some(compensation));
                    let plan = make(&model, &calibration, &recipe, 0.3).unwrap();
                    let sliced = save(&model, &plan, &calibration, Form::Sliced, "sliced");
                    let masked = save(&model, &plan, &calibration, Form::Masked, "masked");
                    let gap = gap(&logits(&sliced), &logits(&masked));
                    assert!(
                        gap < 1e-5,
                        "{kind} {unit:?} {compensation:?} {allocation:?}: {gap}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_removed_share_is_within_one_unit_of_the_ratio_and_the_shards_hold_what_the_plan_counts() {
    for kind in KINDS {
        let model = tiny(kind, DType::F32);
        let calibration = calibrate(&model);
        for name in ["flap", "wanda-sp", "magnitude", "random"] {
            for ratio in [0.1, 0.2, 0.3, 0.5] {
                let plan = make(&model, &calibration, &recipe(name), ratio).unwrap();
                let cost = Cost::of(&model.decoder(), &plan).unwrap();
                let blocks = |blocks: &[prune_structured::BlockCost]| {
                    blocks.iter().map(|b| b.parameters).sum::<u64>()
                };
                let prunable: u64 = {
                    let mut nothing = plan.clone();
                    nothing.layers = plan
                        .layers
                        .iter()
                        .map(|_| LayerPlan {
                            heads: vec![],
                            kv_heads: vec![],
                            neurons: vec![],
                        })
                        .collect();
                    nothing.compensation = NONE;
                    blocks(&cost.before)
                        - blocks(&Cost::of(&model.decoder(), &nothing).unwrap().after)
                };
                let removed = blocks(&cost.before) - blocks(&cost.after);
                let gap = (removed as f64 - ratio * prunable as f64).abs();
                // The largest unit is a KV group, or one query head of every group.
                let unit = (cost.before[0].parameters as f64 / 4.0).min(prunable as f64);
                assert!(gap <= unit, "{kind} {name} {ratio}: off by {gap}");
                let written =
                    Checkpoint::open(save(&model, &plan, &calibration, Form::Sliced, "pruned"))
                        .unwrap();
                assert_eq!(
                    written.parameters(),
                    cost.total_after().parameters,
                    "{kind} {name} {ratio}"
                );
                assert_eq!(
                    written.total_bytes(),
                    cost.total_after().bytes,
                    "{kind} {name} {ratio}"
                );
            }
        }
    }
}

/// A Llama with biases whose neuron 7 of every layer is the same whatever the input.
fn with_constant_neuron() -> TestModel {
    tiny_with("llama-biases", DType::F32, |name, tensor| {
        let constant = name.contains("gate_proj.weight") || name.contains("up_proj.weight");
        if !constant {
            return tensor;
        }
        let mut rows = tensor.to_vec2::<f32>().unwrap();
        rows[7].fill(0.0);
        Tensor::new(rows, tensor.device()).unwrap()
    })
}

#[test]
fn a_constant_feature_scores_0_and_its_bias_replaces_it_exactly() {
    let model = with_constant_neuron();
    let calibration = calibrate(&model);
    for layer in &calibration.layers {
        let stats = layer.mlp.as_ref().unwrap();
        let scores = Score::from(Ifv).columns(0, Part::Mlp, stats).unwrap();
        assert!(scores[7] < 1e-12, "{}", scores[7]);
    }
    let plan = Plan {
        recipe: recipe("flap"),
        ratio: 0.01,
        compensation: BIAS,
        layers: vec![
            LayerPlan {
                heads: (0..8).collect(),
                kv_heads: (0..4).collect(),
                neurons: (0..40).filter(|&j| j != 7).collect(),
            };
            3
        ],
    };
    let pruned = save(&model, &plan, &calibration, Form::Sliced, "pruned");
    assert!(gap(&logits(&pruned), &logits(model.checkpoint().dir())) < 1e-4);
}

#[test]
fn permuting_neurons_permutes_what_is_kept() {
    let shift = |j: usize| (j + 13) % 40;
    let model = tiny("llama", DType::F32);
    let permuted = tiny_with("llama", DType::F32, |name, tensor| {
        let ids = Tensor::from_iter(
            (0..40u32).map(|j| shift(j as usize) as u32),
            tensor.device(),
        )
        .unwrap();
        match name {
            n if n.contains("gate_proj") || n.contains("up_proj") => {
                tensor.index_select(&ids, 0).unwrap()
            }
            n if n.contains("down_proj") => tensor.index_select(&ids, 1).unwrap(),
            _ => tensor,
        }
    });
    let kept = |model: &TestModel| {
        make(model, &calibrate(model), &recipe("flap"), 0.3)
            .unwrap()
            .layers
    };
    for (plain, permuted) in kept(&model).iter().zip(kept(&permuted)) {
        let mut back: Vec<usize> = permuted.neurons.iter().map(|&j| shift(j)).collect();
        back.sort_unstable();
        assert_eq!(back, plain.neurons);
        assert_eq!(permuted.heads, plain.heads);
    }
}

#[test]
fn scaling_an_output_projection_leaves_the_global_cut_alone() {
    let model = tiny("llama", DType::F32);
    let mut calibration = calibrate(&model);
    let plan = |calibration: &Calibration| make(&model, calibration, &recipe("flap"), 0.4).unwrap();
    let before = plan(&calibration);
    for layer in [0, 2] {
        let stats = calibration.layers[layer].mlp.as_mut().unwrap();
        stats.weight_square.iter_mut().for_each(|w| *w *= 64.0);
    }
    let stats = calibration.layers[1].attention.as_mut().unwrap();
    stats.weight_square.iter_mut().for_each(|w| *w *= 64.0);
    assert_eq!(plan(&calibration).layers, before.layers);
}

/// ‖(W_pruned − W) X‖² summed over sublayers is what least squares minimises: seen here as the
/// distance of the first layer's output on the calibration tokens.
#[test]
fn least_squares_never_loses_to_no_compensation_on_its_own_tokens() {
    let model = tiny("mistral", DType::F32);
    let calibration = calibrate(&model);
    let outputs = |checkpoint: &Checkpoint| -> Vec<f32> {
        let decoder = decoder(checkpoint);
        let mut hidden = causal_lm::Hidden::embed(&decoder, &windows(12)).unwrap();
        hidden
            .advance(&decoder.block(0).unwrap(), &mut causal_lm::NoTap)
            .unwrap();
        hidden
            .batches()
            .iter()
            .flat_map(|b| b.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .collect()
    };
    let dense = outputs(model.checkpoint());
    let mut last = 0.0;
    for ratio in [0.1, 0.3, 0.5] {
        let error = |compensation| -> f64 {
            // Only the MLP of the first layer is pruned, so that its input is the dense one.
            let mut recipe = recipe("flap");
            (recipe.allocation, recipe.compensation) = (UlUm.into(), Some(compensation));
            let mut plan = make(&model, &calibration, &recipe, ratio).unwrap();
            plan.layers[0].heads = (0..8).collect();
            plan.layers[0].kv_heads = (0..4).collect();
            let pruned =
                Checkpoint::open(save(&model, &plan, &calibration, Form::Sliced, "pruned"))
                    .unwrap();
            outputs(&pruned)
                .iter()
                .zip(&dense)
                .map(|(a, b)| f64::from(a - b).powi(2))
                .sum()
        };
        let (none, refitted) = (error(NONE), error(LEAST_SQUARES));
        assert!(refitted < none, "{refitted} is no better than {none}");
        assert!(refitted > last, "error must grow with the ratio");
        last = refitted;
    }
}

#[test]
fn minimum_widths_and_alignment_hold_in_every_layer() {
    let model = tiny("llama", DType::F32);
    let calibration = calibrate(&model);
    let mut recipe = recipe("flap");
    (
        recipe.shape.min_attention,
        recipe.shape.min_neurons,
        recipe.shape.align_neurons,
    ) = (2, 12, 4);
    let plan = make(&model, &calibration, &recipe, 0.45).unwrap();
    for widths in plan.widths() {
        assert!(
            widths.kv_heads >= 2 && widths.neurons >= 12 && widths.neurons % 4 == 0,
            "{widths:?}"
        );
    }
    assert!(matches!(
        make(&model, &calibration, &recipe, 0.9),
        Err(Error::Unreachable { .. })
    ));
    recipe.shape.min_attention = 5;
    assert!(matches!(
        make(&model, &calibration, &recipe, 0.1),
        Err(Error::Width {
            option: "min_attention",
            value: 5,
            layer: 0,
            width: 4
        })
    ));
}

#[test]
fn sublayers_may_go_altogether_and_the_model_still_runs() {
    for kind in KINDS {
        let model = tiny(kind, DType::F32);
        let calibration = calibrate(&model);
        let dense = model.decoder().config().widths[0];
        let all = |n: usize| (0..n).collect::<Vec<_>>();
        let whole = LayerPlan {
            heads: all(dense.heads),
            kv_heads: all(dense.kv_heads),
            neurons: all(40),
        };
        for compensation in [NONE, BIAS, LEAST_SQUARES] {
            let plan = Plan {
                recipe: recipe("flap"),
                ratio: 0.3,
                compensation,
                layers: vec![
                    LayerPlan {
                        heads: vec![],
                        kv_heads: vec![],
                        ..whole.clone()
                    },
                    LayerPlan {
                        neurons: vec![],
                        ..whole.clone()
                    },
                    whole.clone(),
                ],
            };
            assert_eq!(
                Loading::of(&model.decoder(), &plan, Form::Sliced),
                Loading::PerLayer
            );
            let sliced = save(&model, &plan, &calibration, Form::Sliced, "sliced");
            let masked = save(&model, &plan, &calibration, Form::Masked, "masked");
            assert!(
                gap(&logits(&sliced), &logits(&masked)) < 1e-5,
                "{kind} {compensation:?}"
            );
        }
    }
}

#[test]
fn a_plan_survives_its_file_and_is_refused_by_another_model() {
    let model = tiny("llama", DType::F32);
    let calibration = calibrate(&model);
    let plan = make(&model, &calibration, &recipe("flap"), 0.3).unwrap();
    let file = model.path("plan.json");
    plan.save(&file).unwrap();
    assert_eq!(Plan::load(&file).unwrap(), plan);
    let other = tiny("qwen2", DType::F32);
    assert!(matches!(
        plan.check(&other.decoder()),
        Err(Error::PlanMismatch(_))
    ));
    std::fs::write(&file, "{").unwrap();
    assert!(matches!(Plan::load(&file), Err(Error::PlanFile { .. })));
}

#[test]
fn bad_ratios_and_missing_statistics_are_refused() {
    let model = tiny("qwen3", DType::F32);
    let collect = Collect::default();
    let calibration =
        Calibration::run(&model.decoder(), &windows(2), &collect, &NoProgress).unwrap();
    for ratio in [-0.1, 1.0, f64::NAN] {
        assert!(matches!(
            make(&model, &calibration, &recipe("flap"), ratio),
            Err(Error::Ratio(_))
        ));
    }
    assert!(matches!(
        make(&model, &calibration, &recipe("flap-compat"), 0.2),
        Err(Error::Missing { layer: 0, .. })
    ));
    // Qwen3 has no slot for a bias in the MLP, so FLAP refits there, which needs Gram matrices.
    let plan = make(&model, &calibration, &recipe("flap"), 0.2).unwrap();
    assert!(matches!(plan.compensation, Compensation::LeastSquares(_)));
    let dst = model.path("pruned");
    let settings = Settings::new(&calibration);
    let result = write(&model.decoder(), &plan, &dst, &settings, &NoProgress);
    assert!(matches!(result, Err(Error::Missing { .. })));
    assert!(!dst.exists());
}

#[test]
fn what_is_refused_beforehand_is_what_planning_would_refuse() {
    let mut refused = 0;
    for kind in ["llama", "qwen2"] {
        let model = tiny(kind, DType::F32);
        let calibration = calibrate(&model);
        for name in Recipe::NAMES.iter().filter(|name| **name != "tyr") {
            for (min_neurons, align, uniform) in
                [(1, 1, false), (30, 1, false), (1, 7, true), (38, 1, true)]
            {
                let mut recipe = recipe(name);
                recipe.shape.min_neurons = min_neurons;
                recipe.shape.align_neurons = align;
                recipe.shape.uniform = uniform;
                for ratio in [0.0, 0.1, 0.4, 0.7, 0.95, 1.0] {
                    let beforehand = recipe.check(&model.decoder(), ratio);
                    let made = make(&model, &calibration, &recipe, ratio);
                    refused += usize::from(made.is_err());
                    assert_eq!(
                        beforehand.is_ok(),
                        made.is_ok(),
                        "{kind} {name} {:?} {ratio}: {beforehand:?}",
                        recipe.shape
                    );
                }
            }
        }
    }
    assert!(refused > 50, "{refused}");
    let model = tiny("llama", DType::F32);
    let mut odd = recipe("rd-dp");
    for ridge in [f64::NAN, f64::INFINITY, -1.0] {
        let least_squares = LeastSquares { ridge };
        odd.compensation = Some(least_squares.into());
        let error = odd.check(&model.decoder(), 0.2).unwrap_err();
        assert!(matches!(
            error,
            Error::Option {
                option: "ridge",
                ..
            }
        ));
    }
}
