//! Writes the golden models of a folder as GGUF files with the logits that this crate's readers compute of the originals.
//!
//! ```text
//! cargo run -p prune-structured --example gguf_golden -- crates/causal-lm/tests/golden OUT
//! python crates/prune-structured/tests/gguf_llama_cpp.py OUT
//! ```
//!
//! `OUT/NAME.gguf` has the weights, `OUT/NAME.json` tokens and logits. Models that the format cannot represent are named
//! with the reason.

use causal_lm::testing::{TestModel, write_byte_tokenizer};
use causal_lm::{Model, ModelConfig};
use prune_structured::NoProgress;
use prune_structured::gguf::{self, Precision};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tensor_io::Config;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(folder), Some(out)) = (arguments.next(), arguments.next()) else {
        return Err("usage: gguf_golden FOLDER OUT".into());
    };
    std::fs::create_dir_all(&out)?;
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "json")
    });
    files.sort();
    for path in files {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let golden: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        let said = match export(&golden, &name, &out) {
            Ok(parameters) => format!("{parameters} parameters"),
            Err(error) => error.to_string(),
        };
        println!("{name}: {said}");
    }
    Ok(())
}

fn export(golden: &Value, name: &str, out: &Path) -> Result<u64> {
    let fields = golden["config"].as_object().ok_or("no config")?.clone();
    let mut config = Config::new(fields);
    if config.str("model_type")? == "smollm3" {
        // The layers that llama.cpp does not rotate.
        config.set("no_rope_layers", vec![1, 1, 1, 0]);
    }
    let vocab = ModelConfig::new(&config)?.vocab;
    let model = TestModel::golden(&config);
    write_byte_tokenizer(model.dir(), vocab);
    let decoder = model.decoder();
    let file = out.join(format!("{name}.gguf"));
    let exported = gguf::export(&decoder, Precision::F32, file, &NoProgress)?;
    let tokens: Vec<u32> = serde_json::from_value(golden["tokens"].clone())?;
    let running = Model::load(&decoder)?;
    let mut cache = running.full_cache(1)?;
    let logits = running.forward_all(&[&tokens], &mut cache)?;
    let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
    let rows: Vec<&[f32]> = logits.chunks(vocab).collect();
    let expected = json!({"tokens": tokens, "logits": rows});
    std::fs::write(out.join(format!("{name}.json")), expected.to_string())?;
    Ok(exported.parameters)
}
