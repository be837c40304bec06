"""Log-likelihoods of multiple-choice answers by transformers, beside those that `eval tasks --log-samples` wrote.

    python tasks_transformers.py MODEL DATA.jsonl SAMPLES.jsonl

MODEL is a checkpoint folder, DATA a file in the layout of ARC or PIQA, SAMPLES what `cargo xtask eval tasks --model MODEL
--data DATA --log-samples DIR` wrote; as many questions are compared as SAMPLES holds. Each choice runs through the model
alone: nothing is shared, packed or cached. Prints acc, acc_norm and the largest difference.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def question(doc):
    if "goal" in doc:
        return doc["goal"], [doc["sol1"], doc["sol2"]], doc["label"]
    choices = doc["choices"]
    return doc["question"], choices["text"], choices["label"].index(doc["answerKey"])


def main(folder, data, samples):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = model.config.max_position_embeddings
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encode = lambda text: bos + tokenizer.encode(text, add_special_tokens=False)
    right = right_by_character = 0
    gap = 0.0
    samples = [json.loads(line) for line in open(samples)]
    for line, sample in zip(open(data), samples):
        asked, choices, label = question(json.loads(line))
        context = f"Question: {asked}\nAnswer:"
        sums = []
        for choice in choices:
            own = len(encode(context))
            tokens = encode(f"{context} {choice}")
            targets = tokens[own:]
            inputs = tokens[-(longest + 1) :][:-1]
            with torch.no_grad():
                logits = model(torch.tensor([inputs])).logits[0, -len(targets) :].double()
            logs = logits.log_softmax(-1)
            sums.append(logs.gather(1, torch.tensor(targets)[:, None]).sum().item())
        gap = max([gap] + [abs(a - b) for a, b in zip(sums, sample["log_likelihoods"], strict=True)])
        best = max(range(len(sums)), key=lambda i: sums[i])
        best_by_character = max(range(len(sums)), key=lambda i: sums[i] / len(choices[i]))
        right += best == label
        right_by_character += best_by_character == label
    n = len(samples)
    print(f"{n} questions: acc {right / n:.4f}, acc_norm {right_by_character / n:.4f}, largest difference {gap:.2e}")


main(*sys.argv[1:])
