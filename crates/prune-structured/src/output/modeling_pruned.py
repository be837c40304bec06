"""Opens a checkpoint whose layers differ in width, as listed in config.json under per_layer_widths:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The stock model is built first, then each projection is replaced by one of its layer's own shape, and each mixture of
experts by one with its layer's own number and width of experts.
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


def mixture(layer, config, experts, width):
    name = "mlp" if hasattr(layer, "mlp") else "block_sparse_moe"
    own = copy.deepcopy(config)
    for field in ("num_experts", "num_local_experts"):
        if hasattr(own, field):
            setattr(own, field, experts)
    field = "moe_intermediate_size" if hasattr(own, "moe_intermediate_size") else "intermediate_size"
    setattr(own, field, width)
    old = getattr(layer, name)
    like = next(old.parameters())
    setattr(layer, name, type(old)(own).to(device=like.device, dtype=like.dtype))


class PrunedForCausalLM(BASE):
    def __init__(self, config):
        super().__init__(config)
        widths = config.per_layer_widths
        for index, layer in enumerate(self.base_model.layers):
            heads, kv_heads = (widths[field][index] for field in ("num_attention_heads", "num_key_value_heads"))
            attention(layer, config, heads, kv_heads, widths["o_proj_bias"])
            experts = widths["num_experts"][index] if "num_experts" in widths else 0
            if experts:
                mixture(layer, config, experts, widths["expert_size"][index])
            else:
                mlp(layer, widths["intermediate_size"][index], widths["down_proj_bias"])

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        # Stock classes rename the head of GPT-NeoX when they load it; classes of other files have to say so.
        kwargs.setdefault("key_mapping", {r"^embed_out\.": "lm_head."})
        return super().from_pretrained(*args, **kwargs)
