"""``nanochat data download|info``: download the data of a source, or describe them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_core.cli import path_argument, positive, whole
from nanochat_core.cli.console import size
from nanochat_core.errors import ConfigError, NanochatError, Problem

if TYPE_CHECKING:
    from nanochat_core.config.load import LoadedExperiment
    from nanochat_core.interfaces.data_source import DataSource
    from nanochat_core.plugins.registry import Entry

BYTES_PER_TOKEN = 4.2  # typical of English text and a vocabulary of several ten thousand tokens
SAMPLES = 200  # documents read to estimate the size of all documents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    download = actions.add_parser("download", help="download every file that a data source needs, and check it")
    info = actions.add_parser("info", help="describe the documents of a data source")
    for action in (download, info):
        what = action.add_mutually_exclusive_group(required=True)
        what.add_argument(
            "file", nargs="?", type=path_argument, metavar="FILE", help="an experiment file, whose table [data] is used"
        )
        what.add_argument("--source", metavar="NAME", help="a data source plugin, with default options")
        action.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="overrides",
            help="override a value, as in --set data.cache=true; may be repeated",
        )
        action.add_argument(
            "-n",
            "--shards",
            type=positive,
            metavar="N",
            help="number of training shards, for a source that consists of shards",
        )
    download.add_argument(
        "-w",
        "--workers",
        type=whole(1, 256),
        default=4,
        metavar="N",
        help="number of files that are downloaded at the same time (default: 4)",
    )


def main(options: argparse.Namespace, _: Sequence[str]) -> int:
    from nanochat_core.config.origins import add_places
    from nanochat_core.data.sources import build_source

    if options.source:
        return _act(options, _named_source(options.source, options.overrides, options.shards), None)
    loaded = _load(options.file, options.overrides, options.shards)
    try:
        return _act(options, build_source(loaded.experiment.data), loaded)
    except NanochatError as error:
        add_places(error, loaded.origins)
        raise


def _act(options: argparse.Namespace, source: DataSource, loaded: LoadedExperiment | None) -> int:
    return _download(source, options.workers) if options.action == "download" else _info(source, loaded)


def _load(file: Path, overrides: Sequence[str], shards: int | None) -> LoadedExperiment:
    from nanochat_core.config.load import load
    from nanochat_core.plugins.discovery import load_plugins

    plugins = load_plugins()
    loaded = load(file, overrides, plugins)
    entry = loaded.experiment.data.entry
    if shards is not None and entry is not None:
        loaded = load(file, [*overrides, f"data.{_limit_option(entry)}={shards}"], plugins)
    needed = [problem for problem in loaded.missing if problem.key.split(".")[0] == "data"]
    if needed:
        raise ConfigError(needed)
    return loaded


def _limit_option(entry: Entry) -> str:
    if not entry.limit_option:
        raise ConfigError([Problem("", f'data source "{entry.name}" does not consist of shards: leave -n out', "-n")])
    return entry.limit_option


def _named_source(name: str, overrides: Sequence[str], shards: int | None) -> DataSource:
    from nanochat_core.config.load import Tables, load
    from nanochat_core.config.merge import parse_override
    from nanochat_core.data.sources import build_source
    from nanochat_core.plugins.discovery import load_plugins

    plugins = load_plugins()
    registry = plugins["data_source"]
    entry = registry.get(name)
    if entry is None:
        hint = registry.explain_clash(name) if registry.claims(name) else f"no such data source{registry.suggest(name)}"
        raise ConfigError([Problem("", hint + plugins.explain_failure(name), f"--source {name}")])
    if entry.missing():
        needs = f"needs {', '.join(entry.missing())}: {entry.how_to_install()}"
        raise ConfigError([Problem("", needs, f"--source {name}")])
    for text in overrides:
        path, _ = parse_override(text)
        if path[0] != "data" or len(path) != 2:
            raise ConfigError([Problem("", f"write data.OPTION=VALUE, not {text!r}", "--set")])
    limit = [] if shards is None else [f"data.{_limit_option(entry)}={shards}"]
    source = Tables({"data": {"plugin": name}}, f"--source {name}")
    loaded = load(None, [*overrides, *limit], plugins, [source], complete=False)
    return build_source(loaded.experiment.data)


# ------------------------------------------------------------------------------------------------------- download


def _download(source: DataSource, workers: int) -> int:
    missing = source.download(workers)
    if missing:
        print(f"{len(missing)} {'file is' if len(missing) == 1 else 'files are'} still missing:", file=sys.stderr)
        for line in missing:
            print(f"  {line}", file=sys.stderr)
        print("run the same command again; files that have arrived are kept", file=sys.stderr)
        return 2
    print("all files are present")
    return 0


# ----------------------------------------------------------------------------------------------------------- info


def _info(source: DataSource, loaded: LoadedExperiment | None) -> int:
    facts = dict(source.describe())
    text_bytes, absent = facts.pop("text_bytes", None), facts.get("missing")
    for name, value in facts.items():
        print(f"{name.replace('_', ' ')}: {size(float(value)) if name == 'bytes' else _number(value)}")
    train, val = source.documents("train"), source.documents("val")
    print(f"documents: {len(train):,} for training, {len(val):,} for validation")
    print(f"fingerprints: train {source.fingerprint('train')[:16]}, val {source.fingerprint('val')[:16]}")
    samples: list[str] = []
    if not absent and len(train):
        samples = list(train[:: max(1, len(train) // SAMPLES)])[:SAMPLES]
    if text_bytes is None and samples:
        text_bytes = round(sum(len(text.encode(errors="replace")) for text in samples) / len(samples) * len(train))
    if isinstance(text_bytes, int):
        _estimates(text_bytes, samples, loaded)
    if samples:
        print("\nfirst lines of some training documents:")
    for text in samples[:: max(1, len(samples) // 3)][:3]:
        print(f"\n{_opening(text)}")
    if absent:
        print(f"\n{absent} files are not downloaded yet; run nanochat data download")
    for line in source.problems():
        print(line, file=sys.stderr)
    return 0


def _estimates(text_bytes: int, samples: Sequence[str], loaded: LoadedExperiment | None) -> None:
    per_token, how = BYTES_PER_TOKEN, f"assuming {BYTES_PER_TOKEN} bytes per token"
    if loaded is not None and not loaded.missing and samples:
        choice = loaded.experiment.tokenizer
        if not isinstance(getattr(choice.config, "vocab_size", None), int):  # such a tokenizer needs no training
            per_token, how = _measure(choice, samples), f"measured on {len(samples)} documents"
    tokens = text_bytes / per_token
    print(f"training text: {size(text_bytes)}, about {tokens:,.0f} tokens ({how})")
    if loaded is not None and not [p for p in loaded.missing if p.key.split(".")[0] != "loggers"]:
        from nanochat_core.hardware.machine import pick_device
        from nanochat_core.planning.planner import make_plan

        plan = make_plan(loaded, 1, pick_device(0)).plan
        print(f"the run trains on {plan.total_tokens:,} tokens: about {plan.total_tokens / max(tokens, 1):.2f} epochs")


def _measure(choice: Any, samples: Sequence[str]) -> float:
    """Return the mean number of bytes per token over ``samples``."""
    from nanochat_core.interfaces.tokenizer import Tokenizer, TokenizerContext

    tokenizer: Tokenizer = choice.build(TokenizerContext(documents=lambda: iter(samples)))
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in samples)
    return sum(len(text.encode(errors="replace")) for text in samples) / tokens


def _number(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else value


def _opening(text: str) -> str:
    """Return the first three lines of a document, each shortened to 110 characters."""
    lines = [line if len(line) <= 110 else line[:107] + "..." for line in text.strip().splitlines()[:3]]
    return "\n".join(f"  | {line}" for line in lines) or "  | (empty)"
