"""Runs that somebody else may have made: what a command does by the word of their files, and whether it may."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from nanochat_core.errors import ConfigError
from nanochat_core.files import shorten
from nanochat_core.plugins.choice import Choice
from nanochat_core.runs.directory import RunDirectory

MOST_LINES = 40


def require_trust(
    run: RunDirectory,
    runs_dir: Path,
    command: str,
    used: Mapping[str, Choice],
    writes: Sequence[Path] = (),
    trusted: bool = False,
) -> None:
    """Return if the run is one of ``runs_dir`` or is trusted. Otherwise show what the command would do by the word of
    its ``experiment.toml``, and ask at a terminal.

    Args:
        command: as in ``nanochat eval``.
        used: the plugins of the run's experiment that the command would use, by table.
        writes: what it would write besides.
        trusted: whether ``--trust`` is given.

    Raises:
        ConfigError: with what it would do, when there is nobody to ask or the answer is not yes.
    """
    if trusted or run.path.resolve().is_relative_to(runs_dir.resolve()):
        return
    would = "\n".join(describe(used, [run.path], writes))
    message = (
        f"{shorten(str(run.path), 300)} is not under {shorten(str(runs_dir), 300)} (--runs-dir), so somebody else may "
        f"have written its files. {command} would\n{would}\n"
    )
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        print(f"{message}Go on? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
        raise ConfigError(f"nothing was done; read {run.experiment} first, and add --trust if you trust it")
    raise ConfigError(f"{message}Read {run.experiment}, and add --trust if you trust it")


def describe(used: Mapping[str, Choice], reads: Sequence[Path], writes: Sequence[Path]) -> list[str]:
    """Lines that say which plugins run, with which texts and paths of the experiment, and what is read and written."""
    plugins = ", ".join(f"{table} {shorten(choice.plugin)}" for table, choice in used.items())
    lines = [f"  run    the installed plugins {plugins}" if plugins else "  run    no plugin"]
    lines += [f"  read   {shorten(str(path), 300)}" for path in reads]
    lines += [f"  write  {shorten(str(path), 300)}" for path in writes]
    options = [
        f"  with   {table}.{key} = {shorten(value, 300)}"
        for table, choice in used.items()
        for key, value in _texts(choice.config)
    ]
    more = len(options) - MOST_LINES
    return [*lines, *options[:MOST_LINES], *([f"  and    {more} more options"] if more > 0 else [])]


def _texts(config: Any) -> Iterator[tuple[str, str]]:
    """The texts and paths of a plugin's options that are not the defaults: these may name what it reads or writes."""
    if isinstance(config, Mapping):  # of a plugin that is not installed
        yield from _leaves("", config)
    else:
        for field in attrs.fields(type(config)):
            value = getattr(config, field.name)
            if value != field.default:
                yield from _leaves(field.name, value)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str | Path):
        yield key, str(value)
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(f"{key}.{shorten(name)[1:-1]}" if key else shorten(name)[1:-1], part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(key, part)
    elif attrs.has(type(value)):
        yield from _leaves(key, attrs.asdict(value, recurse=False))
