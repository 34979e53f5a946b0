"""The contract check of data sources; plugin authors import it from ``nanochat_core.testing``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from nanochat_core.files import shorten
from nanochat_core.interfaces.data_source import DataContext, DataSource
from nanochat_core.interfaces.types import Split
from nanochat_core.testing.checks import Check


def check_data_source(factory: Callable[[Any, DataContext], DataSource], config: Any) -> DataSource:
    """Check that a data source keeps its contract.

    Both splits have documents; they can be read by index and slice, in any order; a second instance, with an empty
    cache, has the same documents and fingerprints, without which no run could be resumed.

    Returns:
        The data source.

    Raises:
        AssertionError: with a line for every rule that is broken.
    """
    check = Check("data source")
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        source = factory(config, DataContext(Path(first)))
        assert isinstance(source, DataSource), f"the factory must return a nanochat_core.DataSource, not {source!r}"
        again = factory(config, DataContext(Path(second)))
        splits: tuple[Split, ...] = ("train", "val")
        for split in splits:
            check.run(lambda s=split: _check_split(check, source, again, s), f"documents of {split}")  # type: ignore[misc]
    described = source.describe()
    for key, value in described.items():
        check.expect(isinstance(value, str | int), f"describe()[{key!r}] must be a str or an int, not {value!r}")
    check.expect(all(isinstance(line, str) for line in source.problems()), "problems() must be lines of text")
    check.finish()
    return source


def _check_split(check: Check, source: DataSource, again: DataSource, split: Split) -> None:
    documents = source.documents(split)
    is_sequence = hasattr(documents, "__len__") and hasattr(documents, "__getitem__")
    if not is_sequence or isinstance(documents, str | bytes | Mapping | Set):
        check.expect(False, f"documents({split!r}) must return a sequence of texts, not {shorten(documents)}")
        return
    count = len(documents)
    check.expect(count > 0, f"{split} has no documents")
    if not count:
        return
    some = sorted({0, count // 3, count // 2, count - 1})
    texts = {i: documents[i] for i in some}
    for i, text in texts.items():
        check.expect(isinstance(text, str), f"document {i} of {split} is not a str")
    backwards = {i: documents[i] for i in reversed(some)}
    check.expect(backwards == texts, f"documents of {split} differ when they are read in a different order")
    check.expect(
        list(documents[0:count:7]) == [documents[i] for i in range(0, count, 7)], f"slices of {split} are wrong"
    )
    check.expect(list(documents[count:]) == [], f"a slice past the end of {split} is not empty")
    try:
        documents[count]
        check.expect(False, f"{split} has a document past its end: raise IndexError")
    except IndexError:
        pass
    others = again.documents(split)
    same = len(others) == count and all(others[i] == text for i, text in texts.items())
    check.expect(same, f"a second instance has different documents in {split}")
    fingerprint = source.fingerprint(split)
    check.expect(fingerprint == again.fingerprint(split), f"a second instance has a different fingerprint of {split}")
    int(fingerprint, 16)
