//! Where a decoder is stored: names of its tensors, and which rows of a stored tensor are which linear.
//!
//! A block's linears are parts of stored modules. Most modules are one linear; some architectures stack several in one
//! tensor (`qkv_proj`, `gate_up_proj`) or interleave them head by head (`query_key_value`). Everything that reads or
//! writes tensors goes through the tables here; no other file knows a name.

mod tables;

pub(crate) use tables::*;

use std::fmt;
use std::ops::Range;

/// The linears of a decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum LinearName {
    /// Query projection, `[heads * head_dim, hidden]`; with twice the rows where it also projects a gate.
    Q,
    /// Key projection, `[kv_heads * head_dim, hidden]`.
    K,
    /// Value projection, `[kv_heads * head_dim, hidden]`.
    V,
    /// Attention output, `[hidden, heads * head_dim]`.
    O,
    /// Queries, keys and values of a delta net, `[2 * key_heads * key_dim + value_heads * value_dim, hidden]`.
    DeltaQkv,
    /// Gate of a delta net's output, `[value_heads * value_dim, hidden]`.
    DeltaZ,
    /// How much of a value a delta net writes, `[value_heads, hidden]`.
    DeltaB,
    /// How much of its state a delta net forgets, `[value_heads, hidden]`.
    DeltaA,
    /// Output of a delta net, `[hidden, value_heads * value_dim]`.
    DeltaOut,
    /// Gate of the MLP, `[neurons, hidden]`.
    Gate,
    /// Up projection of the MLP, `[neurons, hidden]`.
    Up,
    /// Down projection of the MLP, `[hidden, neurons]`.
    Down,
    /// Gate of the expert that every token passes through.
    SharedGate,
    /// Up projection of that expert.
    SharedUp,
    /// Down projection of that expert.
    SharedDown,
}

impl LinearName {
    /// Those of attention and of an MLP that is no expert, in the order of the data.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Those of a delta net, in the order of the data.
    pub const DELTA_NET: [Self; 5] = [
        Self::DeltaQkv,
        Self::DeltaZ,
        Self::DeltaB,
        Self::DeltaA,
        Self::DeltaOut,
    ];

    /// Whether it writes to the residual stream: o_proj, out_proj and down_proj.
    pub fn is_output(self) -> bool {
        matches!(
            self,
            Self::O | Self::DeltaOut | Self::Down | Self::SharedDown
        )
    }

    /// Whether it belongs to attention, or to the delta net in its place, and not to the MLP.
    pub fn is_attention(self) -> bool {
        matches!(self, Self::Q | Self::K | Self::V | Self::O) || self.is_delta_net()
    }

    /// Whether it belongs to a delta net.
    pub fn is_delta_net(self) -> bool {
        Self::DELTA_NET.contains(&self)
    }

    /// Whether it belongs to the expert that every token passes through.
    pub fn is_shared(self) -> bool {
        matches!(self, Self::SharedGate | Self::SharedUp | Self::SharedDown)
    }
}

impl fmt::Display for LinearName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::DeltaQkv => "in_proj_qkv",
            Self::DeltaZ => "in_proj_z",
            Self::DeltaB => "in_proj_b",
            Self::DeltaA => "in_proj_a",
            Self::DeltaOut => "out_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
            Self::SharedGate => "shared gate_proj",
            Self::SharedUp => "shared up_proj",
            Self::SharedDown => "shared down_proj",
        })
    }
}

/// How the rows of a module's parts lie in its tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// One part below the other.
    Stacked,
    /// The rows of one head of each part in turn, head by head.
    PerHead,
}

/// A stored weight, and bias where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Module {
    /// Path within the block, without `.weight`.
    pub path: &'static str,
    /// The linears in it.
    pub parts: &'static [LinearName],
    /// How their rows lie in it.
    pub rows: Rows,
}

impl Module {
    const fn one(path: &'static str, part: &'static [LinearName; 1]) -> Self {
        Self {
            path,
            parts: part,
            rows: Rows::Stacked,
        }
    }

    const fn stacked(path: &'static str, parts: &'static [LinearName]) -> Self {
        Self {
            path,
            parts,
            rows: Rows::Stacked,
        }
    }

    /// Whether it writes to the residual stream.
    pub fn is_output(&self) -> bool {
        self.parts[0].is_output()
    }

    /// Whether it belongs to attention, or to the delta net in its place.
    pub fn is_attention(&self) -> bool {
        self.parts[0].is_attention()
    }

    /// Whether it belongs to a delta net.
    pub fn is_delta_net(&self) -> bool {
        self.parts[0].is_delta_net()
    }
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.path.rsplit('.').next().unwrap_or(self.path))
    }
}

/// Rows of one part that follow each other in a stored module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The linear that they belong to.
    pub part: LinearName,
    /// Which of its rows they are.
    pub rows: Range<usize>,
    /// The first of them in the stored module.
    pub at: usize,
}

/// Names of one architecture.
#[derive(Debug, PartialEq, Eq)]
pub struct Table {
    /// Where the decoder is in a checkpoint of its own.
    pub prefix: &'static str,
    /// Embedding.
    pub embedding: &'static str,
    /// Norm before the head.
    pub final_norm: &'static str,
    /// Output head, the names that it may have.
    pub heads: &'static [&'static str],
    /// Linears of a block, attention first.
    pub modules: &'static [Module],
    /// Norm before attention.
    pub attention_before: Option<&'static str>,
    /// Norm after attention, before its output is added.
    pub attention_after: Option<&'static str>,
    /// Norm before the MLP.
    pub mlp_before: Option<&'static str>,
    /// Norm after the MLP.
    pub mlp_after: Option<&'static str>,
    /// Norm of queries.
    pub q_norm: &'static str,
    /// Norm of keys.
    pub k_norm: &'static str,
    /// What delta nets have beside linears.
    pub delta: Option<DeltaNames>,
    /// Experts of a mixture.
    pub experts: Option<ExpertNames>,
    /// What the names of tensors begin with that stand beside the decoder in a checkpoint of its own too, and are not read.
    pub beside: &'static [&'static str],
}

/// Names of the tensors that delta nets have beside linears.
#[derive(Debug, PartialEq, Eq)]
pub struct DeltaNames {
    /// Causal convolution of each channel, `[channels, 1, kernel]`.
    pub conv: &'static str,
    /// Logarithm of the rate at which a head forgets, `[value_heads]`.
    pub log_decay: &'static str,
    /// What is added to the time step of a head, `[value_heads]`.
    pub dt_bias: &'static str,
    /// Weight of the norm of a head's output, `[value_dim]`.
    pub norm: &'static str,
}

/// Names of the experts of a block.
#[derive(Debug, PartialEq, Eq)]
pub struct ExpertNames {
    /// Where each expert has tensors of its own.
    pub alone: Option<AloneNames>,
    /// Where one tensor holds all experts.
    pub fused: FusedNames,
    /// Gate of the expert that every token passes through.
    pub shared_gate: &'static str,
    /// Constants in the place of experts, in either form.
    pub novices: &'static str,
}

/// Names of experts with tensors of their own.
#[derive(Debug, PartialEq, Eq)]
pub struct AloneNames {
    /// Router.
    pub router: &'static str,
    /// What stands before an expert's number.
    pub before: &'static str,
    /// What stands behind it for gate, up and down.
    pub linears: [&'static str; 3],
}

/// Names of tensors that hold all experts.
#[derive(Debug, PartialEq, Eq)]
pub struct FusedNames {
    /// Router.
    pub router: &'static str,
    /// Gate above up, `[experts, 2 * width, hidden]`.
    pub gate_up: &'static str,
    /// Down, `[experts, hidden, width]`.
    pub down: &'static str,
}

/// How a checkpoint stores experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertLayout {
    /// Each expert has tensors of its own.
    Alone,
    /// One tensor holds all experts of a block.
    Fused,
}

/// Where a checkpoint has a linear of an expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertPart {
    /// Name of the tensor.
    pub tensor: String,
    /// Its rows, when all dimensions of the tensor but the last are taken as rows.
    pub rows: Range<usize>,
    /// Length of a row.
    pub columns: usize,
}

/// Where the text decoder is in the folder of a model of several modalities.
const PREFIXES: [&str; 2] = ["language_model.model.", "model.language_model."];
/// The head of such a folder.
const INNER_HEAD: &str = "language_model.lm_head.weight";

/// Names of the tensors of one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    table: &'static Table,
    prefix: &'static str,
    head: &'static str,
    layout: ExpertLayout,
}

impl Names {
    pub(crate) fn new(table: &'static Table) -> Self {
        Self {
            table,
            prefix: table.prefix,
            head: table.heads[0],
            layout: match &table.experts {
                Some(ExpertNames { alone: None, .. }) => ExpertLayout::Fused,
                _ => ExpertLayout::Alone,
            },
        }
    }

    /// The same in a checkpoint that stores experts in another way; `None` where the architecture does not have it.
    pub fn with_layout(self, layout: ExpertLayout) -> Option<Self> {
        let names = self.table.experts.as_ref()?;
        let exists = layout == ExpertLayout::Fused || names.alone.is_some();
        exists.then_some(Self { layout, ..self })
    }

    /// How experts are stored.
    pub fn layout(&self) -> ExpertLayout {
        self.layout
    }

    /// Name of the router of block `layer`, `[experts, hidden]`; `None` for architectures without experts.
    pub fn router(&self, layer: usize) -> Option<String> {
        let names = self.table.experts.as_ref()?;
        let router = match (self.layout, &names.alone) {
            (ExpertLayout::Alone, Some(alone)) => alone.router,
            _ => names.fused.router,
        };
        Some(self.block(layer, &format!("{router}.weight")))
    }

    /// Name of the gate of the expert that every token of block `layer` passes through, `[1, hidden]`.
    pub fn shared_gate(&self, layer: usize) -> Option<String> {
        let names = self.table.experts.as_ref()?;
        Some(self.block(layer, &format!("{}.weight", names.shared_gate)))
    }

    /// Name of the constants that router rows of block `layer` may stand for, `[constants, hidden]`
    /// ([`ExpertMap`](crate::config::ExpertMap)); `None` for architectures without experts.
    pub fn novices(&self, layer: usize) -> Option<String> {
        let names = self.table.experts.as_ref()?;
        Some(self.block(layer, &format!("{}.weight", names.novices)))
    }

    /// The names under which a checkpoint really has a model of so many layers.
    pub(crate) fn located(self, layers: usize, contains: impl Fn(&str) -> bool) -> Self {
        let prefix = std::iter::once(self.table.prefix)
            .chain(PREFIXES)
            .find(|prefix| contains(&format!("{prefix}{}", self.table.embedding)))
            .unwrap_or(self.prefix);
        let layout = match &self.table.experts {
            Some(names) if names.alone.is_some() => {
                let fused = format!(".{}", names.fused.gate_up);
                let found =
                    (0..layers).any(|layer| contains(&format!("{prefix}layers.{layer}{fused}")));
                match found {
                    true => ExpertLayout::Fused,
                    false => ExpertLayout::Alone,
                }
            }
            _ => self.layout,
        };
        let heads = self.table.heads.iter().copied().chain([INNER_HEAD]);
        let head = heads.into_iter().find(|head| contains(head));
        Self {
            prefix,
            head: head.unwrap_or(self.head),
            layout,
            ..self
        }
    }

    /// The same in the folder of a model of several modalities.
    pub(crate) fn nested(self) -> Self {
        Self {
            prefix: PREFIXES[0],
            ..self
        }
    }

    /// The name that a tensor of the decoder has in a checkpoint of its own; `None` for tensors of other parts.
    pub fn alone(&self, name: &str) -> Option<String> {
        if name == self.head {
            return Some(self.table.heads[0].into());
        }
        let inside = name.strip_prefix(self.prefix)?;
        Some(format!("{}{inside}", self.table.prefix))
    }

    /// Whether a tensor stands beside the decoder: in a folder of several modalities all but the decoder's own, elsewhere those
    /// that the architecture's checkpoints carry along.
    pub fn is_beside(&self, name: &str, nested: bool) -> bool {
        let of_others = nested && !name.starts_with(self.prefix);
        of_others || self.is_extra(name)
    }

    /// Whether a tensor belongs to what an architecture carries beside its decoder and that shares the decoder's widths, such as
    /// blocks that predict several tokens.
    pub fn is_extra(&self, name: &str) -> bool {
        let beside = self.table.beside.iter();
        beside.into_iter().any(|prefix| name.starts_with(prefix))
    }

    /// Names within blocks.
    pub fn table(&self) -> &'static Table {
        self.table
    }

    /// Embedding, `[vocab, hidden]`.
    pub fn embedding(&self) -> String {
        format!("{}{}", self.prefix, self.table.embedding)
    }

    /// Weight or bias of the norm before the head, `[hidden]`.
    pub(crate) fn final_norm(&self, kind: &str) -> String {
        format!("{}{}.{kind}", self.prefix, self.table.final_norm)
    }

    /// Weight of the norm before the head, `[hidden]`.
    pub fn final_norm_weight(&self) -> String {
        self.final_norm("weight")
    }

    /// Output head, `[vocab, hidden]`; absent or unused when tied to the embedding.
    pub fn head(&self) -> &'static str {
        self.head
    }

    /// What the names of the decoder's tensors begin with, the head's excepted.
    pub fn prefix(&self) -> &'static str {
        self.prefix
    }

    /// Name of a tensor of block `layer`.
    pub fn block(&self, layer: usize, path: &str) -> String {
        format!("{}layers.{layer}.{path}", self.prefix)
    }

    /// Block and path of a tensor name, if it belongs to a block.
    pub fn parse_block<'n>(&self, name: &'n str) -> Option<(usize, &'n str)> {
        let inside = name.strip_prefix(self.prefix)?.strip_prefix("layers.")?;
        let (layer, path) = inside.split_once('.')?;
        Some((layer.parse().ok()?, path))
    }

    /// The stored module of a linear; `None` where the architecture has no such linear.
    pub fn module_of(&self, linear: LinearName) -> Option<&'static Module> {
        let modules = self.table.modules.iter();
        modules.into_iter().find(|m| m.parts.contains(&linear))
    }

    /// Name of a module's weight in block `layer`.
    pub fn weight(&self, layer: usize, module: &Module) -> String {
        self.block(layer, &format!("{}.weight", module.path))
    }

    /// Name of a module's bias in block `layer`.
    pub fn bias(&self, layer: usize, module: &Module) -> String {
        self.block(layer, &format!("{}.bias", module.path))
    }

    /// A module of block `block`.
    pub fn id(&self, block: usize, module: &'static Module) -> ModuleId {
        ModuleId {
            block,
            module,
            prefix: self.prefix,
        }
    }

    /// The module that a tensor belongs to, its block, and whether it is the weight.
    pub fn parse_module(&self, name: &str) -> Option<(usize, &'static Module, bool)> {
        let (layer, path) = self.parse_block(name)?;
        let (path, kind) = path.rsplit_once('.')?;
        let module = self.table.modules.iter().find(|m| m.path == path)?;
        matches!(kind, "weight" | "bias").then_some((layer, module, kind == "weight"))
    }
}

/// A stored module of a block, shown as its path: `model.layers.3.mlp.down_proj`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ModuleId {
    block: usize,
    module: &'static Module,
    prefix: &'static str,
}

impl ModuleId {
    /// The module with this path, in whatever architecture has one.
    pub fn parse(path: &str) -> Option<Self> {
        let prefixes = TABLES.iter().map(|table| table.prefix).chain(PREFIXES);
        let mut parsed = prefixes.filter_map(|prefix| {
            let inside = path.strip_prefix(prefix)?.strip_prefix("layers.")?;
            let (block, path) = inside.split_once('.')?;
            let block = block.parse().ok()?;
            let modules = TABLES.iter().flat_map(|table| table.modules);
            let module = modules.into_iter().find(|module| module.path == path)?;
            Some(Self {
                block,
                module,
                prefix,
            })
        });
        parsed.next()
    }

    /// Its block.
    pub fn block(self) -> usize {
        self.block
    }

    /// Where it is stored in the block.
    pub fn module(self) -> &'static Module {
        self.module
    }
}

impl fmt::Display for ModuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}layers.{}.{}",
            self.prefix, self.block, self.module.path
        )
    }
}

impl Ord for ModuleId {
    /// By block, then in the order of the data.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let key = |id: &Self| (id.block, id.module.parts, id.module.path, id.prefix);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for ModuleId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_under_which_the_checkpoint_has_the_embedding_and_the_head() {
        let names = Names::new(&LLAMA);
        let inner = names.located(4, |name| name == "model.language_model.embed_tokens.weight");
        assert_eq!(inner.block(3, "x"), "model.language_model.layers.3.x");
        assert_eq!(inner.head(), "lm_head.weight");
        let outer = names.located(4, |name| {
            name == "language_model.model.embed_tokens.weight" || name == INNER_HEAD
        });
        assert_eq!(outer.head(), INNER_HEAD);
        let pythia = Names::new(&GPT_NEOX).located(4, |name| name == "lm_head.weight");
        assert_eq!(pythia.head(), "lm_head.weight");
        assert_eq!(pythia.embedding(), "gpt_neox.embed_in.weight");
    }

    #[test]
    fn the_layout_of_experts_is_the_one_whose_names_the_checkpoint_has() {
        let names = Names::new(&MIXTRAL);
        let alone = names.located(2, |_| false);
        assert_eq!(alone.layout(), ExpertLayout::Alone);
        let router = "model.layers.1.block_sparse_moe.gate.weight";
        assert_eq!(alone.router(1).as_deref(), Some(router));
        let fused = names.located(2, |name| name == "model.layers.1.mlp.experts.gate_up_proj");
        assert_eq!(
            fused.router(0).as_deref(),
            Some("model.layers.0.mlp.gate.weight")
        );
        assert_eq!(alone.with_layout(ExpertLayout::Fused), Some(fused));
        let granite = Names::new(&GRANITE_MOE);
        assert_eq!(granite.layout(), ExpertLayout::Fused);
        assert_eq!(granite.with_layout(ExpertLayout::Alone), None);
        assert_eq!(Names::new(&LLAMA).router(0), None);
    }

    #[test]
    fn a_module_is_found_by_its_name_and_by_its_parts() {
        let names = Names::new(&PHI3);
        let (layer, module, weight) = names
            .parse_module("model.layers.12.self_attn.qkv_proj.weight")
            .unwrap();
        assert_eq!(
            (layer, module.path, weight),
            (12, "self_attn.qkv_proj", true)
        );
        assert_eq!(names.module_of(LinearName::V), Some(module));
        assert_eq!(Names::new(&GPT_NEOX).module_of(LinearName::Gate), None);
        assert_eq!(
            names.parse_module("model.layers.1.input_layernorm.weight"),
            None
        );
        assert_eq!(names.parse_module("model.norm.weight"), None);
    }
}
