"""The DataSource interface."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from nanochat_core.interfaces.types import Split


@attrs.frozen
class DataContext:
    """What a data source may know when it is built.

    Args:
        cache_dir: an existing directory for what is worth keeping between runs (downloads, extracted text).
    """

    cache_dir: Path


class DataSource(ABC):
    """Documents of a training and a validation split, in a fixed order."""

    @abstractmethod
    def documents(self, split: Split) -> Sequence[str]:
        """The split's documents. Random access by index and by slice (with a step); a list will do.

        Raises:
            DataError: when the data are missing or unreadable.
        """

    def fingerprint(self, split: Split) -> str:
        """Hex digest of the split's content. Default: over every document; override it where that is slow."""
        digest = hashlib.sha256()
        for document in self.documents(split):
            data = document.encode("utf-8", errors="surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def problems(self) -> Sequence[str]:
        """What was skipped so far because it can't be read: a line each, in the order it was met."""
        return ()

    def describe(self) -> Mapping[str, str | int]:
        """What ``nanochat data info`` says of the source: name to value, such as ``files`` and ``bytes``. Fetches no
        documents. Known to the core: ``text_bytes`` (of the training documents) and ``missing`` (files not here yet).
        """
        return {}

    def download(self, workers: int) -> Sequence[str]:
        """Bring everything here that isn't yet, and check it. Returns what is still missing and why, a line each."""
        return ()
