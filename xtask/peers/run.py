"""The peers in this folder beside `xtask`, on the same model, texts and windows: each round runs both one after the other, and
the ratio of a line is the median over rounds. See README.md."""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

import tokenizers

HERE = pathlib.Path(__file__).parent


def arguments():
    parser = argparse.ArgumentParser()
    for name in ("program", "model", "text", "calib"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--gguf", help="the model as a GGUF file, for llama.cpp")
    parser.add_argument("--only", default="flap,gptq,eora,torch,llama.cpp")
    for name, default in (
        ("window", 256),
        ("windows", 16),
        ("calib-windows", 32),
        ("prompt-tokens", 512),
        ("rounds", 3),
        ("threads", 2),
        ("bits", 3),
        ("rank", 32),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ratio", type=float, default=0.25)
    return parser.parse_args()


def beginning(flags, text, tokens, path):
    """Writes as much of a text as makes so many tokens."""
    tokenizer = tokenizers.Tokenizer.from_file(str(pathlib.Path(flags.model) / "tokenizer.json"))
    whole = pathlib.Path(text).read_text()[: 16 * tokens]
    ends = tokenizer.encode(whole, add_special_tokens=False).offsets
    if len(ends) < tokens:
        sys.exit(f"{text} has fewer than {tokens} tokens")
    path.write_text(whole[: ends[tokens - 1][1]])
    return str(path)


def seconds(text):
    """A time as reports write it."""
    parts = re.fullmatch(r"(?:(\d+)h )?(?:(\d+)m ?)?(?:([\d.]+) ?s)?", text).groups()
    return sum(float(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1)))


def run(words):
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr}")
    return done


def peer(script, flags, texts, *more):
    words = [sys.executable, str(HERE / script), "--model", flags.model, "--text", texts["text"], "--calib", texts["calib"]]
    words += ["--window", str(flags.window), "--threads", str(flags.threads), *more]
    return json.loads(run(words).stdout.splitlines()[-1])


def ours(suite, flags, texts, *more):
    words = [flags.program, "eval", suite, "--json", "--model", flags.model, "--text", texts["text"], "--calib", texts["calib"]]
    words += ["--window", str(flags.window), "--threads", str(flags.threads), "--calib-samples", "1000000", *more]
    report = json.loads(run(words).stdout)
    row = dict(report["rows"][-1])
    # A table of several methods calibrates once for all.
    row["seconds"] += seconds(report["sections"][0].get("protocol", {}).get("calibration time", ""))
    return row


def generate(flags, prompt):
    text = pathlib.Path(prompt).read_text()
    words = [flags.program, "generate", "--raw", "--model", flags.model, "--prompt", text, "--max-new-tokens", "49"]
    line = run([*words, "--arithmetic", "f32", "--threads", str(flags.threads)]).stderr.splitlines()[-1]
    rate = lambda name: float(re.search(rf"{name} ([\d.]+) tokens/s", line).group(1))
    return {"prefill": rate("prefill"), "decode": rate("decode")}


def pairs(rounds, first, second):
    """What both measured, round by round; who begins changes."""
    found = []
    for number in range(rounds):
        order = (first, second) if number % 2 == 0 else (second, first)
        results = [measure() for measure in order]
        found.append(results if number % 2 == 0 else results[::-1])
    return found


def line(name, found, field, better, rest=""):
    ratios = sorted(b[field] / a[field] if better == "less" else a[field] / b[field] for a, b in found)
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"{name:<34} {spread:<24} {rest}", flush=True)


def main():
    flags = arguments()
    wanted = flags.only.split(",")
    bits, rank, ratio = str(flags.bits), str(flags.rank), str(flags.ratio)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        texts = {
            name: beginning(flags, getattr(flags, name), flags.window * count, folder / f"{name}.txt")
            for name, count in (("text", flags.windows), ("calib", flags.calib_windows))
        }
        prompt = beginning(flags, flags.text, flags.prompt_tokens, folder / "prompt.txt")
        print(f"{'':<34} {'times as fast as':<24} perplexity, ours and theirs")
        print(f"{'':<34} {'the peer':<24}")
        lowrank = ("--no-controls", "--held-out-samples", "1")
        compared = {
            "flap": (
                f"FLAP at {ratio}",
                lambda: ours("structured", flags, texts, "--method", "flap", "--ratio", ratio, "--compensate", "bias"),
                lambda: peer("flap.py", flags, texts, "--ratio", ratio),
            ),
            "gptq": (
                f"GPTQ in {bits} bits",
                lambda: ours("lowrank", flags, texts, "--compress", f"gptq-int{bits}", "--method", "none", "--rank", "1", *lowrank),
                lambda: peer("gptq.py", flags, texts, "--bits", bits),
            ),
            "eora": (
                f"EoRA of rank {rank}, {bits} bits",
                lambda: ours("lowrank", flags, texts, "--compress", f"rtn-int{bits}", "--method", "eora", "--rank", rank, *lowrank),
                lambda: peer("eora.py", flags, texts, "--bits", bits, "--rank", rank),
            ),
        }
        for name, (label, one, other) in compared.items():
            if name in wanted:
                found = pairs(flags.rounds, one, other)
                quality = ", ".join(f"{row['perplexity']:.4f}" for row in found[0])
                line(label, found, "seconds", "less", quality)
        programs = {"torch": flags.model, "llama.cpp": flags.gguf}
        for name, model in programs.items():
            if name in wanted and model:
                mine = argparse.Namespace(**{**vars(flags), "model": model})
                words = [sys.executable, str(HERE / "generation.py"), "--model", model, "--prompt", prompt]
                words += ["--threads", str(flags.threads)]
                theirs = lambda: json.loads(run(words).stdout.splitlines()[-1])
                found = pairs(flags.rounds, lambda: generate(mine, prompt), theirs)
                for what in ("prefill", "decode"):
                    line(f"{what} beside {name}", found, what, "more")


if __name__ == "__main__":
    main()
