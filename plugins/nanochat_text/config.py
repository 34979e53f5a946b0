"""Options of the data sources ``jsonl`` and ``text``."""

from typing import Any, Literal

import attrs

from nanochat_core import absolute_place, between, option


def _not_empty(_: Any, attribute: Any, value: Any) -> None:
    if value in ((), ""):
        raise ValueError("must name a directory, file or pattern")


def _one_line(_: Any, attribute: Any, value: Any) -> None:
    if isinstance(value, str) and ("\n" in value or "\r" in value):
        raise ValueError("must be one line, without its line break")


@attrs.frozen(kw_only=True)
class FilesConfig:
    """Options that both sources share."""

    path: str | tuple[str, ...] = option(
        help="directory, file, or pattern such as notes/**/*.md; or a list of these; .gz, .bz2, .xz and .zst are "
        "decompressed",
        validator=_not_empty,
        on_resume="free",  # the fingerprint notices other data
    )
    val_path: str | tuple[str, ...] | None = option(
        None,
        "directory, file, pattern or list of these, for validation; all documents of path are for training then",
        validator=_not_empty,
        on_resume="free",
    )
    val_fraction: float = option(
        0.05,
        "without val_path, every k-th document is for validation, k = 1 / val_fraction",
        validator=between(1e-6, 0.5),
    )
    on_error: Literal["fail", "skip"] = option(
        "fail",
        "effect of a text or file that can't be read: fail ends the run; skip makes the document empty",
        on_resume="warn",
    )

    def __attrs_post_init__(self) -> None:
        for name in ("path", "val_path"):  # a run may be resumed from another directory
            object.__setattr__(self, name, _absolute(getattr(self, name)))


def _absolute(path: Any) -> Any:
    if path is None:
        return None
    return tuple(map(_absolute, path)) if isinstance(path, tuple) else absolute_place(path)


@attrs.frozen(kw_only=True)
class JsonlConfig(FilesConfig):
    """One JSON object per line; blank lines are ignored. In directories: *.jsonl and *.ndjson at any depth."""

    text_field: str = option("text", "key of the document's text; null is an empty document")


@attrs.frozen(kw_only=True)
class TextConfig(FilesConfig):
    """UTF-8 text. In directories: *.txt at any depth."""

    separator: str | None = option(
        None,
        'line that separates documents ("" is an empty line); without it each file is a document',
        validator=_one_line,
    )
