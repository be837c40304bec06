//! What dropping, merging and narrowing experts promise.

use super::common::{
    KINDS, Mixture, config, decoder, gap, logits, logits_of, options, restricted, tensors, windows,
    with_twins,
};
use candle_core::{DType, Device, Tensor};
use causal_lm::config::WIDTHS_KEY;
use causal_lm::names::ExpertLayout;
use causal_lm::{Decoder, Windows};
use prune_structured::compensation::{Bias, NoCompensation};
use prune_structured::experts::compensation::ExpertScale;
use prune_structured::experts::{
    ExpertCost, ExpertMethod, ExpertPlan, ExpertRefits, ExpertSettings, FewerExperts, Joint,
    JointData, JointOptions, Keep, NeuronOptions, fewer, joint, narrow, plan, plan_by_layer,
};
use prune_structured::stats::Needs;
use prune_structured::{
    Calibration, Collect, Compensation, Error, Form, Loading, NoProgress, Plan, Recipe, Settings,
};
use serde_json::json;
use std::collections::HashMap;
use tensor_io::Checkpoint;

fn each(test: impl Fn(&str, &Mixture)) {
    for (kind, layout) in KINDS {
        let model = Mixture::random(&config(kind, json!({})), layout);
        test(&format!("{kind} {layout:?}"), &model);
    }
}

#[test]
fn keeping_all_experts_copies_every_byte() {
    each(|name, model| {
        let found = model.plan("reap", Keep::Without(0.0)).unwrap();
        assert!(found.plan.is_identity());
        let folder = model.written(&found.plan, "whole");
        assert_eq!(tensors(&folder), tensors(model.checkpoint.dir()), "{name}");
        let raw = |dir| Checkpoint::open(dir).unwrap().config().raw().clone();
        assert_eq!(raw(folder.as_path()), raw(model.checkpoint.dir()), "{name}");
    });
}

#[test]
fn dropping_is_routing_among_those_that_stay() {
    each(|name, model| {
        for method in ["reap", "random", "stun"] {
            let found = model.plan(method, Keep::Experts(3)).unwrap();
            let folder = model.written(&found.plan, method);
            let expected = restricted(&model.decoder(), &found.plan);
            assert!(gap(&logits(&folder), &expected) < 1e-6, "{name} {method}");
            assert_eq!(found.plan.loading(&model.decoder()), Loading::Stock);
        }
    });
}

#[test]
fn layers_may_keep_different_numbers_of_experts() {
    each(|name, model| {
        let decoder = model.decoder();
        let options = options("reap", Keep::Without(0.0));
        let found = plan_by_layer(&decoder, &windows(), &options, &[5, 3, 4], &NoProgress).unwrap();
        assert_eq!(found.plan.loading(&decoder), Loading::PerLayer);
        let folder = model.written(&found.plan, "by-layer");
        let expected = restricted(&decoder, &found.plan);
        assert!(gap(&logits(&folder), &expected) < 1e-6, "{name}");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let lists = &checkpoint.config().raw()[WIDTHS_KEY];
        assert_eq!(lists["num_experts"][0], 5, "{name}");
        assert!(folder.join(prune_structured::output::LOADER_FILE).exists());
        // A pruned model is pruned again.
        let again = Mixture::again(&checkpoint, "reap", 3);
        assert!(
            again
                .layers
                .iter()
                .flatten()
                .all(|layer| layer.kept.len() == 3)
        );
    });
}

impl Mixture {
    fn again(checkpoint: &Checkpoint, method: &str, keep: usize) -> ExpertPlan {
        let options = options(method, Keep::Experts(keep));
        plan(&decoder(checkpoint), &windows(), &options, &NoProgress)
            .unwrap()
            .plan
    }
}

#[test]
fn experts_that_no_token_chose_are_free_where_gates_are_normalised() {
    let config = config(
        "mixtral",
        json!({"num_experts_per_tok": 1, "num_local_experts": 12}),
    );
    let model = Mixture::random(&config, ExpertLayout::Alone);
    let tokens = [3, 1, 4, 1, 5, 9];
    let text = Windows::cut(&tokens, 6, None).unwrap();
    let decoder = model.decoder();
    let options = options("frequency", Keep::Experts(6));
    let found = plan(&decoder, &text, &options, &NoProgress).unwrap();
    assert!(found.layers.iter().all(|layer| layer.promoted == 0.0));
    let folder = model.written(&found.plan, "free");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let pruned = super::common::decoder(&checkpoint);
    assert_eq!(logits_of(&pruned, &tokens), logits_of(&decoder, &tokens));
}

#[test]
fn both_layouts_hold_the_same_model() {
    for (kind, _) in KINDS.into_iter().filter(|(kind, _)| *kind != "granitemoe") {
        let config = config(kind, json!({}));
        let model = Mixture::random(&config, ExpertLayout::Alone);
        let found = model.plan("reap", Keep::Experts(4)).unwrap();
        let alone = model.written(&found.plan, "alone");
        let settings = ExpertSettings::default().layout(Some(ExpertLayout::Fused));
        let fused = model.written_with(&found.plan, "fused", &settings);
        assert_eq!(logits(&alone), logits(&fused), "{kind}");
        let checkpoint = Checkpoint::open(&fused).unwrap();
        assert!(
            checkpoint
                .names()
                .any(|name| name.ends_with("gate_up_proj")),
            "{kind}"
        );
        // And back.
        let whole = Mixture::again(&checkpoint, "reap", 4);
        let settings = ExpertSettings::default().layout(Some(ExpertLayout::Alone));
        let back = model.path("back");
        let decoder = decoder(&checkpoint);
        prune_structured::experts::write(&decoder, &whole, &back, &settings, &NoProgress).unwrap();
        assert_eq!(tensors(&back), tensors(&alone), "{kind}");
    }
}

#[test]
fn rows_of_routers_and_weights_of_experts_are_the_source_s_bytes() {
    each(|name, model| {
        let found = model.plan("frequency", Keep::Experts(3)).unwrap();
        let folder = model.written(&found.plan, "pruned");
        let pruned = Checkpoint::open(&folder).unwrap();
        let decoder = model.decoder();
        let smaller = super::common::decoder(&pruned);
        for (layer, experts) in found.plan.layers.iter().enumerate() {
            let Some(experts) = experts else { continue };
            let router = decoder.config().names.router(layer).unwrap();
            let rows = model.checkpoint.rows(&router, &experts.kept).unwrap();
            assert_eq!(pruned.bytes(&router).unwrap().as_ref(), rows, "{name}");
            for (at, &expert) in experts.kept.iter().enumerate() {
                let (a, b) = (smaller.expert(layer, at), decoder.expert(layer, expert));
                let (a, b) = (a.unwrap(), b.unwrap());
                let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(
                    values(&a.up.weight().unwrap()),
                    values(&b.up.weight().unwrap()),
                    "{name}"
                );
                assert_eq!(
                    values(&a.down.weight().unwrap()),
                    values(&b.down.weight().unwrap()),
                    "{name}"
                );
            }
        }
    });
}

#[test]
fn linears_of_experts_with_types_of_their_own_are_counted_as_they_are_written() {
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Alone);
    let dir = model.path("mixed");
    std::fs::create_dir(&dir).unwrap();
    let mut mixed = HashMap::new();
    for name in model.checkpoint.names() {
        let tensor = model.checkpoint.tensor(name, &Device::Cpu).unwrap();
        let dtype = match name.ends_with("w2.weight") {
            true => DType::F16,
            false => DType::F32,
        };
        mixed.insert(name.to_string(), tensor.to_dtype(dtype).unwrap());
    }
    candle_core::safetensors::save(&mixed, dir.join("model.safetensors")).unwrap();
    let config = model.checkpoint.dir().join("config.json");
    std::fs::copy(config, dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let decoder = decoder(&checkpoint);
    let options = options("reap", Keep::Experts(3));
    let found = plan(&decoder, &windows(), &options, &NoProgress).unwrap();
    let cost = ExpertCost::of(&decoder, &found.plan).unwrap();
    let folder = model.path("pruned");
    let settings = ExpertSettings::default();
    prune_structured::experts::write(&decoder, &found.plan, &folder, &settings, &NoProgress)
        .unwrap();
    let pruned = Checkpoint::open(&folder).unwrap();
    assert_eq!(cost.parameters, pruned.parameters());
    assert_eq!(cost.bytes, pruned.total_bytes());
}

#[test]
fn no_score_finds_a_better_subset_than_trying_all() {
    each(|name, model| {
        let errors = |method: &str, keep: usize| -> Vec<f64> {
            let options = options(method, Keep::Experts(keep)).measure_errors(true);
            let found = plan(&model.decoder(), &windows(), &options, &NoProgress).unwrap();
            found
                .layers
                .iter()
                .map(|layer| layer.error.unwrap().dropped)
                .collect()
        };
        let best = errors("naee", 4);
        for method in [
            "reap",
            "frequency",
            "ean",
            "man",
            "mone",
            "aimer",
            "stun",
            "random",
            "drop",
            "drop-greedy",
        ] {
            for (best, found) in best.iter().zip(errors(method, 4)) {
                assert!(*best <= found * (1.0 + 1e-9) + 1e-12, "{name} {method}");
            }
        }
        // Of all experts but one, the one whose absence changes least is left out.
        for method in ["drop", "drop-greedy"] {
            for (best, found) in errors("naee", 5).iter().zip(errors(method, 5)) {
                assert!((best - found).abs() <= 1e-9 * found + 1e-12, "{name}");
            }
        }
    });
}

#[test]
fn factors_make_up_for_a_part_of_what_dropped_experts_did() {
    each(|name, model| {
        let options = options("reap", Keep::Experts(3))
            .compensation(ExpertScale::default())
            .measure_errors(true);
        let found = plan(&model.decoder(), &windows(), &options, &NoProgress).unwrap();
        for layer in &found.layers {
            let error = layer.error.unwrap();
            assert!(error.compensated < error.dropped, "{name}");
        }
        // They are in the down projections, so that the result opens everywhere.
        let folder = model.written(&found.plan, "scaled");
        assert_eq!(found.plan.loading(&model.decoder()), Loading::Stock);
        assert!(logits(&folder).iter().all(|x| x.is_finite()));
        assert_ne!(logits(&folder), restricted(&model.decoder(), &found.plan));
    });
}

#[test]
fn merging_equal_experts_whose_neurons_are_in_another_order_gives_that_expert() {
    let model = with_twins(ExpertLayout::Alone);
    let found = model.plan("hc-smoe", Keep::Experts(5)).unwrap();
    let folder = model.written(&found.plan, "merged");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let (merged, dense) = (decoder(&checkpoint), model.decoder());
    for (layer, experts) in found.plan.layers.iter().enumerate() {
        let experts = experts.as_ref().unwrap();
        let at = experts
            .members
            .iter()
            .position(|members| !members.is_empty())
            .unwrap();
        let members: Vec<usize> = experts.members[at].iter().map(|m| m.expert).collect();
        assert_eq!(members, [0, 1]);
        let found = merged.expert(layer, at).unwrap();
        let expected = dense.expert(layer, experts.kept[at]).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (found, expected) in [(&found.up, &expected.up), (&found.down, &expected.down)] {
            assert!(
                gap(
                    &values(&found.weight().unwrap()),
                    &values(&expected.weight().unwrap())
                ) < 1e-6
            );
        }
    }
    // The free place of a token that chose both goes to another expert: it is not the dense model.
    assert!(gap(&logits(&folder), &logits(model.checkpoint.dir())) > 1e-4);
}

#[test]
fn the_order_of_experts_does_not_matter() {
    let order = [4usize, 2, 0, 5, 1, 3];
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Fused);
    let from = Tensor::new(order.map(|e| e as u32).to_vec(), &Device::Cpu).unwrap();
    let other = Mixture::made(
        &config("mixtral", json!({})),
        ExpertLayout::Fused,
        |name, _| {
            let tensor = model.checkpoint.tensor(name, &Device::Cpu).unwrap();
            match name.contains(".mlp.") {
                true => tensor.index_select(&from, 0).unwrap(),
                false => tensor,
            }
        },
    );
    let near = gap(
        &logits(model.checkpoint.dir()),
        &logits(other.checkpoint.dir()),
    );
    assert!(near < 1e-5, "{near}");
    // Not stun: of two members of a cluster both are as near to their mean, so that the lower number stays.
    for method in ["reap", "drop", "naee", "hc-smoe"] {
        let found = model.plan(method, Keep::Experts(3)).unwrap().plan;
        let permuted = other.plan(method, Keep::Experts(3)).unwrap().plan;
        for (a, b) in found
            .layers
            .iter()
            .flatten()
            .zip(permuted.layers.iter().flatten())
        {
            let mut renamed: Vec<usize> = b.kept.iter().map(|&e| order[e]).collect();
            renamed.sort_unstable();
            assert_eq!(a.kept, renamed, "{method}");
        }
    }
}

fn narrowed(model: &Mixture, refit: bool, name: &str) -> (ExpertPlan, ExpertRefits) {
    let decoder = model.decoder();
    let found = model.plan("reap", Keep::Experts(4)).unwrap();
    let dir = model.path(name);
    std::fs::create_dir_all(&dir).unwrap();
    let refits = ExpertRefits::new(dir);
    let mut options = NeuronOptions::default();
    (options.align, options.refit) = (4, refit);
    let widths = vec![Some(8); decoder.config().layers()];
    let plan = narrow(
        &decoder,
        &windows(),
        (&found.plan, &widths),
        (&options, &refits),
        &NoProgress,
    );
    (plan.unwrap(), refits)
}

#[test]
fn narrow_experts_are_wide_ones_whose_other_neurons_are_silent() {
    each(|name, model| {
        let (plan, _) = narrowed(model, false, "none");
        let folder = model.written(&plan, "narrow");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let found = decoder(&checkpoint);
        assert!(
            found
                .config()
                .mixtures
                .iter()
                .flatten()
                .all(|m| m.width == 8),
            "{name}"
        );
        assert_eq!(plan.loading(&model.decoder()), Loading::Stock, "{name}");
        let decoder = model.decoder();
        let silent = silenced(&decoder, &plan);
        assert!(gap(&logits(&folder), &silent) < 1e-5, "{name}");
        let cost = ExpertCost::of(&decoder, &plan).unwrap();
        assert_eq!(cost.parameters, checkpoint.parameters(), "{name}");
        assert_eq!(cost.bytes, checkpoint.total_bytes(), "{name}");
        assert!(cost.active < cost.parameters, "{name}");
    });
}

/// Logits of the dense model with the plan's experts, neurons that are removed multiplied by zero.
fn silenced(decoder: &Decoder<'_>, plan: &ExpertPlan) -> Vec<f32> {
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 50).collect();
    let windows = Windows::cut(&tokens, 20, None).unwrap();
    let mut hidden = causal_lm::Hidden::embed(decoder, &windows).unwrap();
    for (layer, experts) in plan.layers.iter().enumerate() {
        let mut block = decoder.block(layer).unwrap();
        if let (Some(moe), Some(experts)) = (&mut block.experts, experts) {
            let kept = experts.kept.iter().map(|&expert| expert as u32);
            let kept = Tensor::from_iter(kept, &Device::Cpu).unwrap();
            moe.router = moe.router.select(&kept).unwrap();
            let silent = |(&expert, neurons): (&usize, &Vec<usize>)| {
                let mut mlp = moe.experts[expert].clone();
                let mask =
                    (0..mlp.down.inputs()).map(|n| f32::from(u8::from(neurons.contains(&n))));
                let mask = Tensor::from_iter(mask, &Device::Cpu).unwrap();
                let down = mlp.down.weight().unwrap().broadcast_mul(&mask).unwrap();
                mlp.down.set_weight(down);
                mlp
            };
            moe.experts = experts
                .kept
                .iter()
                .zip(&experts.neurons)
                .map(silent)
                .collect();
        }
        hidden.advance(&block, &mut causal_lm::NoTap).unwrap();
    }
    let last = hidden.batches()[0].get(0).unwrap();
    let logits = decoder.head().unwrap().forward(&last).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn fitted_down_projections_come_nearer_to_the_dropped_model() {
    each(|_, model| {
        let found = model.plan("reap", Keep::Experts(4)).unwrap();
        let target = loss_windows(&model.written(&found.plan, "dropped"));
        let (plain, _) = narrowed(model, false, "none");
        let (fitted, refits) = narrowed(model, true, "fitted");
        let settings = ExpertSettings::default().refits(Some(&refits));
        let fitted = loss_windows(&model.written_with(&fitted, "fitted-model", &settings));
        let plain = loss_windows(&model.written(&plain, "plain"));
        let distance = |a: &[f32]| -> f64 {
            let squares = a.iter().zip(&target).map(|(x, y)| f64::from(x - y).powi(2));
            squares.sum()
        };
        assert!(distance(&fitted) < distance(&plain));
    });
}

/// Logits on the calibration windows' first.
fn loss_windows(dir: &std::path::Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let decoder = decoder(&checkpoint);
    let all = windows();
    let text: Vec<&[u32]> = all.iter().collect();
    text.iter()
        .take(4)
        .flat_map(|window| logits_of(&decoder, window))
        .collect()
}

#[test]
fn a_budget_for_experts_and_widths_is_never_exceeded() {
    for kind in ["mixtral", "qwen3_moe"] {
        let model = Mixture::random(&config(kind, json!({})), ExpertLayout::Alone);
        let decoder = model.decoder();
        let whole = ExpertCost::of(
            &decoder,
            &model.plan("reap", Keep::Without(0.0)).unwrap().plan,
        );
        let whole = whole.unwrap();
        for (shape, loading) in [
            (Joint::Uniform, Loading::Stock),
            (Joint::ByLayer, Loading::PerLayer),
        ] {
            let dir = model.path(&format!("joint-{shape:?}"));
            std::fs::create_dir_all(&dir).unwrap();
            let text = windows();
            let search = text.first(3);
            let data = JointData {
                calibration: &text,
                search: &search,
                dir: &dir,
            };
            let mut neurons = NeuronOptions::default();
            neurons.align = 4;
            let experts = options("reap", Keep::Without(0.0));
            let options = JointOptions::new(experts, neurons, 0.4).joint(shape);
            let (found, refits) = joint(&decoder, data, &options, &NoProgress).unwrap();
            let cost = ExpertCost::of(&decoder, &found.plan).unwrap();
            assert!(
                cost.expert_bytes as f64 <= 0.61 * whole.expert_bytes as f64,
                "{kind}"
            );
            assert!(found.divergence.unwrap() > 0.0);
            let settings = ExpertSettings::default().refits(Some(&refits));
            let folder = model.written_with(&found.plan, &format!("out-{shape:?}"), &settings);
            assert!(logits(&folder).iter().all(|x| x.is_finite()));
            if shape == Joint::Uniform {
                assert_eq!(found.plan.loading(&decoder), loading);
            }
        }
    }
}

#[test]
fn fewer_experts_for_each_token_change_the_config_and_down_projections_alone() {
    each(|name, model| {
        let decoder = model.decoder();
        let mut outputs = vec![];
        for factors in [
            FewerExperts::Plain,
            FewerExperts::Scale,
            FewerExperts::ExpertScale,
            FewerExperts::ChannelScale,
        ] {
            let plan = fewer(&decoder, &windows(), 1, factors, &NoProgress).unwrap();
            let folder = model.written(&plan, &format!("{factors:?}"));
            let checkpoint = Checkpoint::open(&folder).unwrap();
            let mut expected = model.checkpoint.config().clone();
            expected.set("num_experts_per_tok", 1);
            if name.starts_with("qwen3_moe") {
                // The number of experts under every name that a reader may look for.
                expected.set("num_local_experts", 6);
            }
            assert_eq!(checkpoint.config().raw(), expected.raw(), "{name}");
            let ends = [
                "w2.weight",
                "down_proj.weight",
                "experts.down_proj",
                "output_linear.weight",
            ];
            let is_down = |tensor: &str| {
                !tensor.contains("shared") && ends.iter().any(|end| tensor.ends_with(end))
            };
            let dense = tensors(model.checkpoint.dir());
            for ((tensor, before), after) in dense.iter().zip(tensors(&folder)) {
                assert_eq!(*tensor, after.0, "{name}");
                let may_change = factors != FewerExperts::Plain && is_down(tensor);
                assert!(
                    *before == after.1 || may_change,
                    "{name} {factors:?}: {tensor}"
                );
            }
            assert_eq!(plan.loading(&decoder), Loading::Stock, "{name}");
            outputs.push(logits(&folder));
        }
        assert!(
            outputs.iter().all(|a| a.iter().all(|x| x.is_finite())),
            "{name}"
        );
        assert_ne!(outputs[0], outputs[1], "{name}");
    });
}

#[test]
fn plans_do_not_depend_on_the_number_of_threads() {
    let model = Mixture::random(&config("qwen2_moe", json!({})), ExpertLayout::Alone);
    let of = |threads: usize, method: &str| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| {
            let options = options(method, Keep::Experts(3)).measure_errors(true);
            let found = plan(&model.decoder(), &windows(), &options, &NoProgress).unwrap();
            serde_json::to_string(&found).unwrap()
        })
    };
    for &method in ExpertMethod::NAMES {
        assert_eq!(of(1, method), of(4, method), "{method}");
    }
}

#[test]
fn a_plan_is_the_same_after_it_was_saved() {
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Alone);
    for &method in ExpertMethod::NAMES {
        let plan = model.plan(method, Keep::Experts(4)).unwrap().plan;
        let path = model.path("plan.json");
        plan.save(&path).unwrap();
        assert_eq!(ExpertPlan::load(&path).unwrap(), plan, "{method}");
    }
}

#[test]
fn attention_of_mixtures_is_pruned_as_that_of_dense_models() {
    for (kind, layout) in KINDS.into_iter().filter(|(kind, _)| *kind != "olmoe") {
        let model = Mixture::random(&config(kind, json!({})), layout);
        let decoder = model.decoder();
        let grams = model.path("grams");
        std::fs::create_dir_all(&grams).unwrap();
        let needs = Needs {
            fluctuation: false,
            gram: true,
        };
        let collect = Collect::new(needs, grams);
        let calibration = Calibration::run(&decoder, &windows(), &collect, &NoProgress).unwrap();
        for compensation in [
            Compensation::from(NoCompensation),
            Bias.into(),
            Compensation::LEAST_SQUARES,
        ] {
            let mut recipe = Recipe::named("wanda-sp", 0).unwrap();
            recipe.compensation = Some(compensation);
            let plan = Plan::make(&decoder, &calibration, &recipe, 0.4, &NoProgress).unwrap();
            assert!(plan.widths()[0].heads < 4, "{kind}");
            let folders = [Form::Sliced, Form::Masked].map(|form| {
                let dst = model.path(&format!("{form:?}-{}", compensation.name()));
                let settings = Settings::new(&calibration).form(form);
                prune_structured::write(&decoder, &plan, &dst, &settings, &NoProgress).unwrap();
                dst
            });
            let [sliced, masked] = folders.map(|folder| logits(&folder));
            assert!(
                gap(&sliced, &masked) < 1e-5,
                "{kind} {}",
                compensation.name()
            );
        }
    }
}

#[test]
fn a_mixture_whose_heads_are_normalised_together_has_nothing_but_experts_to_prune() {
    let model = Mixture::random(&config("olmoe", json!({})), ExpertLayout::Alone);
    let decoder = model.decoder();
    let collect = Collect::default();
    let calibration = Calibration::run(&decoder, &windows(), &collect, &NoProgress).unwrap();
    for method in ["flap", "wanda-sp", "magnitude", "structprune"] {
        let recipe = Recipe::named(method, 0).unwrap();
        let found = Plan::make(&decoder, &calibration, &recipe, 0.4, &NoProgress);
        assert!(
            matches!(found, Err(Error::Unsupported { .. })),
            "{method}: {found:?}"
        );
    }
}

/// Neurons that each expert of a layer keeps.
fn neurons_of(plan: &ExpertPlan, layer: usize) -> &[Vec<usize>] {
    plan.layers[layer].as_ref().map_or(&[], |l| &l.neurons)
}

#[test]
fn layers_are_calibrated_behind_the_pruned_ones_where_that_is_asked_for() {
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Alone);
    let decoder = model.decoder();
    let options = options("reap", Keep::Experts(3)).measure_errors(true);
    let behind = |progressive: bool| {
        let options = options.progressive(progressive);
        plan(&decoder, &windows(), &options, &NoProgress).unwrap()
    };
    let (dense, pruned) = (behind(false), behind(true));
    assert_eq!(dense.layers[0].scores, pruned.layers[0].scores);
    assert_ne!(dense.layers[1].scores, pruned.layers[1].scores);
    // The statistics of the second layer are those of a model whose first is pruned already.
    let mut first = ExpertPlan::whole(&decoder);
    first.layers[0] = pruned.plan.layers[0].clone();
    let folder = model.written(&first, "first-pruned");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let smaller = super::common::decoder(&checkpoint);
    let found = plan(&smaller, &windows(), &options, &NoProgress).unwrap();
    let pairs = found.layers[1].scores.iter().zip(&pruned.layers[1].scores);
    for (found, expected) in pairs {
        assert!(
            (found - expected).abs() < 1e-6 * expected,
            "{found} is not {expected}"
        );
    }
}

#[test]
fn neurons_too_are_scored_behind_the_narrow_layers_where_that_is_asked_for() {
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Alone);
    let of = |decoder: &Decoder<'_>, name: &str, widths: [Option<usize>; 3], progressive: bool| {
        let dir = model.path(name);
        std::fs::create_dir_all(&dir).unwrap();
        let refits = ExpertRefits::new(dir);
        let mut options = NeuronOptions::default();
        (options.align, options.progressive) = (4, progressive);
        let whole = ExpertPlan::whole(decoder);
        let narrow = narrow(
            decoder,
            &windows(),
            (&whole, &widths),
            (&options, &refits),
            &NoProgress,
        );
        (narrow.unwrap(), refits)
    };
    let down = |refits: &ExpertRefits, layer: usize| -> Vec<f32> {
        let down = refits.load(layer, 0).unwrap().unwrap();
        down.flatten_all().unwrap().to_vec1().unwrap()
    };
    let decoder = model.decoder();
    let (dense, of_dense) = of(&decoder, "dense-refits", [Some(8); 3], false);
    let (behind, of_behind) = of(&decoder, "behind-refits", [Some(8); 3], true);
    assert_eq!(neurons_of(&dense, 0), neurons_of(&behind, 0));
    assert_eq!(down(&of_dense, 0), down(&of_behind, 0));
    assert_ne!(down(&of_dense, 1), down(&of_behind, 1));
    // The second layer sees what a model gives it whose first is narrow already.
    let (first, refits) = of(&decoder, "first-refits", [Some(8), None, None], false);
    let settings = ExpertSettings::default().refits(Some(&refits));
    let folder = model.written_with(&first, "first-narrow", &settings);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let smaller = super::common::decoder(&checkpoint);
    let (second, of_second) = of(&smaller, "second-refits", [None, Some(8), None], false);
    assert_eq!(neurons_of(&second, 1), neurons_of(&behind, 1));
    assert!(gap(&down(&of_second, 1), &down(&of_behind, 1)) < 1e-5);
}
