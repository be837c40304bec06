//! Blocks of the types of GGUF in a folder, beside groups or alone.
//!
//! A weight is a tensor of bytes `[rows, bytes of a row]`, whose name is that of the weight and the type
//! (`model.layers.0.mlp.up_proj.weight.Q5_K`). A folder in which no weight is in groups says `"quant_method": "blocks"`.

use packed::{BlockType, QuantRows};
use tensor_io::{Checkpoint, Dtype, Result, TensorSpec};

use super::stored::{self, refuse};

/// What `quant_method` says where no weight is in groups.
pub const METHOD: &str = "blocks";

/// The tensor of the weight of a module.
///
/// # Errors
/// [`packed::Error::Columns`] where rows are no whole blocks.
pub fn spec(module: &str, [rows, cols]: [usize; 2], ty: BlockType) -> packed::Result<TensorSpec> {
    let shape = vec![rows, ty.row_bytes(cols)?];
    Ok(TensorSpec::new(tensor(module, ty), Dtype::U8, shape))
}

/// The tensor that holds the blocks of a module's weight.
pub(super) fn tensor(module: &str, ty: BlockType) -> String {
    format!("{module}.weight.{}", ty.name())
}

/// The module of which a tensor holds the blocks, and their type.
pub fn module_of(name: &str) -> Option<(&str, BlockType)> {
    let (weight, ty) = name.rsplit_once('.')?;
    let ty = BlockType::ALL
        .into_iter()
        .find(|known| known.name() == ty)?;
    Some((weight.strip_suffix(".weight")?, ty))
}

/// The type of a module's weight, where it is in blocks.
pub fn of(folder: &Checkpoint, module: &str) -> Option<BlockType> {
    let stored = |ty: &BlockType| folder.contains(&tensor(module, *ty));
    BlockType::ALL.into_iter().find(stored)
}

/// Shape of a module's weight.
pub(super) fn shape(folder: &Checkpoint, module: &str, ty: BlockType) -> Result<[usize; 2]> {
    let name = tensor(module, ty);
    let info = folder.info(&name)?;
    let [rows, row_bytes] = stored::matrix(folder, &name, &info.shape)?;
    if info.dtype != Dtype::U8 || !row_bytes.is_multiple_of(ty.block_bytes()) {
        let found = format!(
            "expected uint8 with rows of whole blocks of {} bytes, found {:?} with rows of {row_bytes}",
            ty.block_bytes(),
            info.dtype
        );
        return refuse(folder, &name, found);
    }
    Ok([rows, row_bytes / ty.block_bytes() * ty.block_len()])
}

/// The blocks of a module's weight, checked; `None` if it is not in blocks.
///
/// # Errors
/// Tensors of another dtype or shape, and scales that are not finite, by row and block.
pub fn read<'a>(folder: &'a Checkpoint, module: &str) -> Result<Option<QuantRows<'a>>> {
    let Some(blocks) = unchecked(folder, module)? else {
        return Ok(None);
    };
    match blocks.check() {
        Ok(()) => Ok(Some(blocks)),
        Err(error) => refuse(
            folder,
            &tensor(module, blocks.block_type()),
            error.to_string(),
        ),
    }
}

/// The blocks without a look at their scales, for readers of a few rows.
pub(super) fn unchecked<'a>(folder: &'a Checkpoint, module: &str) -> Result<Option<QuantRows<'a>>> {
    let Some(ty) = of(folder, module) else {
        return Ok(None);
    };
    let ([rows, cols], name) = (shape(folder, module, ty)?, tensor(module, ty));
    match QuantRows::new(ty, rows, cols, folder.bytes(&name)?) {
        Ok(blocks) => Ok(Some(blocks)),
        Err(error) => refuse(folder, &name, error.to_string()),
    }
}
