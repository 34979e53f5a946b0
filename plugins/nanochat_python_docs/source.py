"""The data source ``python_docs``: documents of the running Python, split, shuffled and cached."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

from nanochat_core import DataContext, DataError, DataSource, Split, write_atomic
from nanochat_python_docs import corpus
from nanochat_python_docs.config import PythonDocsConfig

FORMAT = 1  # increased when the documents of the same Python change
FEWEST = 100  # documents; a complete Python has about six hundred


class PythonDocs(DataSource):
    """A data source with the documents of both splits in memory."""

    def __init__(self, splits: dict[Split, list[str]]) -> None:
        self._splits = splits

    def documents(self, split: Split) -> list[str]:
        return self._splits[split]


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def make_splits(config: PythonDocsConfig, library: Path) -> dict[Split, list[str]]:
    """The documents of both splits, shuffled by a hash of their names.

    All parts of a module's documentation and source are in the same split.
    """
    splits: dict[Split, list[tuple[float, str]]] = {"train": [], "val": []}
    for name, parts in corpus.all_parts(corpus.documents(config.source, library)).items():
        split: Split = "val" if _fraction(name.partition(":")[2]) < config.val_fraction else "train"
        splits[split] += [(_fraction(f"{name} {i}"), part) for i, part in enumerate(parts)]
    return {split: [text for _, text in sorted(found)] for split, found in splits.items()}


def build(config: PythonDocsConfig, context: DataContext) -> PythonDocs:
    """Extract the documents, or read them from the cache.

    Raises:
        DataError: when this Python has almost no documentation.
    """
    library = Path(sysconfig.get_path("stdlib"))
    key = [FORMAT, sys.version, str(library), config.source, config.val_fraction]
    cached = context.cache_dir / f"python_docs-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    try:
        splits: dict[Split, list[str]] = json.loads(cached.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or damaged
        splits = make_splits(config, library)
        if len(splits["train"]) < FEWEST or not splits["val"]:
            raise DataError(
                f"the Python library in {library} gives only {sum(map(len, splits.values()))} documents (files are "
                f"missing, or packed into an archive); install it in full, or choose another data source",
                key="plugin",
            ) from None
        with suppress(OSError):  # without a cache every start takes a few seconds longer
            write_atomic(cached, json.dumps(splits))
    return PythonDocs(splits)
