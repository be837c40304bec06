"""Makes the golden files beside it: logits that transformers computes for tiny decoders.

    python make.py [NAME ...]        # needs torch and transformers

Every weight comes from a formula, so no weight file is needed: x0 = FNV-1a 64 of the tensor's
name; for each entry in row-major order x = 6364136223846793005 x + 1442695040888963407 mod 2^64
and e = 2 (x >> 11) / 2^53 - 1. Norms are 1 + 0.1 e, biases 0.1 e, the embedding e, everything
else e / sqrt(last dimension).
"""

import json
import math
import pathlib
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = [1, 17, 5, 33, 8, 21, 39, 2, 12, 30, 7, 26]


def entries(name, shape):
    x = 0xCBF29CE484222325
    for byte in name.encode():
        x = ((x ^ byte) * 0x100000001B3) % 2**64
    values = []
    for _ in range(math.prod(shape)):
        x = (6364136223846793005 * x + 1442695040888963407) % 2**64
        e = 2 * ((x >> 11) / 2**53) - 1
        if name.endswith("norm.weight"):
            e = 1 + 0.1 * e
        elif name.endswith(".bias"):
            e = 0.1 * e
        elif "embed_tokens" not in name:
            e = e / math.sqrt(shape[-1])
        values.append(e)
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(torch.float32)


def llama(**changes):
    config = dict(model_type="llama", hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                  num_attention_heads=4, num_key_value_heads=2, vocab_size=40, max_position_embeddings=128,
                  rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False,
                  rope_parameters=dict(rope_type="default", rope_theta=10000.0), bos_token_id=1, eos_token_id=2)
    config.update(changes)
    return {key: value for key, value in config.items() if value is not None}


CASES = {
    "llama-gqa": llama(),
    "llama-mha-tied": llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama-bias-headdim16": llama(attention_bias=True, mlp_bias=True, head_dim=16),
    "llama3-rope": llama(rope_parameters=dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
    "llama-rope-linear-old": llama(rope_parameters=None, rope_theta=5000.0,
                                   rope_scaling=dict(type="linear", factor=2.5)),
    "llama-rope-yarn": llama(rope_parameters=dict(
        rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)),
    "llama-rope-yarn-old": llama(rope_parameters=None, rope_theta=1000.0, rope_scaling=dict(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=16.0, beta_slow=2.0,
        mscale=1.0, mscale_all_dim=0.5, truncate=False)),
    "mistral-window4": llama(model_type="mistral", sliding_window=4),
    "qwen2": llama(model_type="qwen2"),
    "qwen2-window4-upper-layers": llama(model_type="qwen2", use_sliding_window=True, sliding_window=4,
                                        max_window_layers=1),
    "qwen3": llama(model_type="qwen3", head_dim=16),
    "qwen3-layer-types": llama(model_type="qwen3", head_dim=16, attention_bias=True, use_sliding_window=True,
                               sliding_window=3,
                               layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "smollm3-layer-types": llama(model_type="smollm3", pad_token_id=0, use_sliding_window=True, sliding_window=4,
                                 no_rope_layers=[1, 0, 1],
                                 layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    # One head of keys is as wide as their whole projection.
    "olmoe-mqa-clip": llama(model_type="olmoe", num_key_value_heads=1, clip_qkv=0.4, intermediate_size=24,
                            num_experts=6, num_experts_per_tok=2),
}


def main():
    folder = pathlib.Path(__file__).parent
    for name, config in CASES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        parsed = AutoConfig.for_model(**config)
        model = AutoModelForCausalLM.from_config(parsed, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(entries(key, parameter.shape))
            out = model(torch.tensor([TOKENS]), output_hidden_states=True)
            logits = out.logits[0]
            nll = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(TOKENS[1:])).item()
        golden = dict(made_with=dict(torch=torch.__version__, transformers=transformers.__version__), config=config,
                      tokens=TOKENS, mean_nll=round(nll, 8),
                      first_block_last_row=[round(v, 6) for v in out.hidden_states[1][0, -1].tolist()],
                      logits=[[round(v, 6) for v in row] for row in logits.tolist()])
        if any(key.endswith("experts.gate_up_proj") for key, _ in model.named_parameters()):
            golden["layout"] = "fused"
        (folder / f"{name}.json").write_text(json.dumps(golden) + "\n")
        print(name, round(nll, 6))


if __name__ == "__main__":
    main()
