//! Tokenizers rebuilt from metadata.

use std::path::PathBuf;

use causal_lm::TextTokenizer;
use serde_json::Value as Json;
use tensor_io::gguf::{Value, Writer};

fn write(dir: &std::path::Path, keys: &[(&str, Value)]) -> PathBuf {
    let path = dir.join("vocab.gguf");
    let keys: Vec<(String, Value)> = keys
        .iter()
        .map(|(key, value)| (format!("tokenizer.{key}"), value.clone()))
        .collect();
    Writer::create(&path, &keys, &[]).unwrap().finish().unwrap();
    path
}

fn open(keys: &[(&str, Value)]) -> causal_lm::Result<TextTokenizer> {
    let dir = tempfile::tempdir().unwrap();
    TextTokenizer::open(write(dir.path(), keys))
}

fn texts(list: &[&str]) -> Value {
    list.iter()
        .map(|text| text.to_string())
        .collect::<Vec<_>>()
        .into()
}

/// A small vocabulary of bytes: letters, a space, two merges, a special token and a piece of text that is one token.
fn byte_level(pre: &str) -> Vec<(&'static str, Value)> {
    vec![
        ("ggml.model", "gpt2".into()),
        ("ggml.pre", pre.into()),
        (
            "ggml.tokens",
            texts(&[
                "a", "b", "c", "Ġ", "ab", "Ġab", "<end>", "<tool>", "1", "2", "12",
            ]),
        ),
        (
            "ggml.token_type",
            vec![1i32, 1, 1, 1, 1, 1, 3, 4, 1, 1, 1].into(),
        ),
        ("ggml.merges", texts(&["a b", "Ġ ab", "1 2"])),
        ("ggml.bos_token_id", 6u32.into()),
    ]
}

/// SentencePiece: bytes, letters and pairs with scores.
fn sentence_piece() -> Vec<(&'static str, Value)> {
    let tokens = [
        "<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab", "ba", "<0xC3>", "<0xA9>",
    ];
    let scores = [0f32, 0., 0., 0., -4., -5., -6., -2., -1., -3., 0., 0.];
    let kinds = [2i32, 3, 3, 6, 1, 1, 1, 1, 1, 1, 6, 6];
    vec![
        ("ggml.model", "llama".into()),
        ("ggml.tokens", texts(&tokens)),
        ("ggml.scores", scores.to_vec().into()),
        ("ggml.token_type", kinds.to_vec().into()),
    ]
}

#[test]
fn byte_level_tokenizers_split_by_name_and_find_special_tokens_first() {
    let tokenizer = open(&byte_level("gpt-2")).unwrap();
    assert_eq!(
        tokenizer.encode("ab ab<end>12<tool>").unwrap(),
        [4, 5, 6, 10, 7]
    );
    assert_eq!(tokenizer.bos(), Some(6));
    assert_eq!(tokenizer.decode(&[4, 5, 6, 10]).unwrap(), "ab ab12");
    let digits = open(&byte_level("smollm")).unwrap();
    assert_eq!(digits.encode("12").unwrap(), [8, 9]);
    let together = open(&byte_level("llama-bpe")).unwrap();
    assert_eq!(together.encode("12").unwrap(), [10]);
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let tokenizer = open(&sentence_piece()).unwrap();
    // "▁aba": of ab (-2) and ba (-3), ab wins; then ▁ab.
    assert_eq!(tokenizer.encode("aba").unwrap(), [8, 5]);
    assert_eq!(tokenizer.encode("é\n").unwrap(), [4, 10, 11, 3]);
    assert_eq!(tokenizer.encode("<s>ab</s>b").unwrap(), [1, 8, 2, 4, 6]);
    assert_eq!(tokenizer.bos(), Some(1));
    assert_eq!(tokenizer.decode(&[8, 5, 4, 10, 11]).unwrap(), "aba é");
    let mut keys = sentence_piece();
    keys.push(("ggml.add_space_prefix", false.into()));
    assert_eq!(open(&keys).unwrap().encode("ab").unwrap(), [7]);
}

#[test]
fn what_is_not_known_is_an_error_that_names_it() {
    let replaced =
        |mut keys: Vec<(&'static str, Value)>, key: &'static str, value: Option<Value>| {
            keys.retain(|(other, _)| *other != key);
            keys.extend(value.map(|value| (key, value)));
            open(&keys).unwrap_err().to_string()
        };
    let gpt2 = |key, value| replaced(byte_level("gpt-2"), key, value);
    let llama = |key, value| replaced(sentence_piece(), key, value);
    for (error, part) in [
        (gpt2("ggml.pre", Some("default".into())), "\"default\""),
        (gpt2("ggml.pre", Some("porcupine".into())), "\"porcupine\""),
        (gpt2("ggml.pre", None), "tokenizer.ggml.pre"),
        (gpt2("ggml.model", Some("bert".into())), "\"bert\""),
        (gpt2("ggml.tokens", None), "tokenizer.ggml.tokens"),
        (gpt2("ggml.merges", None), "tokenizer.ggml.merges"),
        (gpt2("ggml.merges", Some(texts(&["ab"]))), "\"ab\""),
        (gpt2("ggml.merges", Some(texts(&["a x"]))), "x"),
        (gpt2("ggml.merges", Some(texts(&["b a"]))), "ba"),
        (
            gpt2("ggml.token_type", Some(vec![1i32; 3].into())),
            "3 entries for 11",
        ),
        (gpt2("ggml.token_type", Some(vec![9i32; 11].into())), "9"),
        (
            gpt2("ggml.bos_token_id", Some(11u32.into())),
            "bos_token_id is 11",
        ),
        (gpt2("ggml.tokens", Some(texts(&["a", "b", "a"]))), "\"a\""),
        (llama("ggml.scores", None), "tokenizer.ggml.scores"),
        (
            llama("ggml.scores", Some(vec![0f32; 2].into())),
            "2 entries for 12",
        ),
        (
            llama("ggml.tokens", Some(texts(&["a"]))),
            "bos_token_id is 1",
        ),
    ] {
        assert!(
            error.contains(part) && error.contains("vocab.gguf"),
            "{part}: {error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn a_file_without_a_tokenizer_says_so() {
    for keys in [vec![], vec![("ggml.model", Value::from("none"))]] {
        let error = open(&keys).unwrap_err().to_string();
        assert!(error.contains("no tokenizer"), "{error}");
    }
}

#[test]
fn a_tokenizer_that_the_file_carries_is_used_if_its_vocabulary_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let mut keys = byte_level("gpt-2");
    let plain = TextTokenizer::open(write(dir.path(), &keys)).unwrap();
    let carried = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 4}, "merges": [["a", "b"]]},
    });
    keys.push(("huggingface.json", carried.to_string().into()));
    assert_eq!(open(&keys).unwrap().encode("AB").unwrap(), [4]);
    assert!(plain.encode("AB").unwrap().is_empty());
    let other = carried.to_string().replace("\"ab\":4", "\"ab\":3");
    keys.pop();
    keys.push(("huggingface.json", other.into()));
    assert!(open(&keys).unwrap().encode("AB").unwrap().is_empty());
}

#[shared_data::needed("golden/gguf-tokenizers.json")]
#[test]
fn ids_of_the_golden_texts_are_those_of_llama_cpp() {
    let golden: Json = serde_json::from_slice(
        &std::fs::read(shared_data::path!("golden/gguf-tokenizers.json")).unwrap(),
    )
    .unwrap();
    let strings = |list: &Json| -> Value {
        list.as_array()
            .unwrap()
            .iter()
            .map(|text| text.as_str().unwrap().to_string())
            .collect::<Vec<_>>()
            .into()
    };
    let kinds = |list: &Json| -> Value {
        list.as_array()
            .unwrap()
            .iter()
            .map(|kind| kind.as_i64().unwrap() as i32)
            .collect::<Vec<_>>()
            .into()
    };
    let ids = |list: &Json| -> Vec<u32> {
        list.as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap() as u32)
            .collect()
    };
    let spm = &golden["spm"];
    let scores: Vec<f32> = spm["scores"]
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap() as f32)
        .collect();
    let tokenizer = open(&[
        ("ggml.model", "llama".into()),
        ("ggml.tokens", strings(&spm["tokens"])),
        ("ggml.scores", scores.into()),
        ("ggml.token_type", kinds(&spm["token_type"])),
        (
            "ggml.add_space_prefix",
            spm["add_space_prefix"].as_bool().unwrap().into(),
        ),
    ])
    .unwrap();
    for case in spm["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(
            tokenizer.encode(text).unwrap(),
            ids(&case["ids"]),
            "{text:?}"
        );
    }
    let bpe = &golden["bpe"];
    let names = bpe["ids"].as_object().unwrap();
    assert_eq!(names.len(), 6);
    for (name, expected) in names {
        let tokenizer = open(&[
            ("ggml.model", "gpt2".into()),
            ("ggml.pre", name.as_str().into()),
            ("ggml.tokens", strings(&bpe["tokens"])),
            ("ggml.token_type", kinds(&bpe["token_type"])),
            ("ggml.merges", strings(&bpe["merges"])),
        ])
        .unwrap();
        let texts = bpe["texts"].as_array().unwrap();
        for (text, expected) in texts.iter().zip(expected.as_array().unwrap()) {
            let text = text.as_str().unwrap();
            assert_eq!(
                tokenizer.encode(text).unwrap(),
                ids(expected),
                "{name}: {text:?}"
            );
        }
    }
}
