"""Making a run's tokenizer. A finished one is kept in the cache under the hash of all that it was made from, so that
experiments with equal settings share it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from nanochat_core.errors import CheckpointError, PluginError
from nanochat_core.files import cache_dir, file_sha256, lock_file, remove, shorten, sync, write_atomic
from nanochat_core.interfaces.data_source import DataSource
from nanochat_core.interfaces.tokenizer import Tokenizer, TokenizerContext, vocabulary_problems
from nanochat_core.plugins.choice import Choice
from nanochat_core.plugins.structure import to_plain

FORMAT = 1  # of the cache; a change makes every tokenizer again
READ_AT_ONCE = 256  # documents


@attrs.frozen
class MadeTokenizer:
    """A tokenizer and its directory in the cache.

    Args:
        seconds: time that making it took; 0 when it was cached.
    """

    tokenizer: Tokenizer
    directory: Path
    seconds: float

    def copy_to(self, directory: Path) -> None:
        """Copy its files to ``directory``, which is created atomically."""
        partial = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
        partial.mkdir()
        for path in sorted(self.directory.rglob("*")):  # contents only: the modes are those that this process gives
            target = partial / path.relative_to(self.directory)
            target.mkdir() if path.is_dir() else shutil.copyfile(path, target)
        for path in partial.rglob("*"):
            sync(path)  # checkpoints need it
        partial.rename(directory)


def make_tokenizer(choice: Choice, source: DataSource, report: Callable[[str], None] = print) -> MadeTokenizer:
    """The tokenizer of an experiment: from the cache, or trained now. Processes that need the same one train it once.

    Raises:
        PluginError: when the factory doesn't keep its contract.
        NanochatError: from the factory, about its options or the data.
    """
    parts = made_from(choice, source)
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    directory = cache_dir() / "tokenizers" / key
    found = _find(choice, directory, report)
    if found is not None:
        return MadeTokenizer(found, directory, 0.0)
    directory.parent.mkdir(exist_ok=True)
    with _locked(directory.with_suffix(".lock"), report):
        found = _find(choice, directory, report)  # another process may have made it meanwhile
        if found is not None:
            return MadeTokenizer(found, directory, 0.0)
        for leftover in (*directory.parent.glob(f"{key}.*/"), *directory.parent.glob(f".{key}.*")):
            remove(leftover)  # of a process that was killed
        report("building the tokenizer")
        start = time.perf_counter()
        _train(choice, source, directory, parts)
        return MadeTokenizer(load_tokenizer(choice, directory), directory, time.perf_counter() - start)


def made_from(choice: Choice, source: DataSource) -> dict[str, Any]:
    """Everything that determines a tokenizer; for files that options name, their content."""
    entry = choice.entry
    assert entry is not None, "load() refuses experiments with unknown plugins"
    options = to_plain(choice.config)
    files = {name: _digest(value) for name, value in options.items() if isinstance(value, str)}
    return {
        "format": FORMAT,
        "plugin": f"{entry.distribution} {entry.version}: {entry.factory}",
        "libraries": {name: _version(name) for name in entry.requires},
        "options": {name: files.get(name) or value for name, value in options.items()},
        "documents": source.fingerprint("train"),
    }


def _digest(path: str) -> str | None:
    """Hash of the file at ``path``, None if there is no such file."""
    try:
        return f"sha256:{file_sha256(Path(path))}"
    except (OSError, ValueError):  # a text that is not a file name
        return None


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:  # the module's name differs from that of its package
        return "unknown"


def _find(choice: Choice, directory: Path, report: Callable[[str], None]) -> Tokenizer | None:
    """The tokenizer in the cache. A damaged one is removed."""
    if not directory.is_dir():
        return None
    try:
        return load_tokenizer(choice, directory)
    except CheckpointError as error:
        report(f"the tokenizer in the cache is damaged and is made again ({error})")
        shutil.rmtree(directory, ignore_errors=True)
        return None


def _train(choice: Choice, source: DataSource, directory: Path, parts: dict[str, Any]) -> None:
    def documents() -> Iterable[str]:
        train = source.documents("train")
        for start in range(0, len(train), READ_AT_ONCE):
            yield from train[start : start + READ_AT_ONCE]

    tokenizer = _build(choice, TokenizerContext(documents=documents))
    partial = directory.with_name(f"{directory.name}.{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        with choice.calling("can't be saved"):
            tokenizer.save(partial)
        write_atomic(directory.with_suffix(".json"), json.dumps(parts, indent=1) + "\n")
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock at ``path``; report it before waiting."""
    try:
        lock = lock_file(path, timeout=0)
    except TimeoutError:
        report("another process is building the same tokenizer; waiting for it")
        lock = lock_file(path)
    with lock:
        yield


def load_tokenizer(choice: Choice, directory: Path) -> Tokenizer:
    """A tokenizer that was saved in ``directory``."""

    def no_documents() -> Iterable[str]:
        raise PluginError(f"tokenizer {choice.plugin!r} asks for documents although context.saved is given")

    return _build(choice, TokenizerContext(documents=no_documents, saved=directory))


def build_tokenizer(choice: Choice) -> Tokenizer:
    """A tokenizer that needs no training."""

    def no_documents() -> Iterable[str]:
        raise PluginError(f"tokenizer {choice.plugin!r} asks for documents; it can only be made from an experiment")

    return _build(choice, TokenizerContext(documents=no_documents))


def _build(choice: Choice, context: TokenizerContext) -> Tokenizer:
    tokenizer = choice.build(context)
    if not isinstance(tokenizer, Tokenizer):
        raise choice.breaks(f"the factory must return a nanochat_core.Tokenizer, not {shorten(tokenizer)}")
    with choice.calling():
        for problem in vocabulary_problems(tokenizer):
            raise choice.breaks(problem)
    return tokenizer
