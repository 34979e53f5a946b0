"""Building the data source of an experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import overload

from nanochat_core.errors import DataError, PluginError
from nanochat_core.files import cache_dir
from nanochat_core.interfaces.data_source import DataContext, DataSource
from nanochat_core.interfaces.types import Split
from nanochat_core.plugins.choice import Choice


def build_source(choice: Choice) -> DataSource:
    """The data source that an experiment picks.

    Returns:
        A source whose errors, also those of reading documents later, have full keys of options, file and line.

    Raises:
        PluginError: when the factory returns something else.
        NanochatError: from the factory, about its options or the data.
    """
    source = choice.build(DataContext(cache_dir=cache_dir()))
    if not isinstance(source, DataSource):
        raise PluginError(f"the factory of data source {choice.plugin!r} must return a nanochat_core.DataSource")
    return _NamingSource(choice, source)


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


class _NamingSource(DataSource):
    """A data source that adds keys and places of options to the errors of another one, also to those of reading."""

    def __init__(self, choice: Choice, source: DataSource) -> None:
        self._choice, self._source = choice, source

    def documents(self, split: Split) -> Sequence[str]:
        with self._choice.naming_options():
            return _NamingDocuments(self._choice, self._source.documents(split))

    def fingerprint(self, split: Split) -> str:
        with self._choice.naming_options():
            return self._source.fingerprint(split)

    def problems(self) -> Sequence[str]:
        return self._source.problems()

    def describe(self) -> Mapping[str, str | int]:
        with self._choice.naming_options():
            return self._source.describe()

    def download(self, workers: int) -> Sequence[str]:
        with self._choice.naming_options():
            return self._source.download(workers)


class _NamingDocuments(Sequence[str]):
    """Its documents."""

    def __init__(self, choice: Choice, documents: Sequence[str]) -> None:
        self._choice, self._documents = choice, documents

    def __len__(self) -> int:
        return len(self._documents)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        with self._choice.naming_options():
            return self._documents[index]

    def __iter__(self) -> Iterator[str]:
        with self._choice.naming_options():
            yield from self._documents
