"""The data sources ``jsonl`` and ``text``."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from nanochat_core import (
    LONGEST_DOCUMENT,
    DataContext,
    DataError,
    DataSource,
    Documents,
    Split,
    UnreadablePlaces,
    content_problem,
    field_text,
    find_files,
    hold_out,
    open_regular,
    parse_json,
    parse_text,
    read_text,
    refuse_shared,
)
from nanochat_text.config import FilesConfig, JsonlConfig, TextConfig
from nanochat_text.files import endings, fingerprint, is_complete, line_number, plain
from nanochat_text.index import Spans, load_index

REPAIR = "repair it"
MOST_NUMBERED = 50  # problems that are told with a line number, for which lines are counted


class SpanDocuments(Documents):
    """Documents that are spans of files.

    Args:
        files: for each file its path for messages, its plain file, and the spans of its documents.
        parse: returns the text of a span's bytes; raises ValueError when they are not valid.
        problems: records documents that can't be read.
    """

    def __init__(
        self, files: Sequence[tuple[Path, Path, Spans]], parse: Callable[[bytes], str], problems: UnreadablePlaces
    ) -> None:
        self._files, self._parse, self._problems = files, parse, problems
        self._starts = [0, *accumulate(len(spans) for _, _, spans in files)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, indices: Iterable[int]) -> Iterator[str]:
        opened, descriptor = -1, -1
        try:
            for index in indices:
                which = bisect_right(self._starts, index) - 1
                name, path, spans = self._files[which]
                if which != opened:
                    if descriptor >= 0:
                        os.close(descriptor)
                        descriptor = -1
                    descriptor, opened = _open(path, name), which
                start, end = spans[index - self._starts[which]].tolist()
                yield self._text(descriptor, start, end, name)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _text(self, descriptor: int, start: int, end: int, name: Path) -> str:
        size = end - start
        try:
            if size > LONGEST_DOCUMENT:
                raise ValueError(f"it has {size:,} bytes, more than the {LONGEST_DOCUMENT:,} that a document may have")
            data = os.pread(descriptor, size, start)
            if len(data) == size:
                return self._parse(data)
        except ValueError as error:
            line = line_number(descriptor, start) if len(self._problems.lines()) < MOST_NUMBERED else 0
            reason = f"line {line:,}: {error}" if line else str(error)
            self._problems.report(f"the document at byte {start:,} of {name} can't be read ({reason})", REPAIR, error)
            return ""
        raise DataError(
            f"{name} has become shorter since the run started; restore it, and don't change it during a run",
            key="path",
        )


def _open(path: Path, name: Path) -> int:
    try:
        with open_regular(path) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise DataError(f"{name} can't be read any more ({error}); restore it", key="path") from error


def _reading(path: Path) -> BinaryIO:
    return os.fdopen(_open(path, path), "rb")


class FileDocuments(Documents):
    """Documents that are whole files."""

    def __init__(self, paths: Sequence[Path], problems: UnreadablePlaces) -> None:
        self._paths, self._problems = paths, problems

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: Iterable[int]) -> Iterator[str]:
        for index in indices:
            path = self._paths[index]
            try:
                text = read_text(path)
            except OSError as error:
                raise DataError(f"{path} can't be read ({error}); restore it", key="path") from error
            except ValueError as error:
                self._problems.report(f"{path} can't be read ({error})", REPAIR, error)
                text = ""
            yield text


class _Field:
    """Parser that returns a field of a JSON object. It is a class, so that it can be pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, data: bytes) -> str:
        try:
            return field_text(parse_json(data), self.name)
        except ValueError as error:
            if str(error).startswith("no field"):
                raise ValueError(f"{error}; set data.text_field to the field with the text") from error
            raise


class FilesSource(DataSource):
    """Data source of the documents of files. With ``val_fraction`` every k-th document is for validation."""

    def __init__(self, config: FilesConfig, cache_dir: Path) -> None:
        self._config, self._directory = config, cache_dir / "text"
        self._problems = UnreadablePlaces(config.on_error)
        suffixes = endings(".jsonl", ".ndjson") if isinstance(config, JsonlConfig) else endings(".txt")
        self._train_files = find_files(config.path, suffixes, "path")
        self._val_files = self._train_files
        if config.val_path is not None:
            self._val_files = find_files(config.val_path, suffixes, "val_path")
            refuse_shared(self._train_files, self._val_files, "val_path")

    def documents(self, split: Split) -> Documents:
        """The split's documents, read on demand.

        Raises:
            DataError: when there are too few, or a file is damaged.
        """
        return self._splits[0 if split == "train" else 1]

    @cached_property
    def _splits(self) -> tuple[Documents, Documents]:
        if self._config.val_path is not None:
            splits = self._open(self._train_files), self._open(self._val_files)
        else:
            splits = hold_out(self._open(self._train_files), self._config.val_fraction)
        if not all(map(len, splits)):
            needed = max(2, round(1 / self._config.val_fraction)) if self._config.val_path is None else 1
            hint = ""
            if isinstance(self._config, TextConfig) and self._config.separator is None:
                hint = ', or data.separator to the line between the documents of a file ("" for an empty line)'
            raise DataError(
                f"{len(splits[0]) + len(splits[1])} documents are too few for a training and a validation "
                f"part ({needed} or more are needed); add documents, or set data.val_path or data.val_fraction{hint}",
                key="path",
            )
        return splits

    def _open(self, paths: Sequence[Path]) -> Documents:
        config = self._config
        if isinstance(config, TextConfig) and config.separator is None:
            return FileDocuments(paths, self._problems)
        separator = config.separator if isinstance(config, TextConfig) else None
        files = []
        for path in paths:
            try:
                content = plain(path, self._directory, keep_damaged=config.on_error == "skip")
            except OSError as error:
                raise DataError(f"{path} can't be read ({error}); restore it", key="path") from error
            if content.problem:
                self._problems.report(content.problem, REPAIR)
            with _reading(content.path) as file:
                problem = content_problem(file.read(2**16), json_lines=separator is None)
            if problem:
                self._problems.report(f"{path} can't be read ({problem})", REPAIR)
                continue
            spans = load_index(content.path, self._directory, separator)
            if content.problem and len(spans) and not is_complete(content.path, int(spans[-1, 1]), separator):
                spans = spans[:-1]
            files.append((path, content.path, spans))
        parse = _Field(config.text_field) if isinstance(config, JsonlConfig) else parse_text
        return SpanDocuments(files, parse, self._problems)

    def fingerprint(self, split: Split) -> str:
        """Digest of the options that determine the documents, and of the files' bytes on disk."""
        config = self._config
        settings = [type(config).__name__]
        settings += [config.text_field] if isinstance(config, JsonlConfig) else []
        settings += [repr(config.separator)] if isinstance(config, TextConfig) else []
        if config.val_path is not None:
            return fingerprint(self._train_files if split == "train" else self._val_files, settings)
        return fingerprint(self._train_files, [*settings, split, str(config.val_fraction)])

    def problems(self) -> Sequence[str]:
        return self._problems.lines()

    def describe(self) -> Mapping[str, str | int]:
        files = {*self._train_files, *self._val_files}
        return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def build_jsonl(config: JsonlConfig, context: DataContext) -> FilesSource:
    return FilesSource(config, context.cache_dir)


def build_text(config: TextConfig, context: DataContext) -> FilesSource:
    return FilesSource(config, context.cache_dir)
