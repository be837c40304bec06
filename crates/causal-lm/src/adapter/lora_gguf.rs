//! LoRA adapters in GGUF files.
//!
//! Factors of `NAME.weight` are `NAME.weight.lora_a` and `.lora_b`. Their product is multiplied with α over the rank, or stands
//! for itself where the file has no α.

use std::collections::BTreeMap;

use tensor_io::Checkpoint;
use tensor_io::gguf::{Gguf, Metadata};

use super::Place;
use crate::gguf::layout::{self, Experts, Part, Rows};
use crate::gguf::{Architecture, GgufTensors, content};
use crate::{ModelConfig, Result};

const ALPHA: &str = "adapter.lora.alpha";
const A: &str = ".lora_a";
const B: &str = ".lora_b";
/// Tensors that converters may leave in the file and no reader adds.
const NORM: &str = "_norm.weight";

/// Where the factors of each weight are.
pub(super) fn read(file: &Gguf, base: &Checkpoint) -> Result<BTreeMap<String, Place>> {
    let metadata = file.metadata();
    let refuse = |what: String| content(&metadata, what);
    let kind = metadata.get_str("general.type")?.unwrap_or("model");
    let form = metadata.get_str("adapter.type")?.unwrap_or("lora");
    if kind != "adapter" || form != "lora" {
        let what = format!("general.type is {kind:?} ({form}), expected a LoRA adapter");
        return Err(refuse(what));
    }
    let name = metadata.required("general.architecture", Metadata::get_str)?;
    let source = base
        .source()
        .and_then(|source| source.as_any().downcast_ref::<GgufTensors>());
    let wanted = source.map(GgufTensors::architecture);
    let found = Architecture::named(name);
    let Some(architecture) = found.filter(|found| wanted.is_none_or(|wanted| wanted == *found))
    else {
        let wanted = wanted.map_or("a supported one", Architecture::name);
        let what = format!("architecture {name:?}, but the model is {wanted}");
        return Err(refuse(what));
    };
    let mut config = ModelConfig::new(base.config())?;
    config.names = config
        .names
        .located(config.layers(), |name| base.contains(name));
    config.check_counts(base.names().count())?;
    let tensors = layout::tensors(&config, architecture, Experts::Stacked);
    let alpha = metadata.get_f64(ALPHA)?.filter(|alpha| *alpha != 0.0);
    let mut places = BTreeMap::new();
    for info in file.tensors() {
        let Some(weight) = info.name.strip_suffix(A) else {
            let known = info.name.strip_suffix(B);
            let is_partner = known.is_some_and(|weight| file.contains(&format!("{weight}{A}")));
            if is_partner || info.name.ends_with(NORM) {
                continue;
            }
            return Err(refuse(format!("unexpected tensor `{}`", info.name)));
        };
        let b = format!("{weight}{B}");
        let b_info = file.info(&b)?;
        let (&[rank, cols], &[rows, b_rank]) = (&info.shape[..], &b_info.shape[..]) else {
            return Err(refuse(format!("factors of {weight} are no matrices")));
        };
        if rank != b_rank {
            let what = format!("{weight}: A has rank {rank}, B {b_rank}");
            return Err(refuse(what));
        }
        let tensor = tensors.iter().find(|tensor| tensor.name == weight);
        let (name, order) = match tensor.map(|tensor| &tensor.parts[..]) {
            Some(
                [
                    Part {
                        tensor,
                        rows: Rows::All,
                    },
                ],
            ) => (tensor.clone(), None),
            Some(
                [
                    Part {
                        tensor,
                        rows: Rows::Order(order),
                    },
                ],
            ) if order.rows() == rows => (tensor.clone(), Some(*order)),
            _ => {
                return Err(refuse(format!(
                    "factors of `{weight}` for {rows} rows have no place"
                )));
            }
        };
        let place = Place {
            a: info.name.clone(),
            b,
            rank,
            shape: [rows, cols],
            scale: alpha.map_or(1.0, |alpha| alpha / rank as f64),
            order,
        };
        places.insert(name, place);
    }
    Ok(places)
}
