"""Sequences of documents that are read on demand, a part held out for validation, and places that can't be read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from threading import Lock
from typing import Literal, overload

from nanochat_core.errors import DataError

MOST_SKIPPED = 10_000  # places; with more the data are broken as a whole, or an option is wrong


class Documents(Sequence[str]):
    """A sequence that is indexed, sliced and iterated like a list; subclasses define ``__len__`` and ``read``."""

    @abstractmethod
    def read(self, indices: Iterable[int]) -> Iterator[str]:
        """The documents at ``indices``, all of them in [0, len). Neighbouring documents are requested together, so that
        an implementation reads a row group or file that they share once. Any thread may call it."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return list(self.read(range(*index.indices(len(self)))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return next(self.read((index % len(self),)))

    def __iter__(self) -> Iterator[str]:
        return self.read(range(len(self)))


class _Train(Documents):
    """All documents but every k-th."""

    def __init__(self, documents: Documents, k: int) -> None:
        self._documents, self._k = documents, k

    def __len__(self) -> int:
        return len(self._documents) - len(self._documents) // self._k

    def read(self, indices: Iterable[int]) -> Iterator[str]:
        return self._documents.read(i + i // (self._k - 1) for i in indices)


class _Val(Documents):
    """Every k-th document."""

    def __init__(self, documents: Documents, k: int) -> None:
        self._documents, self._k = documents, k

    def __len__(self) -> int:
        return len(self._documents) // self._k

    def read(self, indices: Iterable[int]) -> Iterator[str]:
        return self._documents.read(i * self._k + self._k - 1 for i in indices)


def hold_out(documents: Documents, fraction: float) -> tuple[Documents, Documents]:
    """Training and validation documents: every k-th is for validation, k = 1 / ``fraction`` to the nearest integer.

    Args:
        fraction: in (0, 0.5].
    """
    k = max(2, round(1 / fraction))
    return _Train(documents, k), _Val(documents, k)


class UnreadablePlaces:
    """The places of a data source that can't be read: skipped, or the end of the run. Thread-safe.

    Args:
        on_error: the option of ``[data]``: "fail" raises an error, "skip" records the place.
    """

    def __init__(self, on_error: Literal["fail", "skip"] = "fail") -> None:
        self.on_error = on_error
        self._lines: dict[str, None] = {}  # a set that keeps its order
        self._lock = Lock()

    def report(self, what: str, remedy: str, error: Exception | None = None) -> None:
        """Report a place that can't be read.

        Args:
            remedy: what the user could do about it.

        Raises:
            DataError: with "fail"; with "skip" after ``MOST_SKIPPED`` places.
        """
        what = " ".join(what.split())  # messages of libraries have line breaks
        if self.on_error == "fail":
            raise DataError(f"{what}; {remedy}, or set data.on_error to skip", key="on_error") from error
        with self._lock:
            self._lines[f"skipped: {what}"] = None
            if len(self._lines) > MOST_SKIPPED:
                message = f"more than {MOST_SKIPPED:,} places can't be read, the last: {what}"
                raise DataError(message, key="on_error")

    def lines(self) -> list[str]:
        """A line for each place, in the order they were reported; see ``DataSource.problems``."""
        with self._lock:
            return list(self._lines)
