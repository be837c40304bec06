"""lm-evaluation-harness on a checkpoint folder, a text and question files in the layout of ARC or PIQA, as `cargo xtask eval
perplexity --protocol rolling` and `cargo xtask eval tasks --no-bos` read them. Prints one line for each.

    python xtask/peers/harness.py --model DIR --text FILE --window N --data arc.jsonl,piqa.jsonl
"""

import argparse
import json
import pathlib
import tempfile

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM

CHOICES = {
    "arc": ("Question: {{question}}\nAnswer:", "{{choices.label.index(answerKey)}}", "{{choices.text}}"),
    "piqa": ("Question: {{goal}}\nAnswer:", "label", "{{[sol1, sol2]}}"),
}


def local(name, path, **rest):
    """A task that reads one local file."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    return {"task": name, **data, **rest}


def questions(path):
    first = json.loads(path.read_text().splitlines()[0])
    text, target, choices = CHOICES["piqa" if "goal" in first else "arc"]
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    asked = {"doc_to_text": text, "doc_to_target": target, "doc_to_choice": choices, "metric_list": metrics}
    return local(path.stem, path, output_type="multiple_choice", **asked)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--data", default="")
    parser.add_argument("--threads", type=int, default=2)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    tasks = [questions(pathlib.Path(path)) for path in flags.data.split(",") if path]
    with tempfile.TemporaryDirectory() as folder:
        if flags.text:
            page = pathlib.Path(folder) / "text.jsonl"
            page.write_text(json.dumps({"page": pathlib.Path(flags.text).read_text()}))
            metrics = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
            whole = {"doc_to_text": "", "doc_to_target": "{{page}}", "metric_list": metrics}
            tasks.append(local("rolling", page, output_type="loglikelihood_rolling", **whole))
        model = HFLM(pretrained=flags.model, dtype="float32", device="cpu", batch_size=8, max_length=flags.window)
        found = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0)
    for name, values in found["results"].items():
        print(name, {key: value for key, value in values.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
