//! Trained character networks of other people: the published losses, and what the methods do to them.

use prune_lattice::{
    Cell,
    data::Examples,
    mask::{hard_remove, neuron_masks},
    prune::{Method, PruneConfig, prune, rank_neurons},
    rnn::{CheckpointNames, Rnn, evaluate},
    tasks::Vocabulary,
};
use std::path::Path;

/// Network and text in its alphabet.
fn model(name: &str) -> (Rnn, Vec<u32>) {
    let weights = Path::new(shared_data::path!("models"))
        .join(name)
        .join("model.safetensors");
    let vocabulary = Vocabulary::load(&weights.with_file_name("vocab.json")).unwrap();
    let text =
        std::fs::read_to_string(shared_data::path!("data/text/tinyshakespeare.txt")).unwrap();
    (
        Rnn::load(&weights, &CheckpointNames::default()).unwrap(),
        vocabulary.encode(&text).unwrap(),
    )
}

fn perplexity(rnn: &Rnn, text: &[u32], from: f64, to: f64) -> f64 {
    let at = |share: f64| (text.len() as f64 * share) as usize;
    evaluate(rnn, &Examples::Text(text[at(from)..at(to)].to_vec()))
        .unwrap()
        .loss
        .exp()
}

#[shared_data::needed("models/tfcharrnn_shakespeare", "data/text")]
#[test]
fn the_one_hot_network_has_its_expected_perplexity() {
    let (rnn, text) = model("tfcharrnn_shakespeare");
    assert_eq!(
        (rnn.config().cell, rnn.config().hidden.as_slice()),
        (Cell::Lstm, [128, 128].as_slice())
    );
    for (from, to, expected) in [(0.90, 0.95, 4.3279), (0.95, 1.0, 5.3092)] {
        let found = perplexity(&rnn, &text, from, to);
        assert!(
            (found - expected).abs() < 2e-4,
            "{found} instead of {expected}"
        );
    }
}

#[shared_data::needed("models/ml5_shakespeare", "data/text")]
#[test]
fn the_embedding_network_has_its_expected_perplexity() {
    let (rnn, text) = model("ml5_shakespeare");
    let found = perplexity(&rnn, &text, 0.95, 1.0);
    assert!((found - 3.7772).abs() < 2e-4, "{found}");
}

#[shared_data::needed("models/tfcharrnn_shakespeare", "data/text")]
#[test]
fn on_a_trained_network_magnitude_costs_less_than_chance_and_removal_equals_masking() {
    let (rnn, text) = model("tfcharrnn_shakespeare");
    let text = &text[text.len() - 5_000..];
    let loss = |rnn: &Rnn| evaluate(rnn, &Examples::Text(text.to_vec())).unwrap().loss;
    let pruned = |method| {
        let (masks, _) = prune(&rnn, &PruneConfig::new(method, 0.5)).unwrap();
        let mut masked = rnn.clone();
        masks.apply(masked.params_mut()).unwrap();
        loss(&masked)
    };
    let (dense, size, chance) = (
        loss(&rnn),
        pruned(Method::Magnitude),
        pruned(Method::Random),
    );
    assert!(dense < size && size < chance, "{dense} {size} {chance}");
    assert!(
        pruned(Method::LatticeContext) > size,
        "order alone does not reach magnitude here"
    );
    let keep = rank_neurons(&rnn, &PruneConfig::new(Method::LatticeContext, 0.3)).unwrap();
    let mut masked = rnn.clone();
    neuron_masks(&rnn, &keep)
        .unwrap()
        .apply(masked.params_mut())
        .unwrap();
    let small = hard_remove(&rnn, &keep).unwrap();
    assert!((loss(&masked) - loss(&small)).abs() < 1e-5);
    assert!(small.params().count() < rnn.params().count() * 8 / 10);
}
