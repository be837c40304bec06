"""Opens a GGUF model with a LoRA adapter in llama.cpp and compares its log-probabilities with this crate's.

With numpy, safetensors and xllamacpp, after `cargo xtask eval lowrank ... --save OUT --save-as gguf,lora-gguf,merged`:

    cargo run --release -p causal-lm --example logits -- OUT/merged TEXT 48 logits.safetensors
    python crates/lowrank-eora/tests/llama_cpp.py OUT/model.gguf OUT/lora.gguf logits.safetensors

llama.cpp rounds activations to 8 bits before its products, so that the two agree to about a hundredth of the largest
logit.
"""

import sys

import numpy as np
import xllamacpp
from safetensors.numpy import load_file

CANDIDATES = 64
PREFIXES = (8, 16, 24, 32, 40, 47)

model, adapter, file = sys.argv[1:]
tensors = load_file(file)
tokens = tensors["tokens"].tolist()
ours = tensors["log_probabilities"]

params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx = 512
params.n_parallel = 1
params.cpuparams.n_threads = 2
params.warmup = False
if adapter != "none":
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    params.lora_adapters = [lora]
server = xllamacpp.Server(params)

differences = []
agreed = 0
for length in PREFIXES:
    answer = server.handle_completions(
        {"prompt": tokens[:length], "n_predict": 1, "n_probs": CANDIDATES, "temperature": 0.0, "cache_prompt": False}
    )
    candidates = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    theirs = {entry["id"]: entry["logprob"] for entry in candidates}
    row = ours[length - 1]
    differences += [theirs[token] - row[token] for token in theirs]
    agreed += max(theirs, key=theirs.get) == int(row.argmax())
differences = np.abs(np.array(differences))
print(
    f"{len(differences)} log-probabilities: mean difference {differences.mean():.4f}, largest {differences.max():.4f}; "
    f"most likely token equal in {agreed} of {len(PREFIXES)}"
)
