"""Perplexity of a checkpoint folder by transformers, in the protocol of `cargo xtask eval perplexity`.

    python transformers_perplexity.py MODEL TEXT WINDOW [WINDOWS]      # needs torch and transformers
"""

import math
import sys

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main(folder, text, window, count=None):
    # Not AutoTokenizer, which for some model types ignores tokenizer.json.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    with open(text, encoding="utf-8") as file:
        tokens = tokenizer(file.read(), add_special_tokens=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = int(window) - len(bos)
    windows = [bos + tokens[i : i + step] for i in range(0, len(tokens) - step + 1, step)]
    windows = torch.tensor(windows[: int(count)] if count else windows)
    total = 0.0
    with torch.no_grad():
        for batch in windows.split(8):
            logits = model(batch).logits[:, :-1].double()
            targets = batch[:, 1:]
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    print(f"{type(model).__name__}: {math.exp(total / windows[:, 1:].numel()):.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
