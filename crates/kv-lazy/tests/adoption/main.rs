//! What a model of candle-transformers changes to adopt the crate: an attention block of each kind of cache that those models have, before and after. The README shows the lines that differ.

use candle_core::{D, DType, Device, Result, Tensor};
use kv_lazy::{Budget, CacheConfig, bottom_right_mask};

/// Query heads, KV heads and elements of a head.
const HEADS: (usize, usize, usize) = (4, 2, 16);
const SCALE: f64 = 0.25;

struct Config {
    max_position_embeddings: usize,
}

const CONFIG: Config = Config {
    max_position_embeddings: 64,
};

/// Attention as models write it: heads repeated, a causal mask, softmax.
fn causal(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let ((heads, kv_heads, d), n) = (HEADS, k.dim(2)?);
    let repeat = |x: &Tensor| {
        x.unsqueeze(2)?
            .broadcast_as((1, kv_heads, heads / kv_heads, n, d))?
            .reshape((1, heads, n, d))
    };
    let scores = (q.matmul(&repeat(k)?.t()?)? * SCALE)?;
    let mask = bottom_right_mask(q.dim(2)?, n, q.device())?;
    let hidden = Tensor::full(f32::NEG_INFINITY, scores.shape(), q.device())?;
    let scores = mask
        .broadcast_as(scores.shape())?
        .where_cond(&hidden, &scores)?;
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&repeat(v)?)
}

/// A block's attention after RoPE.
trait Block {
    fn forward(&mut self, q: &Tensor, k: Tensor, v: Tensor) -> Result<Tensor>;
}

/// qwen3, qwen3_moe, quantized_qwen3_moe.
mod concat {
    pub(super) mod stock {
        use crate::{Block, causal};
        use candle_core::{Result, Tensor};
        use candle_nn::kv_cache::ConcatKvCache;

        pub(crate) struct Attention {
            kv_cache: ConcatKvCache,
        }

        impl Attention {
            pub(crate) fn new() -> Self {
                Self {
                    kv_cache: ConcatKvCache::new(2),
                }
            }
        }

        impl Block for Attention {
            fn forward(&mut self, q: &Tensor, k: Tensor, v: Tensor) -> Result<Tensor> {
                let (k, v) = self.kv_cache.append(&k, &v)?;
                causal(q, &k, &v)
            }
        }
    }

    pub(super) mod adopted {
        use crate::{Block, causal};
        use candle_core::{Result, Tensor};
        use kv_lazy::{CacheConfig, LayerCache};

        pub(crate) struct Attention {
            kv_cache: LayerCache,
        }

        impl Attention {
            pub(crate) fn new(cache: &CacheConfig, layer: usize) -> Result<Self> {
                Ok(Self {
                    kv_cache: LayerCache::new(cache, layer)?,
                })
            }

            pub(crate) fn held(&self) -> usize {
                self.kv_cache.len()
            }
        }

        impl Block for Attention {
            fn forward(&mut self, q: &Tensor, k: Tensor, v: Tensor) -> Result<Tensor> {
                let (k, v) = self.kv_cache.append(&k, &v)?;
                causal(q, &k, &v)
            }
        }
    }
}

/// glm4_new, quantized_glm4, quantized_phi3, smollm3, qwen3_vl: adopted as the kind before.
mod preallocated {
    use crate::{Block, Config, causal};
    use candle_core::{Result, Tensor};
    use candle_nn::kv_cache::KvCache;

    pub(super) struct Attention {
        kv_cache: KvCache,
    }

    impl Attention {
        pub(super) fn new(cfg: &Config) -> Self {
            Self {
                kv_cache: KvCache::new(2, cfg.max_position_embeddings),
            }
        }
    }

    impl Block for Attention {
        fn forward(&mut self, q: &Tensor, k: Tensor, v: Tensor) -> Result<Tensor> {
            let (k, v) = self.kv_cache.append(&k.contiguous()?, &v.contiguous()?)?;
            causal(q, &k, &v)
        }
    }
}

/// qwen2, mistral, mixtral, phi3, olmo2, gemma, gemma2, quantized_llama, quantized_qwen2: a pair of tensors.
mod pair {
    use crate::{Block, causal};
    use candle_core::{Result, Tensor};

    #[derive(Default)]
    pub(super) struct Attention {
        kv_cache: Option<(Tensor, Tensor)>,
    }

    impl Block for Attention {
        fn forward(&mut self, q: &Tensor, k: Tensor, v: Tensor) -> Result<Tensor> {
            let (k, v) = match &self.kv_cache {
                None => (k, v),
                Some((past_k, past_v)) => (
                    Tensor::cat(&[past_k, &k], 2)?,
                    Tensor::cat(&[past_v, &v], 2)?,
                ),
            };
            self.kv_cache = Some((k.clone(), v.clone()));
            causal(q, &k, &v)
        }
    }
}

/// quantized_qwen3, quantized_smollm3, and whatever is to have every policy or quantised storage read as it is: attention included.
mod fused {
    use crate::{Block, SCALE};
    use candle_core::{Result, Tensor};
    use kv_lazy::{CacheConfig, LayerCache};

    pub(super) struct Attention {
        kv_cache: LayerCache,
    }

    impl Attention {
        pub(super) fn new(cache: &CacheConfig, layer: usize) -> Result<Self> {
            let kv_cache = LayerCache::new(cache, layer)?;
            Ok(Self { kv_cache })
        }

        pub(super) fn held(&self) -> usize {
            self.kv_cache.len()
        }
    }

    impl Block for Attention {
        fn forward(&mut self, q: &Tensor, k: Tensor, v: Tensor) -> Result<Tensor> {
            self.kv_cache.attend(q, &k, &v, SCALE)
        }
    }
}

/// gemma3, gemma4: layers of full attention adopt, local ones keep their window.
mod local {
    use crate::{Block, causal};
    use candle_core::{Result, Tensor};
    use candle_nn::kv_cache::RotatingKvCache;
    use kv_lazy::{CacheConfig, LayerCache};

    pub(super) enum KvCache {
        Normal(LayerCache),
        Rotating(RotatingKvCache),
    }

    pub(super) struct Attention {
        kv_cache: KvCache,
    }

    impl Attention {
        pub(super) fn new(
            cache: &CacheConfig,
            layer: usize,
            sliding_window: Option<usize>,
        ) -> Result<Self> {
            let kv_cache = match sliding_window {
                Some(window) => KvCache::Rotating(RotatingKvCache::new(2, window)),
                None => KvCache::Normal(LayerCache::new(cache, layer)?),
            };
            Ok(Self { kv_cache })
        }
    }

    impl Block for Attention {
        fn forward(&mut self, q: &Tensor, k: Tensor, v: Tensor) -> Result<Tensor> {
            let (k, v) = match &mut self.kv_cache {
                KvCache::Normal(cache) => cache.append(&k, &v)?,
                KvCache::Rotating(cache) => cache.append(&k.contiguous()?, &v.contiguous()?)?,
            };
            causal(q, &k, &v)
        }
    }
}

/// llama: the caches of all layers together, outside the model.
mod outside {
    use crate::{HEADS, causal};
    use candle_core::{DType, Device, Result, Tensor};
    use kv_lazy::{CacheConfig, CacheSet, LayerShape};

    pub(super) struct Cache {
        kvs: CacheSet,
    }

    impl Cache {
        pub(super) fn new(layers: usize, config: &CacheConfig) -> Result<Self> {
            let (query_heads, kv_heads, head_dim) = HEADS;
            let shape = LayerShape {
                query_heads,
                kv_heads,
                head_dim,
                sliding_window: None,
            };
            let shapes = vec![shape; layers];
            let kvs = CacheSet::external(&shapes, 1, DType::F32, &Device::Cpu, config)?;
            Ok(Self { kvs })
        }

        pub(super) fn held(&self, layer: usize) -> usize {
            self.kvs.physical_len(layer)
        }
    }

    /// All layers on the same input.
    pub(super) fn forward(
        cache: &mut Cache,
        layers: usize,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
    ) -> Result<Vec<Tensor>> {
        cache.kvs.begin(q.dim(2)?)?;
        let attention = |layer: usize| {
            let (k, v) = cache.kvs.extend(layer, k, v)?;
            causal(q, &k, &v)
        };
        (0..layers).map(attention).collect()
    }
}

fn steps() -> Result<Vec<(Tensor, Tensor, Tensor)>> {
    let (heads, kv_heads, d) = HEADS;
    let step = |tokens: usize| {
        let of = |heads| Tensor::randn(0f32, 1.0, (1, heads, tokens, d), &Device::Cpu);
        Ok((of(heads)?, of(kv_heads)?, of(kv_heads)?))
    };
    [20, 1, 1, 1, 1, 1, 1, 1, 1].map(step).into_iter().collect()
}

fn full() -> CacheConfig {
    CacheConfig::new("full".parse().unwrap(), Budget::Tokens(64))
}

fn keydiff() -> CacheConfig {
    CacheConfig::new("keydiff".parse().unwrap(), Budget::Tokens(16))
}

fn numbers(x: &Tensor) -> Vec<f32> {
    let x = x.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    x.to_vec1().unwrap()
}

#[test]
fn a_full_cache_gives_what_every_kind_of_cache_gave() {
    let mut stock: [Box<dyn Block>; 3] = [
        Box::new(concat::stock::Attention::new()),
        Box::new(preallocated::Attention::new(&CONFIG)),
        Box::new(pair::Attention::default()),
    ];
    let mut adopted: [Box<dyn Block>; 2] = [
        Box::new(concat::adopted::Attention::new(&full(), 0).unwrap()),
        Box::new(local::Attention::new(&full(), 0, None).unwrap()),
    ];
    let mut fused = fused::Attention::new(&full(), 0).unwrap();
    let mut outside = outside::Cache::new(2, &full()).unwrap();
    for (q, k, v) in steps().unwrap() {
        let forward =
            |block: &mut Box<dyn Block>| numbers(&block.forward(&q, k.clone(), v.clone()).unwrap());
        let want = forward(&mut stock[0]);
        for block in stock[1..].iter_mut().chain(&mut adopted) {
            assert_eq!(forward(block), want);
        }
        let layers = outside::forward(&mut outside, 2, (&q, &k, &v)).unwrap();
        assert!(layers.iter().all(|layer| numbers(layer) == want));
        let got = numbers(&fused.forward(&q, k.clone(), v.clone()).unwrap());
        let far = got.iter().zip(&want).map(|(a, b)| (a - b).abs());
        assert!(far.fold(0.0, f32::max) < 1e-5);
    }
}

#[test]
fn a_policy_bounds_what_every_kind_of_cache_holds() {
    let mut appended = concat::adopted::Attention::new(&keydiff(), 0).unwrap();
    let mut fused = fused::Attention::new(&keydiff(), 0).unwrap();
    let mut outside = outside::Cache::new(2, &keydiff()).unwrap();
    let mut local = local::Attention::new(&keydiff(), 0, Some(8)).unwrap();
    for (q, k, v) in steps().unwrap() {
        let one = appended.forward(&q, k.clone(), v.clone()).unwrap();
        let layers = outside::forward(&mut outside, 2, (&q, &k, &v)).unwrap();
        let other = fused.forward(&q, k.clone(), v.clone()).unwrap();
        assert_eq!(numbers(&one), numbers(&layers[0]));
        let far = numbers(&one).into_iter().zip(numbers(&other));
        assert!(far.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-5);
        if q.dim(2).unwrap() == 1 {
            local.forward(&q, k, v).unwrap();
        }
    }
    // The budget, and the tokens until the next eviction.
    for held in [appended.held(), fused.held(), outside.held(1)] {
        assert!((16..20).contains(&held), "{held}");
    }
}

#[test]
fn the_lines_that_the_readme_adds_are_those_that_are_tested() {
    let (readme, here) = (include_str!("../../README.md"), include_str!("main.rs"));
    let code: Vec<&str> = here.lines().map(str::trim).collect();
    let mut shown = 0;
    for block in readme.split("```diff\n").skip(1) {
        let block = block.split("```").next().unwrap();
        for line in block.lines().filter_map(|line| line.strip_prefix('+')) {
            let line = line.trim();
            assert!(code.contains(&line), "{line}");
            shown += 1;
        }
    }
    assert_eq!(shown, 8);
}
