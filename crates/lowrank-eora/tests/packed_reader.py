"""Unpacks GPTQ and compressed-tensors folders with code of its own and compares them with the folder of floats.

With numpy and safetensors, after
`cargo xtask eval lowrank ... --save OUT --save-as gptq-v2,compressed-tensors,compressed` on a model stored as f32:

    python crates/lowrank-eora/tests/packed_reader.py OUT
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
    return (stream.reshape(len(words), count, bits).astype(np.int64) << np.arange(bits)).sum(axis=2)


def gptq(tensors, module, config):
    qweight, qzeros, scales, g_idx = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    bits = config["bits"]
    codes = unpack(qweight.T, bits, len(g_idx))
    zeros = unpack(qzeros, bits, qweight.shape[1])
    if config["checkpoint_format"] == "gptq":
        zeros = zeros + 1
    return scales.astype(np.float64)[g_idx].T * (codes - zeros[g_idx].T)


def compressed_tensors(tensors, module, config):
    scheme = config["config_groups"]["group_0"]["weights"]
    bits = scheme["num_bits"]
    outputs, inputs = tensors[f"{module}.weight_shape"]
    scales = tensors[f"{module}.weight_scale"].astype(np.float64)
    codes = unpack(tensors[f"{module}.weight_packed"], bits, inputs)
    groups = tensors.get(f"{module}.weight_g_idx", np.arange(inputs) // -(-inputs // scales.shape[1]))
    if scheme["group_size"] and f"{module}.weight_g_idx" not in tensors:
        groups = np.arange(inputs) // scheme["group_size"]
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if not scheme["symmetric"]:
        zeros = unpack(tensors[f"{module}.weight_zero_point"].T, bits, outputs).T
    return scales[:, groups] * (codes - zeros[:, groups])


out = pathlib.Path(sys.argv[1])
dense = load_file(out / "compressed" / "model.safetensors")
compared = 0
for folder, suffix, read in (
    ("gptq", "qweight", gptq),
    ("gptq-v2", "qweight", gptq),
    ("compressed-tensors", "weight_packed", compressed_tensors),
):
    if not (out / folder).is_dir():
        continue
    config = json.loads((out / folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(out / folder / "model.safetensors")
    modules = [name.removesuffix("." + suffix) for name in tensors if name.endswith(suffix)]
    for module in modules:
        found, expected = read(tensors, module, config), dense[f"{module}.weight"]
        if expected.dtype != np.float32 or not np.array_equal(found.astype(np.float32), expected):
            sys.exit(f"{folder}: {module} differs by {np.abs(found - expected).max()}")
    print(f"{folder}: {len(modules)} linears are equal")
    compared += len(modules)
if not compared:
    sys.exit("no packed folder was found")
