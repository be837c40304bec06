//! A Llama in the style of candle-transformers, with kv-lazy as its cache: three lines of the attention block differ, marked below. Its logits are compared with those of
//! candle-transformers' own Llama on the same weights; then the cache evicts.
//!
//! candle-transformers keeps attention and cache of its models private, so that a model is adopted by changing a copy of its file.

use candle_core::{D, DType, Device, IndexOp, Module, Result, Tensor};
use candle_nn::{
    Embedding, Linear, RmsNorm, VarBuilder, VarMap, embedding, linear_no_bias, rms_norm,
};
use candle_transformers::models::llama;
use kv_lazy::{Budget, CacheConfig, LayerCache};

struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    // 1. The field: was `KvCache`, `ConcatKvCache` or a pair of tensors.
    kv_cache: LayerCache,
}

impl Attention {
    fn load(
        c: &llama::Config,
        cache: &CacheConfig,
        layer: usize,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let head_dim = c.hidden_size / c.num_attention_heads;
        let kv = c.num_key_value_heads * head_dim;
        let linear = |out, name| linear_no_bias(c.hidden_size, out, vb.pp(name));
        Ok(Self {
            q: linear(c.hidden_size, "q_proj")?,
            k: linear(kv, "k_proj")?,
            v: linear(kv, "v_proj")?,
            o: linear(c.hidden_size, "o_proj")?,
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads,
            head_dim,
            // 2. The constructor.
            kv_cache: LayerCache::new(cache, layer)?.for_append()?,
        })
    }

    fn forward(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let split = |x: Tensor, heads| {
            x.reshape((b, t, heads, self.head_dim))?
                .transpose(1, 2)?
                .contiguous()
        };
        let q = candle_nn::rotary_emb::rope(&split(self.q.forward(x)?, self.heads)?, cos, sin)?;
        let k = candle_nn::rotary_emb::rope(&split(self.k.forward(x)?, self.kv_heads)?, cos, sin)?;
        let v = split(self.v.forward(x)?, self.kv_heads)?;
        // 3. The call.
        let (k, v) = self.kv_cache.append(&k, &v)?;

        let n = k.dim(2)?;
        let group = self.heads / self.kv_heads;
        let repeat = |x: Tensor| {
            x.unsqueeze(2)?
                .broadcast_as((b, self.kv_heads, group, n, self.head_dim))?
                .reshape((b, self.heads, n, self.head_dim))
        };
        let (k, v) = (repeat(k)?, repeat(v)?);
        let scores = (q.matmul(&k.t()?)? / (self.head_dim as f64).sqrt())?;
        let scores = if t == 1 {
            scores
        } else {
            let mask =
                kv_lazy::bottom_right_mask(t, n, x.device())?.broadcast_as(scores.shape())?;
            let hidden = Tensor::full(f32::NEG_INFINITY, scores.shape(), x.device())?;
            mask.where_cond(&hidden, &scores)?
        };
        let y = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        self.o.forward(&y.transpose(1, 2)?.reshape((b, t, ()))?)
    }
}

struct Block {
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

struct Model {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
    cos: Tensor,
    sin: Tensor,
}

impl Model {
    fn load(c: &llama::Config, cache: &CacheConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let (h, f) = (c.hidden_size, c.intermediate_size);
        let block = |layer: usize| {
            let vb = vb.pp(format!("model.layers.{layer}"));
            Ok(Block {
                attention_norm: rms_norm(h, c.rms_norm_eps, vb.pp("input_layernorm"))?,
                attention: Attention::load(c, cache, layer, vb.pp("self_attn"))?,
                mlp_norm: rms_norm(h, c.rms_norm_eps, vb.pp("post_attention_layernorm"))?,
                gate: linear_no_bias(h, f, vb.pp("mlp.gate_proj"))?,
                up: linear_no_bias(h, f, vb.pp("mlp.up_proj"))?,
                down: linear_no_bias(f, h, vb.pp("mlp.down_proj"))?,
            })
        };
        let half = h / c.num_attention_heads / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| 1.0 / c.rope_theta.powf(i as f32 / half as f32))
            .collect();
        let positions = Tensor::arange(0u32, c.max_position_embeddings as u32, vb.device())?;
        let angles = positions
            .to_dtype(DType::F32)?
            .unsqueeze(1)?
            .matmul(&Tensor::from_vec(frequencies, (1, half), vb.device())?)?;
        Ok(Self {
            embedding: embedding(c.vocab_size, h, vb.pp("model.embed_tokens"))?,
            blocks: (0..c.num_hidden_layers).map(block).collect::<Result<_>>()?,
            norm: rms_norm(h, c.rms_norm_eps, vb.pp("model.norm"))?,
            head: linear_no_bias(h, c.vocab_size, vb.pp("lm_head"))?,
            cos: angles.cos()?,
            sin: angles.sin()?,
        })
    }

    /// Logits of the last token; `position` is the first token's.
    fn forward(&mut self, tokens: &[u32], position: usize) -> Result<Tensor> {
        let tokens = Tensor::new(tokens, self.cos.device())?.unsqueeze(0)?;
        let t = tokens.dim(1)?;
        let (cos, sin) = (
            self.cos.narrow(0, position, t)?,
            self.sin.narrow(0, position, t)?,
        );
        let mut x = self.embedding.forward(&tokens)?;
        for block in &mut self.blocks {
            let y = block.attention_norm.forward(&x)?;
            x = (x + block.attention.forward(&y, &cos, &sin)?)?;
            let y = block.mlp_norm.forward(&x)?;
            let y = (candle_nn::ops::silu(&block.gate.forward(&y)?)? * block.up.forward(&y)?)?;
            x = (x + block.down.forward(&y)?)?;
        }
        let last = self.norm.forward(&x.i((.., t - 1, ..))?)?;
        self.head.forward(&last)
    }
}

/// The prompt, then one token at a time: the logits of every step.
fn logits(
    tokens: &[u32],
    prompt: usize,
    mut step: impl FnMut(&[u32], usize) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let mut all = vec![step(&tokens[..prompt], 0)?];
    for position in prompt..tokens.len() {
        all.push(step(&tokens[position..position + 1], position)?);
    }
    Ok(all)
}

fn main() -> Result<()> {
    let device = Device::Cpu;
    let config = llama::Config {
        hidden_size: 64,
        intermediate_size: 128,
        vocab_size: 50,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        use_flash_attn: false,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: 512,
        tie_word_embeddings: false,
    };
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &device);
    let stock = llama::Llama::load(vb.clone(), &config)?;
    let tokens: Vec<u32> = (0..200).map(|i| i * i % 47).collect();

    let mut own_cache = llama::Cache::new(true, DType::F32, &config, &device)?;
    let want = logits(&tokens, 20, |tokens, position| {
        let tokens = Tensor::new(tokens, &device)?.unsqueeze(0)?;
        stock.forward(&tokens, position, &mut own_cache)
    })?;
    let run = |cache: &CacheConfig| {
        let mut model = Model::load(&config, cache, vb.clone())?;
        let got = logits(&tokens, 20, |tokens, position| {
            model.forward(tokens, position)
        })?;
        let mut far = 0f32;
        for (got, want) in got.iter().zip(&want) {
            far = far.max((got - want)?.abs()?.max_all()?.to_scalar()?);
        }
        let caches = model.blocks.iter().map(|block| &block.attention.kv_cache);
        let (seen, held) = caches
            .clone()
            .next()
            .map_or((0, 0), |c| (c.current_seq_len(), c.len()));
        let bytes: usize = caches.map(LayerCache::bytes).sum();
        println!(
            "{}: {seen} tokens seen, {held} held, {bytes} bytes, logits within {far:.1e} of stock",
            cache.decode
        );
        Ok::<_, candle_core::Error>((far, held))
    };
    let (far, held) = run(&CacheConfig::new("full".parse()?, Budget::Tokens(512)))?;
    assert!(
        far < 1e-4 && held == 200,
        "the full cache is the stock model"
    );
    let (_, held) = run(&CacheConfig::new("keydiff".parse()?, Budget::Tokens(64)))?;
    assert!(held < 64 + 16, "the cache stays small");
    Ok(())
}
