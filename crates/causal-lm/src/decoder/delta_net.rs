//! The delta net of a block.

use super::{Decoder, taken};
use crate::Result;
use crate::block::{DeltaNet, Norm};
use crate::config::{DeltaNetConfig, NormKind};
use crate::linear::Linear;
use crate::names::{DeltaNames, LinearName};
use crate::{Error, names};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

impl Decoder<'_> {
    /// Loads the delta net of block `layer`, whose linears are among `linears`.
    pub(super) fn delta_net(
        &self,
        layer: usize,
        shape: DeltaNetConfig,
        linears: &mut BTreeMap<LinearName, Linear>,
    ) -> Result<DeltaNet> {
        let names: &names::Names = &self.config.names;
        let DeltaNames {
            conv,
            log_decay,
            dt_bias,
            norm,
        } = names.table().delta.as_ref().ok_or(Error::InvalidConfig {
            field: "layer_types",
            reason: format!("layer {layer}: the architecture has no delta nets"),
        })?;
        // Whatever the model is computed in: the recurrence is in f32.
        let load = |path: &str| -> Result<Tensor> {
            let name = names.block(layer, path);
            Ok(self.checkpoint.tensor_as(&name, DType::F32, &Device::Cpu)?)
        };
        Ok(DeltaNet {
            shape,
            qkv: taken(linears, LinearName::DeltaQkv)?,
            z: taken(linears, LinearName::DeltaZ)?,
            b: taken(linears, LinearName::DeltaB)?,
            a: taken(linears, LinearName::DeltaA)?,
            out: taken(linears, LinearName::DeltaOut)?,
            conv: load(conv)?.squeeze(1)?.t()?.contiguous()?,
            log_decay: load(log_decay)?,
            dt_bias: load(dt_bias)?,
            norm: Norm {
                kind: NormKind::Rms,
                weight: load(norm)?,
                bias: None,
                eps: self.config.norm.eps,
            },
        })
    }
}
