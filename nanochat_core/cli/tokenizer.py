"""``nanochat tokenizer train|show|compare``: train a tokenizer, show its tokens, and compare tokenizers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_core.cli import add_experiment, add_runs_dir, add_trust, path_argument, positive
from nanochat_core.cli.console import table
from nanochat_core.errors import ConfigError, NanochatError, Problem

if TYPE_CHECKING:
    from nanochat_core.config.schema import Experiment
    from nanochat_core.interfaces.data_source import DataSource
    from nanochat_core.interfaces.tokenizer import Tokenizer
    from nanochat_core.plugins.discovery import Plugins

COLOURS = (194, 223, 189, 217, 153)  # light backgrounds of the 256-colour palette, used in turn
WELL_KNOWN = ("gpt2", "cl100k_base")  # added to every comparison if they are available
REFERENCE = "an experiment (a TOML file) or a run (its name, name/id, id, or directory)"

TEXTS = {
    "English": "The river had risen in the night, and by morning the lower fields were a single sheet of brown water. "
    "Nobody in the village was surprised; it happened every few years, and the old people said it always would.",
    "code": "def moving_average(values, width):\n    total = sum(values[:width])\n    yield total / width\n"
    "    for i in range(width, len(values)):\n        total += values[i] - values[i - width]\n"
    "        yield total / width\n",
    "numbers": "In 1984, 12,450 of 98,317 samples (12.66%) exceeded 3.14159; 2 ** 31 - 1 = 2147483647, 0x7fffffff.",
    "German": "Der Fluss war in der Nacht gestiegen, und am Morgen standen die tiefer gelegenen Felder unter Wasser. "
    "Niemand im Dorf war überrascht; das geschah alle paar Jahre.",
    "Russian": "Ночью река поднялась, и к утру нижние поля превратились в сплошную гладь бурой воды.",
    "Chinese": "夜里河水涨了，到了早晨，低处的田地已经成了一片褐色的水面。村里没有人感到意外。",
    "Arabic": "ارتفع النهر في الليل، وبحلول الصباح كانت الحقول المنخفضة صفحة واحدة من الماء البني.",
    "emoji": "🙂👍🏽 see you at 7 🍕🎉 👩‍👩‍👧‍👦",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="train|show|compare", required=True)
    train = commands.add_parser("train", help="train the tokenizer of an experiment and keep it in the cache")
    add_experiment(train)
    show = commands.add_parser("show", help="show the tokens of a text")
    show.add_argument("reference", metavar="FILE|RUN", help=REFERENCE)
    show.add_argument("text", nargs="?", metavar="TEXT", help="the text (default: standard input)")
    show.add_argument("--ids", action="store_true", help="also print the token ids")
    add_runs_dir(show)
    add_trust(show)
    compare = commands.add_parser("compare", help="compare bytes per token on several texts")
    compare.add_argument(
        "references",
        nargs="+",
        metavar="FILE|RUN|NAME",
        help=f"{REFERENCE}, or a name that a tokenizer plugin knows, such as o200k_base; {' and '.join(WELL_KNOWN)} "
        f"are added if they are on this machine",
    )
    compare.add_argument(
        "--text",
        action="append",
        type=path_argument,
        default=[],
        metavar="PATH",
        help="another text file to measure; may be repeated",
    )
    compare.add_argument(
        "--val-bytes",
        type=positive,
        default=1_000_000,
        metavar="N",
        help="bytes of validation documents of the first FILE or RUN argument to measure (default: 1000000)",
    )
    add_runs_dir(compare)
    add_trust(compare)


def main(options: argparse.Namespace, _: Sequence[str]) -> int:
    from nanochat_core.plugins.discovery import load_plugins

    return {"train": _train, "show": _show, "compare": _compare}[options.action](options, load_plugins())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------- train


def _train(options: argparse.Namespace, plugins: Plugins) -> int:
    from nanochat_core.config.load import load
    from nanochat_core.config.origins import add_places
    from nanochat_core.data.sources import build_source
    from nanochat_core.data.tokenizer_cache import make_tokenizer

    loaded = load(options.file, options.overrides, plugins)
    _require(loaded.missing)
    experiment = loaded.experiment
    try:
        source = build_source(experiment.data)
        made = make_tokenizer(experiment.tokenizer, source, _say)
    except NanochatError as error:
        add_places(error, loaded.origins)
        raise
    how = f"created in {made.seconds:.1f} s" if made.seconds else "already in the cache"
    print(f"tokenizer {experiment.tokenizer.plugin}: {made.tokenizer.vocab_size:,} tokens, {how}")
    print(f"fingerprint {made.tokenizer.fingerprint}\n{made.directory}")
    return 0


def _require(missing: Sequence[Problem]) -> None:
    """Raise ConfigError for missing plugins or libraries of the tokenizer or the data; others are not needed here."""
    needed = [p for p in missing if p.key.split(".")[0] in ("tokenizer", "data")]
    if needed:
        raise ConfigError(needed)


# ------------------------------------------------------------------------------------------------------------ show


def _open(reference: str, options: argparse.Namespace, plugins: Plugins) -> tuple[Tokenizer, Experiment]:
    """Return the tokenizer and experiment of an experiment file (trained now unless it is cached) or of a run."""
    from nanochat_core.config.load import load
    from nanochat_core.data.sources import build_source
    from nanochat_core.data.tokenizer_cache import load_tokenizer, make_tokenizer
    from nanochat_core.runs.directory import find_run
    from nanochat_core.runs.restore import load_recorded
    from nanochat_core.runs.trust import require_trust

    if reference.endswith(".toml"):
        loaded = load(Path(reference), (), plugins)
        _require(loaded.missing)
        experiment = loaded.experiment
        return make_tokenizer(experiment.tokenizer, build_source(experiment.data), _say).tokenizer, experiment
    run = find_run(reference, options.runs_dir)
    loaded = load_recorded(run, plugins)
    _require([p for p in loaded.missing if p.key.startswith("tokenizer")])
    used = {"tokenizer": loaded.experiment.tokenizer}
    if options.action == "compare":
        used["data"] = loaded.experiment.data
    require_trust(run, options.runs_dir, f"nanochat tokenizer {options.action}", used, trusted=options.trust)
    return load_tokenizer(loaded.experiment.tokenizer, run.tokenizer), loaded.experiment


def _show(options: argparse.Namespace, plugins: Plugins) -> int:
    tokenizer, _ = _open(options.reference, options, plugins)
    text = sys.stdin.read() if options.text is None else options.text
    ids = tokenizer.encode(text)
    pieces = [_readable(tokenizer.decode_bytes([i])) for i in ids]
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        print("".join(_coloured(piece, COLOURS[n % len(COLOURS)]) for n, piece in enumerate(pieces)))
    else:
        print("|".join(pieces))
    if options.ids:
        print(" ".join(map(str, ids)))
    size = len(text.encode(errors="replace"))
    print(f"{len(ids)} tokens, {size} bytes" + (f", {size / len(ids):.2f} bytes per token" if ids else ""))
    return 0


def _readable(token: bytes) -> str:
    """Format a token on one line: control characters as escapes, incomplete UTF-8 characters as their bytes."""
    text = token.decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _coloured(text: str, colour: int) -> str:
    return f"\x1b[48;5;{colour};38;5;16m{text}\x1b[0m"


# --------------------------------------------------------------------------------------------------------- compare


def _compare(options: argparse.Namespace, plugins: Plugins) -> int:
    from nanochat_core.data.sources import build_source

    tokenizers: dict[str, Tokenizer] = {}
    source: DataSource | None = None
    for index, reference in enumerate(options.references):
        known = _from_name(reference, plugins)
        if known is not None:
            tokenizers[reference] = known
            continue
        tokenizer, experiment = _open(reference, options, plugins)
        tokenizers[Path(reference).stem if reference.endswith(".toml") else reference] = tokenizer
        if index == 0:
            try:
                source = build_source(experiment.data)
            except NanochatError as error:
                _say(f"validation documents are not measured: {error}")
    for name in WELL_KNOWN:
        try:
            other = _from_name(name, plugins)
        except NanochatError:
            _say(f"{name} is not compared: it is not on this machine")
            continue
        if other is not None:
            tokenizers.setdefault(name, other)
    texts = dict(TEXTS)
    for path in options.text:
        try:
            texts[path.name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([Problem("--text", f"{path} can't be read as UTF-8 text: {error}")]) from error
    if source is not None:
        texts["validation"] = "\n".join(_first(source.documents("val"), options.val_bytes))
    rows = [
        ["BYTES PER TOKEN", "BYTES", *tokenizers],
        ["(vocabulary)", "", *(f"{t.vocab_size:,}" for t in tokenizers.values())],
    ]
    for name, text in texts.items():
        size = len(text.encode(errors="replace"))
        if size:
            rates = [f"{size / len(tokenizer.encode(text)):.2f}" for tokenizer in tokenizers.values()]
            rows.append([name, f"{size:,}", *rates])
    print(table(rows, "l" + "r" * (len(rows[0]) - 1)))
    return 0


def _first(documents: Sequence[str], size: int) -> Iterator[str]:
    """Yield documents up to ``size`` bytes in total; the last one is cut."""
    for document in documents:
        data = document.encode(errors="replace")
        yield data[:size].decode(errors="ignore")
        size -= len(data)
        if size <= 0:
            return


def _from_name(name: str, plugins: Plugins) -> Tokenizer | None:
    """Return a published tokenizer by its name, such as ``gpt2``; None if no plugin knows the name."""
    from nanochat_core.data.tokenizer_cache import build_tokenizer
    from nanochat_core.plugins.choice import Choice, EntryKeys

    if "/" in name or name.endswith(".toml"):
        return None
    for entry in plugins["tokenizer"]:
        if entry.from_name and not entry.missing():
            config = entry.load_from_name()(name)
            if config is not None:
                return build_tokenizer(Choice(EntryKeys(entry.name), entry, config))
    return None
