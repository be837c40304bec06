"""Loads an adapter with stock PEFT and transformers and compares with what this crate computes.

    cargo run --release -p lowrank-eora --example repair -- MODEL TEXT COMPRESSOR RANK OUT
    python crates/lowrank-eora/tests/peft_logits.py OUT

OUT/compressed is opened by transformers, OUT/adapter is put on it by PEFT, and the logits on
OUT/logits.safetensors must agree; then each module is asked for the outputs of OUT/probe.safetensors.
A scale that is wrong on purpose must be found by the probe. Needs torch, transformers and peft.
"""

import argparse
import pathlib
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def probe_errors(model, probe):
    """Largest error of a module's output relative to its correction, and the module."""
    worst = (0.0, "")
    modules = dict(model.base_model.model.named_modules())
    for name, x in probe.items():
        module, _, what = name.rpartition(".")
        if what != "input":
            continue
        linear = modules[module]
        y = linear(x)
        bias = getattr(linear, "bias", None)
        if bias is not None:
            y = y - bias
        error = (y - probe[f"{module}.output"]).norm() / probe[f"{module}.correction"].norm()
        worst = max(worst, (error.item(), module))
    return worst


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    arguments = parser.parse_args()
    out, tolerance = arguments.out, arguments.tolerance

    base = AutoModelForCausalLM.from_pretrained(out / "compressed", dtype=torch.float32)
    reference = load_file(out / "logits.safetensors")
    probe = load_file(out / "probe.safetensors")
    bare = (base(reference["tokens"]).logits - reference["logits"]).abs().max().item()
    model = PeftModel.from_pretrained(base, out / "adapter").eval()
    gap = (model(reference["tokens"]).logits - reference["logits"]).abs().max().item()
    right, _ = probe_errors(model, probe)
    for module in model.modules():
        # Attention modules have a number of the same name.
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 2 * scale for name, scale in module.scaling.items()}
    wrong, module = probe_errors(model, probe)

    print(f"largest difference of logits: {gap:.2e} with the adapter, {bare:.2e} without")
    print(f"largest error of a probe: {right:.2e}; with doubled scale {wrong:.2e} ({module})")
    ok = gap <= tolerance and bare > 10 * tolerance and right < 1e-3 and abs(wrong - 1) < 1e-2
    print("agrees" if ok else "DISAGREES")
    sys.exit(0 if ok else 1)


main()
