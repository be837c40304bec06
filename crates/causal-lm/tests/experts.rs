//! How many experts the layers of a config have.

use causal_lm::ModelConfig;
use causal_lm::testing::config;
use serde_json::{Value, json};

fn experts(model_type: &str, counts: Value) -> usize {
    let config = config(model_type, counts);
    let mixture = ModelConfig::new(&config).unwrap().mixtures[1];
    mixture.unwrap().experts
}

/// The numbers are those that configs of transformers 5.24 have under the name that its models read.
#[test]
fn of_two_numbers_of_experts_that_of_transformers_is_taken() {
    for (model_type, both) in [
        ("mixtral", 3),
        ("qwen2_moe", 3),
        ("qwen3_moe", 5),
        ("olmoe", 5),
        ("granitemoe", 5),
    ] {
        // Whichever is the first in the file.
        for counts in [
            json!({"num_experts": 3, "num_local_experts": 5, "num_experts_per_tok": 2}),
            json!({"num_local_experts": 5, "num_experts": 3, "num_experts_per_tok": 2}),
        ] {
            assert_eq!(experts(model_type, counts), both, "{model_type}");
        }
    }
    for (model_type, field) in [
        ("mixtral", "num_local_experts"),
        ("mixtral", "num_experts"),
        ("qwen2_moe", "num_experts"),
        ("qwen3_moe", "num_local_experts"),
        ("qwen3_moe", "num_experts"),
        ("olmoe", "num_local_experts"),
        ("olmoe", "num_experts"),
        ("granitemoe", "num_local_experts"),
    ] {
        let counts = json!({field: 7, "num_experts_per_tok": 2});
        assert_eq!(experts(model_type, counts), 7, "{model_type} {field}");
    }
}
