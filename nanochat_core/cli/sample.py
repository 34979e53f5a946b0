"""``nanochat sample RUN "text"``: continue a text."""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Sequence

from nanochat_core.cli import add_runs_dir, add_trust, not_negative, positive, seed, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run: its name (the newest), name/id, id, or directory")
    parser.add_argument("text", metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "--max-tokens",
        type=whole(1, 10**6),
        default=64,
        metavar="N",
        help="maximum number of tokens to add (default: 64)",
    )
    parser.add_argument(
        "--temperature",
        type=not_negative,
        default=0.8,
        metavar="X",
        help="sampling temperature; 0 is greedy (default: 0.8)",
    )
    parser.add_argument(
        "--top-k", type=positive, metavar="K", help="sample among the K most likely tokens (default: all)"
    )
    parser.add_argument("--seed", type=seed, default=42, metavar="N", help="random seed (default: 42)")
    add_runs_dir(parser)
    add_trust(parser)


def main(options: argparse.Namespace, _: Sequence[str]) -> int:
    from nanochat_core.evaluation.evaluate import inference
    from nanochat_core.evaluation.sampling import generate
    from nanochat_core.evaluation.trained_model import load_trained
    from nanochat_core.hardware.machine import pick_device
    from nanochat_core.plugins.discovery import load_plugins

    trained = load_trained(options.run, options.runs_dir, pick_device(0), load_plugins(), options.trust)
    tokenizer = trained.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(options.text)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end within a character
    with inference(trained.model, trained.dtype):
        tokens = generate(
            trained.model,
            ids,
            max_new_tokens=options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed,
            stop={tokenizer.bos_id},
            vocab_size=tokenizer.vocab_size,
        )
        print(_shown(options.text), end="", flush=True)
        for token in tokens:
            print(_shown(decoder.decode(tokenizer.decode_bytes([token]))), end="", flush=True)
    print(decoder.decode(b"", final=True))
    print(f"(from {trained.checkpoint})", file=sys.stderr)
    return 0


def _shown(text: str) -> str:
    """Return a text as a terminal gets it: what a model says must not steer it. A pipe gets the text as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
