//! Writes golden mixtures whose routers keep all rows, with the logits that this crate's reader computes of them.
//!
//! ```text
//! cargo run -p prune-structured --example expert_rows -- crates/causal-lm/tests/golden OUT
//! python crates/prune-structured/tests/transformers_experts.py OUT
//! ```
//!
//! `OUT/NAME-KIND` is a checkpoint folder, `OUT/NAME-KIND.json` has tokens and logits.

use causal_lm::candle_core::{DType, Device};
use causal_lm::testing::{TestModel, logits};
use causal_lm::{Decoder, ModelConfig, Windows};
use prune_structured::NoProgress;
use prune_structured::experts::compensation::Novice;
use prune_structured::experts::{Aim, ExpertRecipe, ExpertSettings, JointData, write};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tensor_io::{Checkpoint, Config};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(folder), Some(out)) = (arguments.next(), arguments.next()) else {
        return Err("usage: expert_rows FOLDER OUT".into());
    };
    std::fs::create_dir_all(&out)?;
    for entry in std::fs::read_dir(&folder)? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let golden: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        let fields = golden["config"].as_object().ok_or("no config")?.clone();
        let config = Config::new(fields);
        let mixtures = ModelConfig::new(&config)?.mixtures;
        if mixtures.iter().any(Option::is_some) {
            let tokens: Vec<u32> = serde_json::from_value(golden["tokens"].clone())?;
            all(&TestModel::golden(&config), &tokens, &out.join(&*name))?;
            println!("{name}");
        }
    }
    Ok(())
}

/// Writes what each recipe makes of a model beside `out`.
fn all(model: &TestModel, tokens: &[u32], out: &Path) -> Result<()> {
    let decoder = model.decoder();
    let windows = Windows::cut(tokens, tokens.len(), None)?;
    let data = JointData {
        calibration: &windows,
        search: &windows,
        dir: model.dir(),
    };
    let named = |name| ExpertRecipe::named(name, 0).ok_or("no such recipe");
    for (kind, recipe) in [
        ("novice", named("mone")?.compensation(Novice)),
        ("hc-smoe-tied", named("hc-smoe-tied")?),
        ("m-smoe-tied", named("m-smoe-tied")?),
    ] {
        let (found, _) = recipe.plan(&decoder, data, Aim::Ratio(0.5), &NoProgress)?;
        let dst = PathBuf::from(format!("{}-{kind}", out.display()));
        let settings = ExpertSettings::default();
        write(&decoder, &found.plan, &dst, &settings, &NoProgress)?;
        let checkpoint = Checkpoint::open(&dst)?;
        let pruned = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
        let logits = logits(&pruned, tokens);
        let rows: Vec<&[f32]> = logits.chunks(pruned.config().vocab).collect();
        let expected = json!({"tokens": tokens, "logits": rows});
        std::fs::write(format!("{}.json", dst.display()), expected.to_string())?;
    }
    Ok(())
}
