"""The DataSource interface."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from nanochat_core.files import cache_dir, shorten
from nanochat_core.interfaces.types import Split


@attrs.frozen
class DataContext:
    """The context that the factory of a data source receives.

    Args:
        cache_dir: the directory of ``files.cache_dir`` if it is not given.
    """

    _cache_dir: Path | None = None

    @property
    def cache_dir(self) -> Path:
        """An existing directory for files that are kept between runs (downloads, extracted text).

        Raises:
            ConfigError: when there is none that can be written. A source that keeps nothing does not ask for it.
        """
        return self._cache_dir or cache_dir()


class DataSource(ABC):
    """Documents of a training and a validation split, in a fixed order."""

    @abstractmethod
    def documents(self, split: Split) -> Sequence[str]:
        """Return the split's documents: a list, or another sequence that supports indices and slices with a step.

        Raises:
            DataError: when the data are missing or unreadable.
        """

    def fingerprint(self, split: Split) -> str:
        """Return a hex digest of the split's content. The default reads every document; override it if that is slow."""
        digest = hashlib.sha256()
        for index, document in enumerate(self.documents(split)):
            if not isinstance(document, str):
                raise TypeError(f"document {index} of {split!r} must be a str, not {shorten(document)}")
            data = document.encode("utf-8", errors="surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def problems(self) -> Sequence[str]:
        """Return a line for each place that was skipped so far because it can't be read, in the order of reading."""
        return ()

    def describe(self) -> Mapping[str, str | int]:
        """Return facts that ``nanochat data info`` prints, name to value. This must not fetch documents.

        The core uses ``text_bytes`` (size of the training documents), ``files``, ``bytes`` (size of the files), and
        ``missing`` (number of files that are not downloaded yet).
        """
        return {}

    def download(self, workers: int) -> Sequence[str]:
        """Download and check every missing file, ``workers`` at a time.

        Returns:
            A line with the reason for each file that is still missing.
        """
        return ()
