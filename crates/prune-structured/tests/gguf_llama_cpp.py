"""Opens exported golden models in llama.cpp and compares its log-probabilities with those that the originals have.

    pip install xllamacpp
    cargo run -p prune-structured --example gguf_golden -- crates/causal-lm/tests/golden OUT
    python crates/prune-structured/tests/gguf_llama_cpp.py OUT [NAME..]

Prints the largest difference for each file. A GELU of llama.cpp is a table of half precision, and of GPT-NeoX its tanh
form; factors for long sequences of Phi-3 are chosen by the context of the run, here 256.
"""

import json
import math
import os
import pathlib
import subprocess
import sys


def log_softmax(row):
    top = max(row)
    total = math.log(sum(math.exp(x - top) for x in row))
    return [x - top - total for x in row]


def of_llama_cpp(path, prefixes, vocab):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    for prefix in prefixes:
        request = {"prompt": prefix, "n_predict": 1, "n_probs": vocab, "temperature": 1.0, "cache_prompt": False}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        yield {entry["id"]: entry["logprob"] for entry in entries}


def compare(path):
    expected = json.loads(path.with_suffix(".json").read_text())
    tokens, logits = expected["tokens"], expected["logits"]
    lengths = list(range(1, len(tokens) + 1))
    answers = of_llama_cpp(path, [tokens[:length] for length in lengths], len(logits[0]))
    largest, count = 0.0, 0
    for length, found in zip(lengths, answers):
        row = log_softmax(logits[length - 1])
        for token, value in found.items():
            largest, count = max(largest, abs(value - row[token])), count + 1
    return largest, count


def main():
    folder = pathlib.Path(sys.argv[1])
    if len(sys.argv) == 4 and sys.argv[2] == "--one":
        print("result", *compare(folder / f"{sys.argv[3]}.gguf"))
        sys.stdout.flush()
        os._exit(0)
    names = sys.argv[2:] or sorted(path.stem for path in folder.glob("*.gguf"))
    for name in names:
        # A file that does not load ends the process.
        command = [sys.executable, __file__, str(folder), "--one", name]
        run = subprocess.run(command, capture_output=True, text=True)
        result = [line for line in run.stdout.splitlines() if line.startswith("result ")]
        if result:
            _, largest, count = result[0].split()
            print(f"{name}: largest difference of {count} log-probabilities {float(largest):.2g}", flush=True)
        else:
            reasons = [line for line in run.stderr.splitlines() if "error" in line.lower() or "missing" in line.lower()]
            print(f"{name}: not opened: {' | '.join(reasons[:3]) or run.stderr[-300:]}", flush=True)


if __name__ == "__main__":
    main()
