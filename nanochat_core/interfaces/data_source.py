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
    """Facts that the factory of a data source gets.

    Args:
        cache_dir: an existing directory for files that are kept between runs (downloads, extracted text).
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
        """Places that were skipped so far because they can't be read: one line per place, in the order of reading."""
        return ()

    def describe(self) -> Mapping[str, str | int]:
        """What ``nanochat data info`` says of the source: name to value, such as ``files`` and ``bytes``. Fetches no
        documents. Known to the core: ``text_bytes`` (of the training documents) and ``missing`` (files not here yet).
        """
        return {}

    def download(self, workers: int) -> Sequence[str]:
        """Download and check every file that is missing. Returns a line, with the reason, for each that still is."""
        return ()
