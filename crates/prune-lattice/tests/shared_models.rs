//! Trained character networks of other people: the published losses, and what the methods do to them.

use prune_lattice::{
    Cell, NoProgress,
    calibration::{RecordConfig, record},
    data::{Examples, Inputs, Targets},
    mask::{hard_remove, neuron_masks},
    prune::{Method, PruneConfig, PruneContext, prune, prune_in, rank_neurons, rank_neurons_in},
    repair::{MergeConfig, RefitConfig, merge, refit},
    rnn::{CheckpointNames, Input, ReadOut, Rnn, State, Tape, evaluate},
    rnnoise::{Array, BANDS, Clips, FEATURES, HIDDEN, Stored, WeightFile},
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

/// RNNoise's weights as the file that its library reads.
fn rnnoise() -> WeightFile {
    use prune_lattice::{io, order::bits::BitMatrix};
    let folder = Path::new(shared_data::path!("models/rnnoise"));
    let tensors = io::load(&folder.join("model.safetensors")).unwrap();
    let of = |name: &str| -> Vec<f32> { tensors[name].flatten_all().unwrap().to_vec1().unwrap() };
    // The library keeps gates as z, r, h.
    let gates = |v: Vec<f32>| -> Vec<f32> {
        let n = v.len() / 3;
        [&v[n..2 * n], &v[..n], &v[2 * n..]].concat()
    };
    let mut file = WeightFile::default();
    let floats = |file: &mut WeightFile, name: String, values: Vec<f32>| {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        file.set(Array {
            name,
            kind: 0,
            data,
        });
    };
    for l in 1..=3 {
        for (side, short) in [("input", "ih"), ("recurrent", "hh")] {
            let mut w = gates(of(&format!("gru{l}.weight_{short}_l0")));
            let name = format!("gru{l}_{side}_weights");
            if side == "recurrent" {
                let diagonal = |row: usize| std::mem::take(&mut w[row * HIDDEN + row % HIDDEN]);
                let diagonal = (0..3 * HIDDEN).map(diagonal).collect();
                floats(&mut file, format!("{name}_diag"), diagonal);
            }
            let all = BitMatrix::ones(3 * HIDDEN, HIDDEN);
            file.set_matrix(&name, &w, &all).unwrap();
            let bias = gates(of(&format!("gru{l}.bias_{short}_l0")));
            floats(&mut file, format!("gru{l}_{side}_bias"), bias);
        }
    }
    for (name, inputs, outputs) in [("conv1", FEATURES, 128), ("conv2", 128, HIDDEN)] {
        let w = of(&format!("{name}.weight"));
        // [outputs, inputs, 3] to [3, inputs, outputs].
        let at = |e: usize| {
            let (o, i, t) = (e % outputs, e / outputs % inputs, e / outputs / inputs);
            w[(o * inputs + i) * 3 + t]
        };
        let moved = (0..w.len()).map(at).collect();
        floats(&mut file, format!("{name}_weights_float"), moved);
        floats(
            &mut file,
            format!("{name}_bias"),
            of(&format!("{name}.bias")),
        );
    }
    for (name, outputs) in [("dense_out", BANDS), ("vad_dense", 1)] {
        let w = of(&format!("{name}.weight"));
        let inputs = w.len() / outputs;
        let moved = (0..w.len()).map(|e| w[e % outputs * inputs + e / outputs]);
        floats(&mut file, format!("{name}_weights_float"), moved.collect());
        floats(
            &mut file,
            format!("{name}_bias"),
            of(&format!("{name}.bias")),
        );
    }
    file
}

#[shared_data::needed("models/rnnoise", "data/rnnoise")]
#[test]
fn rnnoise_gives_the_gains_of_its_library() {
    let file = rnnoise();
    let rnn = file.network().unwrap();
    let folder = Path::new(shared_data::path!("data/rnnoise"));
    let path = folder.join("test.safetensors");
    let tensors = prune_lattice::io::load(&path).unwrap();
    let of = |name: &str| -> Vec<f32> { tensors[name].flatten_all().unwrap().to_vec1().unwrap() };
    let (features, expected, voice) = (of("features"), of("gains"), of("vad"));
    // The first clip: the library's tanh and sigmoid are approximations.
    let frames = 1600;
    let (gains, speech) = file.run(&rnn, &features[..frames * FEATURES]).unwrap();
    let far = |a: &[f32], b: &[f32]| {
        let pairs = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        pairs.fold(0.0, f32::max)
    };
    assert_eq!((gains.len(), speech.len()), (frames * BANDS, frames));
    let square = gains.iter().zip(&expected).map(|(a, b)| (a - b).powi(2));
    let rms = (square.sum::<f32>() / gains.len() as f32).sqrt();
    let largest = (far(&gains, &expected), far(&speech, &voice));
    assert!(
        rms < 6e-4 && largest.0 < 5e-3 && largest.1 < 5e-3,
        "{rms} {largest:?}"
    );
    let all = Clips::load(&path).unwrap().quality(&file, &rnn).unwrap();
    assert_eq!(all.targets, 10_480);
    assert!((all.auc.unwrap() - 0.997_930).abs() < 2e-5, "{all:?}");
    assert!((all.accuracy.unwrap() - 0.980_344).abs() < 5e-4, "{all:?}");
    // Of all clips.
    assert!(all.loss.sqrt() < 6.5e-4, "{all:?}");
}

#[shared_data::needed("models/rnnoise", "data/rnnoise")]
#[test]
fn half_of_the_neurons_of_rnnoise_merged_keep_its_gains() {
    let file = rnnoise();
    let rnn = file.network().unwrap();
    let folder = Path::new(shared_data::path!("data/rnnoise"));
    let train = Clips::load(&folder.join("train.safetensors")).unwrap();
    let test = Clips::load(&folder.join("test.safetensors")).unwrap();
    let examples = train.examples(&file).unwrap();
    let calibration = record(&rnn, &examples, &RecordConfig::default(), &NoProgress).unwrap();
    let context = PruneContext::default().calibrated(&calibration);
    let keep = rank_neurons_in(&rnn, &context, &PruneConfig::new(Method::Span, 0.75)).unwrap();
    let merge = MergeConfig::default();
    let (merged, padded) = file
        .merged(&keep, &calibration, &merge, Stored::Floats)
        .unwrap();
    assert!(merged.to_bytes().unwrap().len() < file.to_bytes().unwrap().len() / 2);
    let found = test.quality(&merged, &padded).unwrap();
    // 192 of 384 in each layer, beside the same neurons without predictions of the others.
    let mut removed = rnn.clone();
    neuron_masks(&rnn, &keep)
        .unwrap()
        .apply(removed.params_mut())
        .unwrap();
    let removed = test.quality(&file, &removed).unwrap();
    assert!(
        found.loss < 0.25 * removed.loss && found.auc.unwrap() > 0.99,
        "{found:?} {removed:?}"
    );
}
