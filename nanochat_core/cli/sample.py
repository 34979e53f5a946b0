"""``nanochat sample RUN "text"``: continue texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from nanochat_core.cli import add_runs_dir, add_trust, not_negative, path_argument, positive, seed, whole
from nanochat_core.errors import NanochatError
from nanochat_core.files import read_regular

LARGEST_FILE = 64 << 20  # bytes of --file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run: its name (the newest), name/id, id, or directory")
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="texts to continue")
    parser.add_argument(
        "--file", type=path_argument, metavar="FILE", help="further texts to continue, one on each line"
    )
    parser.add_argument(
        "--num-samples", type=whole(1, 10_000), default=1, metavar="N", help="continuations of each text (default: 1)"
    )
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
    from nanochat_core.evaluation.trained_model import load_trained
    from nanochat_core.generation.engine import Engine
    from nanochat_core.generation.request import Request
    from nanochat_core.hardware.machine import pick_device
    from nanochat_core.plugins.discovery import load_plugins

    texts = [*options.texts, *(_lines(options.file) if options.file is not None else [])]
    if not texts:
        raise NanochatError('there is no text to continue: give one, such as "The sun", or --file')

    def request(prompt: Sequence[int], stop: Collection[int] = ()) -> Request:
        return Request(
            prompt=prompt,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed,
            stop_tokens=stop,
            samples=options.num_samples,
        )

    request([0])  # finds values out of range before a model is loaded
    trained = load_trained(options.run, options.runs_dir, pick_device(0), load_plugins(), options.trust)
    bos = trained.tokenizer.bos_id
    requests = [request([bos, *trained.tokenizer.encode(text)], {bos}) for text in texts]
    engine = Engine(trained.model, trained.tokenizer)
    with inference(trained.model, trained.dtype):
        if len(texts) * options.num_samples == 1:
            print(_shown(texts[0]), end="", flush=True)
            for event in engine.stream(requests[0]):
                print(_shown(event.text), end="", flush=True)
            print()
        else:
            for text, completions in zip(texts, engine.complete(requests), strict=True):
                for completion in completions:
                    print(_shown(f"{text}{completion.text}\n"))
    print(f"(from {trained.checkpoint})", file=sys.stderr)
    return 0


def _lines(file: Path) -> list[str]:
    """The lines of a file of texts that are not blank.

    Raises:
        NanochatError: when it can't be read.
    """
    try:
        text = read_regular(file, LARGEST_FILE).decode("utf-8-sig")
    except OSError as error:
        raise NanochatError(f"--file {file} can't be read: {error.strerror}; give a file of text") from error
    except UnicodeDecodeError as error:
        raise NanochatError(f"--file {file} must be UTF-8: {error}") from error
    return [line for line in text.splitlines() if line.strip()]


def _shown(text: str) -> str:
    """Return a text as a terminal gets it: what a model says must not steer it. A pipe gets the text as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
