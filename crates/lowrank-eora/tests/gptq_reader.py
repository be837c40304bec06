"""Reads GPTQ checkpoints with code of its own and compares them with the dense weights stored beside them.

From the root of the workspace, with numpy and safetensors:

    cargo test --workspace --test gptq_files
    python crates/lowrank-eora/tests/gptq_reader.py target/tmp/gptq
"""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import load_file


def unpack(words, bits, count):
    """The first `count` codes of each row of int32 words, as a string of bits, lowest first."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    stream = np.unpackbits(raw, axis=1, bitorder="little")[:, : count * bits]
    return (stream.reshape(len(words), count, bits) << np.arange(bits)).sum(axis=2)


def check(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits = config["bits"]
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        qweight, qzeros, scales, g_idx = (
            tensors[name.replace("qweight", part)] for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        inputs, outputs = len(g_idx), qweight.shape[1]
        codes = unpack(qweight.T, bits, inputs).T
        zeros = unpack(qzeros, bits, outputs)
        if config["checkpoint_format"] == "gptq":
            zeros = zeros + 1
        weight = scales.astype(np.float64)[g_idx] * (codes - zeros[g_idx])
        if not np.array_equal(weight.T, tensors["dense"]):
            sys.exit(f"{folder.name}: {name} differs by {np.abs(weight.T - tensors['dense']).max()}")
        print(f"{folder.name}: {name} is equal")


folders = sorted(pathlib.Path(sys.argv[1]).iterdir())
for folder in folders:
    check(folder)
if not folders:
    sys.exit("no checkpoints found")
