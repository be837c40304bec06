//! Continues a prompt, with a cache that evicts where a policy and a budget in tokens are given.
//!
//!     cargo run --release --example generate -- MODEL "One summer morning, Anna" lazy 64

use candle_core::{DType, Device};
use causal_lm::{CacheSet, Decoder, GenerateOptions, Model, Sampling, TextTokenizer, generate};
use kv_lazy::{Budget, CacheConfig};
use std::io::Write;
use tensor_io::Checkpoint;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, prompt, eviction @ ..] = &arguments[..] else {
        return Err("usage: generate MODEL PROMPT [POLICY BUDGET]".into());
    };
    let checkpoint = Checkpoint::open(folder)?;
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
    let model = Model::load(&decoder)?;
    let tokenizer = TextTokenizer::open(folder)?;
    let mut prompt_tokens: Vec<u32> = tokenizer.bos().into_iter().collect();
    prompt_tokens.extend(tokenizer.encode(prompt)?);
    let mut cache = match eviction {
        [policy, budget] => {
            let config = CacheConfig::new(policy.parse()?, Budget::Tokens(budget.parse()?));
            let (dtype, device) = (decoder.dtype(), decoder.device());
            CacheSet::new(&model.cache_shapes(), 1, dtype, device, &config)?
        }
        _ => model.full_cache(1)?,
    };
    let options = GenerateOptions {
        max_new_tokens: 128,
        sampling: Sampling::Random {
            temperature: 0.8,
            top_k: None,
            top_p: Some(0.9),
            seed: 1,
        },
        stop: decoder.config().eos.clone(),
    };
    // Text is decoded from the start each time: a token alone may be part of a character.
    let mut tokens = prompt_tokens.clone();
    let mut text = tokenizer.decode(&tokens)?;
    print!("{text}");
    let mut print = |token| {
        tokens.push(token);
        let longer = tokenizer.decode(&tokens).unwrap_or_default();
        if let Some(new) = longer
            .strip_prefix(&text)
            .filter(|new| !new.ends_with('\u{fffd}'))
        {
            print!("{new}");
            std::io::stdout().flush().ok();
            text = longer;
        }
    };
    let generated = generate(&model, &mut cache, &prompt_tokens, &options, &mut print)?;
    println!(
        "\n\n{:.1} tokens/s, {} bytes of keys and values",
        generated.tokens_per_second().unwrap_or_default(),
        cache.bytes()
    );
    Ok(())
}
