"""Perplexity by transformers on the windows that `cargo xtask eval perplexity` reads.

    python xtask/peers/perplexity.py --model DIR --text FILE --window 256 --windows 16
"""

import argparse

import torch

from common import load, perplexity, windows


def main():
    parser = argparse.ArgumentParser()
    for name in ("model", "text"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("window", 256), ("windows", 16), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    tokens = windows(flags.model, flags.text, flags.window)[: flags.windows]
    with torch.no_grad():
        print(f"{perplexity(load(flags.model), tokens):.7g}")


if __name__ == "__main__":
    main()
