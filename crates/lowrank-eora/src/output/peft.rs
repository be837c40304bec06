//! The folder of a PEFT adapter: its two files and the fields of its configuration.

use crate::Result;
use candle_core::Tensor;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tensor_io::PendingFolder;
use tensor_io::atomic::Overwrite;

/// The factors.
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
/// The configuration.
pub(crate) const CONFIG: &str = "adapter_config.json";
/// What PEFT puts before the path of a module.
pub(crate) const PREFIX: &str = "base_model.model.";

/// What differs between adapters; alpha is the rank everywhere, so that the scale of plain LoRA is 1.
pub(crate) struct Peft<'a> {
    /// `base_model_name_or_path`.
    pub(crate) base: &'a str,
    /// Rank of what has no other in `ranks`.
    pub(crate) rank: usize,
    /// Ranks by module, or by a pattern of its path.
    pub(crate) ranks: Map<String, Value>,
    /// Modules that are adapted.
    pub(crate) modules: Vec<String>,
    /// Parameters that are adapted, of modules that are no linears.
    pub(crate) parameters: &'a [&'a str],
    /// Whether the scale is alpha / √r.
    pub(crate) rslora: bool,
}

impl Peft<'_> {
    /// Writes the folder, whole or not at all.
    pub(crate) fn write(
        self,
        dst: &Path,
        overwrite: bool,
        tensors: &[(String, Tensor)],
    ) -> Result<()> {
        self.pending(dst, overwrite, tensors)?.persist()?;
        Ok(())
    }

    /// Writes everything but the folder's name.
    pub(crate) fn pending(
        self,
        dst: &Path,
        overwrite: bool,
        tensors: &[(String, Tensor)],
    ) -> Result<PendingFolder> {
        let overwrite = match overwrite {
            true => Overwrite::IfHolds {
                marker: CONFIG,
                owns: |name| matches!(name, CONFIG | WEIGHTS),
            },
            false => Overwrite::Never,
        };
        let folder = PendingFolder::create(dst, overwrite)?;
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        tensor_io::write_file(folder.path().join(WEIGHTS), tensors, &metadata)?;
        folder.write(CONFIG, format!("{:#}\n", self.config()).as_bytes())?;
        Ok(folder)
    }

    fn config(self) -> Value {
        let mut config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": self.rank,
            "target_modules": self.modules,
            "rank_pattern": self.ranks,
            "alpha_pattern": self.ranks,
            "use_rslora": self.rslora,
            "use_dora": false,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_dropout": 0.0,
            "modules_to_save": null,
        });
        // PEFT before 0.17 does not know the field.
        if !self.parameters.is_empty() {
            config["target_parameters"] = json!(self.parameters);
        }
        config
    }
}
