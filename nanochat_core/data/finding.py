"""Which files are the data: directories, files, patterns and lists of these. Imports no torch."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nanochat_core.errors import DataError
from nanochat_core.files import shorten

REMEDY = "set it to a file, a directory, or a pattern that matches files"


def find_files(places: str | Iterable[str], suffixes: Sequence[str], key: str, *, deep: bool = True) -> list[Path]:
    """Return the files at ``places``, those of each place sorted by path.

    Names that begin with a dot, and what is in directories of such names, are no data unless the place names them.
    Links to files and directories are followed. In a pattern ``*`` stands for a part of a name and ``**`` for any
    number of directories.

    Args:
        places: directories, files or patterns.
        suffixes: ends of the names that count in a directory, in any case, such as ``.jsonl``.
        key: option that names the places, for messages.
        deep: whether directories are searched at any depth.

    Raises:
        DataError: when a place is missing, can't be read, holds no such files, or a file that fits is not a regular one
            (as a link whose target is gone); when a file is found twice, also by another name.
    """
    seen: dict[object, Path] = {}
    for place in [places] if isinstance(places, str) else places:
        try:
            for path in _at(place, tuple(suffix.lower() for suffix in suffixes), key, deep):
                first = seen.setdefault(_identity(path), path)
                if first is not path:
                    other = "is named twice" if first == path else f"is the same file as {_show(first)}"
                    raise DataError(f"{_show(path)} {other}; name it once, or leave one of the two out", key=key)
        except (OSError, ValueError, RuntimeError) as error:
            where = getattr(error, "filename", None) or place
            why = getattr(error, "strerror", None) or error
            raise DataError(f"{shorten(os.fspath(where), 300)} can't be read ({why}); {REMEDY}", key=key) from error
    return list(seen.values())


def refuse_shared(train: Iterable[Path], val: Iterable[Path], key: str) -> None:
    """Check that no file is for training and for validation, also by another name.

    Args:
        key: option that names the files for validation.

    Raises:
        DataError: when one is.
    """
    training = {_identity(path): path for path in train}
    for path in val:
        other = training.get(_identity(path))
        if other is not None:
            also = "" if other == path else f", as {_show(other)}"
            raise DataError(
                f"{_show(path)} is among the training files too{also}; remove it from one of the two", key=key
            )


def _at(place: str, suffixes: tuple[str, ...], key: str, deep: bool) -> list[Path]:
    path = Path(place).expanduser().absolute()
    if os.path.lexists(path) or not glob.has_magic(place):
        if not path.is_dir():
            return [_regular(path, key)]
        found = sorted(_in_directory(path, suffixes, key, deep))
        problem = f"holds no {', '.join('*' + suffix for suffix in suffixes)}"
        if not found and not deep and next(_in_directory(path, suffixes, key, True), None):
            problem += " itself, only directories that do"
    else:
        matches = sorted(set(_matching(Path(path.anchor), path.parts[1:], key)))
        found = [_regular(match, key) for match in matches if not match.is_dir()]
        problem = "matches only directories" if matches else "matches no files"
    if not found:
        raise DataError(f"{_show(path)} {problem}; {REMEDY}", key=key)
    return found


def _in_directory(directory: Path, suffixes: tuple[str, ...], key: str, deep: bool) -> Iterator[Path]:
    for entry in _walk(directory, key) if deep else _entries(directory):
        if entry.name.startswith(".") or not entry.name.lower().endswith(suffixes):
            continue
        if _is_directory(entry):
            if not deep:
                raise DataError(
                    f"{_show(Path(entry.path))} is a directory; name it in this option, or use a pattern such as "
                    f"{_show(directory)}/**/*{suffixes[0]}",
                    key=key,
                )
        else:
            yield _regular(Path(entry.path), key)


def _matching(base: Path, parts: Sequence[str], key: str) -> Iterator[Path]:
    """Paths below ``base`` that match the parts of a pattern, as a shell with ``globstar`` expands it."""
    if not parts:
        yield base
        return
    first, *rest = parts
    if first == "**":
        below = [entry for entry in _walk(base, key) if not entry.name.startswith(".")] if base.is_dir() else []
        if not rest:
            yield from (Path(entry.path) for entry in below)
            return
        for directory in (base, *(Path(entry.path) for entry in below if _is_directory(entry))):
            yield from _matching(directory, rest, key)
    elif not glob.has_magic(first) or os.path.lexists(base / first):
        if os.path.lexists(base / first):
            yield from _matching(base / first, rest, key)
    elif base.is_dir():
        for entry in _entries(base):
            if fnmatch.fnmatchcase(entry.name, first) and entry.name.startswith(".") <= first.startswith("."):
                yield from _matching(Path(entry.path), rest, key)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _walk(directory: Path, key: str, above: tuple[object, ...] = ()) -> Iterator[os.DirEntry[str]]:
    """Everything below a directory, but not what is in directories whose name begins with a dot."""
    above = (*above, _identity(directory))
    for entry in _entries(directory):
        yield entry
        if not entry.name.startswith(".") and _is_directory(entry):
            if _identity(Path(entry.path)) in above:
                raise DataError(f"{entry.path} is a link to a directory that holds it; remove the link", key=key)
            yield from _walk(Path(entry.path), key, above)


def _regular(path: Path, key: str) -> Path:
    """``path``, if it is a regular file or a link to one."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            target = shorten(str(path.readlink()), 300)
            message = f"{_show(path)} is a link to {target}, which does not exist; restore it, or remove the link"
            raise DataError(message, key=key) from None
        raise DataError(f"{_show(path)} does not exist; {REMEDY}", key=key) from None
    if not stat.S_ISREG(mode):
        raise DataError(f"{_show(path)} is not a regular file, and nothing else is read; {REMEDY}", key=key)
    return path


def _identity(path: Path) -> object:
    status = path.stat()
    return (status.st_dev, status.st_ino) if status.st_ino else path.resolve()  # some file systems number no files


def _show(path: Path) -> str:
    """A path as text for messages: bytes that are not UTF-8 and control characters are written as ``\\xNN``."""
    return "".join(
        c if c.isprintable() else ascii(c)[1:-1] for c in os.fsencode(path).decode("utf-8", "backslashreplace")
    )
