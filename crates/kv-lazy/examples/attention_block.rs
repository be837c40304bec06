//! An attention block of one's own on top of kv-lazy: projections, RoPE, and a cache that evicts.

use candle_core::{DType, Device, IndexOp, Module, Result, Tensor};
use candle_nn::rotary_emb::rope;
use candle_nn::{Linear, VarBuilder, VarMap, linear_no_bias};
use kv_lazy::{Budget, CacheConfig, CacheSet, LayerShape};

struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    shape: LayerShape,
}

impl Attention {
    fn new(dim: usize, shape: LayerShape, vb: VarBuilder<'_>) -> Result<Self> {
        let (q, kv) = (
            shape.query_heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
        );
        Ok(Self {
            q: linear_no_bias(dim, q, vb.pp("q"))?,
            k: linear_no_bias(dim, kv, vb.pp("k"))?,
            v: linear_no_bias(dim, kv, vb.pp("v"))?,
            o: linear_no_bias(q, dim, vb.pp("o"))?,
            shape,
        })
    }

    /// `x` `[B, T, dim]`; `rotation` is (cos, sin) of the step's positions, `[T, head_dim / 2]`.
    fn forward(
        &self,
        x: &Tensor,
        layer: usize,
        (cos, sin): (&Tensor, &Tensor),
        cache: &mut CacheSet,
    ) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let d = self.shape.head_dim;
        let heads = |x: Tensor| x.reshape((b, t, (), d))?.transpose(1, 2)?.contiguous();
        let q = rope(&heads(self.q.forward(x)?)?, cos, sin)?;
        let k = rope(&heads(self.k.forward(x)?)?, cos, sin)?;
        let v = heads(self.v.forward(x)?)?;
        let y = cache.attend(layer, &q, &k, &v, 1.0 / (d as f64).sqrt())?;
        self.o.forward(&y.transpose(1, 2)?.reshape((b, t, ()))?)
    }
}

/// Angles of all positions: `[positions, head_dim / 2]` cosines and sines.
fn rotations(positions: usize, d: usize) -> Result<(Tensor, Tensor)> {
    let frequencies: Vec<f32> = (0..d / 2)
        .map(|i| 10000f32.powf(-(2.0 * i as f32) / d as f32))
        .collect();
    let frequencies = Tensor::from_vec(frequencies, (1, d / 2), &Device::Cpu)?;
    let positions = Tensor::arange(0f32, positions as f32, &Device::Cpu)?.unsqueeze(1)?;
    let angles = positions.matmul(&frequencies)?;
    Ok((angles.cos()?, angles.sin()?))
}

fn main() -> Result<()> {
    let (dim, layers, device) = (64, 3, Device::Cpu);
    let shape = LayerShape {
        query_heads: 4,
        kv_heads: 2,
        head_dim: 16,
        sliding_window: None,
    };
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &device);
    let blocks: Vec<Attention> = (0..layers)
        .map(|layer| Attention::new(dim, shape, vb.pp(layer)))
        .collect::<Result<_>>()?;
    let (cos, sin) = rotations(512, shape.head_dim)?;

    let config = CacheConfig::new("lazy-guarded".parse()?, Budget::Tokens(64));
    let mut cache = CacheSet::new(&vec![shape; layers], 1, DType::BF16, &device, &config)?;
    let mut x = Tensor::randn(0f32, 1.0, (1, 20, dim), &device)?;
    for _ in 0..300 {
        let step = cache.begin(x.dim(1)?)?;
        let positions = step.position..step.position + step.tokens;
        let rotation = (&cos.i(positions.clone())?, &sin.i(positions)?);
        for (layer, block) in blocks.iter().enumerate() {
            x = (&x + block.forward(&x, layer, rotation, &mut cache)?)?;
        }
        // A model would normalise, mix and sample here; the last position stands in for the next token.
        let last = x.i((.., x.dim(1)? - 1.., ..))?;
        x = last.broadcast_div(&last.sqr()?.mean_keepdim(2)?.sqrt()?)?;
    }
    println!(
        "{} positions seen, {} held per head, {} bytes of keys and values, {} of state",
        cache.logical_len(),
        cache.physical_len(0),
        cache.bytes(),
        cache.state_bytes(),
    );
    Ok(())
}
