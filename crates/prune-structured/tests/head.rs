//! A head beside the embedding that the config says is tied to it: used, and kept by everything that is written.

use candle_core::{DType, Device};
use causal_lm::testing::gap;
use causal_lm::testing::{self, TestModel};
use causal_lm::{Decoder, Windows};
use prune_structured::gguf::{self, Precision};
use prune_structured::{
    Calibration, Collect, Form, NoProgress, Plan, Recipe, Settings, nemotron, write,
};
use serde_json::{Value, json};
use std::path::Path;
use tensor_io::{Checkpoint, WriteOptions};

fn decoder(checkpoint: &Checkpoint) -> Decoder<'_> {
    Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap()
}

fn logits_of(checkpoint: &Checkpoint) -> Vec<f32> {
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 50).collect();
    testing::logits(&decoder(checkpoint), &tokens)
}

/// Logits of the model in a folder.
fn logits(dir: &Path) -> Vec<f32> {
    logits_of(&Checkpoint::open(dir).unwrap())
}

/// A model with a head of its own, and with a config that says otherwise.
fn mislabelled() -> (TestModel, Vec<f32>) {
    let model = TestModel::new(&testing::config("llama", json!({})));
    let expected = logits(model.dir());
    set_flag(model.dir(), true);
    testing::write_byte_tokenizer(model.dir(), 50);
    (model, expected)
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
}

fn set_flag(dir: &Path, tied: bool) {
    let mut config = config(dir);
    config["tie_word_embeddings"] = json!(tied);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

fn windows() -> Windows {
    let text: Vec<u32> = (0..12 * 16).map(|i| i * i % 50).collect();
    Windows::cut(&text, 16, None).unwrap()
}

fn plan(checkpoint: &Checkpoint, ratio: f64) -> (Plan, Calibration) {
    let decoder = decoder(checkpoint);
    let collect = Collect::default();
    let calibration = Calibration::run(&decoder, &windows(), &collect, &NoProgress).unwrap();
    let mut recipe = Recipe::named("wanda-sp", 3).unwrap();
    recipe.shape.uniform = true;
    let plan = Plan::make(&decoder, &calibration, &recipe, ratio, &NoProgress).unwrap();
    (plan, calibration)
}

#[test]
fn it_is_used_whatever_the_config_says() {
    let (model, expected) = mislabelled();
    assert_eq!(logits(model.dir()), expected);
    assert!(
        !decoder(&Checkpoint::open(model.dir()).unwrap())
            .config()
            .tied
    );
}

#[test]
fn folders_have_it_and_say_so() {
    let (model, expected) = mislabelled();
    let checkpoint = Checkpoint::open(model.dir()).unwrap();
    for (ratio, form) in [
        (0.0, Form::Sliced),
        (0.3, Form::Sliced),
        (0.3, Form::Masked),
    ] {
        let (plan, calibration) = plan(&checkpoint, ratio);
        let dst = model.path(&format!("{ratio}-{form:?}"));
        let settings = Settings::new(&calibration).form(form);
        write(&decoder(&checkpoint), &plan, &dst, &settings, &NoProgress).unwrap();
        assert_eq!(config(&dst)["tie_word_embeddings"], false);
        let written = logits(&dst);
        match ratio == 0.0 {
            true => assert_eq!(written, expected),
            false => assert!(gap(&written, &expected) > 0.0),
        }
        // A reader that goes by the flag alone reads the same.
        let head = Checkpoint::open(&dst).unwrap();
        let head = head.bytes("lm_head.weight").unwrap().into_owned();
        assert!(head == *checkpoint.bytes("lm_head.weight").unwrap());
    }
    let dst = model.path("nemotron");
    let options = WriteOptions::default();
    nemotron::export(&decoder(&checkpoint), &dst, &options, &NoProgress).unwrap();
    assert_eq!(config(&dst)["tie_word_embeddings"], false);
}

#[test]
fn gguf_files_have_it() {
    let (model, expected) = mislabelled();
    let checkpoint = Checkpoint::open(model.dir()).unwrap();
    let file = model.path("model.gguf");
    gguf::export(&decoder(&checkpoint), Precision::F32, &file, &NoProgress).unwrap();
    let opened = causal_lm::open(&file).unwrap();
    assert!(gap(&logits_of(&opened), &expected) < 1e-5);
}

#[test]
fn a_copy_of_the_embedding_is_none() {
    let model = TestModel::with(
        &testing::config("llama", json!({})),
        DType::F32,
        |name, tensor| match name.contains("embed_tokens") || name == "lm_head.weight" {
            true => (tensor.ones_like().unwrap() * 0.1).unwrap(),
            false => tensor,
        },
    );
    set_flag(model.dir(), true);
    let checkpoint = Checkpoint::open(model.dir()).unwrap();
    let decoder = decoder(&checkpoint);
    assert!(decoder.config().tied);
    assert_eq!(decoder.config_to_write().unwrap(), *checkpoint.config());
}
