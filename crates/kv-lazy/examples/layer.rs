//! What eviction costs the first layer of a Llama checkpoint: the output of attention under several policies beside the
//! full cache's, token by token.
//!
//! `cargo run --release -p kv-lazy --example layer -- xtask/model xtask/model/evaluation.txt 64`

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::rms_norm;
use candle_nn::rotary_emb::rope;
use kv_lazy::{Budget, CacheConfig, CacheSet, LayerShape};
use tensor_io::{Checkpoint, Config};
use tokenizers::Tokenizer;

/// Tokens of the text.
const TOKENS: usize = 512;

/// Queries, keys and values of the first layer, `[1, heads, tokens, head_dim]` each.
struct Attended {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: LayerShape,
}

impl Attended {
    fn new(checkpoint: &Checkpoint, tokens: &[u32]) -> Result<Self> {
        let config = checkpoint.config();
        let shape = shape(config)?;
        let weight = |name: &str| {
            checkpoint.tensor_as(&format!("model.{name}.weight"), DType::F32, &Device::Cpu)
        };
        let x = weight("embed_tokens")?.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?;
        let eps = config.f64("rms_norm_eps")? as f32;
        let x = rms_norm(&x, &weight("layers.0.input_layernorm")?, eps)?;
        let heads = |name: &str| -> Result<Tensor> {
            let y = x.matmul(&weight(&format!("layers.0.self_attn.{name}"))?.t()?)?;
            let y = y.reshape((tokens.len(), (), shape.head_dim))?;
            Ok(y.transpose(0, 1)?.contiguous()?.unsqueeze(0)?)
        };
        let theta = config.opt_f64("rope_theta")?.unwrap_or(10000.0) as f32;
        let (cos, sin) = rotation(tokens.len(), shape.head_dim, theta)?;
        Ok(Self {
            q: rope(&heads("q_proj")?, &cos, &sin)?,
            k: rope(&heads("k_proj")?, &cos, &sin)?,
            v: heads("v_proj")?,
            shape,
        })
    }

    /// The outputs of all tokens, decoded one at a time, `[heads, tokens, head_dim]`, and the bytes held at the end.
    fn decode(&self, policy: &str, budget: usize) -> Result<(Tensor, usize)> {
        let config = CacheConfig::new(policy.parse()?, Budget::Tokens(budget));
        let mut cache = CacheSet::new(&[self.shape], 1, DType::F32, &Device::Cpu, &config)?;
        let scale = 1.0 / (self.shape.head_dim as f64).sqrt();
        let outputs = (0..self.q.dim(2)?).map(|t| {
            let at = |x: &Tensor| x.narrow(2, t, 1)?.contiguous();
            cache.begin(1)?;
            Ok(cache.attend(0, &at(&self.q)?, &at(&self.k)?, &at(&self.v)?, scale)?)
        });
        let outputs = outputs.collect::<Result<Vec<_>>>()?;
        Ok((Tensor::cat(&outputs, 2)?.squeeze(0)?, cache.bytes()))
    }
}

fn shape(config: &Config) -> Result<LayerShape> {
    let query_heads = config.usize("num_attention_heads")?;
    let head_dim = config.opt_usize("head_dim")?;
    Ok(LayerShape {
        query_heads,
        kv_heads: config
            .opt_usize("num_key_value_heads")?
            .unwrap_or(query_heads),
        head_dim: head_dim.unwrap_or(config.usize("hidden_size")? / query_heads),
        sliding_window: None,
    })
}

/// Cosines and sines of all positions, `[positions, head_dim / 2]`.
fn rotation(positions: usize, head_dim: usize, theta: f32) -> Result<(Tensor, Tensor)> {
    let frequencies = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f32 / head_dim as f32));
    let frequencies: Vec<f32> = frequencies.collect();
    let frequencies = Tensor::from_vec(frequencies, (1, head_dim / 2), &Device::Cpu)?;
    let positions = Tensor::arange(0f32, positions as f32, &Device::Cpu)?.unsqueeze(1)?;
    let angles = positions.matmul(&frequencies)?;
    Ok((angles.cos()?, angles.sin()?))
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, budget] = &arguments[..] else {
        anyhow::bail!("usage: layer MODEL TEXT BUDGET");
    };
    let budget = budget.parse().context("BUDGET")?;
    let checkpoint = Checkpoint::open(model)?;
    let tokenizer = checkpoint.dir().join("tokenizer.json");
    let tokenizer = Tokenizer::from_file(tokenizer).map_err(anyhow::Error::from_boxed)?;
    let text = std::fs::read_to_string(text).with_context(|| text.clone())?;
    let tokens = tokenizer
        .encode(text, false)
        .map_err(anyhow::Error::from_boxed)?;
    let tokens = &tokens.get_ids()[..TOKENS.min(tokens.len())];
    let attended = Attended::new(&checkpoint, tokens)?;
    let (full, bytes) = attended.decode("full", budget)?;
    println!(
        "{} tokens, {bytes} bytes of keys and values in the full cache",
        tokens.len()
    );
    let size = full.sqr()?.sum(D::Minus1)?.sum_all()?.to_scalar::<f32>()?;
    for policy in ["streaming", "h2o", "tova", "random", "lazy", "lazy-guarded"] {
        let (output, bytes) = attended.decode(policy, budget)?;
        let error = (output - &full)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
        println!(
            "{policy:13} {bytes:7} bytes, output error {:.4}",
            (error / size).sqrt()
        );
    }
    Ok(())
}
