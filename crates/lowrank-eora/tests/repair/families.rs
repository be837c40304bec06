//! Repair of every dense architecture that differs from Llama.

use crate::common::{compressor, decoder, eora, held_out, run};
use causal_lm::testing::TestModel;
use lowrank_eora::output::{CheckpointOptions, Layout, Weights, write_checkpoint};
use serde_json::Value;
use std::collections::BTreeSet;
use tensor_io::{Checkpoint, Config, NoProgress};

fn each(test: impl Fn(&str, &TestModel)) {
    let all: Vec<Value> = serde_json::from_str(include_str!("../golden/families.json")).unwrap();
    for family in &all {
        let mut fields = family["config"].clone();
        // As many tokens as the tests' windows have.
        match fields.get_mut("text_config") {
            Some(text) => text["vocab_size"] = 50.into(),
            None => fields["vocab_size"] = 50.into(),
        }
        let config = Config::new(fields.as_object().unwrap().clone());
        test(family["name"].as_str().unwrap(), &TestModel::new(&config));
    }
}

#[test]
fn a_correction_brings_back_a_part_of_what_every_architecture_lost() {
    each(|name, tiny| {
        let decoder = tiny.decoder();
        let losses = [1, 4].map(|rank| {
            let folder = tiny.path(&format!("run-{rank}"));
            let repaired = run(&eora(rank), &decoder, &compressor("rtn-int3"), &folder);
            let energy = held_out(&repaired);
            assert!(energy.loss() < energy.loss_before(), "{name} {rank}");
            energy.loss()
        });
        assert!(losses[1] < losses[0], "{name}: {losses:?}");
    });
}

#[test]
fn merged_weights_have_the_names_and_shapes_of_the_dense_model() {
    each(|name, tiny| {
        let dense = tiny.decoder();
        let repaired = run(
            &eora(2),
            &dense,
            &compressor("wanda-2:4"),
            &tiny.path("run"),
        );
        let merged = tiny.path("merged");
        let options = CheckpointOptions::new(Weights::Merged, Layout::Dense { dtype: None });
        write_checkpoint(&dense, &repaired, &merged, &options, &NoProgress).unwrap();
        let merged = Checkpoint::open(&merged).unwrap();
        let described = |checkpoint: &Checkpoint| -> BTreeSet<(String, Vec<usize>)> {
            let shape = |name: &str| checkpoint.info(name).unwrap().shape.clone();
            checkpoint
                .names()
                .map(|name| (name.to_string(), shape(name)))
                .collect()
        };
        assert_eq!(described(&merged), described(tiny.checkpoint()), "{name}");
        assert_eq!(
            decoder(&merged).config().layers(),
            dense.config().layers(),
            "{name}"
        );
    });
}
