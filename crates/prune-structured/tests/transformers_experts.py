"""Opens mixtures whose routers keep all rows with transformers and the folder's loader, and compares logits.

    cargo run -p prune-structured --example expert_rows -- crates/causal-lm/tests/golden OUT
    python crates/prune-structured/tests/transformers_experts.py OUT        # needs torch and transformers 5

Prints the largest difference for each folder, and fails where one is above 1e-4.
"""

import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM


def main(folder):
    worst = 0.0
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        expected = json.loads(path.read_text())
        model = AutoModelForCausalLM.from_pretrained(
            path.with_suffix(""), dtype=torch.float32, trust_remote_code=True, attn_implementation="eager"
        )
        with torch.no_grad():
            logits = model.eval()(torch.tensor([expected["tokens"]])).logits[0]
        gap = (logits - torch.tensor(expected["logits"])).abs().max().item()
        worst = max(worst, gap)
        print(f"{path.stem}: {gap:.2e}")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main(*sys.argv[1:])
