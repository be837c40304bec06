"""Compares the divergence of a saved GGUF model, as this repository computes it, with that of llama.cpp's predictions.

With xllamacpp, after `cargo xtask eval frontier --model MODEL ... --for gguf --save OUT`, whose models are in OUT/BYTES:

    cargo run --release -p causal-lm --example logits -- MODEL TEXT 48 dense.safetensors
    cargo run --release -p causal-lm --example logits -- OUT/BYTES/model.gguf TEXT 48 saved.safetensors [OUT/BYTES/adapter.gguf]
    python crates/frontier/tests/llama_cpp.py dense.safetensors saved.safetensors OUT/BYTES/model.gguf [OUT/BYTES/adapter.gguf]

Both divergences are from the dense model's predictions in the first file, over the whole vocabulary, in nats per token.
llama.cpp rounds activations to 8 bits, or to the 16 bits of the weights, before its products: of a model saved with
`--memory 100%`, which is dense, it prints what that alone does.
"""

import array
import json
import math
import os
import struct
import sys

# Prefixes are spread over the text, so many at most: each is a request with the whole vocabulary in its answer.
PREFIXES = 16


def read(path):
    """Tokens and log-probabilities of a file of the example."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        data = file.read()

    def values(name, code):
        found = array.array(code)
        start, end = header[name]["data_offsets"]
        found.frombytes(data[start:end])
        return found

    vocab = header["log_probabilities"]["shape"][1]
    rows = values("log_probabilities", "f")
    return list(values("tokens", "q")), [rows[i : i + vocab] for i in range(0, len(rows), vocab)]


def of_llama_cpp(model, adapter, prefixes, vocab):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = 2
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    for prefix in prefixes:
        request = {"prompt": prefix, "n_predict": 1, "n_probs": vocab, "temperature": 1.0, "cache_prompt": False}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = {entry["id"]: entry["logprob"] for entry in entries}
        if len(found) != vocab:
            raise SystemExit(f"{len(found)} log-probabilities of {vocab} tokens")
        yield [found[token] for token in range(vocab)]


def divergence(p, q):
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q) if a > -60.0)


def main():
    dense_file, saved_file, model = sys.argv[1:4]
    adapter = sys.argv[4] if len(sys.argv) > 4 else None
    tokens, dense = read(dense_file)
    saved_tokens, saved = read(saved_file)
    if tokens != saved_tokens:
        raise SystemExit("the two files are of different tokens")
    count = min(PREFIXES, len(tokens))
    lengths = sorted({1 + i * (len(tokens) - 1) // max(count - 1, 1) for i in range(count)})
    theirs = list(of_llama_cpp(model, adapter, [tokens[:length] for length in lengths], len(dense[0])))
    ours_mean = theirs_mean = largest = 0.0
    for length, row in zip(lengths, theirs):
        p = dense[length - 1]
        ours, of_llama = divergence(p, saved[length - 1]), divergence(p, row)
        ours_mean += ours / len(lengths)
        theirs_mean += of_llama / len(lengths)
        largest = max(largest, abs(ours - of_llama))
    print(
        f"{len(lengths)} positions: {ours_mean:.6f} nats here, {theirs_mean:.6f} in llama.cpp; "
        f"largest difference of a position {largest:.6f}",
        flush=True,
    )
    # The server's threads would outlive the script.
    os._exit(0)


if __name__ == "__main__":
    main()
