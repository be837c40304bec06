//! How a set is built: each layer's policies, storage and store.

use super::layer::Layer;
use super::{CacheSet, LayerShape, START};
use crate::attention::Geometry;
use crate::error::{Error, Result};
use crate::policy::{Budget, CacheConfig, Evictor, Policy, PolicyConfig, Positions, Prompt};
use crate::quantise::{self, StorageConfig};
use crate::store::{DeviceStore, HostStore, PackedDeviceStore, Store};
use candle_core::{DType, Device};

impl CacheSet {
    /// Caches that keep every token, stored as `dtype` (f32, f16 or bf16) on `device`.
    ///
    /// # Errors
    /// Query heads that do not divide over the KV heads; other dtypes.
    pub fn full(
        layers: &[LayerShape],
        batch: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let storage = |_| Ok(StorageConfig::default());
        let place = Whole::of(layers, batch, dtype, device);
        Self::build(&place, |_, _| Ok(Vec::new()), storage)
    }

    /// Caches that evict as `config` says, stored as `dtype` (f32, f16 or bf16) on `device`.
    ///
    /// # Errors
    /// As [`full`](Self::full); a budget below sinks + recent + 1, windows of zero, settings out of range; the oracle, which
    /// needs the future.
    pub fn new(
        layers: &[LayerShape],
        batch: usize,
        dtype: DType,
        device: &Device,
        config: &CacheConfig,
    ) -> Result<Self> {
        Self::of(&Whole::of(layers, batch, dtype, device), config)
    }

    /// The cache of one layer alone, of that index.
    pub(crate) fn of_layer(
        layer: usize,
        shape: LayerShape,
        (batch, dtype, device): (usize, DType, &Device),
        config: &CacheConfig,
        external: bool,
    ) -> Result<Self> {
        let layers = [shape];
        let whole = Whole {
            first: layer,
            external,
            ..Whole::of(&layers, batch, dtype, device)
        };
        Self::of(&whole, config)
    }

    /// The cache of one layer alone, of that index, for one sequence in f32; `policy` stands in for the one that `config` names.
    #[cfg(feature = "trace")]
    pub(crate) fn replaying(
        layer: usize,
        shape: LayerShape,
        config: &CacheConfig,
        policy: Option<&dyn Policy>,
    ) -> Result<Self> {
        let layers = [shape];
        let whole = Whole {
            first: layer,
            policy,
            ..Whole::of(&layers, 1, DType::F32, &Device::Cpu)
        };
        Self::of(&whole, config)
    }

    fn of(whole: &Whole<'_>, config: &CacheConfig) -> Result<Self> {
        config.check()?;
        let evictors = |layer: usize, shape: &LayerShape| {
            if config.keeps_all() {
                return Ok(Vec::new());
            }
            let budget = config.layer_budget(layer)?;
            let policy = match whole.policy {
                Some(policy) => config.combine(policy.boxed_clone(), budget)?,
                None => config.build(budget)?,
            };
            let shared = config.shared_budget;
            Evictor::for_batch(policy.as_ref(), budget, layer, whole.batch, shape, shared)
        };
        let storage = |layer| config.storage_of(layer).copied();
        let configured = Whole {
            config: Some(config),
            ..*whole
        };
        let mut set = Self::build(&configured, evictors, storage)?;
        let elsewhere = whole.external || !whole.device.is_cpu();
        if elsewhere && config.shared_budget.is_some() {
            return Err(Error::Setting {
                name: "shared-budget",
                value: "tensors".into(),
                expected: "a cache on the CPU that computes the attention itself: rows of different lengths are no tensor",
            });
        }
        if config.positions == Positions::Consecutive {
            let streaming = matches!(config.decode, PolicyConfig::Streaming(_));
            let prefill = config.prefill.as_ref();
            let streaming = streaming
                && prefill.is_none_or(|p| matches!(p, PolicyConfig::Streaming(_)))
                && config
                    .prompt
                    .is_none_or(|prompt| prompt == Prompt::Evictable)
                && config.guard_values == 0;
            if !streaming || elsewhere {
                return Err(Error::Setting {
                    name: "positions",
                    value: "consecutive".into(),
                    expected: "the policy `streaming` without values or a prompt kept, in a cache on the CPU that computes the attention itself",
                });
            }
            let mut windows = whole.layers.iter().filter_map(|layer| layer.sliding_window);
            if let Some(window) = windows.next() {
                return Err(Error::Setting {
                    name: "positions",
                    value: format!("consecutive, with a sliding window of {window}"),
                    expected: "layers without a sliding window, which masks by the positions of the text",
                });
            }
        }
        for layer in &mut set.layers {
            layer.set_rotary(config.rotary_of(layer.index))?;
            if config.positions == Positions::Consecutive {
                layer.move_sinks(config.storage_of(layer.index)?)?;
            }
        }
        set.config = Some(config.clone());
        Ok(set)
    }

    /// Caches under a policy of your own: `policy` gives each layer's policy and budget; it is cloned per sequence and KV head.
    ///
    /// # Errors
    /// As [`new`](Self::new), and whatever `policy` returns.
    pub fn with_policies(
        layers: &[LayerShape],
        batch: usize,
        dtype: DType,
        device: &Device,
        policy: impl Fn(usize) -> Result<(Box<dyn Policy>, Budget)>,
    ) -> Result<Self> {
        Self::with_policies_and_storage(layers, batch, dtype, device, |layer| {
            let (policy, budget) = policy(layer)?;
            Ok((policy, budget, StorageConfig::default()))
        })
    }

    /// As [`with_policies`](Self::with_policies), with each layer's storage.
    ///
    /// # Errors
    /// As [`new`](Self::new), and whatever `policy` returns.
    pub fn with_policies_and_storage(
        layers: &[LayerShape],
        batch: usize,
        dtype: DType,
        device: &Device,
        policy: impl Fn(usize) -> Result<(Box<dyn Policy>, Budget, StorageConfig)>,
    ) -> Result<Self> {
        let evictors = |layer: usize, shape: &LayerShape| {
            let (policy, budget, _) = policy(layer)?;
            Evictor::for_batch(policy.as_ref(), budget, layer, batch, shape, None)
        };
        let storage = |layer| policy(layer).map(|(_, _, storage)| storage);
        Self::build(&Whole::of(layers, batch, dtype, device), evictors, storage)
    }

    /// Caches for attention computed elsewhere, by [`extend`](Self::extend), which sees neither attention weights nor queries.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::NeedUnavailable`] for a policy that needs weights or queries.
    pub fn external(
        layers: &[LayerShape],
        batch: usize,
        dtype: DType,
        device: &Device,
        config: &CacheConfig,
    ) -> Result<Self> {
        let whole = Whole {
            external: true,
            ..Whole::of(layers, batch, dtype, device)
        };
        let set = Self::of(&whole, config)?;
        for layer in &set.layers {
            layer.check_elsewhere(|| config.decode.to_string())?;
        }
        Ok(set)
    }

    /// Numbers the sequences of the batch from `first` on, in place of 0: policies that draw then draw the same for a sequence of a larger
    /// run, however it is cut into batches.
    ///
    /// # Errors
    /// [`Error::NotReset`] once there are tokens.
    pub fn numbered_from(mut self, first: usize) -> Result<Self> {
        if self.clock.next > 0 {
            return Err(Error::NotReset {
                held: self.logical_len(),
            });
        }
        for layer in &mut self.layers {
            layer.number_from(first, self.batch);
        }
        Ok(self)
    }

    fn build(
        whole: &Whole<'_>,
        evictors: impl Fn(usize, &LayerShape) -> Result<Vec<Evictor>>,
        storage: impl Fn(usize) -> Result<StorageConfig>,
    ) -> Result<Self> {
        let Whole {
            batch,
            dtype,
            device,
            ..
        } = *whole;
        let layers = whole
            .layers
            .iter()
            .zip(whole.first..)
            .map(|(&shape, index)| {
                let (evictors, storage) = if shape.kv_heads > 0 {
                    (evictors(index, &shape)?, storage(index)?)
                } else {
                    (Vec::new(), StorageConfig::default())
                };
                let (layout, mut most) = laid_out(&evictors, &storage, shape, dtype)?;
                if let (Some(config), []) = (whole.config, evictors.as_slice()) {
                    most = config.expected(index);
                }
                let evicts = !evictors.is_empty() || shape.sliding_window.is_some();
                if layout.shares_scales() && (evicts || !device.is_cpu()) {
                    return Err(Error::Setting {
                        name: "key-groups",
                        value: format!("per-channel in layer {index}"),
                        expected: match evicts {
                            true => {
                                "per-token wherever tokens are evicted or leave a sliding window"
                            }
                            false => "per-token on devices other than the CPU",
                        },
                    });
                }
                let store = new_store(index, shape, (layout, most), whole)?;
                Ok(Layer::new(index, shape, store, layout, evictors))
            })
            .collect::<Result<_>>()?;
        let device = device.clone();
        Ok(Self {
            layers,
            batch,
            dtype,
            device,
            config: None,
            clock: START,
            #[cfg(feature = "trace")]
            recorder: None,
            held: 0,
            peak: 0,
        })
    }
}

/// What a set is built for.
#[derive(Clone, Copy)]
struct Whole<'a> {
    layers: &'a [LayerShape],
    /// Index of the first of the layers.
    first: usize,
    batch: usize,
    dtype: DType,
    device: &'a Device,
    /// Attention is computed elsewhere, over tensors.
    external: bool,
    /// What it is built from, unless the policies are the caller's own.
    config: Option<&'a CacheConfig>,
    /// A policy in place of the one that the configuration names.
    policy: Option<&'a dyn Policy>,
}

impl<'a> Whole<'a> {
    fn of(layers: &'a [LayerShape], batch: usize, dtype: DType, device: &'a Device) -> Self {
        Self {
            layers,
            first: 0,
            batch,
            dtype,
            device,
            external: false,
            config: None,
            policy: None,
        }
    }
}

/// How the rows of a layer are stored under its policies, and how many tokens each is to hold at most.
pub(super) fn laid_out(
    evictors: &[Evictor],
    storage: &StorageConfig,
    shape: LayerShape,
    dtype: DType,
) -> Result<(quantise::Layout, usize)> {
    let Some(evictor) = evictors.first() else {
        return Ok((storage.layout(shape.head_dim, dtype, 0)?, usize::MAX));
    };
    let layout = storage.layout(shape.head_dim, dtype, evictor.recent())?;
    let most = if evictor.shares() {
        usize::MAX
    } else {
        evictor.most()
    };
    Ok((layout.evicting(evictor.protected()), most))
}

fn new_store(
    layer: usize,
    shape: LayerShape,
    (layout, most): (quantise::Layout, usize),
    whole: &Whole<'_>,
) -> Result<Box<dyn Store>> {
    let Whole {
        batch,
        dtype,
        device,
        external,
        ..
    } = *whole;
    let LayerShape {
        query_heads,
        kv_heads,
        head_dim,
        ..
    } = shape;
    if kv_heads > 0 && head_dim == 0 {
        return Err(Error::Setting {
            name: "head_dim",
            value: "0".into(),
            expected: "at least one element",
        });
    }
    if shape.sliding_window == Some(0) {
        return Err(Error::ZeroWindow {
            name: "sliding_window",
        });
    }
    if kv_heads > 0 && (query_heads == 0 || query_heads % kv_heads != 0) {
        return Err(Error::HeadGroups {
            layer,
            query_heads,
            kv_heads,
        });
    }
    let rows = match batch.checked_mul(kv_heads) {
        Some(rows) if batch > 0 => rows,
        _ => {
            return Err(Error::Setting {
                name: "batch",
                value: batch.to_string(),
                expected: "at least one sequence, and no more than can be counted with their heads",
            });
        }
    };
    let geometry = Geometry {
        group: query_heads.checked_div(kv_heads).unwrap_or(1),
        head_dim,
    };
    Ok(match device {
        // What is handed out as tensors is best kept as tensors.
        device if external && layout.residual.is_none() => {
            Box::new(DeviceStore::new(rows, geometry, layout, dtype, device))
        }
        Device::Cpu => {
            let store = HostStore::new(rows, geometry, layout, dtype, most);
            Box::new(match whole.config.is_some_and(CacheConfig::keeps_all) {
                true => store.keeping_all(),
                false => store,
            })
        }
        device if layout.residual.is_some() => Box::new(PackedDeviceStore::new(
            rows, geometry, layout, dtype, device,
        )),
        device => Box::new(DeviceStore::new(rows, geometry, layout, dtype, device)),
    })
}
