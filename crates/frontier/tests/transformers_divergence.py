"""Compares the divergence of a saved model, as this repository computes it, with that of predictions of transformers.

With torch and transformers, after `cargo xtask eval frontier --model MODEL ... --save OUT`, for a plan that prunes nothing
(transformers has one width for all blocks) and corrects nothing (OUT/BYTES has no adapter):

    cargo xtask eval structured --model OUT/BYTES/model --text TEXT --calib CALIB --method magnitude --ratio 0 --save DECODED
    cargo run --release -p causal-lm --example logits -- MODEL TEXT 256 dense.safetensors
    cargo run --release -p causal-lm --example logits -- OUT/BYTES/model TEXT 256 saved.safetensors
    python crates/frontier/tests/transformers_divergence.py MODEL DECODED dense.safetensors saved.safetensors

Both are the mean over positions of KL(dense || saved) over the whole vocabulary, in nats per token, in f32. They agree to 1e-4 of
one another, or the script fails.
"""

import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4


def divergence(dense, other):
    """KL of rows of log-probabilities."""
    dense, other = dense.double(), other.double()
    return (dense.exp() * (dense - other)).sum(-1).mean().item()


def of_transformers(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        return torch.log_softmax(model(tokens[None]).logits[0], -1)


def main():
    model, decoded, dense_file, saved_file = sys.argv[1:]
    dense, saved = load_file(dense_file), load_file(saved_file)
    tokens = dense["tokens"]
    assert torch.equal(tokens, saved["tokens"]), "the files are of different texts"
    ours = divergence(dense["log_probabilities"], saved["log_probabilities"])
    theirs = divergence(of_transformers(model, tokens), of_transformers(decoded, tokens))
    print(f"{len(tokens)} tokens: {ours:.6f} here, {theirs:.6f} in transformers")
    if abs(ours - theirs) > TOLERANCE * theirs:
        sys.exit(f"they differ by more than {TOLERANCE} of one another")


if __name__ == "__main__":
    main()
