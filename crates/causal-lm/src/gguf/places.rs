//! Where a GGUF file has the tensors of a checkpoint.

use std::collections::{BTreeMap, HashMap, HashSet};

use packed::BlockType;
use tensor_io::gguf::Gguf;
use tensor_io::{Config, Dtype, TensorSpec};

use super::layout::{self, Experts, FileTensor, Rows};
use super::names::{self, in_block};
use super::tensors::{GgufTensors, Piece, Stored};
use super::{Architecture, content};
use crate::config::ModelConfig;
use crate::names::{LLAMA, Names};
use crate::{LinearName, Result};

/// Finds the place of every tensor of `file`.
pub(super) fn find(
    file: Gguf,
    architecture: Architecture,
    config: &Config,
) -> Result<(Vec<TensorSpec>, GgufTensors)> {
    check_heads(&file, architecture, config)?;
    let model = ModelConfig::new(config)?;
    let experts = match file.contains(&in_block(0, "ffn_gate.0.weight")) {
        true => Experts::Alone,
        false => Experts::Stacked,
    };
    check_counts(&file, &model, experts)?;
    let expected = layout::tensors(&model, architecture, experts);
    check_places(&file, architecture, &model, &expected)?;
    // Pieces of each tensor of the checkpoint by their first row.
    let mut found: BTreeMap<String, (BTreeMap<usize, Piece>, &FileTensor)> = BTreeMap::new();
    for tensor in &expected {
        let Ok(info) = file.info(&tensor.name) else {
            continue;
        };
        let metadata = file.metadata();
        let Some(ty) = BlockType::from_id(info.layout.id) else {
            let (name, layout) = (&info.name, info.layout.name);
            let what = format!("tensor `{name}`: type {layout} is not supported");
            return Err(content(&metadata, what));
        };
        let in_parts = tensor
            .parts
            .iter()
            .any(|part| matches!(part.rows, Rows::Range(_)))
            || tensor.parts.len() > 1;
        if in_parts && info.shape != tensor.shape {
            let (name, found, expected) = (&info.name, &info.shape, &tensor.shape);
            let what = format!("tensor `{name}` has shape {found:?}, expected {expected:?}");
            return Err(content(&metadata, what));
        }
        let mut first = 0;
        for part in &tensor.parts {
            let (of_file, cols) = match (&part.rows, info.shape.len()) {
                // A vector has one value for each row of the matrix.
                (Rows::Order(_), 1) => (info.elements(), 1),
                _ => (info.elements() / info.width().max(1), info.width()),
            };
            let rows = match &part.rows {
                Rows::Range(range) => range.len(),
                _ => of_file / tensor.parts.len(),
            };
            let (at, order) = match &part.rows {
                Rows::All => (0, None),
                Rows::Range(range) => (range.start, None),
                Rows::Order(order) if order.rows() == rows => (0, Some(*order)),
                Rows::Order(_) => (0, None),
            };
            let piece = Piece {
                name: info.name.clone(),
                ty,
                rows,
                cols,
                first,
                order,
            };
            first += rows;
            let of_tensor = found.entry(part.tensor.clone());
            of_tensor
                .or_insert_with(|| (BTreeMap::new(), tensor))
                .0
                .insert(at, piece);
        }
    }
    let shapes: HashMap<String, Vec<usize>> = model.tensors().into_iter().collect();
    let (mut specs, mut stored) = (Vec::new(), HashMap::new());
    for (name, (pieces, tensor)) in found {
        let pieces: Vec<Piece> = pieces.into_values().collect();
        let of_file = || file.info(&tensor.name).map(|info| info.shape.clone());
        // What the file has in another shape is compared with the config later.
        let shape = match (&pieces[..], shapes.get(&name)) {
            ([_], Some(shape)) if tensor.parts.len() > 1 || of_file()? == tensor.shape => {
                shape.clone()
            }
            ([_], _) => of_file()?,
            (_, Some(shape)) => shape.clone(),
            (_, None) => continue,
        };
        // A tensor of which the file lacks a part is missing.
        let values = |piece: &Piece| piece.rows * piece.cols;
        if pieces.iter().map(values).sum::<usize>() != shape.iter().product::<usize>() {
            continue;
        }
        let offset = tensor.offset;
        let tensor = Stored::Pieces { pieces, offset };
        let dtype = match tensor.block_type() {
            Some(BlockType::F16) => Dtype::F16,
            Some(BlockType::BF16) => Dtype::BF16,
            _ => Dtype::F32,
        };
        specs.push(TensorSpec::new(&name, dtype, shape));
        stored.insert(name, tensor);
    }
    if architecture == Architecture::Deci {
        add_norms_of_absent_halves(config, &mut specs, &mut stored)?;
    }
    Ok((specs, GgufTensors::new(file, architecture, stored)))
}

/// Refuses blocks and experts that the metadata count and the file does not have: everything after this takes memory for each
/// of them.
fn check_counts(file: &Gguf, model: &ModelConfig, experts: Experts) -> Result<()> {
    let refuse = |what: String| Err(content(&file.metadata(), what));
    let blocks = file.tensors().iter().filter_map(|info| {
        let (block, _) = info.name.strip_prefix("blk.")?.split_once('.')?;
        block.parse::<usize>().ok()
    });
    let blocks: HashSet<usize> = blocks.collect();
    let mut alone = 0usize;
    for (layer, widths) in model.widths.iter().enumerate() {
        let mixture = model.mixtures[layer];
        let has_half = widths.heads > 0 || widths.neurons > 0 || mixture.is_some();
        if has_half && !blocks.contains(&layer) {
            let block = model.names.block(layer, "");
            let blocks = model.layers();
            return refuse(format!(
                "the file states {blocks} blocks, but it has no tensor of {block}"
            ));
        }
        let Some(mixture) = mixture else { continue };
        let stacks = [LinearName::Gate, LinearName::Up, LinearName::Down];
        let stacks = stacks.map(|of| format!("{}_exps.weight", names::linear(of)));
        for name in stacks.iter().map(String::as_str).chain([names::ROUTER]) {
            let name = in_block(layer, name);
            let found = match file.info(&name) {
                Ok(info) => info.shape[0],
                // Only the router is always there.
                Err(_) if name.ends_with(names::ROUTER) => 0,
                Err(_) => continue,
            };
            if found != mixture.experts {
                return refuse(format!(
                    "the file states {} experts, but tensor `{name}` is of {found}",
                    mixture.experts
                ));
            }
        }
        alone = alone.saturating_add(mixture.experts);
    }
    if experts == Experts::Alone && alone > file.tensors().len() {
        return refuse(format!(
            "the file states {alone} experts in all, but it has {} tensors",
            file.tensors().len()
        ));
    }
    Ok(())
}

/// Refuses q and k whose rows are no whole heads, where they have to be reordered.
fn check_heads(file: &Gguf, architecture: Architecture, config: &Config) -> Result<()> {
    if !architecture.rotates_neighbours() {
        return Ok(());
    }
    let head_dim = config.usize("head_dim")?;
    for info in file.tensors() {
        let Some((_, part)) = info
            .name
            .strip_prefix("blk.")
            .and_then(|name| name.split_once('.'))
        else {
            continue;
        };
        let of_heads = [LinearName::Q, LinearName::K].map(names::linear);
        let Some((module, kind)) = part.rsplit_once('.') else {
            continue;
        };
        if !of_heads.contains(&module) || !matches!(kind, "weight" | "bias") {
            continue;
        }
        let rows = match info.shape.len() {
            1 => info.elements(),
            _ => info.elements() / info.width().max(1),
        };
        let whole_heads =
            head_dim > 0 && head_dim.is_multiple_of(2) && rows.is_multiple_of(head_dim);
        let is_quantised = BlockType::from_id(info.layout.id).is_some_and(BlockType::is_quantised);
        if !(whole_heads && (info.shape.len() == 2 || !is_quantised)) {
            let what = format!(
                "tensor `{}`: {rows} rows are no heads of {head_dim}",
                info.name
            );
            return Err(content(&file.metadata(), what));
        }
    }
    Ok(())
}

/// Refuses tensors that the model does not have: reading on would ignore them.
fn check_places(
    file: &Gguf,
    architecture: Architecture,
    model: &ModelConfig,
    expected: &[FileTensor],
) -> Result<()> {
    let known: HashSet<&str> = expected.iter().map(|tensor| tensor.name.as_str()).collect();
    let of_rotation = [
        names::ROPE_FACTORS,
        names::SHORT_FACTORS,
        names::LONG_FACTORS,
    ];
    for info in file.tensors() {
        let name = info.name.as_str();
        // Frequencies that old files carry and nothing reads.
        let ignored = name.starts_with("blk.") && name.ends_with(".attn_rot_embd.weight");
        if known.contains(name) || of_rotation.contains(&name) || ignored {
            continue;
        }
        let block = name
            .strip_prefix("blk.")
            .and_then(|name| name.split_once('.'));
        let block = block.and_then(|(block, _)| block.parse::<usize>().ok());
        let metadata = file.metadata();
        let what = match block.filter(|block| *block >= model.layers()) {
            Some(block) => format!(
                "tensor `{name}` is of {}, but the file states {} blocks",
                model.names.block(block, ""),
                model.layers()
            ),
            None => format!(
                "tensor `{name}` has no place in a {} model; reading on would ignore it",
                architecture.name()
            ),
        };
        return Err(content(&metadata, what));
    }
    Ok(())
}

/// Files leave out the norm before a half that a block does not have.
fn add_norms_of_absent_halves(
    config: &Config,
    specs: &mut Vec<TensorSpec>,
    stored: &mut HashMap<String, Stored>,
) -> Result<()> {
    let hidden = config.usize("hidden_size")?;
    for layer in 0..config.usize("num_hidden_layers")? {
        for (attention, norm) in [(true, LLAMA.attention_before), (false, LLAMA.mlp_before)] {
            let Some(norm) = norm else { continue };
            let norm = Names::new(&LLAMA).block(layer, &format!("{norm}.weight"));
            if !stored.contains_key(&norm) && has_no_half(config, layer, attention) {
                specs.push(TensorSpec::new(&norm, Dtype::F32, [hidden]));
                stored.insert(norm, Stored::Ones(hidden));
            }
        }
    }
    Ok(())
}

/// Whether the config gives block `layer` no attention, or no MLP.
fn has_no_half(config: &Config, layer: usize, attention: bool) -> bool {
    let field = match attention {
        true => "num_attention_heads",
        false => "intermediate_size",
    };
    let list = config
        .get(crate::config::WIDTHS_KEY)
        .map(|lists| &lists[field][layer]);
    list.is_some_and(|width| width.as_u64() == Some(0))
}
