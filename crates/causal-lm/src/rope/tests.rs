use super::*;
use serde_json::json;

fn read(fields: Value) -> Rope {
    let config = Config::new(fields.as_object().unwrap().clone());
    let defaults = Defaults {
        theta: 1e4,
        partial: None,
        pairs: Pairs::Halves,
        head_dim: 16,
        max_positions: 128,
    };
    Rope::read(&config, defaults).unwrap()
}

#[test]
fn of_two_spellings_the_older_wins_unless_it_is_empty() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
    let scaled = read(json!({"rope_scaling": yarn}));
    let plain = read(json!({}));
    assert_ne!(scaled.inv_freq, plain.inv_freq);
    let default = json!({"rope_type": "default", "rope_theta": 500.0});
    for newer in [default.clone(), json!({})] {
        let both = read(json!({"rope_parameters": newer, "rope_scaling": yarn}));
        assert_eq!(both, scaled);
    }
    let newer = read(json!({"rope_parameters": default}));
    let empty = read(json!({"rope_parameters": default, "rope_scaling": {}}));
    assert_eq!(empty, newer);
    assert_eq!(
        read(json!({"rope_parameters": default, "rope_scaling": null})),
        newer
    );
}

#[test]
fn the_original_length_at_the_top_wins_over_the_one_in_the_object() {
    let rules = [
        json!({"rope_type": "yarn", "factor": 4.0}),
        json!({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        json!({"rope_type": "longrope", "short_factor": vec![1.0; 8], "long_factor": vec![2.0; 8]}),
    ];
    for rule in rules {
        let with = |original: usize| {
            let mut rule = rule.clone();
            rule["original_max_position_embeddings"] = json!(original);
            rule
        };
        let expected = read(json!({"rope_scaling": with(16)}));
        let top = json!({"rope_scaling": with(64), "original_max_position_embeddings": 16});
        assert_eq!(read(top), expected, "{rule}");
        assert_ne!(read(json!({"rope_scaling": with(64)})), expected, "{rule}");
    }
}

#[test]
fn the_frequencies_of_llama_3_equal_golden_values() {
    let rule = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    let fields = json!({"rope_theta": 5e5, "rope_scaling": rule});
    let config = Config::new(fields.as_object().unwrap().clone());
    let defaults = Defaults {
        theta: 1e4,
        partial: None,
        pairs: Pairs::Halves,
        head_dim: 64,
        max_positions: 131_072,
    };
    let rope = Rope::read(&config, defaults).unwrap();
    let want = [
        (0, 1.0),
        (10, 0.016_560_440_1),
        (20, 3.428_102_2e-5),
        (31, 3.767_322_69e-7),
    ];
    for (pair, want) in want {
        let got = rope.inv_freq[pair];
        assert!((got / want - 1.0).abs() < 1e-8, "{pair}: {got} {want}");
    }
}
