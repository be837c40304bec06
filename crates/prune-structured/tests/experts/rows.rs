//! Models whose router keeps the rows of all experts: constants in the place of some, and merges that are tied.

use super::common::{
    KINDS, Mixture, config, decoder, gap, logits, options, tensors, windows, with_twins,
};
use candle_core::{DType, Device, Tensor};
use causal_lm::block::Mlp;
use causal_lm::config::{EXPERT_MAP, WIDTHS_KEY};
use causal_lm::names::ExpertLayout;
use causal_lm::{
    Decoder, ExpertPass, Hidden, Linear, NoTap, Site, Tap, TapResult, Windows, run_blocks,
};
use prune_structured::experts::compensation::Novice;
use prune_structured::experts::method::{HcSmoe, MSmoe};
use prune_structured::experts::{
    ExpertCost, ExpertMethod, ExpertOptions, ExpertPlan, ExpertRecipe, ExpertRefits,
    ExpertSettings, FewerExperts, JointData, JointOptions, Keep, NeuronOptions, fewer, joint,
    narrow, plan, write,
};
use prune_structured::{Calibration, Collect, Error, Loading, NoProgress, gguf, nemotron};
use serde_json::json;
use tensor_io::Checkpoint;

fn each(test: impl Fn(&str, &Mixture)) {
    for (kind, layout) in KINDS {
        let model = Mixture::random(&config(kind, json!({})), layout);
        test(&format!("{kind} {layout:?}"), &model);
    }
}

fn made(model: &Mixture, options: &ExpertOptions) -> ExpertPlan {
    let found = plan(&model.decoder(), &windows(), options, &NoProgress).unwrap();
    found.plan
}

fn with_novices(keep: usize) -> ExpertOptions {
    options("reap", Keep::Experts(keep)).compensation(Novice)
}

fn tied(method: &str, keep: usize) -> ExpertOptions {
    let (mut clusters, mut pairs) = (HcSmoe::default(), MSmoe::default());
    (clusters.tied, pairs.tied) = (true, true);
    let method: ExpertMethod = match method {
        "hc-smoe" => clusters.into(),
        _ => pairs.into(),
    };
    ExpertOptions::new(method, Keep::Experts(keep))
}

/// Plans that keep all rows, by name.
fn plans(model: &Mixture) -> Vec<(&'static str, ExpertPlan)> {
    vec![
        ("novice", made(model, &with_novices(3))),
        ("one", made(model, &with_novices(1))),
        ("hc-smoe-tied", made(model, &tied("hc-smoe", 3))),
        ("m-smoe-tied", made(model, &tied("m-smoe", 1))),
    ]
}

/// Logits of the dense model with an expert of its own for each router row: those of `pruned` by the rows of the plan, and
/// experts that put out the plan's constants whatever they read.
fn written_out(dense: &Decoder<'_>, pruned: &Decoder<'_>, plan: &ExpertPlan) -> Vec<f32> {
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 50).collect();
    let windows = Windows::cut(&tokens, 20, None).unwrap();
    let mut hidden = Hidden::embed(dense, &windows).unwrap();
    for (layer, experts) in plan.layers.iter().enumerate() {
        let mut block = dense.block(layer).unwrap();
        if let (Some(moe), Some(experts)) = (&mut block.experts, experts) {
            let expert = |&row: &usize| -> Mlp {
                let Some(at) = row.checked_sub(experts.kept.len()) else {
                    return pruned.expert(layer, row).unwrap();
                };
                let mut constant = moe.experts[0].clone();
                let zeros = constant.down.weight().unwrap().zeros_like().unwrap();
                let values = Tensor::new(experts.novices[at].as_slice(), &Device::Cpu).unwrap();
                constant.down = Linear::new(zeros, Some(values));
                constant
            };
            let all: Vec<Mlp> = experts.rows.iter().map(expert).collect();
            assert_eq!(all.len(), moe.experts.len());
            moe.experts = all;
        }
        hidden.advance(&block, &mut NoTap).unwrap();
    }
    let last = hidden.batches()[0].get(0).unwrap();
    let logits = dense.head().unwrap().forward(&last).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn what_is_written_computes_an_expert_for_each_row_and_has_the_bytes_that_are_counted() {
    each(|name, model| {
        let dense = model.decoder();
        for (kind, plan) in plans(model) {
            let folder = model.written(&plan, kind);
            let checkpoint = Checkpoint::open(&folder).unwrap();
            let pruned = decoder(&checkpoint);
            let expected = written_out(&dense, &pruned, &plan);
            assert!(gap(&logits(&folder), &expected) < 1e-5, "{name} {kind}");
            assert_eq!(plan.loading(&dense), Loading::PerLayer, "{name} {kind}");
            assert!(folder.join(prune_structured::output::LOADER_FILE).exists());
            let cost = ExpertCost::of(&dense, &plan).unwrap();
            assert_eq!(cost.parameters, checkpoint.parameters(), "{name} {kind}");
            assert_eq!(cost.bytes, checkpoint.total_bytes(), "{name} {kind}");
            assert!(cost.active <= cost.parameters, "{name} {kind}");
            // All rows of the router, byte for byte.
            for layer in (0..3).filter(|&layer| plan.layers[layer].is_some()) {
                let router = dense.config().names.router(layer).unwrap();
                assert_eq!(
                    checkpoint.bytes(&router).unwrap(),
                    model.checkpoint.bytes(&router).unwrap(),
                    "{name} {kind}"
                );
            }
        }
    });
}

/// Sums of the outputs of each expert of each layer, and their number.
#[derive(Default)]
struct Means(Vec<((usize, usize), Vec<f64>, usize)>);

impl Tap for Means {
    fn observe(&mut self, _layer: usize, _site: Site, _x: &Tensor) -> TapResult {
        Ok(())
    }

    fn expert(&mut self, layer: usize, pass: &ExpertPass) -> TapResult {
        let Some(expert) = pass.expert else {
            return Ok(());
        };
        let rows: Vec<Vec<f32>> = pass.output.to_vec2()?;
        let mut sum = vec![0.0; 24];
        for row in &rows {
            sum.iter_mut()
                .zip(row)
                .for_each(|(sum, &x)| *sum += f64::from(x));
        }
        self.0.push(((layer, expert), sum, rows.len()));
        Ok(())
    }
}

#[test]
fn constants_are_the_means_of_what_dropped_experts_put_out_and_zeros_without_tokens() {
    let changes = json!({"num_local_experts": 12, "num_experts_per_tok": 1});
    let model = Mixture::random(&config("mixtral", changes), ExpertLayout::Alone);
    let text = Windows::cut(&[3, 1, 4, 1, 5, 9, 2, 6], 8, None).unwrap();
    let dense = model.decoder();
    let options = options("frequency", Keep::Experts(2)).compensation(Novice);
    let found = plan(&dense, &text, &options, &NoProgress).unwrap();
    let mut means = Means::default();
    run_blocks(&dense, &text, &mut means, &NoProgress).unwrap();
    let (mut seen, mut unseen) = (0, 0);
    for (layer, experts) in found.plan.layers.iter().enumerate() {
        let experts = experts.as_ref().unwrap();
        let gone = (0..12).filter(|expert| !experts.kept.contains(expert));
        for (expert, novice) in gone.zip(&experts.novices) {
            let of = means.0.iter().find(|(of, ..)| *of == (layer, expert));
            match of {
                None => {
                    unseen += 1;
                    assert_eq!(*novice, [0.0; 24]);
                }
                Some((_, sum, count)) => {
                    seen += 1;
                    for (&found, sum) in novice.iter().zip(sum) {
                        assert!((f64::from(found) - sum / *count as f64).abs() < 1e-6);
                    }
                }
            }
        }
        // Rows of dropped experts in ascending order.
        let expected = (0..12).filter_map(|row| match experts.kept.binary_search(&row) {
            Ok(_) => None,
            Err(_) => Some(experts.rows[row]),
        });
        assert!(expected.eq(2..12));
    }
    assert!(seen > 0 && unseen > 0);
    assert!(found.layers.iter().all(|layer| layer.promoted == 0.0));
}

#[test]
fn constants_leave_less_error_than_the_next_best_experts_on_the_text_that_they_are_means_of() {
    each(|name, model| {
        let options = with_novices(3).measure_errors(true);
        let found = plan(&model.decoder(), &windows(), &options, &NoProgress).unwrap();
        for layer in &found.layers {
            let error = layer.error.unwrap();
            assert!(error.compensated < error.dropped, "{name}");
        }
    });
}

#[test]
fn tied_merges_of_equal_experts_are_the_model_and_reduced_ones_are_not() {
    let model = with_twins(ExpertLayout::Alone);
    let dense = logits(model.checkpoint.dir());
    let options = tied("hc-smoe", 5);
    let found = plan(&model.decoder(), &windows(), &options, &NoProgress).unwrap();
    // Some tokens go to both of the equal experts.
    assert!(found.layers.iter().all(|l| l.statistics.together[1] > 0));
    for experts in found.plan.layers.iter().flatten() {
        assert_eq!(experts.rows[0], experts.rows[1]);
        assert_eq!(experts.kept.len(), 5);
    }
    for layout in [ExpertLayout::Alone, ExpertLayout::Fused] {
        let settings = ExpertSettings::default().layout(Some(layout));
        let folder = model.written_with(&found.plan, &format!("{layout:?}"), &settings);
        let near = gap(&logits(&folder), &dense);
        assert!(near < 1e-5, "{layout:?}: {near}");
        let bytes = |dir| Checkpoint::open(dir).unwrap().total_bytes();
        assert!(bytes(folder.as_path()) < bytes(model.checkpoint.dir()));
    }
    let reduced = model.plan("hc-smoe", Keep::Experts(5)).unwrap().plan;
    let reduced = logits(&model.written(&reduced, "reduced"));
    assert!(gap(&reduced, &dense) > 1e-4);
}

#[test]
fn layers_that_keep_all_experts_have_no_map_and_the_config_lists_their_rows_one_by_one() {
    let model = Mixture::random(&config("qwen2_moe", json!({})), ExpertLayout::Alone);
    let decoder = model.decoder();
    let options = with_novices(6);
    assert!(made(&model, &options).is_identity());
    let counts = [6, 0, 2];
    let found = prune_structured::experts::plan_by_layer(
        &decoder,
        &windows(),
        &options,
        &counts,
        &NoProgress,
    );
    let plan = found.unwrap().plan;
    let folder = model.written(&plan, "novices");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let lists = &checkpoint.config().raw()[WIDTHS_KEY];
    let rows = &plan.layers[2].as_ref().unwrap().rows;
    assert_eq!(lists[EXPERT_MAP], json!([[0, 1, 2, 3, 4, 5], [], rows]));
    assert_eq!(lists["num_experts"], json!([6, 0, 2]));
    let expected = written_out_where_mapped(&decoder, &folder, &plan);
    assert!(gap(&logits(&folder), &expected) < 1e-5);
}

/// As `written_out`, with the rows of layers that keep all experts filled in.
fn written_out_where_mapped(
    dense: &Decoder<'_>,
    folder: &std::path::Path,
    plan: &ExpertPlan,
) -> Vec<f32> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut plan = plan.clone();
    for layer in plan.layers.iter_mut().flatten() {
        if layer.rows.is_empty() {
            layer.rows = (0..layer.experts).collect();
        }
    }
    written_out(dense, &decoder(&checkpoint), &plan)
}

#[test]
fn both_layouts_hold_the_same_constants_and_ties() {
    for (kind, _) in KINDS.into_iter().filter(|(kind, _)| *kind != "granitemoe") {
        let model = Mixture::random(&config(kind, json!({})), ExpertLayout::Alone);
        for (name, plan) in plans(&model) {
            let alone = model.written(&plan, &format!("alone-{name}"));
            let settings = ExpertSettings::default().layout(Some(ExpertLayout::Fused));
            let fused = model.written_with(&plan, &format!("fused-{name}"), &settings);
            assert_eq!(logits(&alone), logits(&fused), "{kind} {name}");
        }
    }
}

#[test]
fn experts_beside_constants_are_narrowed_on_the_tokens_of_all_their_rows() {
    let model = Mixture::random(&config("olmoe", json!({})), ExpertLayout::Fused);
    let dense = model.decoder();
    for (name, plan) in plans(&model) {
        let dir = model.path(&format!("refits-{name}"));
        std::fs::create_dir_all(&dir).unwrap();
        let refits = ExpertRefits::new(dir);
        let mut neurons = NeuronOptions::default();
        neurons.align = 4;
        let widths = [Some(12); 3];
        let both = (&plan, &widths[..]);
        let narrowed = narrow(&dense, &windows(), both, (&neurons, &refits), &NoProgress).unwrap();
        let settings = ExpertSettings::default().refits(Some(&refits));
        let folder = model.written_with(&narrowed, &format!("narrow-{name}"), &settings);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let expected = written_out(&dense, &decoder(&checkpoint), &narrowed);
        assert!(gap(&logits(&folder), &expected) < 1e-5, "{name}");
        let cost = ExpertCost::of(&dense, &narrowed).unwrap();
        assert_eq!(cost.bytes, checkpoint.total_bytes(), "{name}");
        let wide = logits(&model.written(&plan, &format!("wide-{name}")));
        assert!(gap(&wide, &expected) > 1e-4, "{name}");
    }
}

#[test]
fn bytes_come_as_near_to_the_ratio_as_whole_experts_allow() {
    let model = Mixture::random(
        &config("mixtral", json!({"num_local_experts": 16})),
        ExpertLayout::Alone,
    );
    let decoder = model.decoder();
    let whole = ExpertCost::of(&decoder, &ExpertPlan::whole(&decoder)).unwrap();
    let expert = whole.expert_bytes as f64 / 3.0 / 16.0;
    for ratio in [0.1, 0.25, 0.5, 0.9, 0.99] {
        let options = options("reap", Keep::Without(ratio)).compensation(Novice);
        let plan = made(&model, &options);
        let bytes = ExpertCost::of(&decoder, &plan).unwrap().expert_bytes as f64;
        let wanted = whole.expert_bytes as f64 * (1.0 - ratio);
        // Three layers of the same number, of which at least one stays.
        let least = plan
            .layers
            .iter()
            .flatten()
            .all(|layer| layer.kept.len() == 1);
        assert!((bytes - wanted).abs() <= 1.5 * expert || least, "{ratio}");
        let novices: usize = plan.layers.iter().flatten().map(|l| l.novices.len()).sum();
        let kept: usize = plan.layers.iter().flatten().map(|l| l.kept.len()).sum();
        assert_eq!(novices + kept, 48, "{ratio}");
    }
}

#[test]
fn models_whose_rows_share_experts_are_not_pruned_again_nor_exported() {
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Alone);
    for (name, plan) in plans(&model) {
        let folder = model.written(&plan, name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let decoder = decoder(&checkpoint);
        let is_of_map = |error: &Error| {
            let found = matches!(
                error,
                Error::Model(causal_lm::Error::ExpertMap { layer: 0, .. })
            );
            assert!(found, "{name}: {error}");
        };
        let again = options("reap", Keep::Experts(1));
        let text = windows();
        let found = prune_structured::experts::plan(&decoder, &text, &again, &NoProgress);
        is_of_map(&found.unwrap_err());
        let found = fewer(&decoder, &text, 1, FewerExperts::Plain, &NoProgress);
        is_of_map(&found.unwrap_err());
        let recipe = ExpertRecipe::named("reap", 0).unwrap();
        let aim = prune_structured::experts::Aim::Ratio(0.5);
        is_of_map(&recipe.check(&decoder, aim).unwrap_err());
        let dst = model.path("never");
        let whole = ExpertPlan::whole(&decoder);
        let settings = ExpertSettings::default();
        let found = write(&decoder, &whole, &dst, &settings, &NoProgress);
        is_of_map(&found.unwrap_err());
        let found = Calibration::run(&decoder, &text, &Collect::default(), &NoProgress);
        is_of_map(&found.unwrap_err());
        assert!(!dst.exists());
        let widths = &decoder.config().widths;
        for found in [
            gguf::check(&decoder, widths),
            nemotron::check(&decoder, widths),
        ] {
            let error = found.unwrap_err();
            assert!(matches!(error, Error::Export { .. }), "{error}");
            assert!(error.to_string().contains("share experts"), "{error}");
        }
    }
}

#[test]
fn constants_for_merged_experts_and_maps_that_do_not_fit_are_refused() {
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Alone);
    let both = options("hc-smoe", Keep::Experts(3)).compensation(Novice);
    let error = plan(&model.decoder(), &windows(), &both, &NoProgress).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Unsupported {
                method: "novice",
                ..
            }
        ),
        "{error}"
    );
    let good = made(&model, &with_novices(3));
    let refused = |change: &dyn Fn(&mut prune_structured::experts::LayerExperts)| {
        let mut plan = good.clone();
        change(plan.layers[0].as_mut().unwrap());
        let dst = model.path("never");
        let settings = ExpertSettings::default();
        let error = write(&model.decoder(), &plan, &dst, &settings, &NoProgress).unwrap_err();
        assert!(matches!(error, Error::PlanMismatch(_)), "{error}");
        assert!(error.to_string().contains("layer 0"), "{error}");
        assert!(!dst.exists());
    };
    refused(&|layer| drop(layer.novices.pop()));
    refused(&|layer| layer.novices[1].truncate(3));
    refused(&|layer| layer.novices[1][3] = f32::NAN);
    refused(&|layer| layer.rows = vec![]);
    refused(&|layer| layer.rows.push(0));
    refused(&|layer| layer.rows[0] = 6);
    // All constants.
    refused(&|layer| {
        let constant = layer.novices[0].clone();
        layer.novices = vec![constant; 6];
        layer.rows = (0..6).collect();
        layer.kept.clear();
        layer.members.clear();
        layer.factors.clear();
        layer.neurons.clear();
    });
    let (windows, dir) = (windows(), model.path("joint"));
    let data = JointData {
        calibration: &windows,
        search: &windows,
        dir: &dir,
    };
    for experts in [with_novices(3), tied("m-smoe", 3)] {
        let shared = JointOptions::new(experts, NeuronOptions::default(), 0.5);
        let error = joint(&model.decoder(), data, &shared, &NoProgress).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
    let path = model.path("plan.json");
    good.save(&path).unwrap();
    assert_eq!(ExpertPlan::load(&path).unwrap(), good);
}

#[test]
fn recipes_that_keep_rows_have_names_and_do_not_depend_on_the_number_of_threads() {
    let model = Mixture::random(&config("qwen3_moe", json!({})), ExpertLayout::Alone);
    let decoder = model.decoder();
    let (text, dir) = (windows(), model.path("weights"));
    let data = prune_structured::experts::JointData {
        calibration: &text,
        search: &text,
        dir: &dir,
    };
    let novice = ExpertRecipe::named("mone", 0).unwrap().compensation(Novice);
    let tied = ["hc-smoe-tied", "m-smoe-tied"].map(|name| ExpertRecipe::named(name, 0).unwrap());
    for recipe in tied.into_iter().chain([novice]) {
        assert!(recipe.keeps_rows() && recipe.drops());
        // Fewer than the two that a token goes to.
        let aim = prune_structured::experts::Aim::Ratio(0.8);
        recipe.check(&decoder, aim).unwrap();
        let of = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.unwrap().install(|| {
                let (found, _) = recipe.plan(&decoder, data, aim, &NoProgress).unwrap();
                serde_json::to_string(&found).unwrap()
            })
        };
        assert_eq!(of(1), of(4), "{}", recipe.name);
        let (found, _) = recipe.plan(&decoder, data, aim, &NoProgress).unwrap();
        assert!(
            found
                .plan
                .layers
                .iter()
                .flatten()
                .all(|layer| layer.kept.len() == 1)
        );
    }
    assert!(!ExpertRecipe::named("hc-smoe", 0).unwrap().keeps_rows());
}

#[test]
fn constants_are_rounded_to_the_dtype_of_the_router() {
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Alone);
    let half = model.path("half");
    std::fs::create_dir(&half).unwrap();
    let tensors_of = model.checkpoint.names().map(|name| {
        let tensor = model.checkpoint.tensor(name, &Device::Cpu).unwrap();
        (name.to_string(), tensor.to_dtype(DType::BF16).unwrap())
    });
    let all: std::collections::HashMap<String, Tensor> = tensors_of.collect();
    candle_core::safetensors::save(&all, half.join("model.safetensors")).unwrap();
    std::fs::copy(
        model.checkpoint.dir().join("config.json"),
        half.join("config.json"),
    )
    .unwrap();
    let checkpoint = Checkpoint::open(&half).unwrap();
    let dense = decoder(&checkpoint);
    let found = plan(&dense, &windows(), &with_novices(3), &NoProgress).unwrap();
    let dst = model.path("novices");
    let settings = ExpertSettings::default();
    write(&dense, &found.plan, &dst, &settings, &NoProgress).unwrap();
    let written = Checkpoint::open(&dst).unwrap();
    let cost = ExpertCost::of(&dense, &found.plan).unwrap();
    assert_eq!(cost.bytes, written.total_bytes());
    let name = "model.layers.0.mlp.novices.weight";
    let stored = written.tensor(name, &Device::Cpu).unwrap();
    assert_eq!(stored.dtype(), DType::BF16);
    let stored: Vec<Vec<f32>> = stored.to_dtype(DType::F32).unwrap().to_vec2().unwrap();
    let novices = &found.plan.layers[0].as_ref().unwrap().novices;
    for (stored, exact) in stored.iter().zip(novices) {
        assert!(gap(stored, exact) <= 1e-2);
    }
    assert!(tensors(&dst).iter().any(|(found, _)| found == name));
}
