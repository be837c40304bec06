//! Agreement with transformers on the dequantised weights of small GGUF files of llama.cpp's types.

use std::path::Path;

use candle_core::{DType, Device};
use causal_lm::testing::logits;
use causal_lm::{Arithmetic, Decoder, Execution, LinearName, TextTokenizer, Windows};
use serde_json::Value;

use crate::common::mean_nll;

const FOLDER: &str = shared_data::path!("golden");

fn golden() -> Value {
    let text = std::fs::read(Path::new(FOLDER).join("gguf-models.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

pub(crate) fn floats(list: &Value) -> Vec<f32> {
    let list = list.as_array().unwrap();
    list.iter()
        .map(|value| value.as_f64().unwrap() as f32)
        .collect()
}

fn tokens(list: &Value) -> Vec<u32> {
    let list = list.as_array().unwrap();
    list.iter()
        .map(|value| value.as_u64().unwrap() as u32)
        .collect()
}

fn near(name: &str, found: &[f32], exact: &[f32], bar: f32) {
    assert_eq!(found.len(), exact.len());
    for (found, exact) in found.iter().zip(exact) {
        assert!(
            (found - exact).abs() < bar,
            "{name}: {found} is not {exact}"
        );
    }
}

#[shared_data::needed("golden/gguf-models.json")]
#[test]
fn every_golden_file_gives_the_logits_of_transformers() {
    let golden = golden();
    let text = tokens(&golden["tokens"]);
    let models = golden["models"].as_object().unwrap();
    assert_eq!(models.len(), 9);
    for (name, expected) in models {
        let checkpoint = causal_lm::open(Path::new(FOLDER).join(name)).unwrap();
        let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
        let found = logits(&decoder, &text);
        let rows = expected["logits"].as_array().unwrap();
        let exact: Vec<f32> = rows.iter().flat_map(floats).collect();
        let largest = exact.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        // Those of the wide models reach 130.
        let bar = if name.contains("wide") {
            2e-5 * largest
        } else {
            1e-4
        };
        near(name, &found, &exact, bar);
        let packed = |arithmetic| {
            let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
            decoder.packed(Execution::new(arithmetic))
        };
        near(name, &logits(&packed(Arithmetic::F32), &text), &exact, bar);
        let rounded = logits(&packed(Arithmetic::Int8), &text);
        near(name, &rounded, &exact, 1e-2 * largest);
        let block = packed(Arithmetic::F32).block(0).unwrap();
        let kind = block.linear(LinearName::Up).unwrap().kind();
        assert_eq!(kind.is_some(), !name.contains("f32"), "{name}: {kind:?}");
        if name.contains("q8_0") {
            assert_ne!(rounded, found);
        }
        let windows = Windows::cut(&text, text.len(), None).unwrap();
        let nll = mean_nll(&decoder, &windows);
        let exact = expected["mean_nll"].as_f64().unwrap();
        assert!(
            (nll / exact - 1.0).abs() < 1e-5,
            "{name}: {nll} is not {exact}"
        );
        for (tensor, ty) in expected["types"].as_object().unwrap() {
            let source = checkpoint.source().unwrap().as_any();
            let source: &causal_lm::gguf::GgufTensors = source.downcast_ref().unwrap();
            assert_eq!(
                source.file().info(tensor).unwrap().layout.name,
                ty.as_str().unwrap()
            );
        }
    }
}

/// A published file, which is too large to stand beside the repository.
#[test]
#[ignore = "needs the environment variable SMOLLM2_GGUF, the path of SmolLM2-135M-Instruct.Q4_1.gguf"]
fn a_published_file_gives_the_tokens_and_the_likelihood_of_transformers() {
    let path = std::env::var_os("SMOLLM2_GGUF").expect("SMOLLM2_GGUF is the path of the file");
    let golden = golden();
    let golden = &golden["real"]["SmolLM2-135M-Instruct.Q4_1.gguf"];
    let tokenizer = TextTokenizer::open(&path).unwrap();
    let text = std::fs::read_to_string(shared_data::path!("data/text/wikitext2_test.txt")).unwrap();
    let text: String = text.chars().take(8000).collect();
    let text = tokenizer.encode(&text).unwrap();
    let first = tokens(&golden["first_window"]);
    assert_eq!(text[..first.len() - 1], first[1..]);
    let windows: Vec<u32> = text[..4 * 255].to_vec();
    let windows = Windows::cut(&windows, 256, Some(first[0])).unwrap();
    assert_eq!(tokenizer.bos(), Some(first[0]));
    let checkpoint = causal_lm::open(&path).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let packed = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let packed = packed.packed(Execution::default());
    let exact = golden["mean_of_4"].as_f64().unwrap();
    for decoder in [decoder, packed] {
        let found = mean_nll(&decoder, &windows);
        assert!((found - exact).abs() < 2e-4, "{found} is not {exact}");
    }
}
