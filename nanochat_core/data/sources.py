"""Building the data source of an experiment, and checking that it keeps its contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, overload

from nanochat_core.errors import DataError
from nanochat_core.files import shorten
from nanochat_core.interfaces.data_source import DataContext, DataSource
from nanochat_core.interfaces.types import Split
from nanochat_core.plugins.choice import Choice


def build_source(choice: Choice) -> DataSource:
    """The data source that an experiment picks.

    Returns:
        A source whose errors, also those of reading documents later, have full keys of options, file and line. What it
        returns is checked: a document that is no text is an error when it is read.

    Raises:
        PluginError: when the factory returns something else.
        NanochatError: from the factory, about its options or the data.
    """
    source = choice.build(DataContext())
    if not isinstance(source, DataSource):
        raise choice.breaks(f"the factory must return a nanochat_core.DataSource, not {shorten(source)}")
    return _CheckedSource(choice, source)


SAME_DATA = "the training and the validation data are the same: the validation loss says nothing about new text"
MOST_EMPTY = 100_000  # documents at the start that are looked at


def training_data_problems(choice: Choice, source: DataSource) -> list[str]:
    """What is wrong with the documents of a source, but may be meant: a line each.

    Raises:
        DataError: when all training documents are empty.
    """
    problems = []
    if source.fingerprint("train") == source.fingerprint("val"):
        problems.append(SAME_DATA)
    documents = source.documents("train")
    for start in range(0, min(len(documents), MOST_EMPTY), 256):
        if any(documents[start : start + 256]):
            return problems
    if len(documents) <= MOST_EMPTY:
        raise DataError(
            f"all {len(documents):,} training documents of data source {choice.plugin!r} are empty; check its data, "
            f"and the option of [data] that says where in them the text is"
        )
    return [*problems, f"the first {MOST_EMPTY:,} training documents are empty"]


class _CheckedSource(DataSource):
    """Another data source, whose errors have keys and places of options, and whose results are checked."""

    def __init__(self, choice: Choice, source: DataSource) -> None:
        self._choice, self._source = choice, source

    def documents(self, split: Split) -> Sequence[str]:
        with self._choice.calling():
            return _CheckedDocuments(self._choice, self._source.documents(split), split)

    def fingerprint(self, split: Split) -> str:
        with self._choice.calling():
            fingerprint = self._source.fingerprint(split)
        if not (isinstance(fingerprint, str) and fingerprint and fingerprint.isprintable() and len(fingerprint) <= 200):
            raise self._choice.breaks(f"fingerprint({split!r}) must be a hex digest, not {shorten(fingerprint)}")
        return fingerprint

    def problems(self) -> Sequence[str]:
        with self._choice.calling():
            return [str(line) for line in self._source.problems()]

    def describe(self) -> Mapping[str, str | int]:
        with self._choice.calling():
            described = self._source.describe()
        if not isinstance(described, Mapping) or not all(
            isinstance(k, str) and isinstance(v, str | int) for k, v in described.items()
        ):
            raise self._choice.breaks(f"describe() must map names to texts and whole numbers, not {shorten(described)}")
        return described

    def download(self, workers: int) -> Sequence[str]:
        with self._choice.calling():
            return [str(line) for line in self._source.download(workers)]


class _CheckedDocuments(Sequence[str]):
    """Its documents."""

    def __init__(self, choice: Choice, documents: Any, split: Split) -> None:
        self._choice, self._documents, self._split = choice, documents, split
        is_sequence = hasattr(documents, "__len__") and hasattr(documents, "__getitem__")
        if not is_sequence or isinstance(documents, str | bytes | Mapping | Set):
            raise choice.breaks(f"documents({split!r}) must return a sequence of texts, not {shorten(documents)}")

    def __len__(self) -> int:
        with self._choice.calling():
            return len(self._documents)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return self._part(index)
        if index >= len(self):  # so that a loop over all documents ends
            raise IndexError(index)
        with self._choice.calling():
            document = self._documents[index]
        return self._text(document, index)

    def _part(self, index: slice) -> Sequence[str]:
        indices = range(*index.indices(len(self)))
        with self._choice.calling():
            part = list(self._documents[index])
        if len(part) != len(indices):
            raise self._choice.breaks(
                f"documents({self._split!r}) has {len(self)} documents by its length, but a slice of {len(indices)} of "
                f"them has {len(part)}"
            )
        return [self._text(document, i) for i, document in zip(indices, part, strict=True)]

    def _text(self, document: object, index: int) -> str:
        if not isinstance(document, str):
            raise self._choice.breaks(f"document {index} of {self._split!r} must be a str, not {shorten(document)}")
        return document

    def __iter__(self) -> Iterator[str]:
        with self._choice.calling():
            documents = iter(self._documents)
        for index in range(len(self)):
            with self._choice.calling():
                document = next(documents)
            yield self._text(document, index)
