//! What mixes the tokens of a sequence in a block.

use crate::block::{Attention, Half, Norm};
use crate::delta_net::DeltaNet;
use crate::linear::Linear;
use crate::names::LinearName;

/// What stands before the MLP of a block.
#[derive(Clone, Debug)]
pub enum TokenMixer {
    /// Attention.
    Attention(Attention),
    /// A recurrence in its place.
    DeltaNet(DeltaNet),
}

impl TokenMixer {
    /// The attention; `None` for a delta net.
    pub fn attention(&self) -> Option<&Attention> {
        match self {
            Self::Attention(attention) => Some(attention),
            Self::DeltaNet(_) => None,
        }
    }

    /// The attention, to be changed.
    pub fn attention_mut(&mut self) -> Option<&mut Attention> {
        match self {
            Self::Attention(attention) => Some(attention),
            Self::DeltaNet(_) => None,
        }
    }

    /// The projection that writes to the residual stream.
    pub fn output(&self) -> &Linear {
        match self {
            Self::Attention(attention) => &attention.o,
            Self::DeltaNet(net) => &net.out,
        }
    }

    /// One of its linears; `None` where it has no such linear.
    pub fn linear(&self, name: LinearName) -> Option<&Linear> {
        match (self, name) {
            (Self::Attention(attention), LinearName::Q) => Some(&attention.q),
            (Self::Attention(attention), LinearName::K) => Some(&attention.k),
            (Self::Attention(attention), LinearName::V) => attention.v.as_ref(),
            (Self::Attention(attention), LinearName::O) => Some(&attention.o),
            (Self::DeltaNet(net), LinearName::DeltaQkv) => Some(&net.qkv),
            (Self::DeltaNet(net), LinearName::DeltaZ) => Some(&net.z),
            (Self::DeltaNet(net), LinearName::DeltaB) => Some(&net.b),
            (Self::DeltaNet(net), LinearName::DeltaA) => Some(&net.a),
            (Self::DeltaNet(net), LinearName::DeltaOut) => Some(&net.out),
            _ => None,
        }
    }

    /// The same, to be changed.
    pub fn linear_mut(&mut self, name: LinearName) -> Option<&mut Linear> {
        match (self, name) {
            (Self::Attention(attention), LinearName::Q) => Some(&mut attention.q),
            (Self::Attention(attention), LinearName::K) => Some(&mut attention.k),
            (Self::Attention(attention), LinearName::V) => attention.v.as_mut(),
            (Self::Attention(attention), LinearName::O) => Some(&mut attention.o),
            (Self::DeltaNet(net), LinearName::DeltaQkv) => Some(&mut net.qkv),
            (Self::DeltaNet(net), LinearName::DeltaZ) => Some(&mut net.z),
            (Self::DeltaNet(net), LinearName::DeltaB) => Some(&mut net.b),
            (Self::DeltaNet(net), LinearName::DeltaA) => Some(&mut net.a),
            (Self::DeltaNet(net), LinearName::DeltaOut) => Some(&mut net.out),
            _ => None,
        }
    }

    /// Bytes of its weights in memory.
    pub fn bytes(&self) -> usize {
        let linears = LinearName::ALL.into_iter().chain(LinearName::DELTA_NET);
        let linears = linears.filter_map(|name| self.linear(name));
        let norms = match self {
            Self::Attention(a) => [&a.q_norm, &a.k_norm, &a.v_norm]
                .into_iter()
                .flatten()
                .map(Norm::bytes)
                .sum(),
            Self::DeltaNet(net) => net.small_bytes(),
        };
        linears.map(Linear::bytes).sum::<usize>() + norms
    }
}

impl Half<TokenMixer> {
    /// The attention; `None` where there is none, or a delta net in its place.
    pub fn attention(&self) -> Option<&Attention> {
        self.body.as_ref()?.attention()
    }
}
