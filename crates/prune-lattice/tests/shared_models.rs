//! Trained character networks of other people: the published losses, and what the methods do to them.

use prune_lattice::{
    Cell, NoProgress,
    calibration::{RecordConfig, record},
    data::{Examples, Inputs, Targets},
    mask::{hard_remove, neuron_masks},
    prune::{Method, PruneConfig, PruneContext, prune, prune_in, rank_neurons, rank_neurons_in},
    repair::{MergeConfig, RefitConfig, merge, refit},
    rnn::{CheckpointNames, Input, ReadOut, Rnn, State, Tape, evaluate},
    tasks::{Task, Vocabulary},
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

/// The recurrent part of Silero VAD, and its recorded clips.
fn silero() -> (Rnn, prune_lattice::data::Dataset) {
    let names = CheckpointNames::default().with(|c| {
        c.dense_input = true;
        c.read_out = ReadOut::Relu;
    });
    let file = shared_data::path!("models/silero_vad/model.safetensors");
    let task = Task::Vad(shared_data::path!("data/vad").into());
    (
        Rnn::load(Path::new(file), &names).unwrap(),
        task.generate(task.default_sizes(), 0).unwrap(),
    )
}

#[shared_data::needed("models/silero_vad", "data/vad")]
#[test]
fn silero_vad_gives_the_probabilities_and_the_quality_of_its_runtime() {
    let (rnn, data) = silero();
    let found = evaluate(&rnn, &data.test).unwrap();
    assert_eq!(found.targets, 3736);
    assert!((found.auc.unwrap() - 0.998_203).abs() < 1e-5, "{found:?}");
    assert!((found.accuracy.unwrap() - 0.986_081).abs() < 3e-4);
    assert!((found.loss - 0.043_524).abs() < 1e-5);
    // Every probability of the first training clip.
    let Examples::Sequences(train) = &data.train else {
        unreachable!()
    };
    let (Inputs::Vectors { values, .. }, Targets::Binary { targets, .. }) =
        (train.inputs(), train.targets())
    else {
        unreachable!()
    };
    let (mut tape, mut logits) = (Tape::new(), Vec::new());
    let input = Input::Vectors(&values[..500 * 128]);
    let mut state = State::zeros(&rnn, 1);
    tape.forward(&rnn, input, 500, &mut state).unwrap();
    tape.read_out(&rnn, None, &mut logits);
    for (z, p) in logits.iter().zip(&targets[..500]) {
        assert!((1.0 / (1.0 + (-z).exp()) - p).abs() < 1e-5);
    }
}

#[shared_data::needed("models/silero_vad", "data/vad")]
#[test]
fn a_quarter_of_silero_vad_is_as_good_as_the_whole_after_merging_and_refitting_repairs_masks() {
    let (rnn, data) = silero();
    let calibration = record(&rnn, &data.train, &RecordConfig::default(), &NoProgress).unwrap();
    let context = PruneContext::default().calibrated(&calibration);
    let auc = |rnn: &Rnn| evaluate(rnn, &data.test).unwrap().auc.unwrap();
    let quality = |method, sparsity| {
        let config = PruneConfig::new(method, sparsity);
        let (masks, _) = prune_in(&rnn, &context, &config).unwrap();
        let (mut masked, mut fitted) = (rnn.clone(), rnn.clone());
        masks.apply(masked.params_mut()).unwrap();
        refit(&mut fitted, &masks, &calibration, &RefitConfig::default()).unwrap();
        (auc(&masked), auc(&fitted))
    };
    let (plain, fitted) = quality(Method::Magnitude, 0.9);
    assert!(plain < 0.992 && fitted > 0.995, "{plain} {fitted}");
    let (plain, fitted) = quality(Method::Block8x4, 0.75);
    assert!(fitted > plain + 0.002, "{plain} {fitted}");
    // 32 of 128 neurons.
    let config = PruneConfig::new(Method::Flow, 1.0 - 1.0 / 16.0);
    let keep = rank_neurons_in(&rnn, &context, &config).unwrap();
    let merged = merge(&rnn, &keep, &calibration, &MergeConfig::default()).unwrap();
    assert_eq!(merged.config().hidden, [32]);
    let removed = auc(&hard_remove(&rnn, &keep).unwrap());
    let merged = auc(&merged);
    assert!(removed < 0.97 && merged > 0.99, "{removed} {merged}");
}
