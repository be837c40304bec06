"""Generation with torch or with llama.cpp: tokens per second of a prompt and of decoding behind it, as one line of JSON."""

import argparse
import json
import os
import pathlib
import sys
import time


def torch_rates(flags, text):
    import torch

    import common

    torch.set_num_threads(flags.threads)
    model = common.load(flags.model)
    tokenizer = common.tokenizers.Tokenizer.from_file(str(pathlib.Path(flags.model) / "tokenizer.json"))
    tokens = torch.tensor([tokenizer.encode(text).ids])
    with torch.no_grad():
        model(tokens[:, :8])
        start = time.perf_counter()
        out = model(tokens, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(flags.steps):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        decode = time.perf_counter() - start
    return tokens.shape[1] / prefill, flags.steps / decode


def llama_cpp_rates(flags, text):
    # What the library prints to stdout goes to stderr.
    answers = os.dup(1)
    os.dup2(2, 1)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = flags.model
    params.n_ctx = 4096
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.verbosity = -1
    params.cpuparams.n_threads = flags.threads
    params.cpuparams_batch.n_threads = flags.threads
    server = xllamacpp.Server(params)
    request = {"prompt": text, "n_predict": flags.steps + 1, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    sys.stdout = os.fdopen(answers, "w")
    timings = answer["timings"]
    return timings["prompt_per_second"], timings["predicted_per_second"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a folder for torch, a GGUF file for llama.cpp")
    parser.add_argument("--prompt", required=True, help="a file with the text to read")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--threads", type=int, required=True)
    flags = parser.parse_args()
    text = pathlib.Path(flags.prompt).read_text()
    rates = llama_cpp_rates if flags.model.endswith(".gguf") else torch_rates
    prefill, decode = rates(flags, text)
    print(json.dumps({"prefill": prefill, "decode": decode}), flush=True)


if __name__ == "__main__":
    main()
