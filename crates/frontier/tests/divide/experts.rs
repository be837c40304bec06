//! Mixtures of experts.

use crate::common::{
    WORDS, budget, options, weight_files, windows, with_frontier_of, write_tokenizer,
};
use candle_core::{DType, Device, Tensor};
use causal_lm::names::ExpertLayout;
use causal_lm::testing::{TestModel, config};
use causal_lm::{Decoder, Execution};
use frontier::{Data, Error, Format, Frontier, Options, Plan, Site, Target};
use prune_structured::experts::{ExpertPlan, ExpertSettings, write};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tensor_io::{Checkpoint, NoProgress};

/// A small mixture in a folder.
struct Mixture {
    random: TestModel,
    dir: PathBuf,
}

/// Two blocks of four experts of 64 neurons, in this layout.
fn mixture(model_type: &str, layout: ExpertLayout) -> Mixture {
    mixture_with(model_type, layout, json!({}))
}

/// The same with some fields of its config replaced.
fn mixture_with(model_type: &str, layout: ExpertLayout, fields: Value) -> Mixture {
    let mut changes = json!({
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": WORDS,
        "tie_word_embeddings": true, "num_experts_per_tok": 2, "num_local_experts": 4,
    });
    let own = match model_type {
        // The second block has an MLP; the first an expert for every token.
        "qwen2_moe" => json!({
            "moe_intermediate_size": 64, "intermediate_size": 96, "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [1],
        }),
        "qwen3_moe" => json!({"moe_intermediate_size": 64, "norm_topk_prob": true}),
        "granitemoe" => json!({"attention_multiplier": 0.3}),
        "olmoe" => json!({"num_key_value_heads": 8, "tie_word_embeddings": false}),
        _ => json!({}),
    };
    for more in [own, fields] {
        for (field, value) in more.as_object().unwrap() {
            changes[field] = value.clone();
        }
    }
    // Random weights of this size make predictions that differ from token to token.
    let louder = |name: &str, tensor: Tensor| match name.contains("norm") {
        true => tensor,
        false => (tensor * 3.0).unwrap(),
    };
    let random = TestModel::with(&config(model_type, changes), DType::BF16, louder);
    write_tokenizer(random.dir());
    let checkpoint = causal_lm::open(random.dir()).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let dir = random.path("mixture");
    let settings = ExpertSettings::default().layout(Some(layout));
    write(
        &decoder,
        &ExpertPlan::whole(&decoder),
        &dir,
        &settings,
        &NoProgress,
    )
    .unwrap();
    Mixture { random, dir }
}

/// What a GGUF file can hold: experts in every block, gates as llama.cpp has them.
const IN_GGUF: [(&str, ExpertLayout); 4] = [
    ("mixtral", ExpertLayout::Alone),
    ("qwen3_moe", ExpertLayout::Fused),
    ("olmoe", ExpertLayout::Alone),
    ("granitemoe", ExpertLayout::Fused),
];
const KINDS: [(&str, ExpertLayout); 5] = [
    ("mixtral", ExpertLayout::Alone),
    ("mixtral", ExpertLayout::Fused),
    ("qwen2_moe", ExpertLayout::Fused),
    ("olmoe", ExpertLayout::Alone),
    ("granitemoe", ExpertLayout::Fused),
];

impl Mixture {
    fn frontier<T>(&self, options: Options, f: impl FnOnce(&mut Frontier<'_>) -> T) -> T {
        with_frontier_of(&self.dir, &self.random.path("state"), options, f)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.random.path(name)
    }
}

fn tensors_in(dir: &Path) -> usize {
    Checkpoint::open(dir).unwrap().names().count()
}

fn is_of_experts(site: Site) -> bool {
    matches!(site, Site::Experts(_))
}

/// Whether some experts of a plan are stored as codes.
fn quantises_experts(plan: &Plan) -> bool {
    let mut experts = plan.sites.iter().filter(|site| is_of_experts(site.site));
    experts.any(|site| site.treatment.format != Format::Stored)
}

#[test]
fn what_is_written_takes_the_bytes_of_the_plan_and_predicts_as_it_was_measured() {
    let here = KINDS.map(|(model_type, layout)| (model_type, layout, Target::Here));
    let in_gguf = IN_GGUF.map(|(model_type, layout)| (model_type, layout, Target::Gguf));
    for (model_type, layout, target) in here.into_iter().chain(in_gguf) {
        let model = mixture(model_type, layout);
        model.frontier(options(target), |frontier| {
            for share in [0.0, 0.3, 0.7, 0.95] {
                let case = format!("{target} {model_type} {layout:?} {share}");
                let budget = budget(frontier, share);
                let plan = frontier.plan(budget, &NoProgress).unwrap();
                assert!(plan.bytes() <= budget, "{case}");
                let dst = model.path(&format!("written-{share}"));
                let written = frontier.write(&plan, &dst, &NoProgress).unwrap();
                assert_eq!(written.bytes, weight_files(&dst), "{case}");
                assert!(written.bytes <= plan.weight_bytes, "{case}");
                // Entries of headers are counted with the longest offsets, and all else to the byte.
                let gap = plan.weight_bytes - written.bytes;
                let most = match target {
                    Target::Gguf => 1500,
                    _ => 300 + 16 * tensors_in(&written.model) as u64,
                };
                assert!(gap < most, "{case}: {gap} of {}", written.bytes);

                let checkpoint = written.open().unwrap();
                let opened = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
                // Codes have names of single experts; floats stay where they were.
                let expected = match quantises_experts(&plan) {
                    true => ExpertLayout::Alone,
                    false => layout,
                };
                if target == Target::Here {
                    assert_eq!(opened.config().names.layout(), expected, "{case}");
                }
                let mut widths: Vec<usize> = plan
                    .sites
                    .iter()
                    .filter(|site| is_of_experts(site.site))
                    .map(|site| site.treatment.width)
                    .collect();
                let mixtures = opened.config().mixtures.iter().flatten();
                assert!(mixtures.map(|mixture| mixture.width).eq(widths.clone()));
                widths.dedup();
                assert!(target == Target::Here || widths.len() == 1, "{case}");
                let near = |decoder: &Decoder<'_>| {
                    let found = frontier.divergence(decoder, &NoProgress).unwrap();
                    let difference = (found.mean - plan.measured.mean).abs();
                    assert!(
                        difference < 1e-6,
                        "{case}: {} written, {} measured",
                        found.mean,
                        plan.measured.mean
                    );
                };
                near(&opened);
                near(&opened.packed(Execution::default()));
                assert_eq!(Plan::load(dst.join("plan.json")).unwrap(), plan);
            }
        });
        std::fs::remove_dir_all(model.path("state")).unwrap();
    }
}

#[test]
fn a_budget_of_the_dense_model_leaves_every_tensor_as_it_was() {
    for (model_type, layout) in KINDS {
        let model = mixture(model_type, layout);
        model.frontier(options(Target::Here), |frontier| {
            let source = Checkpoint::open(&model.dir).unwrap();
            let (dense, files) = (frontier.dense_bytes(), weight_files(&model.dir));
            let most = 300 + 16 * tensors_in(&model.dir) as u64;
            assert!(dense >= files && dense - files < most, "{dense} of {files}");
            let plan = frontier.plan(dense, &NoProgress).unwrap();
            assert!(plan.is_dense() && plan.measured.mean.abs() < 1e-6);
            let written = frontier
                .write(&plan, model.path("dense"), &NoProgress)
                .unwrap();
            let copy = written.open().unwrap();
            assert!(copy.names().eq(source.names()));
            for name in source.names() {
                let (ours, theirs) = (source.bytes(name), copy.bytes(name));
                assert_eq!(ours.unwrap(), theirs.unwrap(), "{model_type}: {name}");
            }
        });
    }
}

#[test]
fn floats_of_narrower_experts_stay_in_the_layout_of_the_model() {
    for (model_type, layout) in [
        ("qwen3_moe", ExpertLayout::Fused),
        ("mixtral", ExpertLayout::Alone),
    ] {
        let model = mixture(model_type, layout);
        let mut options = options(Target::Here);
        (options.formats, options.ranks) = (Some(vec![]), Some(vec![]));
        model.frontier(options, |frontier| {
            let smallest = frontier.smallest().unwrap();
            let plan = frontier.plan(smallest, &NoProgress).unwrap();
            let of_experts = plan.sites.iter().filter(|site| is_of_experts(site.site));
            let widths: Vec<usize> = of_experts.map(|site| site.treatment.width).collect();
            assert_eq!(widths, [32, 32]);
            let written = frontier
                .write(&plan, model.path("narrow"), &NoProgress)
                .unwrap();
            let copy = written.open().unwrap();
            let opened = Decoder::new(&copy, DType::F32, &Device::Cpu).unwrap();
            assert_eq!(opened.config().names.layout(), layout);
            for (layer, mixture) in opened.config().mixtures.iter().enumerate() {
                assert_eq!(mixture.unwrap().width, 32);
                // The router is that of the model.
                let router = opened.config().names.router(layer).unwrap();
                let source = Checkpoint::open(&model.dir).unwrap();
                assert_eq!(copy.bytes(&router).unwrap(), source.bytes(&router).unwrap());
            }
        });
    }
}

#[test]
fn experts_without_names_of_their_own_are_narrowed_and_never_quantised() {
    let model = mixture("granitemoe", ExpertLayout::Fused);
    model.frontier(options(Target::Here), |frontier| {
        let curves = frontier.curves();
        let (experts, others): (Vec<_>, Vec<_>) =
            curves.iter().partition(|curve| is_of_experts(curve.site));
        let quantised = |points: &[frontier::Point]| {
            let formats = points.iter().map(|point| point.treatment.format);
            formats.filter(|format| *format != Format::Stored).count()
        };
        assert_eq!(experts.len(), 2);
        assert!(experts.iter().all(|curve| quantised(&curve.points) == 0));
        assert!(experts.iter().all(|curve| curve.points.len() > 1));
        assert!(others.iter().all(|curve| quantised(&curve.points) > 0));
    });
}

#[test]
fn the_expert_of_every_token_is_a_site_of_its_own_and_experts_have_no_corrections() {
    let model = mixture("qwen2_moe", ExpertLayout::Fused);
    model.frontier(options(Target::Here), |frontier| {
        let plan = frontier.plan(budget(frontier, 0.2), &NoProgress).unwrap();
        let sites: Vec<String> = plan.sites.iter().map(|s| s.site.to_string()).collect();
        let expected = [
            "embedding",
            "attention.0",
            "experts.0",
            "shared-expert.0",
            "attention.1",
            "mlp.1",
        ];
        assert_eq!(sites, expected);
        for name in expected {
            assert_eq!(Site::try_from(name.to_string()).unwrap().to_string(), name);
        }
        for curve in frontier.curves() {
            let ranks = curve.points.iter().map(|point| point.treatment.rank);
            if is_of_experts(curve.site) {
                assert_eq!(ranks.max(), Some(0));
            }
        }
    });
}

#[test]
fn plans_do_not_depend_on_the_number_of_threads_and_a_second_run_measures_nothing() {
    let plan = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let model = mixture("qwen2_moe", ExpertLayout::Fused);
            let run = |expected: Option<f64>| {
                model.frontier(options(Target::Here), |frontier| {
                    let plan = frontier.plan(budget(frontier, 0.25), &NoProgress).unwrap();
                    assert!(expected.is_none_or(|passes| frontier.passes() == passes));
                    plan
                })
            };
            let first = run(None);
            assert_eq!(run(Some(0.0)), first);
            first
        })
    };
    assert_eq!(plan(1), plan(3));
}

#[test]
fn a_token_takes_the_seconds_of_the_experts_that_it_goes_to() {
    let model = mixture("mixtral", ExpertLayout::Alone);
    let mut slow = options(Target::Here);
    slow.tokens_per_second = Some(1e-3);
    model.frontier(slow, |frontier| {
        let plan = frontier.plan(budget(frontier, 0.5), &NoProgress).unwrap();
        assert!(plan.seconds.unwrap() > 0.0);
    });
    let free = model.frontier(options(Target::Here), |frontier| {
        frontier.plan(budget(frontier, 0.5), &NoProgress).unwrap()
    });
    assert_eq!(free.seconds, None);
}

#[test]
fn what_a_target_cannot_store_of_experts_is_refused() {
    let model = mixture("mixtral", ExpertLayout::Alone);
    let checkpoint = causal_lm::open(&model.dir).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let (calibration, comparison) = (windows(1, 4), windows(2, 4));
    let data = Data {
        calibration: &calibration,
        comparison: &comparison,
    };
    let state = model.path("state");
    let vllm = options(Target::Vllm);
    let error = Frontier::measure(&decoder, data, vllm, &state, &NoProgress);
    let error = error.err().unwrap();
    assert!(
        matches!(
            error,
            Error::Experts {
                target: "vllm",
                model_type: "mixtral",
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("cannot store the experts"));
    assert!(!state.exists());
    // Router rows that share experts.
    let lists = json!({"num_attention_heads": [8, 8], "num_key_value_heads": [4, 4], "intermediate_size": [0, 0],
        "num_experts": [4, 2], "expert_size": [64, 64], "expert_map": [[0, 1, 2, 3], [0, 1, 1, 0]]});
    let changes = json!({"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": WORDS,
        "num_experts_per_tok": 2, "num_local_experts": 4, "per_layer_widths": lists});
    let shared = TestModel::new(&config("mixtral", changes));
    let decoder = shared.decoder();
    let here = options(Target::Here);
    let error = Frontier::prepare(&decoder, data, here, &state, &NoProgress);
    let error = error.err().unwrap();
    let is_of_map =
        |error: &causal_lm::Error| matches!(error, causal_lm::Error::ExpertMap { layer: 1, .. });
    assert!(
        matches!(&error, Error::Model(error) if is_of_map(error)),
        "{error}"
    );
    assert!(!state.exists());
    // A file states one number of experts for all blocks.
    let model = mixture("qwen2_moe", ExpertLayout::Alone);
    let checkpoint = causal_lm::open(&model.dir).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let gguf = options(Target::Gguf);
    let error = Frontier::prepare(&decoder, data, gguf, &state, &NoProgress);
    let error = error.err().unwrap().to_string();
    assert!(error.contains("dense layers between mixtures"), "{error}");
}

#[test]
fn a_head_that_a_gguf_file_has_beside_a_tied_embedding_is_quantised_with_it() {
    let tied = json!({"tie_word_embeddings": true});
    let model = mixture_with("olmoe", ExpertLayout::Alone, tied);
    model.frontier(options(Target::Gguf), |frontier| {
        let plan = frontier.plan(budget(frontier, 0.0), &NoProgress).unwrap();
        assert_ne!(plan.sites[0].treatment.format, Format::Stored);
        let dst = model.path("tied");
        let written = frontier.write(&plan, &dst, &NoProgress).unwrap();
        let checkpoint = written.open().unwrap();
        let opened = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
        let found = frontier.divergence(&opened, &NoProgress).unwrap();
        assert!((found.mean - plan.measured.mean).abs() < 1e-6);
    });
}
