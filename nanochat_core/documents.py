"""Long sequences of documents that are read when they are asked for, and the part of them that is held out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import overload


class Documents(Sequence[str]):
    """Indexes, slices and iterates like a list, given ``__len__`` and ``read``."""

    @abstractmethod
    def read(self, indices: Iterable[int]) -> Iterator[str]:
        """The documents at ``indices``, all of them in [0, len). Neighbouring ones are asked for together, so that an
        implementation reads what they share (a row group, a file) once. Any thread may call it."""

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
