//! The rotation of every family by every spelling of its config. Expected values are those of transformers 5.24, rounded to six
//! digits behind the point.

use causal_lm::ModelConfig;
use serde_json::{Value, json};
use tensor_io::Config;

fn read(model_type: &str, fields: Value) -> Result<ModelConfig, String> {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "vocab_size": 40,
        "max_position_embeddings": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    });
    for (field, value) in fields.as_object().unwrap() {
        config[field] = value.clone();
    }
    let config = Config::new(config.as_object().unwrap().clone());
    ModelConfig::new(&config).map_err(|error| error.to_string())
}

/// Frequencies of the layers, and the factor on cos and sin.
fn frequencies(model: &ModelConfig, layer: usize) -> &[f64] {
    &model.ropes[model.attention[layer].rotation.unwrap()].inv_freq
}

fn check(model_type: &str, fields: Value, sliding: [f64; 4], full: [f64; 4]) {
    let model = read(model_type, fields.clone()).unwrap();
    for (layer, expected) in [sliding, full].iter().enumerate() {
        for (ours, theirs) in frequencies(&model, layer).iter().zip(expected) {
            assert!(
                (ours - theirs).abs() < 6e-7,
                "{model_type} {fields}, layer {layer}: {ours} is not {theirs}"
            );
        }
    }
}

const LOCAL: [f64; 4] = [1.0, 0.1, 0.01, 0.001];

fn linear() -> Value {
    json!({"rope_type": "linear", "factor": 8.0})
}

fn nested() -> Value {
    json!({
        "full_attention": {"rope_type": "default", "rope_theta": 3e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    })
}

#[test]
fn scaling_beside_parameters_by_kind_is_that_of_full_layers() {
    let of_nested = [1.0, 0.08409, 0.007071, 0.000595];
    let scaled = [0.125, 0.003953, 0.000125, 4e-6];
    let gemma = |fields, sliding, full| check("gemma3_text", fields, sliding, full);
    gemma(json!({}), LOCAL, [1.0, 0.031623, 0.001, 3.2e-5]);
    gemma(json!({"rope_scaling": linear()}), LOCAL, scaled);
    gemma(
        json!({"rope_scaling": linear(), "rope_theta": 7e5}),
        LOCAL,
        [0.125, 0.004322, 0.000149, 5e-6],
    );
    gemma(
        json!({"rope_scaling": linear(), "rope_parameters": nested()}),
        of_nested,
        [0.125, 0.005341, 0.000228, 1e-5],
    );
    gemma(
        json!({"rope_scaling": {}, "rope_parameters": nested()}),
        of_nested,
        [1.0, 0.042729, 0.001826, 7.8e-5],
    );
    gemma(
        json!({"rope_local_base_freq": 5e3, "rope_theta": 7e5}),
        [1.0, 0.118921, 0.014142, 0.001682],
        [1.0, 0.034572, 0.001195, 4.1e-5],
    );
    // transformers has no rotation for an empty object beside scaling; it says nothing, so scaling is all there is.
    gemma(
        json!({"rope_scaling": linear(), "rope_parameters": {}}),
        LOCAL,
        scaled,
    );
    // Early revisions of the field call the rule `type`.
    gemma(
        json!({"rope_scaling": {"type": "linear", "factor": 8.0}}),
        LOCAL,
        scaled,
    );
}

#[test]
fn a_base_that_the_object_of_a_kind_leaves_out_is_the_one_at_the_top() {
    let parts = json!({"full_attention": linear(), "sliding_attention": {"rope_type": "default"}});
    let fields = json!({"rope_theta": 7e5, "rope_parameters": parts});
    let full = [0.125, 0.004322, 0.000149, 5e-6];
    check("gemma3_text", fields.clone(), LOCAL, full);
    let by_default = [1.0, 0.037606, 0.001414, 5.3e-5];
    check("olmo3", fields.clone(), by_default, full);
    let both = [1.0, 0.034572, 0.001195, 4.1e-5];
    check("gemma4_text", fields, both, full);
    // A kind without an object rotates by the family's base.
    for sliding in [json!({}), json!({"sliding_attention": null})] {
        let mut parts = sliding.clone();
        parts["full_attention"] = linear();
        let scaled = [0.125, 0.003953, 0.000125, 4e-6];
        check(
            "gemma3_text",
            json!({"rope_parameters": parts}),
            LOCAL,
            scaled,
        );
        let scaled = [0.125, 0.004701, 0.000177, 7e-6];
        check(
            "olmo3",
            json!({"rope_parameters": parts}),
            by_default,
            scaled,
        );
    }
}

#[test]
fn scaling_of_olmo_3_is_that_of_full_layers() {
    let by_default = [1.0, 0.037606, 0.001414, 5.3e-5];
    let olmo = |fields, sliding, full| check("olmo3", fields, sliding, full);
    olmo(json!({}), by_default, by_default);
    olmo(
        json!({"rope_scaling": linear()}),
        by_default,
        [0.125, 0.004701, 0.000177, 7e-6],
    );
    olmo(
        json!({"rope_scaling": linear(), "rope_parameters": nested()}),
        [1.0, 0.08409, 0.007071, 0.000595],
        [0.125, 0.005341, 0.000228, 1e-5],
    );
    olmo(
        json!({"rope_theta": 7e5}),
        by_default,
        [1.0, 0.034572, 0.001195, 4.1e-5],
    );
}

#[test]
fn parameters_that_name_no_kind_are_refused_where_kinds_rotate_differently() {
    for model_type in ["gemma3_text", "olmo3", "gemma4_text"] {
        let flat = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}});
        let error = read(model_type, flat).unwrap_err();
        assert!(error.contains("full_attention"), "{model_type}: {error}");
    }
    // Gemma 4 never had the older field.
    let error = read("gemma4_text", json!({"rope_scaling": linear()})).unwrap_err();
    assert!(error.contains("rope_scaling"), "{error}");
    check(
        "gemma4_text",
        json!({"rope_scaling": null, "rope_parameters": nested()}),
        [1.0, 0.08409, 0.007071, 0.000595],
        [1.0, 0.042729, 0.001826, 7.8e-5],
    );
}

#[test]
fn queries_are_scaled_by_the_object_that_the_rotation_is_of() {
    let yarn = |beta: f64| {
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
            "llama_4_scaling_beta": beta})
    };
    let newer = json!({"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.3,
        "original_max_position_embeddings": 16});
    let scaled = [1.0, 0.025, 0.0025, 0.00025];
    for (fields, frequencies_of, beta, original) in [
        (json!({"rope_scaling": yarn(0.2)}), scaled, 0.2, 32),
        (json!({"rope_parameters": yarn(0.2)}), scaled, 0.2, 32),
        (
            json!({"rope_scaling": yarn(0.2), "rope_parameters": newer}),
            scaled,
            0.2,
            32,
        ),
        (
            json!({"rope_scaling": {}, "rope_parameters": yarn(0.3)}),
            scaled,
            0.3,
            32,
        ),
        (
            json!({"rope_scaling": yarn(0.2), "original_max_position_embeddings": 16}),
            scaled,
            0.2,
            16,
        ),
        (json!({"rope_parameters": newer}), LOCAL, 0.3, 16),
        (json!({}), [1.0, 0.031623, 0.000531, 2e-6], 0.1, 16_384),
    ] {
        let mut fields = fields;
        fields["layer_types"] = json!(null);
        let model = read("ministral3", fields.clone()).unwrap();
        for (ours, theirs) in frequencies(&model, 0).iter().zip(frequencies_of) {
            assert!((ours - theirs).abs() < 6e-7, "{fields}: {ours} {theirs}");
        }
        let scale = model.query_scale.unwrap();
        assert_eq!((scale.beta, scale.original), (beta, original), "{fields}");
    }
}

#[test]
fn phi_3_reads_the_rule_that_it_rotates_by() {
    let long = json!({"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0]});
    let plain = json!({"rope_type": "default", "rope_theta": 1e4});
    let both = json!({"rope_scaling": long, "rope_parameters": plain, "original_max_position_embeddings": 16,
        "layer_types": null});
    let model = read("phi3", both).unwrap();
    let expected = [1.0, 0.1 / 1.5, 0.01 / 2.0, 0.001 / 2.5];
    for (ours, theirs) in frequencies(&model, 0).iter().zip(expected) {
        assert!((ours - theirs).abs() < 1e-9, "{ours} {theirs}");
    }
    // The rule that is not read changes nothing: its heads could be removed, and no original length is assumed.
    let plain = json!({"rope_scaling": plain, "rope_parameters": long, "layer_types": null});
    let model = read("phi3", plain).unwrap();
    assert!(model.ropes[0].long.is_none());
    assert_eq!(model.stock.heads, causal_lm::config::StockHeads::Any);
}

#[test]
fn a_factor_divides_proportional_frequencies() {
    let rotations = json!({
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    });
    let fields = json!({"rope_parameters": rotations});
    check("gemma4_text", fields, LOCAL, [0.125, 0.0125, 0.0, 0.0]);
}

#[test]
fn llama_3_scales_from_the_whole_context_where_the_config_names_no_first_one() {
    let rule = json!({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0});
    let scaled = [1.0, 0.042751, 0.00125, 0.000125];
    let fields = json!({"rope_parameters": rule, "layer_types": null});
    check("llama", fields, scaled, scaled);
}

#[test]
fn gpt_neox_reads_its_own_names_and_the_usual_ones_in_the_object_alone() {
    let own = json!({"rotary_emb_base": 1e6, "rotary_pct": 0.5});
    let object = json!({"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 1.0});
    for (own, object, expected) in [
        (json!({}), json!(null), &[1.0][..]),
        (own.clone(), json!(null), &[1.0, 0.001]),
        (own, object, &[1.0, 0.056234, 0.003162, 0.000178]),
    ] {
        let mut fields = own;
        fields["rope_parameters"] = object;
        fields["rope_theta"] = json!(7e5);
        fields["partial_rotary_factor"] = json!(1.0);
        fields["num_key_value_heads"] = json!(4);
        fields["layer_types"] = json!(null);
        let model = read("gpt_neox", fields.clone()).unwrap();
        let found = frequencies(&model, 0);
        assert_eq!(found.len(), expected.len(), "{fields}");
        for (ours, theirs) in found.iter().zip(expected) {
            assert!((ours - theirs).abs() < 6e-7, "{fields}: {ours} {theirs}");
        }
    }
}

#[test]
fn full_layers_of_gemma_4_that_fields_by_layer_pass_over_are_as_the_others() {
    // Widths of heads, and heads of keys, of the two layers.
    for (by_layer, dims, kv_heads) in [
        (json!({"1": {"num_key_value_heads": 1}}), [8, 8], [2, 1]),
        (json!({}), [8, 8], [2, 2]),
        (json!(null), [8, 8], [2, 2]),
        (json!({"0": {"head_dim": 6}}), [6, 8], [2, 2]),
        (json!({"1": {"head_dim": 12}}), [8, 12], [2, 2]),
    ] {
        let fields = json!({"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": true,
            "per_layer_config": by_layer});
        let model = read("gemma4_text", fields.clone()).unwrap();
        assert_eq!([0, 1].map(|layer| model.head_dim(layer)), dims, "{fields}");
        assert_eq!(
            [0, 1].map(|layer| model.widths[layer].kv_heads),
            kv_heads,
            "{fields}"
        );
        assert!(model.attention[1].value_is_key && !model.attention[0].value_is_key);
        assert_eq!(frequencies(&model, 1).len(), dims[1] / 2, "{fields}");
    }
    let without =
        json!({"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": true});
    let model = read("gemma4_text", without).unwrap();
    assert_eq!((model.head_dim(1), model.widths[1].kv_heads), (16, 1));
}

#[test]
fn attention_in_both_directions_among_tokens_of_pictures_changes_nothing_for_text() {
    let both = |value: &str| read("gemma4_text", json!({"use_bidirectional_attention": value}));
    assert!(both("vision").is_ok());
    let error = both("all").unwrap_err();
    assert!(error.contains("use_bidirectional_attention"), "{error}");
}
