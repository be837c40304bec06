"""Opens a checkpoint whose layers differ in width, as listed in config.json under per_layer_widths:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The stock model is built first, then each projection is replaced by one of its layer's own shape.
"""

import torch
from torch import nn
from transformers import BASE


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

    def __init__(self, old, bias):
        super().__init__()
        self.layer_idx = old.layer_idx
        self.o_proj = Constant(old.o_proj, bias)

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        if past_key_values is not None:
            batch, tokens, _ = hidden_states.shape
            blank = hidden_states.new_zeros(batch, 1, tokens, 1)
            past_key_values.update(blank, blank, self.layer_idx)
        return self.o_proj(hidden_states), None


class NoMlp(nn.Module):
    """Stands where a layer has no MLP."""

    def __init__(self, old, bias):
        super().__init__()
        self.down_proj = Constant(old.down_proj, bias)

    def forward(self, hidden_states):
        return self.down_proj(hidden_states)


class PrunedForCausalLM(BASE):
    def __init__(self, config):
        super().__init__(config)
        widths = config.per_layer_widths
        hidden, head_dim = config.hidden_size, config.head_dim
        for index, layer in enumerate(self.model.layers):
            heads = widths["num_attention_heads"][index]
            kv_heads = widths["num_key_value_heads"][index]
            neurons = widths["intermediate_size"][index]
            if heads == 0:
                layer.self_attn = NoAttention(layer.self_attn, widths["o_proj_bias"])
            else:
                attention = layer.self_attn
                for name, outputs in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
                    old = getattr(attention, name)
                    setattr(attention, name, resized(old, hidden, outputs * head_dim, old.bias is not None))
                attention.o_proj = resized(attention.o_proj, heads * head_dim, hidden, widths["o_proj_bias"])
                attention.num_key_value_groups = heads // kv_heads
            if neurons == 0:
                layer.mlp = NoMlp(layer.mlp, widths["down_proj_bias"])
            else:
                mlp = layer.mlp
                for name in ("gate_proj", "up_proj"):
                    old = getattr(mlp, name)
                    setattr(mlp, name, resized(old, hidden, neurons, old.bias is not None))
                mlp.down_proj = resized(mlp.down_proj, neurons, hidden, widths["down_proj_bias"])
