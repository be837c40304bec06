"""What all peers share: the model, the windows, the walk through its blocks and the perplexity, as `cargo xtask eval` has
them. Decoders with Llama's names (Llama, Mistral, Qwen 2 and 3, SmolLM)."""

import argparse
import json
import math
import pathlib
import resource
import time

import tokenizers
import torch
import transformers

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def arguments(**more):
    """Flags of a peer that compresses a model; `more` are its own with their defaults."""
    parser = argparse.ArgumentParser()
    for name in ("model", "text", "calib"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    return flags


def load(folder):
    """The model in f32, without gradients."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def windows(folder, text, length):
    """Consecutive windows of a text, each BOS and `length - 1` tokens where the tokenizer has one; the rest is dropped."""
    folder = pathlib.Path(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    named = json.loads((folder / "tokenizer_config.json").read_text()).get("bos_token")
    named = named["content"] if isinstance(named, dict) else named
    bos = [] if named is None else [tokenizer.token_to_id(named)]
    ids = tokenizer.encode(pathlib.Path(text).read_text(), add_special_tokens=False).ids
    own = length - len(bos)
    return torch.tensor([bos + ids[at:at + own] for at in range(0, len(ids) - own + 1, own)])


class Walk:
    """Hidden states of windows on their way through a model, one block after the other."""

    def __init__(self, model, tokens):
        base = model.model
        self.hidden = list(base.embed_tokens(tokens).split(8))
        positions = torch.arange(tokens.shape[1])[None]
        self.rotation = base.rotary_emb(self.hidden[0], positions)
        self.positions = positions

    def through(self, block, keep=True):
        """Runs all windows through a block; `keep` makes its outputs the hidden states."""
        for i, batch in enumerate(self.hidden):
            out = block(batch, position_embeddings=self.rotation, position_ids=self.positions, attention_mask=None)
            if keep:
                self.hidden[i] = out[0] if isinstance(out, tuple) else out


def watch(linear, see):
    """Calls `see` with the inputs of a linear, one row a token, until the handle that it returns is removed."""
    hook = lambda module, inputs: see(inputs[0].reshape(-1, inputs[0].shape[-1]))
    return linear.register_forward_pre_hook(hook)


def linears(block):
    """The linears of a block in the order of the data."""
    attention = [getattr(block.self_attn, name) for name in ATTENTION]
    return attention + [getattr(block.mlp, name) for name in MLP]


def perplexity(model, tokens):
    """exp of the mean cross-entropy over all targets, all but the first token of each window."""
    loss = 0.0
    for batch in tokens.split(8):
        logits = model(batch).logits[:, :-1].double()
        loss += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(loss / (tokens.shape[0] * (tokens.shape[1] - 1)))


def report(model, flags, seconds, **more):
    """Prints what a peer measured as one line of JSON."""
    tokens = windows(flags.model, flags.text, flags.window)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak, "perplexity": perplexity(model, tokens), **more}))


def clock():
    """A function that returns the seconds since now."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
