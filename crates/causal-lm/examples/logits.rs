//! Writes the tokens of a text and the log-probabilities that a model gives every next token, to compare with another
//! runtime:
//!
//!     cargo run --release --example logits -- MODEL TEXT TOKENS OUT.safetensors [ADAPTER]
//!
//! MODEL is a folder in the layout of Hugging Face or a GGUF file, ADAPTER a PEFT folder or a LoRA in GGUF.

use candle_core::{D, DType, Device, Tensor};
use causal_lm::{Decoder, Model, TextTokenizer, read_text};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (path, text, count, out, adapter) = match &arguments[..] {
        [path, text, count, out] => (path, text, count, out, None),
        [path, text, count, out, adapter] => (path, text, count, out, Some(adapter)),
        _ => return Err("usage: logits MODEL TEXT TOKENS OUT.safetensors [ADAPTER]".into()),
    };
    let checkpoint = match adapter {
        None => causal_lm::open(path)?,
        Some(adapter) => causal_lm::open_adapted(path, adapter)?,
    };
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
    let tokenizer = TextTokenizer::open(path)?;
    let mut tokens: Vec<u32> = tokenizer.bos().into_iter().collect();
    tokens.extend(tokenizer.encode(&read_text(text)?)?);
    tokens.truncate(count.parse()?);
    let model = Model::load(&decoder)?;
    let logits = model.forward_all(&[&tokens], &mut model.full_cache(1)?)?;
    let logits = logits.squeeze(0)?.to_dtype(DType::F32)?;
    let logits = logits.broadcast_sub(&logits.log_sum_exp(D::Minus1)?.unsqueeze(1)?)?;
    let tokens: Vec<i64> = tokens.into_iter().map(i64::from).collect();
    let tokens = Tensor::new(tokens, &Device::Cpu)?;
    let tensors = [("tokens", &tokens), ("log_probabilities", &logits)];
    tensor_io::write_file(out, tensors, &Default::default())?;
    Ok(())
}
