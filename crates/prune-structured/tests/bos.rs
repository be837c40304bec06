//! BOS is the same token in a folder and in the GGUF file that is made of it, wherever the folder names it.

use candle_core::DType;
use causal_lm::TextTokenizer;
use causal_lm::testing::TestModel;
use prune_structured::NoProgress;
use prune_structured::gguf::{self, Precision};
use serde_json::{Value, json};
use tensor_io::gguf::Gguf;

/// A tokenizer of forty tokens, `<s>` and `</s>` among them; with `in_front` it begins texts with `<s>` itself.
fn tokenizer(byte_fallback: bool, in_front: bool) -> Value {
    let vocab: serde_json::Map<String, Value> = (1..38)
        .map(|i| (format!("t{i}"), json!(i)))
        .chain([("a".into(), json!(0))])
        .chain([("<s>".into(), json!(38)), ("</s>".into(), json!(39))])
        .collect();
    let added = [(38, "<s>"), (39, "</s>")].map(|(id, content)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    });
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let bos = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let template = json!({
        "type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [38], "tokens": ["<s>"]}},
    });
    let (normalizer, pre) = match byte_fallback {
        true => (
            json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}),
            json!(null),
        ),
        false => (
            json!(null),
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        ),
    };
    let processor = if in_front { template } else { json!(null) };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": normalizer, "added_tokens": added,
        "pre_tokenizer": pre, "post_processor": processor, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": byte_fallback, "vocab": vocab, "merges": []},
    })
}

#[test]
fn evaluation_and_exports_begin_texts_with_the_same_token() {
    // The config names a BOS token in every case: where the tokenizer has none, texts begin without.
    let config = causal_lm::testing::config("llama", json!({"bos_token_id": 38}));
    let model = TestModel::with(&config, DType::F32, |_, tensor| tensor);
    let file = model.path("model.gguf");
    for byte_fallback in [false, true] {
        for (names, in_front, bos, adds) in [
            (None, false, None, false),
            (None, true, Some(38), true),
            (
                Some(("tokenizer_config.json", json!({"bos_token": "<s>"}))),
                false,
                Some(38),
                false,
            ),
            (
                Some(("special_tokens_map.json", json!({"bos_token": "<s>"}))),
                true,
                Some(38),
                true,
            ),
            (
                Some((
                    "tokenizer_config.json",
                    json!({"bos_token": "<s>", "add_bos_token": true}),
                )),
                false,
                Some(38),
                true,
            ),
            (
                Some(("tokenizer_config.json", json!({"bos_token": null}))),
                false,
                None,
                false,
            ),
        ] {
            for name in ["tokenizer_config.json", "special_tokens_map.json"] {
                drop(std::fs::remove_file(model.dir().join(name)));
            }
            let text = tokenizer(byte_fallback, in_front).to_string();
            std::fs::write(model.dir().join("tokenizer.json"), text).unwrap();
            if let Some((name, fields)) = &names {
                std::fs::write(model.dir().join(name), fields.to_string()).unwrap();
            }
            gguf::export(&model.decoder(), Precision::F32, &file, &NoProgress).unwrap();
            for place in [model.dir(), file.as_path()] {
                let read = TextTokenizer::open(place).unwrap();
                let what = format!("{names:?} {in_front} {byte_fallback} {}", place.display());
                assert_eq!((read.bos(), read.adds_bos()), (bos, adds), "{what}");
            }
        }
    }
}

#[test]
fn the_token_that_only_the_template_adds_is_that_of_the_gguf_file() {
    // Neither of the two says it.
    let config = causal_lm::testing::config("llama", json!({}));
    assert!(config.get("bos_token_id").is_none());
    let model = TestModel::with(&config, DType::F32, |_, tensor| tensor);
    let path = model.path("model.gguf");
    for byte_fallback in [false, true] {
        // Readers take another token of their own in tokenizers with byte fallback, unless the file says that there is none.
        let none = byte_fallback.then_some(u32::MAX.into());
        for (in_front, bos) in [(true, Some(38)), (false, none)] {
            let text = tokenizer(byte_fallback, in_front).to_string();
            std::fs::write(model.dir().join("tokenizer.json"), text).unwrap();
            assert!(!model.dir().join("tokenizer_config.json").exists());
            gguf::export(&model.decoder(), Precision::F32, &path, &NoProgress).unwrap();
            let file = Gguf::open(&path).unwrap();
            let said = file.metadata();
            let what = format!("byte fallback {byte_fallback}, in front {in_front}");
            assert_eq!(
                said.get_u64("tokenizer.ggml.bos_token_id").unwrap(),
                bos,
                "{what}"
            );
            assert_eq!(
                said.get_bool("tokenizer.ggml.add_bos_token").unwrap(),
                Some(in_front),
                "{what}"
            );
            let read = TextTokenizer::open(&path).unwrap();
            let tokens = read.encode_with_special_tokens("a").unwrap();
            let expected = if in_front { vec![38, 0] } else { vec![0] };
            assert_eq!(tokens, expected, "{what}");
        }
    }
}
