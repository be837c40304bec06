//! Mixtures that cannot be read or pruned, and what is said of them.

use super::common::{Mixture, config, options, store, windows};
use candle_core::{DType, Device};
use causal_lm::names::ExpertLayout;
use causal_lm::{Decoder, ModelConfig, NoTap, run_blocks, synthetic};
use prune_structured::experts::compensation::ExpertScale;
use prune_structured::experts::{
    Aim, ExpertPlan, ExpertRecipe, ExpertSettings, FewerExperts, Joint, JointData, JointOptions,
    Keep, NeuronOptions, fewer, joint, narrow, plan, write,
};
use prune_structured::score::Magnitude;
use prune_structured::{Error, NoProgress};
use serde_json::{Value, json};
use tensor_io::Checkpoint;

/// What is said of a checkpoint whose tensors were changed after its config was written.
fn said(
    kind: &str,
    (layout, changes): (ExpertLayout, Value),
    change: impl Fn(&mut Vec<(String, Vec<usize>)>),
) -> String {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    let mut model = ModelConfig::new(&config(kind, json!({}))).unwrap();
    model.names = model.names.with_layout(layout).unwrap();
    let mut tensors = model.tensors();
    change(&mut tensors);
    let mut random = synthetic::random(7);
    let mut make = |name: &str, shape: &[usize]| random(name, shape).unwrap();
    store(&dir, &config(kind, changes), &tensors, &mut make);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let error = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap_err();
    error.to_string()
}

const ALONE: ExpertLayout = ExpertLayout::Alone;

fn renamed(tensors: &mut [(String, Vec<usize>)], from: &str, to: &str) {
    for (name, _) in tensors.iter_mut().filter(|(name, _)| name.contains(from)) {
        *name = name.replace(from, to);
    }
}

#[test]
fn another_number_of_experts_than_the_config_says_names_the_tensor() {
    let fewer = said("mixtral", (ALONE, json!({"num_local_experts": 5})), |_| {});
    assert!(fewer.contains("block_sparse_moe"), "{fewer}");
    let more = said("mixtral", (ALONE, json!({"num_local_experts": 7})), |_| {});
    assert!(more.contains("block_sparse_moe"), "{more}");
    let fused = (ExpertLayout::Fused, json!({"num_experts": 7}));
    let fused = said("qwen3_moe", fused, |_| {});
    assert!(fused.contains("model.layers.0.mlp"), "{fused}");
}

#[test]
fn an_expert_that_is_missing_is_named() {
    let error = said("mixtral", (ALONE, json!({})), |tensors| {
        tensors.retain(|(name, _)| !name.contains("layers.1.block_sparse_moe.experts.3.w2"));
    });
    assert!(
        error.contains("model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        "{error}"
    );
    // A gap in the numbers.
    let error = said("mixtral", (ALONE, json!({})), |tensors| {
        renamed(tensors, "experts.5.", "experts.9.");
    });
    assert!(
        error.contains("model.layers.0.block_sparse_moe.experts.5.w1.weight"),
        "{error}"
    );
}

#[test]
fn a_router_of_another_width_is_named() {
    let error = said("olmoe", (ALONE, json!({})), |tensors| {
        let router = tensors
            .iter_mut()
            .find(|(name, _)| name.ends_with("mlp.gate.weight"));
        router.unwrap().1 = vec![6, 20];
    });
    assert!(
        error.contains("model.layers.0.mlp.gate.weight") && error.contains("20"),
        "{error}"
    );
}

#[test]
fn both_layouts_in_one_checkpoint_are_refused() {
    let error = said("qwen3_moe", (ALONE, json!({})), |tensors| {
        tensors.push((
            "model.layers.2.mlp.experts.gate_up_proj".into(),
            vec![6, 32, 24],
        ));
    });
    assert!(error.contains("model.layers."), "{error}");
    assert!(error.contains("mlp.experts."), "{error}");
}

#[test]
fn a_shared_expert_that_the_architecture_does_not_have_is_named() {
    let error = said("qwen3_moe", (ALONE, json!({})), |tensors| {
        tensors.push((
            "model.layers.0.mlp.shared_expert.up_proj.weight".into(),
            vec![16, 24],
        ));
    });
    assert!(
        error.contains("model.layers.0.mlp.shared_expert.up_proj.weight"),
        "{error}"
    );
    let error = said("qwen2_moe", (ALONE, json!({})), |tensors| {
        tensors.retain(|(name, _)| !name.contains("layers.2.mlp.shared_expert_gate"));
    });
    assert!(
        error.contains("model.layers.2.mlp.shared_expert_gate.weight"),
        "{error}"
    );
}

#[test]
fn more_experts_for_a_token_than_there_are_is_an_error_of_the_config() {
    let error =
        ModelConfig::new(&config("mixtral", json!({"num_experts_per_tok": 7}))).unwrap_err();
    assert!(error.to_string().contains("num_experts_per_tok"), "{error}");
}

#[test]
fn a_value_that_is_no_number_names_its_expert() {
    for layout in [ExpertLayout::Alone, ExpertLayout::Fused] {
        let mut random = synthetic::random(7);
        let model = Mixture::made(&config("mixtral", json!({})), layout, |name, shape| {
            let tensor = random(name, shape).unwrap();
            let broken = match layout {
                ExpertLayout::Alone => name.contains("layers.1.block_sparse_moe.experts.2.w3"),
                ExpertLayout::Fused => name.contains("layers.1.mlp.experts.down_proj"),
            };
            match broken {
                true => (tensor * f64::NAN).unwrap(),
                false => tensor,
            }
        });
        let error = run_blocks(&model.decoder(), &windows(), &mut NoTap, &NoProgress).unwrap_err();
        let expected = match layout {
            ExpertLayout::Alone => "model.layers.1.block_sparse_moe.experts.2.w3.weight",
            ExpertLayout::Fused => "model.layers.1.mlp.experts.down_proj",
        };
        assert!(error.to_string().contains(expected), "{error}");
        let error = model.plan("reap", Keep::Experts(3)).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        // Nobody has read an expert that no token chose when it is copied.
        let decoder = model.decoder();
        let (whole, dst) = (ExpertPlan::whole(&decoder), model.path("never"));
        let settings = ExpertSettings::default();
        let error = write(&decoder, &whole, &dst, &settings, &NoProgress).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!dst.exists());
    }
}

fn mixtral() -> Mixture {
    Mixture::random(&config("mixtral", json!({})), ALONE)
}

#[test]
fn fewer_experts_than_a_token_goes_to_are_refused_before_anything_is_written() {
    let model = mixtral();
    let error = model.plan("reap", Keep::Experts(1)).unwrap_err();
    let expected = Error::Experts {
        layer: 0,
        kept: 1,
        chosen: 2,
    };
    assert_eq!(error.to_string(), expected.to_string());
    let mut small = model.plan("reap", Keep::Experts(2)).unwrap().plan;
    for list in small.layers.iter_mut().flatten() {
        list.kept.pop();
        list.members.pop();
        list.factors.pop();
        list.neurons.pop();
    }
    let dst = model.path("never");
    let error = write(
        &model.decoder(),
        &small,
        &dst,
        &ExpertSettings::default(),
        &NoProgress,
    );
    assert!(matches!(error, Err(Error::Experts { kept: 1, .. })));
    assert!(!dst.exists());
}

#[test]
fn plans_of_other_models_are_refused() {
    let model = mixtral();
    let good = model.plan("reap", Keep::Experts(4)).unwrap().plan;
    let refused = |change: &dyn Fn(&mut ExpertPlan)| {
        let mut plan = good.clone();
        change(&mut plan);
        let dst = model.path("never");
        let settings = ExpertSettings::default();
        let error = write(&model.decoder(), &plan, &dst, &settings, &NoProgress).unwrap_err();
        assert!(matches!(error, Error::PlanMismatch(_)), "{error}");
        assert!(!dst.exists());
    };
    refused(&|plan| plan.chosen = Some(0));
    refused(&|plan| plan.layers.truncate(2));
    refused(&|plan| plan.layers[1] = None);
    refused(&|plan| plan.layers[0].as_mut().unwrap().kept[3] = 6);
    refused(&|plan| plan.layers[0].as_mut().unwrap().kept.swap(0, 1));
    refused(&|plan| plan.layers[2].as_mut().unwrap().experts = 8);
    refused(&|plan| plan.layers[2].as_mut().unwrap().neurons[0] = vec![1, 2]);
    refused(&|plan| plan.layers[2].as_mut().unwrap().factors[0] = vec![1.0; 3]);
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let model = mixtral();
    let decoder = model.decoder();
    let refused = |keep| *model.plan("reap", keep).unwrap_err();
    assert!(matches!(refused(Keep::Without(1.0)), Error::Ratio(_)));
    assert!(matches!(refused(Keep::Experts(7)), Error::Option { .. }));
    for chosen in [0, 3] {
        let found = fewer(
            &decoder,
            &windows(),
            chosen,
            FewerExperts::Plain,
            &NoProgress,
        );
        assert!(matches!(
            found,
            Err(Error::Option {
                option: "chosen",
                ..
            })
        ));
    }
    let whole = model.plan("reap", Keep::Without(0.0)).unwrap().plan;
    let refits = prune_structured::experts::ExpertRefits::new(model.path(""));
    let widths = [Some(99), None, None];
    let settings = NeuronOptions::default();
    let found = narrow(
        &decoder,
        &windows(),
        (&whole, &widths),
        (&settings, &refits),
        &NoProgress,
    );
    assert!(matches!(
        found,
        Err(Error::Width {
            option: "width",
            ..
        })
    ));
    for prior in [-1.0, f64::NAN, f64::INFINITY] {
        let mut settings = settings;
        settings.prior = Some(prior);
        let options = (&settings, &refits);
        let whole = (&whole, &[None; 3][..]);
        let found = narrow(&decoder, &windows(), whole, options, &NoProgress);
        let option = "prior";
        assert!(matches!(found, Err(Error::Option { option: o, .. }) if o == option));
        let mut recipe = ExpertRecipe::named("neurons", 0).unwrap();
        recipe.neurons = settings;
        let refused = recipe.check(&decoder, Aim::Ratio(0.5));
        assert!(refused.is_err());
    }
}

#[test]
fn what_reads_no_layer_says_so() {
    let reads = |name: &str| ExpertRecipe::named(name, 0).unwrap().reads_layers();
    for name in [
        "reap",
        "frequency",
        "stun-reap",
        "hc-smoe",
        "neurons",
        "joint",
    ] {
        assert!(reads(name), "{name}");
    }
    for name in ["random", "aimer", "stun", "stun-compat", "topk-scale"] {
        assert!(!reads(name), "{name}");
    }
    let scaled = ExpertRecipe::named("aimer", 0).unwrap();
    assert!(scaled.compensation(ExpertScale::default()).reads_layers());
    let mut magnitude = ExpertRecipe::named("neurons", 0).unwrap();
    magnitude.neurons.score = Magnitude.into();
    assert!(magnitude.reads_layers());
    magnitude.neurons.refit = false;
    assert!(!magnitude.reads_layers());
}

#[test]
fn too_many_subsets_are_refused() {
    let config = config("mixtral", json!({"num_local_experts": 20}));
    let model = Mixture::random(&config, ALONE);
    let error = model.plan("naee", Keep::Experts(10)).unwrap_err();
    assert!(
        matches!(*error, Error::Unsupported { method: "naee", .. }),
        "{error}"
    );
}

#[test]
fn a_dense_model_has_no_experts_to_drop() {
    let fields = json!({
        "model_type": "llama", "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    });
    let config = tensor_io::Config::new(fields.as_object().unwrap().clone());
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("dense");
    let files = tensor_io::WriteOptions::default();
    synthetic::write(&config, DType::F32, &dir, &files, synthetic::random(7)).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let decoder = super::common::decoder(&checkpoint);
    let found = plan(
        &decoder,
        &windows(),
        &options("reap", Keep::Experts(2)),
        &NoProgress,
    );
    assert!(matches!(found, Err(Error::Unsupported { .. })));
}

#[test]
fn granite_has_one_layout() {
    let model = Mixture::random(&config("granitemoe", json!({})), ExpertLayout::Fused);
    let plan = model.plan("reap", Keep::Experts(4)).unwrap().plan;
    let settings = ExpertSettings::default().layout(Some(ALONE));
    let refused = settings.check(&model.decoder());
    assert!(matches!(refused, Err(Error::Unsupported { .. })));
    assert!(ExpertSettings::default().check(&model.decoder()).is_ok());
    let dst = model.path("never");
    let error = write(&model.decoder(), &plan, &dst, &settings, &NoProgress).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(!dst.exists());
}

#[test]
fn a_budget_that_no_pair_meets_is_told_with_what_the_smallest_pair_keeps() {
    let model = mixtral();
    let (decoder, dir) = (model.decoder(), model.path("joint"));
    let windows = windows();
    let data = JointData {
        calibration: &windows,
        search: &windows,
        dir: &dir,
    };
    for shape in [Joint::Uniform, Joint::ByLayer] {
        let experts = options("reap", Keep::Without(0.0));
        let options = JointOptions::new(experts, NeuronOptions::default(), 0.9).joint(shape);
        std::fs::create_dir_all(&dir).unwrap();
        let error = joint(&decoder, data, &options, &NoProgress).unwrap_err();
        let Error::Unreachable { kept, total, .. } = error else {
            panic!("{error}");
        };
        // Of six experts of sixteen neurons in three layers two for each token, or the half.
        let expert = 3 * (3 * 24 * 16 + 24);
        let least = match shape {
            Joint::Uniform => 2,
            _ => 3,
        };
        assert_eq!((kept, total), (least * expert, 6 * expert), "{shape:?}");
    }
}

#[test]
fn plans_of_earlier_versions_are_read_and_damaged_ones_refused() {
    let model = mixtral();
    let plan = model.plan("reap", Keep::Experts(4)).unwrap().plan;
    let path = model.path("plan.json");
    let loaded = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        plan.save(&path).unwrap();
        let mut fields: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for layer in fields["layers"].as_array_mut().unwrap() {
            change(layer.as_object_mut().unwrap());
        }
        std::fs::write(&path, fields.to_string()).unwrap();
        ExpertPlan::load(&path).map_err(Box::new)
    };
    let earlier = loaded(&|layer| drop(layer.remove("neurons"))).unwrap();
    assert_eq!(earlier, plan);
    model.written(&earlier, "earlier");
    for list in ["members", "factors", "neurons"] {
        let error = loaded(&|layer| layer[list] = json!([[]])).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("plan.json") && error.contains("layer 0"),
            "{list}: {error}"
        );
    }
}
