"""Reads an exported GGUF with the `gguf` package, recomputes its logits and compares them.

    python gguf_reader.py FILE.gguf [--folder FOLDER] [--llama-cpp]

prints metadata and tensor types, then the largest difference of logits, computed here with numpy from the file alone,
from those of transformers on FOLDER, the checkpoint that the file was exported from, and of the log-probabilities of
llama.cpp. Needs gguf and numpy; --folder torch and transformers; --llama-cpp xllamacpp, a build of llama.cpp.
"""

import argparse

import numpy as np
from gguf import GGUFReader, dequantize

TOKENS = 40
TEXT = "Once upon a time, Lily's dog saw 12 naïve cats!\nShe said:  hello"


class Model:
    def __init__(self, path):
        self.reader = GGUFReader(path)
        self.tensors = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in self.reader.tensors}
        self.arch = self.field("general.architecture")
        self.layers = self.field(f"{self.arch}.block_count")

    def field(self, key):
        return self.reader.fields[key].contents()

    def width(self, key, layer):
        value = self.field(f"{self.arch}.{key}")
        return value[layer] if isinstance(value, list) else value

    def linear(self, x, name):
        y = x @ self.tensors[f"{name}.weight"].T
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, x, name):
        eps = self.field(f"{self.arch}.attention.layer_norm_rms_epsilon")
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.tensors[name]

    def rotate(self, x):
        tokens, _, dim = x.shape
        angles = np.arange(tokens)[:, None] * self.field(f"{self.arch}.rope.freq_base") ** (-np.arange(0, dim, 2) / dim)
        if "rope_freqs.weight" in self.tensors:
            angles = angles / self.tensors["rope_freqs.weight"]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        if self.arch == "qwen3":
            a, b = x[..., : dim // 2], x[..., dim // 2 :]
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        a, b = x[..., ::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)

    def logits(self, tokens):
        x = self.tensors["token_embd.weight"][tokens]
        count, dim = len(tokens), self.field(f"{self.arch}.attention.key_length")
        mask = np.triu(np.full((count, count), -np.inf), 1)
        for layer in range(self.layers):
            part = f"blk.{layer}."
            heads, kv_heads = (self.width(f"attention.head_count{kv}", layer) for kv in ("", "_kv"))
            assert self.tensors[part + "ffn_up.weight"].shape[0] == self.width("feed_forward_length", layer)
            normed = self.norm(x, part + "attn_norm.weight")
            q = self.linear(normed, part + "attn_q").reshape(count, heads, dim)
            k = self.linear(normed, part + "attn_k").reshape(count, kv_heads, dim)
            v = self.linear(normed, part + "attn_v").reshape(count, kv_heads, dim)
            if part + "attn_q_norm.weight" in self.tensors:
                q, k = self.norm(q, part + "attn_q_norm.weight"), self.norm(k, part + "attn_k_norm.weight")
            q, k = self.rotate(q), self.rotate(k)
            k, v = (np.repeat(each, heads // kv_heads, 1) for each in (k, v))
            scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(dim) + mask
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed = np.einsum("hij,jhd->ihd", weights, v).reshape(count, heads * dim)
            x = x + self.linear(mixed, part + "attn_output")
            normed = self.norm(x, part + "ffn_norm.weight")
            gate = self.linear(normed, part + "ffn_gate")
            x = x + self.linear(gate / (1 + np.exp(-gate)) * self.linear(normed, part + "ffn_up"), part + "ffn_down")
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return self.norm(x, "output_norm.weight") @ head.T


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def of_transformers(folder, tokens):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().numpy()


def of_llama_cpp(path, prefixes, vocab):
    """Log-probabilities of what follows each prefix, a list of ids or a text."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    rows = []
    for prefix in prefixes:
        request = {"prompt": prefix, "n_predict": 1, "n_probs": vocab, "temperature": 1.0, "cache_prompt": False}
        answer = server.handle_completions(request)
        row = np.full(vocab, np.nan)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    return np.array(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--folder")
    parser.add_argument("--llama-cpp", action="store_true")
    arguments = parser.parse_args()
    model = Model(arguments.file)
    for name, field in model.reader.fields.items():
        value = field.contents()
        if not isinstance(value, list) or len(value) <= 128:
            print(f"{name}: {value}")
    types = sorted({t.tensor_type.name for t in model.reader.tensors})
    print(f"{len(model.tensors)} tensors: {', '.join(types)}")
    vocab = model.tensors["token_embd.weight"].shape[0]
    tokens = [1] + [(37 * i + 11) % vocab for i in range(TOKENS - 1)]
    ours = model.logits(tokens)
    if arguments.folder:
        theirs = of_transformers(arguments.folder, tokens)
        print(f"largest difference of logits from transformers: {np.abs(ours - theirs).max():.3g}")
    if arguments.llama_cpp:
        ends = [1, 2, 7, 20, TOKENS]
        theirs = of_llama_cpp(arguments.file, [tokens[:end] for end in ends], vocab)
        gap = np.nanmax(np.abs(log_softmax(ours)[[end - 1 for end in ends]] - theirs))
        print(f"largest difference of {np.isfinite(theirs).sum()} log-probabilities from llama.cpp: {gap:.3g}")
    if arguments.folder and arguments.llama_cpp:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.folder)
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        if model.field("tokenizer.ggml.add_bos_token"):
            ids = [model.field("tokenizer.ggml.bos_token_id")] + ids
        by_text, by_ids = of_llama_cpp(arguments.file, [TEXT, ids], vocab)
        print(f"the same after a text and after its {len(ids)} tokens: {np.nanmax(np.abs(by_text - by_ids)):.3g}")


if __name__ == "__main__":
    main()
