//! Matrices of a GGUF file beside the linears of its blocks: embedding and head, and tensors that hold a linear of all experts.

use super::gguf_model::NAME;
use crate::format::gguf::place;
use crate::repair::{Repaired, StoredWeight};
use crate::{Error, Result};
use causal_lm::gguf::layout::FileTensor;
use causal_lm::gguf::names::{EMBEDDING, HEAD};
use packed::{BlockType, QuantRows};
use std::collections::BTreeMap;

/// The matrices of a repair by the tensors of a file, read when they are written.
pub(super) struct Others<'a> {
    repaired: &'a Repaired,
    tensors: BTreeMap<String, Stacked>,
}

/// A tensor of a file: matrices one below the other, by their places in the repair.
#[derive(Clone)]
struct Stacked {
    ty: BlockType,
    places: Vec<usize>,
}

impl<'a> Others<'a> {
    /// Finds the tensors of the file in which matrices are that are not floats; the head among them where it is a copy of the
    /// embedding.
    ///
    /// # Errors
    /// [`Error::NotStorable`] for matrices that no block type holds exactly, that no tensor of the file has, or that share one
    /// with matrices of another type.
    pub(super) fn find(
        repaired: &'a Repaired,
        tensors: &[FileTensor],
        head_is_copy: bool,
    ) -> Result<Self> {
        let mut holders: BTreeMap<&str, (&FileTensor, usize)> = BTreeMap::new();
        for tensor in tensors {
            for (at, part) in tensor.parts.iter().enumerate() {
                holders.insert(&part.tensor, (tensor, at));
            }
        }
        let mut found: BTreeMap<String, Vec<Option<(usize, BlockType)>>> = BTreeMap::new();
        for (place, module) in repaired.other_modules().iter().enumerate() {
            let Some(blocks) = blocks(module, repaired.other(place)?)? else {
                continue;
            };
            let weight = format!("{module}.weight");
            let Some(&(tensor, at)) = holders.get(weight.as_str()) else {
                return Err(refused(module, "the file has no such tensor"));
            };
            let parts = found.entry(tensor.name.clone());
            let parts = parts.or_insert_with(|| vec![None; tensor.parts.len()]);
            parts[at] = Some((place, blocks.block_type()));
        }
        let stacked = |(name, parts): (String, Vec<Option<(usize, BlockType)>>)| {
            let all: Option<Vec<(usize, BlockType)>> = parts.into_iter().collect();
            match all.as_deref() {
                Some([(_, ty), rest @ ..]) if rest.iter().all(|(_, other)| other == ty) => {
                    let places = all.iter().flatten().map(|(place, _)| *place).collect();
                    Ok((name, Stacked { ty: *ty, places }))
                }
                _ => Err(refused(
                    &name,
                    "it holds all experts of a block, which have one type",
                )),
            }
        };
        let stacked = found.into_iter().map(stacked);
        let mut tensors: BTreeMap<String, Stacked> = stacked.collect::<Result<_>>()?;
        if head_is_copy && let Some(embedding) = tensors.get(EMBEDDING) {
            tensors.insert(HEAD.into(), embedding.clone());
        }
        Ok(Self { repaired, tensors })
    }

    /// The type of a tensor of the file, where these matrices are in it.
    pub(super) fn block_type(&self, tensor: &str) -> Option<BlockType> {
        Some(self.tensors.get(tensor)?.ty)
    }

    /// The bytes of a tensor of the file, where these matrices are in it.
    ///
    /// # Errors
    /// What reading reports.
    pub(super) fn bytes(&self, tensor: &str) -> Result<Option<Vec<u8>>> {
        let Some(Stacked { places, .. }) = self.tensors.get(tensor) else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        for &place in places {
            let weight = self.repaired.other(place)?;
            if let Some(blocks) = blocks(tensor, weight)? {
                bytes.extend_from_slice(blocks.bytes());
            }
        }
        Ok(Some(bytes))
    }
}

/// A matrix in blocks; `None` for floats, which are as in the template.
fn blocks(module: &str, weight: StoredWeight) -> Result<Option<QuantRows<'static>>> {
    Ok(match weight {
        StoredWeight::Blocks(blocks) => Some(blocks),
        StoredWeight::Quantised { weight, .. } => Some(place(module, &weight)?),
        StoredWeight::Dense(_) => None,
    })
}

fn refused(module: &str, reason: &str) -> Error {
    Error::NotStorable {
        module: module.into(),
        format: NAME,
        reason: reason.into(),
    }
}
