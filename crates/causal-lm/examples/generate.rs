//! Continues a prompt, with a cache that evicts where a policy and a budget in tokens are given.
//!
//!     cargo run --release --example generate -- MODEL "One summer morning, Anna" lazy 64

use candle_core::{DType, Device};
use causal_lm::{
    Arithmetic, CacheSet, Decoder, Execution, GenerateOptions, Model, Sampling, TextTokenizer,
    generate,
};
use kv_lazy::{Budget, CacheConfig};
use std::io::Write;
use std::ops::ControlFlow;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, prompt, eviction @ ..] = &arguments[..] else {
        return Err("usage: generate MODEL PROMPT [POLICY BUDGET]".into());
    };
    let checkpoint = causal_lm::open(folder)?;
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
    // Quantised and 16-bit weights stay as they are.
    let decoder = decoder.packed(Execution::new(Arithmetic::Int8));
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
    let sampling = Sampling::Random {
        temperature: 0.8,
        top_k: None,
        top_p: Some(0.9),
        seed: 1,
    };
    let options = GenerateOptions::new(128)
        .with_sampling(sampling)
        .with_stop(decoder.config().eos.clone());
    print!("{prompt}");
    let mut text = tokenizer.stream();
    let mut print = |token| {
        let mut out = std::io::stdout();
        let written = write!(out, "{}", text(token).unwrap_or_default());
        // Whoever reads this may have had enough.
        match written.and_then(|()| out.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
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
