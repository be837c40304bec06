"""Opens a checkpoint whose layers differ in width, as listed in config.json under per_layer_widths:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The stock model is built first, then each projection is replaced by one of its layer's own shape, and each mixture of
experts by one with its layer's own number and width of experts. Where a layer has an expert_map, its router keeps a row for
each entry: several rows may share an expert, and entries from the number of experts on are constants.
"""

import copy

import torch
from torch import nn
from transformers import BASE

# Modules of a layer, and the projections that each of them stacks.
MODULES = {}
# Whether queries come with as many rows of a gate.
GATED = False


def split(layer, path):
    """The module that holds the one at `path`, and its name in it."""
    *parents, name = path.split(".")
    for parent in parents:
        layer = getattr(layer, parent)
    return layer, name


def module_of(part):
    return next(path for path, parts in MODULES.items() if part in parts)


def resized(old, inputs, outputs, bias):
    return nn.Linear(inputs, outputs, bias=bias, device=old.weight.device, dtype=old.weight.dtype)


class Constant(nn.Module):
    """What is left of an output projection without inputs: its bias, or nothing."""

    def __init__(self, old, bias):
        super().__init__()
        new = old.weight.new_empty(old.out_features) if bias else None
        self.bias = None if new is None else nn.Parameter(new)

    def forward(self, hidden_states):
        zeros = torch.zeros_like(hidden_states)
        return zeros if self.bias is None else zeros + self.bias


class NoAttention(nn.Module):
    """Stands where a layer has no attention; keeps the cache's count of positions right."""

    def __init__(self, old, output, bias):
        super().__init__()
        self.layer_idx, self.output = old.layer_idx, output
        setattr(self, output, Constant(getattr(old, output), bias))

    def forward(self, hidden_states, past_key_values=None, layer_past=None, **kwargs):
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            batch, tokens, _ = hidden_states.shape
            blank = hidden_states.new_zeros(batch, 1, tokens, 1)
            cache.update(blank, blank, self.layer_idx)
        return getattr(self, self.output)(hidden_states), None


class NoMlp(nn.Module):
    """Stands where a layer has no MLP."""

    def __init__(self, old, output, bias):
        super().__init__()
        self.output = output
        setattr(self, output, Constant(getattr(old, output), bias))

    def forward(self, hidden_states):
        return getattr(self, self.output)(hidden_states)


def resize(layer, half, widths, biases):
    """Gives the projections of attention or MLP their widths: outputs of each, inputs of the last."""
    for path, parts in MODULES.items():
        if parts[0] not in half:
            continue
        parent, name = split(layer, path)
        old = getattr(parent, name)
        if old is None:
            # Values that are the keys have no projection.
            continue
        if parts[0] in biases:
            new = resized(old, widths[parts[0]], old.out_features, biases[parts[0]])
        else:
            new = resized(old, old.in_features, sum(widths[part] for part in parts), old.bias is not None)
        setattr(parent, name, new)


def attention(layer, config, heads, kv_heads, bias):
    output = module_of("o")
    holder, name = output.rsplit(".", 1)
    parent, child = split(layer, holder)
    old = getattr(parent, child, None)
    if old is None:
        # A layer with linear attention in its place.
        return
    if heads == 0:
        setattr(parent, child, NoAttention(old, name, bias))
        return
    size = old.head_dim if hasattr(old, "head_dim") else config.head_dim
    per_query = 2 * size if GATED else size
    rows = {"q": heads * per_query, "k": kv_heads * size, "v": kv_heads * size, "o": heads * size}
    resize(layer, ("q", "k", "v", "o"), rows, {"o": bias})
    old.config = copy.copy(old.config)
    old.config.num_attention_heads, old.config.num_key_value_heads = heads, kv_heads
    counts = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    counts["num_key_value_groups"] = heads // kv_heads
    for field, value in counts.items():
        if hasattr(old, field):
            setattr(old, field, value)


def mlp(layer, neurons, bias):
    output = module_of("down")
    holder, name = output.rsplit(".", 1)
    parent, child = split(layer, holder)
    if neurons == 0:
        setattr(parent, child, NoMlp(getattr(parent, child), name, bias))
        return
    widths = {"gate": neurons, "up": neurons, "down": neurons}
    resize(layer, ("gate", "up", "down"), widths, {"down": bias})


class Mapped:
    """Goes in front of a stock class of experts: what it is handed are rows of the router."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        ids = torch.tensor(self.ids, device=top_k_index.device)[top_k_index]
        constant = ids >= self.num_experts
        # Two rows of one expert add up, each with its own gate; a constant runs no expert.
        gates = top_k_weights.masked_fill(constant, 0)
        output = super().forward(hidden_states, ids.masked_fill(constant, 0), gates)
        if self.novices is None:
            return output
        vectors = self.novices.weight[(ids - self.num_experts).clamp(min=0)]
        gates = top_k_weights.masked_fill(~constant, 0).to(vectors.dtype)
        return output + (gates.unsqueeze(-1) * vectors).sum(-2).to(output.dtype)


def map_rows(block, wide, ids):
    """Lets rows of a router share experts or stand for constants; `wide` is a block with as many rows."""
    experts = getattr(block, "experts", None)
    if not hasattr(experts, "num_experts") or isinstance(experts, nn.ModuleList):
        raise ImportError("an expert_map needs transformers 5, whose experts are one module")
    router = "gate" if hasattr(block, "gate") else "router"
    setattr(block, router, getattr(wide, router))
    constants = max(ids) + 1 - experts.num_experts
    novices = None
    if constants > 0:
        like = next(experts.parameters())
        novices = nn.Embedding(constants, experts.hidden_dim, device=like.device, dtype=like.dtype)
        block.novices = novices
    experts.__class__ = type("MappedExperts", (Mapped, type(experts)), {})
    # Not a child of the experts: their parameters keep their names.
    experts.__dict__["novices"] = novices
    experts.ids = tuple(ids)


def mixture(layer, config, experts, width, ids):
    name = "mlp" if hasattr(layer, "mlp") else "block_sparse_moe"
    old = getattr(layer, name)
    like = next(old.parameters())

    def block(experts, width):
        own = copy.deepcopy(config)
        for field in ("num_experts", "num_local_experts"):
            if hasattr(own, field):
                setattr(own, field, experts)
        field = "moe_intermediate_size" if hasattr(own, "moe_intermediate_size") else "intermediate_size"
        setattr(own, field, width)
        return type(old)(own).to(device=like.device, dtype=like.dtype)

    new = block(experts, width)
    if ids != list(range(experts)):
        map_rows(new, block(len(ids), 1), ids)
    setattr(layer, name, new)


class PrunedForCausalLM(BASE):
    def __init__(self, config):
        super().__init__(config)
        widths = config.per_layer_widths
        for index, layer in enumerate(self.base_model.layers):
            heads, kv_heads = (widths[field][index] for field in ("num_attention_heads", "num_key_value_heads"))
            attention(layer, config, heads, kv_heads, widths["o_proj_bias"])
            experts = widths["num_experts"][index] if "num_experts" in widths else 0
            if experts:
                ids = widths["expert_map"][index] if "expert_map" in widths else list(range(experts))
                mixture(layer, config, experts, widths["expert_size"][index], ids)
            else:
                mlp(layer, widths["intermediate_size"][index], widths["down_proj_bias"])

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        # Stock classes rename the head of GPT-NeoX when they load it; classes of other files have to say so.
        kwargs.setdefault("key_mapping", {r"^embed_out\.": "lm_head."})
        return super().from_pretrained(*args, **kwargs)
