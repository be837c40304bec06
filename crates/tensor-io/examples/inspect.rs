//! Lists the tensors of a checkpoint folder or a safetensors file:
//! `cargo run -p tensor-io --example inspect -- xtask/model`.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};
use tensor_io::Checkpoint;

fn main() -> Result<()> {
    let path = env::args_os()
        .nth(1)
        .map(PathBuf::from)
        .context("usage: inspect CHECKPOINT_FOLDER|FILE.safetensors")?;
    let checkpoint = if path.is_file() {
        Checkpoint::open_file(&path)?
    } else {
        Checkpoint::open(&path)?
    };
    let width = checkpoint.names().map(str::len).max().unwrap_or(0);
    for name in checkpoint.names() {
        let info = checkpoint.info(name)?;
        println!(
            "{name:width$}  {:>5}  {:>12}  {:?}",
            info.dtype.to_string(),
            info.bytes,
            info.shape
        );
    }
    println!(
        "{} tensors, {} parameters, {} bytes in {} file(s)",
        checkpoint.names().count(),
        checkpoint.parameters(),
        checkpoint.total_bytes(),
        checkpoint.shards().len()
    );
    if let Some(model_type) = checkpoint.config().opt_str("model_type")? {
        println!("model type {model_type}");
    }
    for file in checkpoint.files_to_carry() {
        println!("carries {}", file.display());
    }
    Ok(())
}
