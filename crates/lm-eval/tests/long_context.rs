//! Questions about long contexts, with a tokenizer of whole characters.

use causal_lm::TextTokenizer;
use lm_eval::candle_core::{Device, Tensor};
use lm_eval::long_context::{Question, Questions, example};

/// A tokenizer with one token per byte.
fn tokenizer(dir: &std::path::Path) -> TextTokenizer {
    let vocab: serde_json::Map<String, serde_json::Value> = (0..=255u8)
        .map(|byte| (format!("<0x{byte:02X}>"), byte.into()))
        .collect();
    let file = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": true, "vocab": vocab, "merges": []},
    });
    std::fs::write(dir.join("tokenizer.json"), file.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), "{}").unwrap();
    TextTokenizer::open(dir).unwrap()
}

fn text(tokens: &[u32]) -> String {
    String::from_utf8(tokens.iter().map(|&t| t as u8).collect()).unwrap()
}

#[test]
fn contexts_have_the_length_asked_for_and_hold_the_answers() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    for kind in Questions::ALL {
        assert_eq!(Questions::named(kind.name()), Some(kind));
        for index in 0..5 {
            let example = example(kind, &tokenizer, 4000, 1, index).unwrap();
            let held = example.context.len();
            assert!((3700..=4000).contains(&held), "{kind:?} {held}");
            let context = text(&example.context);
            for Question { tokens, parts, .. } in &example.questions {
                for part in parts {
                    let answer = text(&tokens[part.clone()]);
                    assert!(answer.starts_with(' '), "{kind:?} {answer:?}");
                    assert!(context.contains(answer.trim()), "{kind:?} {answer:?}");
                }
                let whole = text(tokens);
                assert!(
                    whole.ends_with('.') && whole.contains('?') || kind == Questions::Copy,
                    "{whole}"
                );
            }
        }
    }
    assert!(
        example(Questions::Needle8, &tokenizer, 400, 1, 0).is_err(),
        "too short"
    );
}

#[test]
fn examples_follow_from_seed_index_and_kind() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    let of = |kind, seed, index| example(kind, &tokenizer, 3000, seed, index).unwrap();
    let one = of(Questions::Needle4, 3, 7);
    assert_eq!(one, of(Questions::Needle4, 3, 7));
    assert_ne!(one, of(Questions::Needle4, 4, 7));
    assert_ne!(one, of(Questions::Needle4, 3, 8));
}

#[test]
fn an_answer_is_exact_where_its_tokens_are_the_most_likely_ones() {
    let question = Question::new(vec![1, 2, 3, 0, 2], vec![2..4, 4..5]);
    // Row i predicts token i + 1: the first part is right, the second wrong.
    let likely = [0, 3, 0, 1];
    let logits: Vec<f32> = likely
        .iter()
        .flat_map(|&token| (0..4).map(move |t| if t == token { 3.0 } else { 0.0 }))
        .collect();
    let logits = Tensor::from_vec(logits, (4, 4), &Device::Cpu).unwrap();
    let answer = question.score(&logits).unwrap();
    assert_eq!((answer.exact, answer.choice, answer.tokens), (0.5, None, 3));
    let sum = 3f64.exp() + 3.0;
    let nats = 2.0 * (sum.ln() - 3.0) + sum.ln();
    assert!((answer.nats - nats).abs() < 1e-5);
}

#[test]
fn an_answer_is_chosen_where_decoding_among_the_candidates_gives_it() {
    // Scores of the five tokens after each token.
    let logits = |rows: [[f32; 5]; 4]| Tensor::new(&rows, &Device::Cpu).unwrap();
    let question = Question::new(vec![0, 1, 2, 3, 4], std::iter::once(1..3).collect());
    let chosen = |others: &[&[u32]], rows| {
        let others = others.iter().map(|other| other.to_vec()).collect();
        let question = question.clone().among(vec![others]);
        question.score(&logits(rows)).unwrap().choice
    };
    // Token 0 is the most likely everywhere: nothing is exact. Of 1 and 4, then of 2 and 3, then of 3 and 4 the first is the likelier.
    let rows = [
        [9.0, 3.0, 0.0, 0.0, 2.0],
        [9.0, 0.0, 3.0, 2.0, 0.0],
        [9.0, 0.0, 0.0, 3.0, 2.0],
        [9.0, 0.0, 0.0, 0.0, 3.0],
    ];
    assert_eq!(chosen(&[&[4, 2, 3]], rows), Some(1.0));
    assert_eq!(
        chosen(&[&[4, 2, 3], &[1, 3, 3], &[1, 2, 4, 3]], rows),
        Some(1.0)
    );
    // One candidate is likelier at the first token, another at the second; a longer one beats the end of the answer.
    assert_eq!(chosen(&[&[0, 2, 3]], rows), Some(0.0));
    assert_eq!(chosen(&[&[1, 0, 3]], rows), Some(0.0));
    assert_eq!(chosen(&[&[1, 2, 0, 3]], rows), Some(0.0));
    // What begins otherwise is out of the running, however likely it goes on.
    assert_eq!(chosen(&[&[4, 0, 0]], rows), Some(1.0));
}

#[test]
fn candidates_are_other_answers_and_never_the_right_one() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    for kind in Questions::ALL {
        let example = example(kind, &tokenizer, 4000, 2, 3).unwrap();
        for question in &example.questions {
            if kind == Questions::Copy {
                assert!(question.others.is_empty());
                continue;
            }
            let wanted = match kind {
                Questions::Frequent => 4,
                Questions::Gather => 2,
                _ => 3,
            };
            assert_eq!(question.others.len(), question.parts.len());
            for (part, others) in question.parts.iter().zip(&question.others) {
                let right = &question.tokens[part.start..=part.end];
                assert_eq!(others.len(), wanted, "{kind:?}");
                for (i, other) in others.iter().enumerate() {
                    assert!(text(other).starts_with(' ') && other.last() == right.last());
                    assert!(other != right && !others[..i].contains(other), "{kind:?}");
                }
            }
        }
    }
}
