//! Tokenizers in GGUF files: the file splits a text as the folder does, or the export is refused.

use causal_lm::TextTokenizer;
use causal_lm::testing::{self, TestModel};
use prune_structured::gguf::{self, Precision};
use prune_structured::{Error, NoProgress};
use serde_json::{Value as Json, json};
use tensor_io::gguf::Gguf;

fn model() -> TestModel {
    TestModel::new(&testing::config("llama", json!({})))
}

/// Tokens of a model as `tokenizer.json` writes them; ids are places in the list.
fn vocabulary(tokens: &[&str]) -> Json {
    let ids = tokens.iter().enumerate();
    ids.map(|(id, token)| (token.to_string(), json!(id)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// Byte-level BPE with Llama 3's expression or GPT-2's.
fn byte_level(llama3: bool, model: Json) -> Json {
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let expression = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let split = json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
    json!({
        "version": "1.0", "normalizer": null, "added_tokens": [], "post_processor": null, "decoder": null,
        "pre_tokenizer": match llama3 {
            true => json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]}),
            false => bytes(true),
        },
        "model": model,
    })
}

/// SentencePiece-like BPE; a space comes before every text.
fn sentence_piece(tokens: &[&str], merges: &[(&str, &str)]) -> Json {
    json!({
        "version": "1.0", "post_processor": null, "decoder": null, "pre_tokenizer": null,
        "added_tokens": [added("<unk>", 0, json!({"special": true}))],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocabulary(tokens), "merges": merges},
    })
}

fn added(text: &str, id: u32, flags: Json) -> Json {
    let mut token = json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false});
    for (flag, value) in flags.as_object().unwrap() {
        token[flag] = value.clone();
    }
    token
}

/// Exports the model with this tokenizer.
fn export(model: &TestModel, tokenizer: &Json) -> Result<TextTokenizer, String> {
    std::fs::write(model.dir().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let file = model.path("model.gguf");
    match gguf::export(&model.decoder(), Precision::F16, &file, &NoProgress) {
        Ok(_) => Ok(TextTokenizer::open(file).unwrap()),
        Err(Error::ExportFile { path, reason }) => {
            assert!(path.ends_with("tokenizer.json"), "{}", path.display());
            assert!(!file.exists());
            Err(reason)
        }
        Err(other) => panic!("{other}"),
    }
}

/// That the file splits these texts as the folder does.
fn assert_alike(model: &TestModel, tokenizer: &Json, texts: &[&str]) {
    let theirs = export(model, tokenizer).unwrap();
    let own = TextTokenizer::open(model.dir()).unwrap();
    for text in texts {
        let (own, theirs) = (own.encode(text).unwrap(), theirs.encode(text).unwrap());
        assert_eq!(own, theirs, "{text:?}");
    }
    std::fs::remove_file(model.path("model.gguf")).unwrap();
}

const PIECES: [&str; 8] = ["<unk>", "▁", "a", "b", "ab", "▁ab", "ba", "x"];
const JOINS: [(&str, &str); 3] = [("a", "b"), ("▁", "ab"), ("b", "a")];

#[test]
fn pieces_are_merged_in_the_file_as_in_the_folder_or_refused() {
    let model = model();
    let texts = ["ab", "aba b", "bab", "baab", "x"];
    assert_alike(&model, &sentence_piece(&PIECES, &JOINS), &texts);
    let with = |piece| [&PIECES[..], &[piece]].concat();
    // Nothing makes it, and llama.cpp would.
    let reason = export(&model, &sentence_piece(&with("ax"), &JOINS)).unwrap_err();
    assert!(reason.contains("\"ax\""), "{reason}");
    // Nothing makes it in llama.cpp either: one of its characters is no entry.
    assert_alike(&model, &sentence_piece(&with("az"), &JOINS), &texts);
    let reason = export(&model, &sentence_piece(&with("aba"), &JOINS)).unwrap_err();
    assert!(reason.contains("\"aba\""), "{reason}");
}

#[test]
fn spaces_are_written_as_gemma_writes_them() {
    let model = model();
    let mut tokenizer = sentence_piece(&PIECES, &JOINS);
    tokenizer["normalizer"] =
        json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    tokenizer["pre_tokenizer"] = json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false});
    // No space comes before a text.
    assert_alike(&model, &tokenizer, &["ab", " ab", "aba b", "b  ab", "x"]);
    tokenizer["pre_tokenizer"]["pattern"] = json!({"String": "a"});
    let reason = export(&model, &tokenizer).unwrap_err();
    assert!(reason.contains("spaces"), "{reason}");
}

#[test]
fn whole_pieces_are_looked_up_before_merging_where_the_folder_does() {
    let model = model();
    // No merge makes `ab`.
    let bpe = |ignore_merges: bool| json!({"type": "BPE", "ignore_merges": ignore_merges, "vocab": vocabulary(&["a", "b", "ab", "ba"]), "merges": [["b", "a"]]});
    for ignores in [true, false] {
        assert_alike(
            &model,
            &byte_level(true, bpe(ignores)),
            &["ab", "ba", "aba"],
        );
    }
    assert_alike(&model, &byte_level(false, bpe(false)), &["ab", "ba", "aba"]);
    let reason = export(&model, &byte_level(false, bpe(true))).unwrap_err();
    assert!(reason.contains("\"ab\""), "{reason}");
}

#[test]
fn added_tokens_are_found_where_the_folder_finds_them_or_refused() {
    let model = model();
    let with = |flags: Json| {
        let mut tokenizer = sentence_piece(&PIECES, &JOINS);
        let tokens = tokenizer["added_tokens"].as_array_mut().unwrap();
        tokens.push(added("<tool>", 8, flags));
        tokenizer
    };
    let texts = ["ab<tool>ab", "<tool>", "a <tool> b"];
    assert_alike(&model, &with(json!({})), &texts);
    for flag in ["single_word", "lstrip", "normalized"] {
        let reason = export(&model, &with(json!({flag: true}))).unwrap_err();
        assert!(reason.contains("<tool>"), "{reason}");
    }
    // As Phi-3 has it, which llama.cpp knows by the model's name.
    assert_alike(&model, &with(json!({"rstrip": true})), &texts);
    export(&model, &with(json!({"rstrip": true}))).unwrap();
    let file = Gguf::open(model.path("model.gguf")).unwrap();
    let name = file.metadata().get_str("general.name").unwrap().unwrap();
    assert_eq!(name, "model (phi-3)");
}

#[test]
fn chat_templates_of_every_form_are_in_the_file_by_their_names() {
    let model = model();
    let tokenizer = sentence_piece(&PIECES, &JOINS);
    let put = |name: &str, text: &str| std::fs::write(model.dir().join(name), text).unwrap();
    let exported = || {
        let opened = export(&model, &tokenizer).unwrap();
        let own = TextTokenizer::open(model.dir()).unwrap();
        assert_eq!(opened.chat_template(), own.chat_template());
        let all = opened.chat_templates();
        all.map(|(name, text)| format!("{name}={text}"))
            .collect::<Vec<_>>()
    };
    assert!(exported().is_empty());
    put("tokenizer_config.json", r#"{"chat_template": "one"}"#);
    assert_eq!(exported(), ["default=one"]);
    put(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "tool use", "template": "two"}, {"name": "default", "template": "three"}]}"#,
    );
    assert_eq!(exported(), ["default=three", "tool_use=two"]);
    // A folder made of the file has them again.
    let opened = causal_lm::open(model.path("model.gguf")).unwrap();
    let files = opened.source().unwrap().files().unwrap();
    let config = files
        .iter()
        .find(|(name, _)| name == "tokenizer_config.json");
    let config: Json = serde_json::from_slice(&config.unwrap().1).unwrap();
    assert_eq!(config["chat_template"][1]["template"], "two");
    put("chat_template.jinja", "four");
    assert_eq!(exported(), ["default=four"]);
    std::fs::create_dir(model.dir().join("additional_chat_templates")).unwrap();
    put("additional_chat_templates/rag.jinja", "five");
    assert_eq!(exported(), ["default=four", "rag=five"]);
}
