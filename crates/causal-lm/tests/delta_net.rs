//! Gated delta nets: a second implementation, steps of every length, caches, forests, folders, and what is refused.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use causal_lm::testing::{TestModel, config, gap, logits};
use causal_lm::{
    CacheSet, Decoder, Error, Forest, Mixer, Model, ModelConfig, NoTap, Site, Tap, TapResult, Tree,
    Windows, run_blocks, synthetic,
};
use kv_lazy::{Budget, CacheConfig, PolicyConfig};
use serde_json::{Value, json};
use tensor_io::{Checkpoint, CheckpointWriter, Config, NoProgress, TensorSpec, WriteOptions};

/// Two delta nets around gated attention. 45 columns of a matrix are a block of 32, three of 4 and one of 1.
fn fields() -> Value {
    json!({
        "head_dim": 8, "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
        "linear_key_head_dim": 11, "linear_value_head_dim": 45, "linear_conv_kernel_dim": 4,
    })
}

fn model() -> TestModel {
    TestModel::new(&config("qwen3_5_text", fields()))
}

fn tokens(count: u32) -> Vec<u32> {
    (0..count).map(|i| (i * i + 3 * i + 1) % 50).collect()
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// What a block's delta net reads and what its output projection reads.
#[derive(Default)]
struct Seen {
    input: Vec<f32>,
    heads: Vec<f32>,
}

impl Tap for Seen {
    fn observe(&mut self, layer: usize, site: Site, x: &Tensor) -> TapResult {
        match (layer, site) {
            (0, Site::Qkv) => self.input.extend(flat(x)),
            (0, Site::O) => self.heads.extend(flat(x)),
            _ => {}
        }
        Ok(())
    }
}

/// A delta net of block 0 by its definition, in f64 and token by token: `[tokens, values]` from `[tokens, hidden]`.
fn naive(checkpoint: &Checkpoint, input: &[f32]) -> Vec<f64> {
    let model = ModelConfig::new(checkpoint.config()).unwrap();
    let shape = model.delta_nets[0].unwrap();
    let (nk, nv, dk, dv) = (
        shape.key_heads,
        shape.value_heads,
        shape.key_dim,
        shape.value_dim,
    );
    let hidden = model.hidden;
    let load = |name: &str| -> Vec<f64> {
        let name = format!("model.layers.0.linear_attn.{name}");
        let tensor = checkpoint.tensor_as(&name, DType::F64, &Device::Cpu);
        tensor.unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let rows: Vec<Vec<f64>> = input
        .chunks(hidden)
        .map(|row| row.iter().map(|&x| f64::from(x)).collect())
        .collect();
    let project = |name: &str| -> Vec<Vec<f64>> {
        let weight = load(&format!("{name}.weight"));
        let dot = |w: &[f64], x: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        let product = |x: &Vec<f64>| weight.chunks(hidden).map(|w| dot(w, x)).collect();
        rows.iter().map(product).collect()
    };
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let (u, z) = (project("in_proj_qkv"), project("in_proj_z"));
    let (b, a) = (project("in_proj_b"), project("in_proj_a"));
    let (conv, log_decay, dt_bias) = (load("conv1d.weight"), load("A_log"), load("dt_bias"));
    let (norm, taps) = (load("norm.weight"), shape.kernel);
    let mut states = vec![vec![vec![0f64; dv]; dk]; nv];
    let mut out = Vec::new();
    for t in 0..rows.len() {
        let mixed: Vec<f64> = (0..u[t].len())
            .map(|c| {
                let earlier = (0..taps).filter(|i| t + i + 1 >= taps);
                let sum: f64 = earlier
                    .map(|i| conv[c * taps + i] * u[t + i + 1 - taps][c])
                    .sum();
                sum * sigmoid(sum)
            })
            .collect();
        let unit = |x: &[f64]| -> Vec<f64> {
            let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
            x.iter().map(|x| x / length).collect()
        };
        for h in 0..nv {
            let j = h / (nv / nk);
            let q = unit(&mixed[j * dk..][..dk]);
            let k = unit(&mixed[(nk + j) * dk..][..dk]);
            let v = &mixed[2 * nk * dk + h * dv..][..dv];
            let alpha = (-log_decay[h].exp() * (1.0 + (a[t][h] + dt_bias[h]).exp()).ln()).exp();
            let beta = sigmoid(b[t][h]);
            let s = &mut states[h];
            s.iter_mut().flatten().for_each(|x| *x *= alpha);
            let o: Vec<f64> = (0..dv)
                .map(|c| {
                    let known: f64 = (0..dk).map(|i| s[i][c] * k[i]).sum();
                    (0..dk).for_each(|i| s[i][c] += k[i] * beta * (v[c] - known));
                    (0..dk).map(|i| s[i][c] * q[i]).sum::<f64>() / (dk as f64).sqrt()
                })
                .collect();
            let square = o.iter().map(|o| o * o).sum::<f64>() / dv as f64;
            let scale = (square + model.norm.eps).sqrt();
            out.extend((0..dv).map(|c| {
                let gate = z[t][h * dv + c];
                norm[c] * o[c] / scale * gate * sigmoid(gate)
            }));
        }
    }
    out
}

#[test]
fn a_delta_net_computes_what_its_definition_says() {
    for changes in [
        json!({}),
        json!({"linear_conv_kernel_dim": 1}),
        json!({"linear_num_key_heads": 6}),
    ] {
        let mut all = fields();
        let new = changes.as_object().unwrap().clone();
        all.as_object_mut().unwrap().extend(new);
        let model = TestModel::new(&config("qwen3_5_text", all));
        let decoder = model.decoder();
        // More tokens than are convolved at once.
        let windows = Windows::cut(&tokens(2 * 300), 300, None).unwrap();
        let mut seen = Seen::default();
        run_blocks(&decoder, &windows, &mut seen, &NoProgress).unwrap();
        let (input, heads) = (seen.input.len() / 2, seen.heads.len() / 2);
        for window in 0..2 {
            let expected = naive(model.checkpoint(), &seen.input[window * input..][..input]);
            let found = &seen.heads[window * heads..][..heads];
            assert_eq!(found.len(), expected.len());
            let pairs = found.iter().zip(&expected);
            let errors = pairs.map(|(found, expected)| (f64::from(*found) - expected).abs());
            let (sum, most) = errors.fold((0.0, 0f64), |(sum, most), e| (sum + e, most.max(e)));
            // The norm makes small outputs of a head large, and their rounding with them.
            let mean = sum / found.len() as f64;
            assert!(mean < 1e-6 && most < 2e-4, "{changes:?}: {mean} {most}");
        }
    }
}

/// Logits of all tokens, fed to `cache` in steps of these lengths.
fn stepwise(model: &Model<'_>, cache: &mut CacheSet, tokens: &[u32], steps: &[usize]) -> Vec<f32> {
    let mut rest = tokens;
    let mut all = Vec::new();
    for &step in steps {
        let (now, after) = rest.split_at(step);
        all.extend(flat(&model.forward_all(&[now], cache).unwrap()));
        rest = after;
    }
    assert!(rest.is_empty());
    all
}

#[test]
fn a_prompt_in_chunks_and_single_tokens_give_what_one_prompt_gives() {
    let tiny = model();
    let decoder = tiny.decoder();
    let model = Model::load(&decoder).unwrap();
    let tokens = tokens(30);
    let whole = logits(&decoder, &tokens);
    for steps in [&[1; 30][..], &[2, 1, 17, 3, 7], &[29, 1]] {
        let mut cache = model.full_cache(1).unwrap();
        let found = stepwise(&model, &mut cache, &tokens, steps);
        let near = gap(&found, &whole);
        assert!(near < 1e-4, "{steps:?}: {near}");
    }
}

#[test]
fn sequences_of_a_batch_keep_states_of_their_own_and_snapshots_go_back() {
    let tiny = model();
    let decoder = tiny.decoder();
    let model = Model::load(&decoder).unwrap();
    let (a, b) = (tokens(12), tokens(24)[12..].to_vec());
    let mut both = model.full_cache(2).unwrap();
    model.forward(&[&a[..8], &b[..8]], &mut both).unwrap();
    let snapshot = both.snapshot();
    let after =
        |cache: &mut CacheSet| flat(&model.forward_all(&[&a[8..], &b[8..]], cache).unwrap());
    let first = after(&mut both);
    both.restore(&snapshot).unwrap();
    assert_eq!(after(&mut both), first);
    both.reset();
    model.forward(&[&a[..8], &b[..8]], &mut both).unwrap();
    assert_eq!(after(&mut both), first);
    for (at, tokens) in [a, b].iter().enumerate() {
        let alone = logits(&decoder, tokens);
        let vocab = alone.len() / 12;
        let found = &first[at * 4 * vocab..][..4 * vocab];
        assert!(gap(found, &alone[8 * vocab..]) < 2e-5);
    }
}

#[test]
fn a_cache_reports_the_bytes_of_states_and_evicts_in_layers_with_attention_alone() {
    let tiny = model();
    let decoder = tiny.decoder();
    let model = Model::load(&decoder).unwrap();
    let state = decoder.config().delta_nets[0].unwrap().state();
    // A matrix for each of six heads, and three tokens that the convolution still sees.
    assert_eq!(state, 6 * 11 * 45 + 3 * (2 * 2 * 11 + 6 * 45));
    let policy: PolicyConfig = "h2o".parse().unwrap();
    let config = CacheConfig::new(policy, Budget::Tokens(8));
    let shapes = model.cache_shapes();
    let mut cache = CacheSet::new(&shapes, 1, DType::F32, &Device::Cpu, &config).unwrap();
    for token in tokens(20) {
        let logits = model.forward(&[&[token]], &mut cache).unwrap();
        assert!(flat(&logits).iter().all(|x| x.is_finite()));
    }
    assert_eq!(cache.recurrent_bytes(), 2 * 4 * state);
    assert!(cache.state_bytes() > cache.recurrent_bytes());
    let held: Vec<usize> = (0..3).map(|layer| cache.physical_len(layer)).collect();
    assert!(held[0] == 0 && held[2] == 0, "{held:?}");
    assert!((1..=8).contains(&held[1]), "{held:?}");
}

#[test]
fn windows_that_are_decoded_and_prompts_give_the_same_logits() {
    let tiny = model();
    let policy: PolicyConfig = "full".parse().unwrap();
    let config = CacheConfig::new(policy, Budget::Tokens(64));
    let decoding = tiny.decoder().decoding(config);
    let windows = Windows::cut(&tokens(32), 16, None).unwrap();
    let [prompts, decoded] = [&tiny.decoder(), &decoding].map(|decoder| {
        let hidden = run_blocks(decoder, &windows, &mut NoTap, &NoProgress).unwrap();
        flat(&hidden.batches()[0])
    });
    assert!(gap(&prompts, &decoded) < 2e-5);
}

#[test]
fn branches_go_on_from_the_state_at_the_end_of_their_trunk() {
    let tiny = model();
    let decoder = tiny.decoder();
    let trees = [(5, vec![3, 1, 4]), (2, vec![2])];
    let forest = Forest {
        trees: trees
            .iter()
            .map(|(trunk, branches)| Tree {
                trunk: *trunk,
                branches: branches.clone(),
            })
            .collect(),
    };
    let text = tokens(forest.tokens() as u32);
    let positions = forest.trees.iter().flat_map(Tree::positions);
    let positions: Vec<u32> = positions.map(|position| position as u32).collect();
    let rope = decoder.rope(0, 16).unwrap().at(&positions).unwrap();
    let mut x = decoder.embed(&[&text]).unwrap();
    for layer in 0..decoder.config().layers() {
        let block = decoder.block(layer).unwrap();
        let mixer = &mut Mixer::Forest(&forest);
        x = block.forward(&x, &rope, mixer, &mut NoTap).unwrap();
    }
    let x: Vec<Vec<f32>> = x.squeeze(0).unwrap().to_vec2().unwrap();
    let mut start = 0;
    for tree in &forest.trees {
        let trunk = &text[start..start + tree.trunk];
        let mut at = start + tree.trunk;
        for &len in &tree.branches {
            let sequence = [trunk, &text[at..at + len]].concat();
            let windows = Windows::cut(&sequence, sequence.len(), None).unwrap();
            let alone = run_blocks(&decoder, &windows, &mut NoTap, &NoProgress).unwrap();
            let alone: Vec<Vec<f32>> = alone.batches()[0].squeeze(0).unwrap().to_vec2().unwrap();
            for (found, expected) in x[at..at + len].iter().zip(&alone[tree.trunk..]) {
                assert!(gap(found, expected) < 2e-5);
            }
            at += len;
        }
        start = at;
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let tiny = model();
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let decoder = tiny.decoder();
        pool.build()
            .unwrap()
            .install(|| logits(&decoder, &tokens(40)))
    };
    assert_eq!(on(1), on(3));
}

/// A folder of several modalities with the tensors of `model`, a vision tower and a block that predicts several tokens.
fn nested(model: &TestModel, dir: &Path) {
    let mut text = model.checkpoint().config().clone();
    text.set("mtp_num_hidden_layers", 1);
    let mut whole = Config::default();
    whole.set("model_type", "qwen3_5");
    whole.set("text_config", text.raw().clone());
    let source = model.checkpoint();
    let mut tensors: Vec<(String, Tensor)> = source
        .names()
        .map(|name| {
            let tensor = source.tensor(name, &Device::Cpu).unwrap();
            (name.replace("model.", "model.language_model."), tensor)
        })
        .collect();
    for name in [
        "model.visual.proj.weight",
        "mtp.layers.0.mlp.up_proj.weight",
    ] {
        let tensor = Tensor::ones((4, 3), DType::F32, &Device::Cpu).unwrap();
        tensors.push((name.into(), tensor));
    }
    let specs = tensors
        .iter()
        .map(|(name, tensor)| TensorSpec::new(name, DType::F32, tensor.dims().to_vec()));
    let options = WriteOptions::default();
    let mut writer = CheckpointWriter::create(dir, &whole, specs.collect(), &options).unwrap();
    for (name, tensor) in &tensors {
        writer.write_tensor(name, tensor).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn the_decoder_in_a_folder_of_several_modalities_is_the_same_and_others_stand_beside_it() {
    let tiny = model();
    let dir = tiny.path("nested");
    nested(&tiny, &dir);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let tokens = tokens(12);
    assert_eq!(logits(&decoder, &tokens), logits(&tiny.decoder(), &tokens));
    let names = decoder.config().names;
    assert!(names.is_extra("mtp.norm.weight") && !names.is_extra("model.visual.proj.weight"));
}

#[test]
fn a_published_config_has_the_sizes_of_its_class_where_it_is_silent() {
    let fields = json!({
        "model_type": "qwen3_5", "tie_word_embeddings": true,
        "text_config": {
            "model_type": "qwen3_5_text", "attn_output_gate": true, "full_attention_interval": 4, "hidden_size": 2560,
            "intermediate_size": 9216, "mamba_ssm_dtype": "float32", "mlp_only_layers": [], "mtp_num_hidden_layers": 1,
            "num_hidden_layers": 32, "num_attention_heads": 16, "eos_token_id": 248044,
            "rope_parameters": {"mrope_interleaved": true, "mrope_section": [11, 11, 10], "rope_type": "default",
                "rope_theta": 10000000, "partial_rotary_factor": 0.25},
        },
    });
    let model = ModelConfig::new(&Config::new(fields.as_object().unwrap().clone())).unwrap();
    let full: Vec<usize> = (0..32).filter(|&l| model.delta_nets[l].is_none()).collect();
    assert_eq!(full, [3, 7, 11, 15, 19, 23, 27, 31]);
    assert_eq!((model.vocab, model.max_positions), (248_320, 32_768));
    assert_eq!((model.widths[0].heads, model.widths[3].heads), (0, 16));
    assert_eq!((model.widths[3].kv_heads, model.head_dim(3)), (4, 256));
    assert_eq!(model.ropes[0].turned(), 64);
    assert!(model.tied && model.attention[3].gated);
    let net = model.delta_nets[0].unwrap();
    assert_eq!(
        (net.keys(), net.values(), net.channels()),
        (2048, 4096, 8192)
    );
    let q = causal_lm::LinearName::Q;
    assert_eq!(model.linear_shape(3, q), Some([2 * 16 * 256, 2560]));
    assert_eq!(model.linear_shape(0, q), None);
}

#[test]
fn configs_that_cannot_be_a_model_are_refused_by_their_field() {
    for (changes, field) in [
        (
            json!({"linear_num_value_heads": 7}),
            "linear_num_value_heads",
        ),
        (json!({"linear_num_key_heads": 0}), "linear_num_key_heads"),
        (
            json!({"linear_key_head_dim": 1 << 20}),
            "linear_key_head_dim",
        ),
        (
            json!({"linear_conv_kernel_dim": 0}),
            "linear_conv_kernel_dim",
        ),
        (
            json!({"full_attention_interval": 0}),
            "full_attention_interval",
        ),
        (json!({"layer_types": ["linear_attention"]}), "layer_types"),
        (
            json!({"layer_types": ["linear_attention", "sliding_attention", "full_attention"]}),
            "layer_types",
        ),
        (json!({"attn_output_gate": false}), "attn_output_gate"),
        (json!({"hidden_act": "gelu"}), "hidden_act"),
        (
            json!({"per_layer_widths": {"num_attention_heads": [8, 8, 8], "num_key_value_heads": [4, 4, 4],
                "intermediate_size": [40, 40, 40]}}),
            "per_layer_widths",
        ),
    ] {
        let mut all = fields();
        let new = changes.as_object().unwrap().clone();
        all.as_object_mut().unwrap().extend(new);
        let error = ModelConfig::new(&config("qwen3_5_text", all)).unwrap_err();
        match &error {
            Error::InvalidConfig { field: found, .. }
            | Error::UnsupportedOption { field: found, .. } => {
                assert_eq!(*found, field, "{changes}: {error}");
            }
            other => panic!("{changes}: {other}"),
        }
    }
    // A kind of layers that other architectures do not have.
    let changes = json!({"layer_types": ["linear_attention", "full_attention", "full_attention"], "use_sliding_window": true});
    let error = ModelConfig::new(&config("qwen3", changes)).unwrap_err();
    assert!(error.to_string().contains("linear_attention"), "{error}");
}

/// A model of [`fields`] with tensors that `shape` gives, `None` for those that are left out.
fn changed(shape: impl Fn(&str, Vec<usize>) -> Option<Vec<usize>>) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let folder: PathBuf = dir.path().join("model");
    let config = config("qwen3_5_text", fields());
    let tensors = ModelConfig::new(&config).unwrap().tensors();
    let tensors: Vec<(String, Vec<usize>)> = tensors
        .into_iter()
        .filter_map(|(name, dims)| Some((name.clone(), shape(&name, dims)?)))
        .collect();
    let specs = tensors
        .iter()
        .map(|(name, dims)| TensorSpec::new(name, DType::F32, dims.clone()));
    let options = WriteOptions::default();
    let mut writer = CheckpointWriter::create(&folder, &config, specs.collect(), &options).unwrap();
    let mut random = synthetic::random(3);
    for (name, dims) in &tensors {
        writer
            .write_tensor(name, &random(name, dims).unwrap())
            .unwrap();
    }
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap_err()
}

#[test]
fn tensors_that_are_missing_or_have_other_shapes_are_named() {
    for missing in [
        "linear_attn.A_log",
        "linear_attn.conv1d.weight",
        "linear_attn.in_proj_qkv.weight",
        "linear_attn.norm.weight",
        "linear_attn.out_proj.weight",
    ] {
        let name = format!("model.layers.2.{missing}");
        let error = changed(|found, dims| (found != name).then_some(dims));
        assert!(error.to_string().contains(&name), "{error}");
    }
    for (path, wrong) in [
        ("linear_attn.conv1d.weight", vec![314, 1, 3]),
        ("linear_attn.dt_bias", vec![5]),
        ("linear_attn.in_proj_b.weight", vec![7, 24]),
        ("linear_attn.out_proj.weight", vec![24, 269]),
    ] {
        let name = format!("model.layers.0.{path}");
        let error = changed(|found, dims| match found == name {
            true => Some(wrong.clone()),
            false => Some(dims),
        });
        match error {
            Error::Shape { tensor, found, .. } => assert_eq!((tensor, found), (name, wrong)),
            other => panic!("{name}: {other}"),
        }
    }
}
