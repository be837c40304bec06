//! Models without experts.

use crate::common::{
    WORDS, budget, model, options, weight_files, windows, with_frontier, write_tokenizer,
};
use candle_core::{DType, Device};
use causal_lm::testing::{TestModel, config};
use causal_lm::{Decoder, Windows};
use frontier::{Baseline, Data, Error, Frontier, Options, Plan, Site, Target};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use tensor_io::{Cancelled, Checkpoint, NoProgress};

#[test]
fn what_is_written_takes_the_bytes_of_the_plan_and_predicts_as_it_was_measured() {
    for (target, tied) in [
        (Target::Here, true),
        (Target::Here, false),
        (Target::Gguf, true),
        (Target::Vllm, true),
    ] {
        let model = model(tied);
        with_frontier(&model, options(target), |frontier| {
            for share in [0.0, 0.2, 0.6] {
                let budget = budget(frontier, share);
                let plan = frontier.plan(budget, &NoProgress).unwrap();
                assert!(plan.bytes() <= budget, "{target} {share}");
                let dst = model.path(&format!("{target}-{share}"));
                let written = frontier.write(&plan, &dst, &NoProgress).unwrap();
                assert_eq!(written.bytes, weight_files(&dst), "{target} {share}");
                assert!(written.bytes <= plan.weight_bytes);
                // Entries of headers are counted with the longest offsets, and all else to the byte.
                let gap = plan.weight_bytes - written.bytes;
                assert!(gap < 1500, "{target} {share}: {gap} of {}", written.bytes);

                let checkpoint = written.open().unwrap();
                let opened = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
                let found = frontier.divergence(&opened, &NoProgress).unwrap();
                let difference = (found.mean - plan.measured.mean).abs();
                assert!(
                    difference < 1e-6,
                    "{target} {share}: {} written, {} measured",
                    found.mean,
                    plan.measured.mean
                );
                let packed = opened.packed(causal_lm::Execution::default());
                let found = frontier.divergence(&packed, &NoProgress).unwrap();
                assert!(
                    (found.mean - plan.measured.mean).abs() < 1e-6,
                    "{target} {share}"
                );
                assert_eq!(Plan::load(dst.join("plan.json")).unwrap(), plan);
            }
        });
    }
}

#[test]
fn a_budget_of_the_dense_model_leaves_every_tensor_as_it_was() {
    let model = model(true);
    with_frontier(&model, options(Target::Here), |frontier| {
        let plan = frontier.plan(frontier.dense_bytes(), &NoProgress).unwrap();
        assert!(plan.is_dense());
        assert!(plan.measured.mean.abs() < 1e-6);
        assert_eq!(plan.summary().pruned, 0.0);
        let written = frontier
            .write(&plan, model.path("dense"), &NoProgress)
            .unwrap();
        let copy = written.open().unwrap();
        for name in model.checkpoint().names() {
            let (ours, theirs) = (model.checkpoint().bytes(name), copy.bytes(name));
            assert_eq!(ours.unwrap(), theirs.unwrap(), "{name}");
        }
    });
}

#[test]
fn a_budget_below_the_smallest_plan_says_what_the_smallest_is() {
    let model = model(true);
    with_frontier(&model, options(Target::Here), |frontier| {
        let smallest = frontier.smallest().unwrap();
        let error = frontier.plan(smallest - 1, &NoProgress).unwrap_err();
        assert!(
            matches!(error, Error::Budget { smallest: found, .. } if found == smallest),
            "{error}"
        );
        assert!(error.to_string().contains(&smallest.to_string()));
        assert!(frontier.plan(smallest, &NoProgress).unwrap().bytes() <= smallest);
    });
}

#[test]
fn rounds_never_make_a_plan_worse_and_a_larger_budget_is_not_predicted_worse() {
    let model = model(true);
    with_frontier(&model, options(Target::Here), |frontier| {
        let mut last = f64::INFINITY;
        for share in [0.1, 0.3, 0.5, 0.8] {
            let budget = budget(frontier, share);
            let plan = frontier.plan(budget, &NoProgress).unwrap();
            let kept: Vec<f64> = plan
                .rounds
                .iter()
                .filter(|round| round.kept)
                .map(|r| r.measured.mean)
                .collect();
            assert!(kept.windows(2).all(|pair| pair[1] < pair[0]), "{kept:?}");
            assert_eq!(kept.last().copied(), Some(plan.measured.mean));
            // Of the division: rounds and whole plans go by what was measured.
            let predicted = plan.rounds[0].predicted.unwrap();
            assert!(predicted <= last + 1e-12);
            last = predicted;
            for baseline in Baseline::ALL {
                let Some(other) = frontier.baseline(baseline, budget, &NoProgress).unwrap() else {
                    continue;
                };
                assert!(other.bytes() <= budget, "{baseline}");
                // Of ranks one choice of several is tried.
                let tried = [
                    Baseline::Bits,
                    Baseline::Widths,
                    Baseline::Caches,
                    Baseline::KQuantMix,
                ];
                if tried.contains(&baseline) {
                    assert!(plan.measured.mean <= other.measured.mean, "{baseline}");
                }
                // The joint division could have chosen it, and with its bytes alone can, up to what the units of bytes leave.
                let spent = other.bytes() + frontier.unit() * plan.sites.len() as u64;
                let joint = frontier.divided_plan(spent, &NoProgress).unwrap();
                assert!(joint.bytes() <= spent && joint.rounds.len() == 1);
                let ours = joint.predicted.unwrap();
                assert!(
                    other.predicted.is_none_or(|theirs| ours <= theirs + 1e-9),
                    "{baseline}"
                );
                let other = other.predicted;
                assert_eq!(other.is_none(), baseline == Baseline::KQuantMix);
                assert!(
                    other.is_none_or(|other| predicted <= other + 1e-9),
                    "{baseline}"
                );
            }
        }
        let points = frontier.predicted(16);
        assert!(
            points
                .windows(2)
                .all(|p| p[0].0 <= p[1].0 && p[0].1 >= p[1].1)
        );
    });
}

#[test]
fn a_run_that_was_stopped_goes_on_to_the_same_plan_and_measures_nothing_twice() {
    let (calibration, comparison) = (windows(1, 24), windows(2, 16));
    let data = Data {
        calibration: &calibration,
        comparison: &comparison,
    };
    let model = model(true);
    let decoder = model.decoder();
    let whole = {
        let dir = model.path("whole");
        let mut frontier =
            Frontier::measure(&decoder, data, options(Target::Here), dir, &NoProgress).unwrap();
        frontier.plan(budget(&frontier, 0.3), &NoProgress).unwrap()
    };
    let dir = model.path("stopped");
    let measure = |progress: &dyn tensor_io::Progress| {
        Frontier::measure(&decoder, data, options(Target::Here), &dir, progress)
    };
    // Steps that are found done count too, so that each run gets further than the one before.
    for limit in [3, 8, 20, 45, 70] {
        let left = AtomicU64::new(limit);
        let stop = |steps: u64| {
            let after = |left: u64| left.checked_sub(steps);
            let found = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, after);
            found.map(|_| ()).map_err(|_| Cancelled)
        };
        let error = measure(&stop).err().unwrap();
        assert!(error.to_string().contains("cancelled"), "{limit}: {error}");
    }
    let mut frontier = measure(&NoProgress).unwrap();
    assert_eq!(
        frontier.plan(budget(&frontier, 0.3), &NoProgress).unwrap(),
        whole
    );
    assert!(frontier.passes() > 0.0);
    let mut again = measure(&NoProgress).unwrap();
    assert_eq!(again.plan(budget(&again, 0.3), &NoProgress).unwrap(), whole);
    assert_eq!(again.passes(), 0.0);
}

#[test]
fn plans_do_not_depend_on_the_number_of_threads() {
    let plan = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let model = model(true);
            with_frontier(&model, options(Target::Here), |frontier| {
                frontier.plan(budget(frontier, 0.25), &NoProgress).unwrap()
            })
        })
    };
    assert_eq!(plan(1), plan(3));
}

/// Divides a small model over two budgets and checks what is written against what was measured.
fn is_written_as_it_was_measured(model_type: &str, changes: &serde_json::Value, target: Target) {
    let mut fields = json!({
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": WORDS,
    });
    let both = changes.as_object().unwrap().clone();
    fields.as_object_mut().unwrap().extend(both);
    let louder = |_: &str, tensor: candle_core::Tensor| (tensor * 3.0).unwrap();
    let model = TestModel::with(&config(model_type, fields), DType::BF16, louder);
    write_tokenizer(model.dir());
    with_frontier(&model, options(target), |frontier| {
        for share in [0.1, 0.5] {
            let plan = frontier.plan(budget(frontier, share), &NoProgress).unwrap();
            let summary = plan.summary();
            assert!(summary.bits < 16.0, "{model_type} {target}: {summary:?}");
            let dst = model.path(&format!("{target}-{share}"));
            let written = frontier.write(&plan, &dst, &NoProgress).unwrap();
            assert!(written.bytes <= plan.weight_bytes);
            let checkpoint = written.open().unwrap();
            let opened = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
            let found = frontier.divergence(&opened, &NoProgress).unwrap();
            let difference = (found.mean - plan.measured.mean).abs();
            assert!(
                difference < 1e-6,
                "{model_type} {target} {share}: {difference}"
            );
        }
    });
}

#[test]
fn models_that_store_several_linears_in_one_matrix_are_written_as_they_were_measured() {
    for (model_type, changes, target) in [
        ("phi3", json!({}), Target::Here),
        ("phi3", json!({}), Target::Gguf),
        ("glm4", json!({}), Target::Here),
        (
            "gpt_neox",
            json!({"hidden_act": "gelu", "rotary_pct": 0.75, "num_key_value_heads": 8}),
            Target::Here,
        ),
        (
            "gpt_neox",
            json!({"hidden_act": "gelu", "rotary_pct": 0.75, "num_key_value_heads": 8}),
            Target::Gguf,
        ),
    ] {
        is_written_as_it_was_measured(model_type, &changes, target);
    }
}

#[test]
fn models_with_delta_nets_are_written_as_they_were_measured() {
    // The second block has attention with a gate.
    let changes = json!({
        "full_attention_interval": 2, "linear_num_key_heads": 8, "linear_num_value_heads": 16,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    });
    is_written_as_it_was_measured("qwen3_5_text", &changes, Target::Here);
}

#[test]
fn a_k_quant_mix_has_the_types_of_llama_cpp_and_is_written_as_it_was_measured() {
    // Rows of 256 are whole blocks of the K types.
    let changes = json!({
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": WORDS,
        "tie_word_embeddings": true,
    });
    for target in [Target::Here, Target::Gguf] {
        let model = TestModel::with(
            &config("llama", changes.clone()),
            DType::BF16,
            |_, tensor| tensor,
        );
        write_tokenizer(model.dir());
        with_frontier(&model, options(target), |frontier| {
            let dense = frontier.dense_bytes();
            let mut mix = |budget| {
                let plan = frontier.baseline(Baseline::KQuantMix, budget, &NoProgress);
                plan.unwrap().map(|plan| (plan.bytes(), plan))
            };
            let (bytes, plan) = mix(1 << 30).unwrap();
            let of = |site| {
                plan.sites
                    .iter()
                    .find(|planned| planned.site == site)
                    .unwrap()
            };
            assert_eq!(of(Site::Embedding).treatment.format.to_string(), "q6_k");
            let blocks = of(Site::Mlp(0)).treatment.format.to_string();
            assert!(blocks.starts_with("gptq-q5_k_"), "{blocks}");
            // What takes more is no candidate, and below the smallest mix there is none.
            let (smaller, _) = mix(bytes - 1).unwrap();
            assert!(smaller < bytes);
            assert!(mix(dense / 20).is_none());
            let plan = frontier.baseline(Baseline::KQuantMix, bytes, &NoProgress);
            let plan = plan.unwrap().unwrap();
            let written = frontier
                .write(&plan, model.path("mix"), &NoProgress)
                .unwrap();
            assert!(written.bytes <= plan.weight_bytes && written.bytes + 1500 > plan.weight_bytes);
            let checkpoint = written.open().unwrap();
            let opened = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
            let found = frontier.divergence(&opened, &NoProgress).unwrap();
            assert!((found.mean - plan.measured.mean).abs() < 1e-6, "{target}");
            if target == Target::Here {
                // Of two blocks the last is among the last eighth, where the larger of both mixes has more bits.
                let value = match blocks.as_str() {
                    "gptq-q5_k_m" => "v_proj.weight.Q6_K",
                    _ => "v_proj.weight.Q5_K",
                };
                let files = Checkpoint::open(&written.model).unwrap();
                for name in [value, "q_proj.weight.Q5_K"] {
                    let name = format!("model.layers.1.self_attn.{name}");
                    assert!(files.contains(&name), "{name}");
                }
            }
        });
    }
    let model = model(true);
    with_frontier(&model, options(Target::Vllm), |frontier| {
        let found = frontier.baseline(Baseline::KQuantMix, u64::MAX, &NoProgress);
        assert!(found.unwrap().is_none());
    });
}

#[test]
fn what_a_target_cannot_store_and_texts_that_overlap_are_refused() {
    let mut wrong = options(Target::Gguf);
    wrong.formats = Some(vec!["gptq-int4-g32".parse().unwrap()]);
    let model = model(true);
    let decoder = model.decoder();
    let text = windows(3, 24);
    let other = windows(4, 8);
    let measure = |options: Options, comparison: &Windows| {
        let data = Data {
            calibration: &text,
            comparison,
        };
        let found = Frontier::measure(&decoder, data, options, model.path("state"), &NoProgress);
        found.err().unwrap().to_string()
    };
    let error = measure(wrong, &other);
    assert!(error.contains("gguf cannot store gptq-int4-g32"), "{error}");
    let error = measure(options(Target::Here), &text.first(2));
    assert!(error.contains("comparison windows"), "{error}");
    let mut wide = options(Target::Here);
    wide.widths = vec![0.5, 1.5];
    assert!(measure(wide, &other).contains("widths is 1.5"));
}

#[test]
fn the_same_widths_everywhere_where_the_target_wants_them_and_keys_and_values_count() {
    let model = model(true);
    with_frontier(&model, options(Target::Vllm), |frontier| {
        let plan = frontier.plan(budget(frontier, 0.1), &NoProgress).unwrap();
        let of = |attention: bool| {
            let sites = plan.sites.iter().filter(move |s| match s.site {
                frontier::Site::Attention(_) => attention,
                frontier::Site::Mlp(_) => !attention,
                _ => false,
            });
            sites
                .map(|s| (s.treatment.width, s.treatment.rank))
                .collect::<Vec<_>>()
        };
        for sites in [of(true), of(false)] {
            assert!(sites.windows(2).all(|pair| pair[0] == pair[1]), "{sites:?}");
        }
    });
    let mut long = options(Target::Here);
    long.context = 1000;
    with_frontier(&model, long, |frontier| {
        // Two layers of four key/value heads of 8 channels, keys and values in f32, and the position of each token.
        let cache = 2 * 4 * (8 * 2 * 4 + 4) * 1000;
        let dense = frontier.plan(frontier.dense_bytes(), &NoProgress).unwrap();
        assert_eq!(dense.cache_bytes, cache);
        let plan = frontier.plan(budget(frontier, 0.5), &NoProgress).unwrap();
        assert!(plan.cache_bytes < cache && plan.bytes() <= budget(frontier, 0.5));
    });
    let mut few = options(Target::Here);
    few.max_parameters = Some(60_000);
    with_frontier(&model, few, |frontier| {
        let plan = frontier.plan(frontier.dense_bytes(), &NoProgress).unwrap();
        assert!(plan.summary().pruned > 0.0);
        assert!(plan.parameters <= 60_000);
        let written = frontier
            .write(&plan, model.path("few"), &NoProgress)
            .unwrap();
        let opened = causal_lm::open(&written.model).unwrap();
        let mut parameters = opened.parameters();
        if let Some(adapter) = &written.adapter {
            let factors = adapter.join("adapter_model.safetensors");
            parameters += Checkpoint::open_file(factors).unwrap().parameters();
        }
        assert_eq!(parameters, plan.parameters);
    });
    let mut none = options(Target::Here);
    none.max_parameters = Some(1000);
    let checkpoint = causal_lm::open(model.dir()).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let (calibration, comparison) = (windows(1, 24), windows(2, 16));
    let data = Data {
        calibration: &calibration,
        comparison: &comparison,
    };
    let refused = Frontier::prepare(&decoder, data, none, model.path("none"), &NoProgress);
    match refused.map(|_| ()) {
        Err(Error::Parameters { wanted, fewest }) => assert!(wanted == 1000 && fewest > 1000),
        other => panic!("{other:?}"),
    }
}

#[test]
fn budgets_are_known_before_anything_is_measured() {
    let model = model(true);
    let (calibration, comparison) = (windows(1, 24), windows(2, 16));
    let checkpoint = causal_lm::open(model.dir()).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let data = Data {
        calibration: &calibration,
        comparison: &comparison,
    };
    for target in [Target::Here, Target::Gguf, Target::Vllm] {
        let dir = model.path("state");
        let prepared =
            Frontier::prepare(&decoder, data, options(target), dir, &NoProgress).unwrap();
        let before = (prepared.smallest(), prepared.dense_bytes());
        let frontier = prepared.measure(&NoProgress).unwrap();
        assert_eq!(before, (frontier.smallest(), frontier.dense_bytes()));
        // Without a rank or a width to choose nothing is left to check, and ranks of dense weights are no combinations.
        assert!(
            frontier.check().rho > 0.0,
            "{target}: {:?}",
            frontier.check()
        );
    }
}

#[test]
fn a_head_that_is_a_copy_of_the_embedding_is_paid_for_by_the_dense_model_alone() {
    let tied = model(true);
    let copied = TestModel::with(tied.checkpoint().config(), DType::BF16, |_, tensor| tensor);
    let dir = copied.path("copied");
    let checkpoint = causal_lm::open(tied.dir()).unwrap();
    let names = checkpoint.names().map(|name| (name.to_string(), name));
    let head = ("lm_head.weight".to_string(), "model.embed_tokens.weight");
    let tensors: Vec<(String, candle_core::Tensor)> = names
        .chain([head])
        .map(|(name, of)| (name, checkpoint.tensor(of, &Device::Cpu).unwrap()))
        .collect();
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::copy(tied.dir().join("config.json"), dir.join("config.json")).unwrap();
    let data = tensors.iter().map(|(name, tensor)| (name, tensor));
    tensor_io::write_file(dir.join("model.safetensors"), data, &BTreeMap::new()).unwrap();

    let checkpoint = causal_lm::open(&dir).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let (calibration, comparison) = (windows(1, 24), windows(2, 16));
    let data = Data {
        calibration: &calibration,
        comparison: &comparison,
    };
    let state = copied.path("state");
    let of = options(Target::Here);
    let mut frontier = Frontier::measure(&decoder, data, of, state, &NoProgress).unwrap();
    let dense = frontier.dense_bytes();
    for (budget, keeps) in [(dense, true), (dense - 1, false)] {
        let plan = frontier.plan(budget, &NoProgress).unwrap();
        let dst = copied.path(&format!("plan-{budget}"));
        let written = frontier.write(&plan, &dst, &NoProgress).unwrap();
        assert!(written.bytes <= plan.weight_bytes && plan.weight_bytes <= budget);
        let opened = Checkpoint::open(&written.model).unwrap();
        assert_eq!(opened.contains("lm_head.weight"), keeps, "{budget}");
        assert!(plan.is_dense());
    }
}

#[test]
fn a_speed_is_kept_by_the_measured_table_and_one_that_no_plan_reaches_names_the_fastest() {
    let model = model(true);
    let plans = |speed: Option<f64>| {
        let mut options = options(Target::Here);
        options.tokens_per_second = speed;
        with_frontier(&model, options, |frontier| {
            let budget = budget(frontier, 0.9);
            let divided = frontier.divided_plan(budget, &NoProgress)?;
            frontier
                .plan(budget, &NoProgress)
                .map(|plan| (divided, plan))
        })
    };
    let (free_division, free) = plans(None).unwrap();
    assert_eq!(free.seconds, None);
    let (slow_division, slow) = plans(Some(1e-3)).unwrap();
    assert_eq!(slow_division.sites, free_division.sites);
    assert_eq!(slow.sites, free.sites);
    let slowest = slow_division.seconds.unwrap();
    assert!(slowest > 0.0);
    let Err(Error::Speed { fastest, .. }) = plans(Some(1e12)) else {
        panic!("a million million tokens a second");
    };
    // The table was kept: the fastest plan is no slower than the free one, and can be asked for.
    assert!(fastest >= 1.0 / slowest);
    let asked = 0.999 * fastest;
    let (division, plan) = plans(Some(asked)).unwrap();
    for plan in [&division, &plan] {
        assert!(plan.seconds.unwrap() * asked <= 1.0 && plan.bytes() <= plan.budget);
    }
    // Of what the sites do by themselves speed costs something. A whole plan may be a mix, which has no such sum.
    let sum = |plan: &Plan| plan.rounds[0].predicted.unwrap();
    assert!(sum(&division) >= sum(&free_division) - 1e-12);
}

#[test]
fn drawn_exchanges_never_make_a_plan_worse_keep_its_budget_and_are_those_of_the_seed() {
    let model = model(true);
    let with_refine = |refine: usize, seed: u64, folder: &str| {
        let mut options = options(Target::Here);
        (options.refine, options.seed) = (refine, seed);
        // Few tokens, few formats and no rounds leave something to be found.
        let names = ["gptq-int8-g32", "gptq-int4-g64", "gptq-int2-g32"];
        options.formats = Some(names.map(|name| name.parse().unwrap()).to_vec());
        (options.rounds, options.coarse_tokens) = (0, 32);
        let (calibration, comparison) = (windows(1, 24), windows(2, 16));
        let decoder = model.decoder();
        let data = Data {
            calibration: &calibration,
            comparison: &comparison,
        };
        let dir = model.path(folder);
        let mut frontier = Frontier::measure(&decoder, data, options, dir, &NoProgress).unwrap();
        let budget = budget(&frontier, 0.35);
        let plan = frontier.plan(budget, &NoProgress).unwrap();
        assert!(plan.bytes() <= budget);
        plan
    };
    let plain = with_refine(0, 0, "refine");
    let refined = with_refine(8, 0, "refine");
    assert!(
        refined.measured.mean < plain.measured.mean,
        "nothing was found in 96 plans"
    );
    let kept: Vec<f64> = refined
        .rounds
        .iter()
        .filter(|round| round.kept)
        .map(|round| round.measured.mean)
        .collect();
    assert!(kept.windows(2).all(|pair| pair[1] < pair[0]), "{kept:?}");
    assert!(kept.contains(&plain.measured.mean));
    assert_eq!(*kept.last().unwrap(), refined.measured.mean);
    assert_eq!(with_refine(8, 0, "refine"), refined);
    assert_eq!(with_refine(8, 0, "another folder"), refined);
    let (plain, other) = (with_refine(0, 1, "refine"), with_refine(8, 1, "refine"));
    assert!(other.measured.mean <= plain.measured.mean);
}
