//! Sites: what of a model gets one treatment.

use crate::{Error, Result};
use causal_lm::names::Module;
use causal_lm::{Decoder, LinearName};
use lowrank_eora::repair::LayerId;
use prune_structured::divergence::Place;
use prune_structured::stats::Part;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A part of a model that gets one treatment. Shown and serialised as `embedding`, `attention.3`, `mlp.3`, `experts.3`,
/// `shared-expert.3` or `head`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Site {
    /// The embedding, which is also the head where the two are tied.
    Embedding,
    /// q, k, v and o of a block, or the linears of the delta net in its place.
    Attention(usize),
    /// gate, up and down of a block.
    Mlp(usize),
    /// gate, up and down of all experts of a block. The router stays as it is.
    Experts(usize),
    /// gate, up and down of the expert that every token passes through. Its gate stays as it is.
    SharedExpert(usize),
    /// The head, where it is a matrix of its own.
    Head,
}

impl Site {
    /// The sites of a model, in the order of the data.
    pub fn of(decoder: &Decoder<'_>) -> Vec<Self> {
        let config = decoder.config();
        let mut sites = vec![Self::Embedding];
        for (layer, widths) in config.widths.iter().enumerate() {
            if widths.heads > 0 || config.delta_nets[layer].is_some() {
                sites.push(Self::Attention(layer));
            }
            if widths.neurons > 0 {
                sites.push(Self::Mlp(layer));
            }
            if let Some(mixture) = config.mixtures[layer] {
                sites.push(Self::Experts(layer));
                if mixture.shared > 0 {
                    sites.push(Self::SharedExpert(layer));
                }
            }
        }
        if !config.tied {
            sites.push(Self::Head);
        }
        sites
    }

    /// Its block and half; `None` for the embedding and the head.
    pub fn half(self) -> Option<(usize, Part)> {
        match self {
            Self::Attention(layer) => Some((layer, Part::Attention)),
            Self::Mlp(layer) | Self::Experts(layer) | Self::SharedExpert(layer) => {
                Some((layer, Part::Mlp))
            }
            Self::Embedding | Self::Head => None,
        }
    }

    /// Where it is for comparisons.
    pub fn place(self) -> Place {
        match (self, self.half()) {
            (_, Some((layer, _))) => Place::Block(layer),
            (Self::Head, None) => Place::Head,
            (_, None) => Place::Embedding,
        }
    }

    /// Its stored linears, of which one may hold the rows of several, by the first of these; none for the embedding and the head, and none for experts, which the modules of a block do not
    /// list.
    pub(crate) fn linears(
        self,
        decoder: &Decoder<'_>,
    ) -> Vec<(LinearName, LayerId, &'static Module)> {
        let Some((layer, part)) = self.half() else {
            return Vec::new();
        };
        let config = decoder.config();
        let modules = config.names.table().modules.iter();
        let shared = matches!(self, Self::SharedExpert(_));
        let of_half = modules.filter(|module| {
            module.is_attention() == (part == Part::Attention)
                && module.parts[0].is_shared() == shared
                && !matches!(self, Self::Experts(_))
        });
        let stored = of_half.filter(|module| config.module_shape(layer, module).is_some());
        stored
            .map(|module| (module.parts[0], LayerId::new(config, layer, module), module))
            .collect()
    }

    /// Name of the matrix of the embedding or the head in the checkpoint.
    pub(crate) fn matrix(self, decoder: &Decoder<'_>) -> Option<String> {
        match self {
            Self::Embedding => Some(decoder.config().names.embedding()),
            Self::Head => Some(decoder.config().names.head().to_string()),
            _ => None,
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::Attention(layer) => write!(f, "attention.{layer}"),
            Self::Mlp(layer) => write!(f, "mlp.{layer}"),
            Self::Experts(layer) => write!(f, "experts.{layer}"),
            Self::SharedExpert(layer) => write!(f, "shared-expert.{layer}"),
            Self::Head => f.write_str("head"),
        }
    }
}

impl From<Site> for String {
    fn from(site: Site) -> Self {
        site.to_string()
    }
}

impl TryFrom<String> for Site {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        let number = |text: &str| text.parse().ok();
        let found = match name.split_once('.') {
            None if name == "embedding" => Some(Self::Embedding),
            None if name == "head" => Some(Self::Head),
            Some(("attention", layer)) => number(layer).map(Self::Attention),
            Some(("mlp", layer)) => number(layer).map(Self::Mlp),
            Some(("experts", layer)) => number(layer).map(Self::Experts),
            Some(("shared-expert", layer)) => number(layer).map(Self::SharedExpert),
            _ => None,
        };
        found.ok_or(Error::Name {
            what: "site",
            name,
            expected: "embedding, attention.N, mlp.N, experts.N, shared-expert.N or head",
        })
    }
}
