//! Windows, targets and perplexities of each protocol, compared with naive implementations of them.

use causal_lm::testing::{TestModel, config, configs};
use causal_lm::{Model, TextTokenizer};
use lm_eval::{Error, NoProgress, Perplexity, Protocol, ProtocolKind, ScoredWindows};
use serde_json::json;

/// Words of the tokenizer.
const WORDS: [&str; 8] = ["<s>", "a", "b", "c", "d", "e", "f", "."];

/// A text of `words` words, and their tokens.
fn text(words: usize) -> (String, Vec<u32>) {
    let tokens: Vec<u32> = (0..words)
        .map(|i| 1 + ((i * 3 + i / 5) % 7) as u32)
        .collect();
    let words: Vec<&str> = tokens.iter().map(|&t| WORDS[t as usize]).collect();
    (words.join(" "), tokens)
}

fn model() -> TestModel {
    TestModel::new(&config("llama", json!({"vocab_size": 8}))).with_words(&WORDS)
}

fn tokenizer(model: &TestModel) -> TextTokenizer {
    TextTokenizer::open(model.dir()).unwrap()
}

/// Each window: its input, the first scored position, and the targets from there.
type Window = (Vec<u32>, usize, Vec<u32>);

fn list(windows: &ScoredWindows) -> Vec<Window> {
    let window = |(input, (from, targets)): (&[u32], (usize, &[u32]))| {
        (input.to_vec(), from, targets.to_vec())
    };
    let inputs = windows.inputs().iter();
    inputs.zip(windows.scored()).map(window).collect()
}

/// The pairs of input and targets that `get_rolling_token_windows` of the lm-evaluation-harness makes with a context of
/// one token, written out as there.
fn rolling(tokens: &[u32], prefix: u32, max: usize) -> Vec<(Vec<u32>, Vec<u32>)> {
    let first = max.min(tokens.len());
    let input = std::iter::once(prefix).chain(tokens[..first - 1].iter().copied());
    let mut pairs = vec![(input.collect(), tokens[..first].to_vec())];
    let mut predicted = first;
    while predicted < tokens.len() {
        let count = max.min(tokens.len() - predicted);
        let end = predicted + count;
        pairs.push((
            tokens[end - max - 1..end - 1].to_vec(),
            tokens[end - count..end].to_vec(),
        ));
        predicted += count;
    }
    pairs
}

/// Minus the log-likelihood of the tokens after the last positions of `input`.
fn nll(model: &Model<'_>, input: &[u32], targets: &[u32]) -> f64 {
    let mut cache = model.full_cache(1).unwrap();
    let logits = model.forward_all(&[input], &mut cache).unwrap();
    let logits: Vec<Vec<f32>> = logits.squeeze(0).unwrap().to_vec2().unwrap();
    let rows = &logits[input.len() - targets.len()..];
    rows.iter()
        .zip(targets)
        .map(|(row, &target)| {
            let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[target as usize]
        })
        .sum()
}

#[test]
fn windows_begin_with_bos_and_score_every_other_token() {
    let model = model();
    let (text, tokens) = text(23);
    let of = |kind| {
        let protocol = Protocol::new(kind, 6, 64).unwrap();
        protocol.evaluation(&tokenizer(&model), &text).unwrap()
    };
    let windows = of(ProtocolKind::Windows);
    assert_eq!((windows.count(), windows.targets()), (4, 20));
    for (i, window) in windows.inputs().iter().enumerate() {
        assert_eq!(window[0], 0);
        assert_eq!(window[1..], tokens[5 * i..5 * i + 5]);
    }
    let scored: Vec<u32> = windows.scored().flat_map(|(_, t)| t.to_vec()).collect();
    assert_eq!(scored, tokens[..20]);
    let without = of(ProtocolKind::WindowsWithoutBos);
    assert_eq!((without.count(), without.targets()), (3, 15));
    assert!(without.inputs().iter().eq(tokens.chunks_exact(6)));
}

#[test]
fn gptq_cuts_windows_from_a_text_with_the_special_tokens_of_the_tokenizer() {
    let model = model();
    // A tokenizer that puts BOS in front of a text, as those of Llama do.
    let path = model.dir().join("tokenizer.json");
    let json = std::fs::read_to_string(&path).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    });
    std::fs::write(&path, json.to_string()).unwrap();
    let (text, tokens) = text(23);
    let protocol = Protocol::new(ProtocolKind::Gptq, 6, 64).unwrap();
    let windows = protocol.evaluation(&tokenizer(&model), &text).unwrap();
    let whole = [vec![0], tokens].concat();
    assert!(windows.inputs().iter().eq(whole.chunks_exact(6)));
    assert_eq!((windows.count(), windows.targets()), (4, 20));
    // Each window's own first token is no target.
    let (decoder, cells) = (model.decoder(), whole.chunks_exact(6));
    let run = Model::load(&decoder).unwrap();
    let naive: f64 = cells.map(|w| nll(&run, &w[..5], &w[1..])).sum::<f64>() / 20.0;
    let found = Perplexity::measure(&decoder, &windows, &NoProgress).unwrap();
    assert!(
        (found.nll() - naive).abs() < 1e-5,
        "{} {naive}",
        found.nll()
    );
    assert_eq!(found.bits_per_byte(), None);
}

#[test]
fn rolling_windows_are_those_of_the_harness() {
    let model = model();
    for (words, window) in [
        (1, 4),
        (3, 4),
        (4, 4),
        (5, 4),
        (8, 4),
        (23, 6),
        (24, 6),
        (9, 1),
    ] {
        let (text, tokens) = text(words);
        let protocol = Protocol::new(ProtocolKind::Rolling, window, 64).unwrap();
        let windows = protocol.evaluation(&tokenizer(&model), &text).unwrap();
        let expected = rolling(&tokens, 0, window).into_iter();
        let expected = expected.map(|(input, targets)| {
            let from = input.len() - targets.len();
            (input, from, targets)
        });
        assert_eq!(
            list(&windows),
            expected.collect::<Vec<Window>>(),
            "{words} {window}"
        );
        let scored: Vec<u32> = windows.scored().flat_map(|(_, t)| t.to_vec()).collect();
        assert_eq!(scored, tokens, "each token is scored once");
    }
}

#[test]
fn rolling_perplexities_are_those_of_sequences_run_one_by_one() {
    for config in configs() {
        let model = TestModel::new(&config).with_words(&WORDS);
        let (text, tokens) = text(23);
        let protocol = Protocol::new(ProtocolKind::Rolling, 6, 64).unwrap();
        let windows = protocol.evaluation(&tokenizer(&model), &text).unwrap();
        let decoder = model.decoder();
        let run = Model::load(&decoder).unwrap();
        let total: f64 = rolling(&tokens, 0, 6)
            .iter()
            .map(|(input, targets)| nll(&run, input, targets))
            .sum();
        let found = Perplexity::measure(&decoder, &windows, &NoProgress).unwrap();
        let near = |found: f64, expected: f64| {
            assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
        };
        near(found.total_nll(), total);
        near(found.perplexity(), (total / 23.0).exp());
        // 23 letters with 22 spaces between them.
        near(found.word_perplexity().unwrap(), (total / 23.0).exp());
        near(found.byte_perplexity().unwrap(), (total / 45.0).exp());
        near(found.bits_per_byte().unwrap(), total / 45.0 / 2f64.ln());
    }
}

#[test]
fn the_first_windows_cover_the_text_of_their_targets() {
    let model = model();
    let (text, tokens) = text(23);
    for kind in ProtocolKind::ALL {
        let protocol = Protocol::new(kind, 6, 64).unwrap();
        let tokenizer = tokenizer(&model);
        let all = protocol.evaluation(&tokenizer, &text).unwrap();
        let first = protocol.first(&tokenizer, &text, 2).unwrap();
        assert_eq!(first.count(), 2);
        assert_eq!(list(&first), list(&all)[..2], "{kind}");
        assert_eq!(protocol.first(&tokenizer, &text, 99).unwrap(), all);
        if kind == ProtocolKind::Rolling {
            let size = first.text_size().unwrap();
            // Two windows of six words.
            assert_eq!((size.words, size.bytes), (12, 23));
            assert_eq!(first.targets(), 12);
            assert_eq!(all.text_size().unwrap().words, tokens.len());
        }
    }
}

#[test]
fn what_cannot_be_evaluated_is_refused() {
    for (window, fits) in [(0, false), (1, false), (2, true), (64, true), (65, false)] {
        let protocol = Protocol::new(ProtocolKind::Windows, window, 64);
        match protocol {
            Ok(_) => assert!(fits, "{window}"),
            Err(Error::Window { window: found, .. }) => {
                assert!(!fits && found == window, "{window}");
            }
            Err(other) => panic!("{other}"),
        }
    }
    let model = model();
    let rolling = Protocol::new(ProtocolKind::Rolling, 6, 64).unwrap();
    let empty = rolling.evaluation(&tokenizer(&model), "");
    assert!(matches!(empty, Err(Error::Protocol { .. })));
    // Without BOS the first token follows EOS, and without both there is nothing to predict it from.
    let config = model.dir().join("tokenizer_config.json");
    std::fs::write(&config, r#"{"eos_token": "."}"#).unwrap();
    let windows = rolling.evaluation(&tokenizer(&model), "a b").unwrap();
    assert_eq!(windows.inputs().iter().next().unwrap(), [7, 1]);
    std::fs::write(&config, "{}").unwrap();
    let refused = rolling.evaluation(&tokenizer(&model), "a b");
    assert!(matches!(refused, Err(Error::Protocol { .. })));
}
