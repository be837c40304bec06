//! LoRA adapters in folders of PEFT.

use std::collections::BTreeMap;
use std::path::Path;

use fancy_regex::Regex;
use serde_json::Value;
use tensor_io::{Checkpoint, Config};

use super::{Place, fault};
use crate::Result;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What names of tensors begin with, before the name of the module.
const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// The model that the adapter names as its base.
pub(super) fn base(dir: &Path) -> Result<Option<String>> {
    let config = Config::read(dir.join(CONFIG))?;
    Ok(config
        .opt_str("base_model_name_or_path")?
        .filter(|name| !name.is_empty())
        .map(str::to_owned))
}

/// The file and where the factors of each weight are in it.
pub(super) fn read(dir: &Path) -> Result<(Checkpoint, BTreeMap<String, Place>)> {
    let path = dir.join(CONFIG);
    let config = Config::read(&path)?;
    let kind = config.opt_str("peft_type")?.unwrap_or("LORA");
    let dora = config.opt_bool("use_dora")?.unwrap_or(false);
    let bias = config.opt_str("bias")?.unwrap_or("none");
    if kind != "LORA" || dora || bias != "none" {
        let what = format!("peft_type {kind}, use_dora {dora}, bias {bias}: expected plain LoRA");
        return Err(fault(&path, what));
    }
    let ranks = Setting::read(&path, &config, "r", "rank_pattern")?;
    let alphas = Setting::read(&path, &config, "lora_alpha", "alpha_pattern")?;
    let of_root = config.opt_bool("use_rslora")?.unwrap_or(false);
    let weights = dir.join(WEIGHTS);
    let file = Checkpoint::open_file(&weights)?;
    let mut places = BTreeMap::new();
    for name in file.names() {
        let Some(tensor) = name.strip_suffix(A) else {
            let known = name.strip_suffix(B);
            match known.filter(|module| file.contains(&format!("{module}{A}"))) {
                Some(_) => continue,
                None => return Err(fault(&weights, format!("unexpected tensor {name}"))),
            }
        };
        let b = format!("{tensor}{B}");
        let (&[rank, cols], &[rows, b_rank]) =
            (&file.info(name)?.shape[..], &file.info(&b)?.shape[..])
        else {
            return Err(fault(
                &weights,
                format!("factors of {tensor} are no matrices"),
            ));
        };
        if rank != b_rank || rank == 0 {
            return Err(fault(
                &weights,
                format!("{tensor}: A has rank {rank}, B {b_rank}"),
            ));
        }
        let module = tensor.strip_prefix(PREFIX).unwrap_or(tensor);
        let stated = ranks.of(module)?;
        if stated != rank as f64 {
            return Err(fault(
                &weights,
                format!("{module}: A has rank {rank}, but {CONFIG} states {stated}"),
            ));
        }
        let divisor = match of_root {
            true => stated.sqrt(),
            false => stated,
        };
        let place = Place {
            a: name.to_string(),
            b,
            rank,
            shape: [rows, cols],
            scale: alphas.of(module)? / divisor,
            order: None,
        };
        places.insert(format!("{module}.weight"), place);
    }
    Ok((file, places))
}

/// A number for all modules, and others for those whose names expressions match.
struct Setting<'c> {
    path: &'c Path,
    all: f64,
    own: Vec<(&'c str, Regex, f64)>,
}

impl<'c> Setting<'c> {
    fn read(
        path: &'c Path,
        config: &'c Config,
        field: &'static str,
        pattern: &'static str,
    ) -> Result<Self> {
        let own = match config.get(pattern) {
            None | Some(Value::Null) => vec![],
            Some(Value::Object(own)) => own
                .iter()
                .map(|(key, value)| {
                    let refuse = |what: String| fault(path, format!("{pattern}: {what}"));
                    let value = value
                        .as_f64()
                        .ok_or_else(|| refuse(format!("{key:?} is {value}, no number")))?;
                    // As PEFT does: the key is an expression for the name of a module or for its end behind a dot.
                    let expression = Regex::new(&format!(r"^(.*\.)?({key})$"));
                    let expression = expression.map_err(|error| {
                        let error = error.to_string();
                        let error = error.split_whitespace().collect::<Vec<_>>().join(" ");
                        refuse(format!("{key:?} is no expression: {error}"))
                    })?;
                    Ok((key.as_str(), expression, value))
                })
                .collect::<Result<_>>()?,
            Some(other) => return Err(fault(path, format!("{pattern} is {other}, no object"))),
        };
        Ok(Self {
            path,
            all: config.f64(field)?,
            own,
        })
    }

    /// The number of a module: that of the first expression that matches.
    fn of(&self, module: &str) -> Result<f64> {
        for (key, expression, value) in &self.own {
            let matches = expression.is_match(module);
            let matches = matches.map_err(|error| {
                fault(
                    self.path,
                    format!("{key:?} does not apply to {module}: {error}"),
                )
            })?;
            if matches {
                return Ok(*value);
            }
        }
        Ok(self.all)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The rank of each of some modules, or the error.
    fn ranks(patterns: Value) -> std::result::Result<[f64; 4], String> {
        let fields = json!({"r": 8, "rank_pattern": patterns});
        let config = Config::new(fields.as_object().unwrap().clone());
        let setting = Setting::read(Path::new(CONFIG), &config, "r", "rank_pattern");
        let setting = setting.map_err(|error| error.to_string())?;
        let modules = [
            "model.layers.0.self_attn.q_proj",
            "model.layers.10.self_attn.q_proj",
            "model.layers.0.mlp.down_proj",
            "q_proj",
        ];
        let mut found = [0.0; 4];
        for (found, module) in found.iter_mut().zip(modules) {
            *found = setting.of(module).map_err(|error| error.to_string())?;
        }
        Ok(found)
    }

    #[test]
    fn patterns_are_expressions_for_names_and_for_their_ends_behind_a_dot() {
        // Values of peft.utils.other.get_pattern_key for the same keys and names.
        for (patterns, expected) in [
            (json!({}), [8.0; 4]),
            (Value::Null, [8.0; 4]),
            (json!({"q_proj": 4}), [4.0, 4.0, 8.0, 4.0]),
            (json!({".*q_proj": 32}), [32.0, 32.0, 8.0, 32.0]),
            (json!({"_proj": 4}), [8.0; 4]),
            (json!({".*_proj": 4}), [4.0; 4]),
            (json!({"^q_proj": 4}), [8.0, 8.0, 8.0, 4.0]),
            (
                json!({"model.layers.0.self_attn.q_proj": 4}),
                [4.0, 8.0, 8.0, 8.0],
            ),
            (json!({r"layers\.(0|1)\..*": 4}), [4.0, 8.0, 4.0, 8.0]),
            (json!({r"layers\.\d\..*": 4}), [4.0, 8.0, 4.0, 8.0]),
            (json!({"q_proj|down_proj": 4}), [4.0; 4]),
            (json!({"layers.0.*": 2, "q_proj": 4}), [2.0, 4.0, 2.0, 4.0]),
            (json!({"q_proj": 4, "layers.0.*": 2}), [4.0, 4.0, 2.0, 4.0]),
            (json!({r"layers\.(?!0\.)\d+\..*": 4}), [8.0, 4.0, 8.0, 8.0]),
        ] {
            assert_eq!(ranks(patterns.clone()), Ok(expected), "{patterns}");
        }
    }

    #[test]
    fn patterns_that_are_none_are_named() {
        for (patterns, says) in [
            (json!({"(": 4}), "\"(\" is no expression"),
            (json!({"q_proj": "four"}), "\"q_proj\" is \"four\""),
            (json!(["q_proj"]), "no object"),
            // Exponentially many ways to match.
            (json!({r"(?=x?)(.+)+\1\1\1\1z": 4}), "does not apply to"),
        ] {
            let error = ranks(patterns.clone()).unwrap_err();
            assert!(error.contains(says) && !error.contains('\n'), "{error}");
        }
    }
}
