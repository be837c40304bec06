"""llama.cpp beside the bench `generation`: for each line on stdin, tokens per second of decoding and of a prompt.

    pip install xllamacpp
    cargo bench -p causal-lm --bench generation -- MODEL.gguf 2 int8 "python3 crates/causal-lm/benches/llama_cpp.py MODEL.gguf 2"
"""

import json
import os
import sys

# What the library prints to stdout goes to stderr; answers go to what stdout was.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import xllamacpp as llama  # noqa: E402

CONTEXT, STEPS, PROMPT = 64, 24, 512

path, threads = sys.argv[1], int(sys.argv[2])
params = llama.CommonParams()
params.model.path = path
params.n_ctx = 1024
params.n_parallel = 1
params.n_gpu_layers = 0
params.verbosity = -1
params.cpuparams.n_threads = threads
params.cpuparams_batch.n_threads = threads
server = llama.Server(params)


def complete(tokens, count):
    request = {
        "prompt": tokens,
        "n_predict": count,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    return answer["timings"]


tokens = [100 + i * 31 % 1000 for i in range(PROMPT)]
for _ in sys.stdin:
    decode = complete(tokens[:CONTEXT], STEPS + 1)["predicted_per_second"]
    prompt = complete(tokens, 1)["prompt_per_second"]
    print(decode, prompt, file=answers, flush=True)
