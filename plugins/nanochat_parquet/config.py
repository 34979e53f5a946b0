"""Options of the data sources ``parquet``, ``hub_parquet``, ``fineweb_edu`` and ``climbmix``."""

from pathlib import Path
from typing import Any, Literal

import attrs

from nanochat_core import at_least, between, option

COLUMN_HELP = "column of strings, one document a row; a null is an empty document"
ON_ERROR_HELP = "what a row group or text that can't be read does: fail ends the run; skip leaves empty documents"


def _not_empty(_: Any, attribute: Any, value: Any) -> None:
    if value in ((), ""):
        raise ValueError("must name a directory, file, pattern or URL")


@attrs.frozen
class ParquetConfig:
    """Shards in the order of their names. Unless told otherwise the last is for validation, the others for training."""

    path: str | tuple[str, ...] = option(
        help="directory of *.parquet files, file, pattern such as data/*.parquet, or URL (http, https, s3, gs, "
        "or any other that fsspec knows); or a list of these",
        validator=_not_empty,
        on_resume="free",  # the fingerprint notices other data
    )
    text_column: str = option("text", COLUMN_HELP)
    val_path: str | tuple[str, ...] | None = option(
        None, "the same for the validation shards; those of path are all for training then",
        validator=_not_empty, on_resume="free",
    )  # fmt: skip
    val_fraction: float | None = option(
        None,
        "hold out every k-th document instead of the last shard, k = 1 / val_fraction",
        validator=between(1e-6, 0.5),
    )
    on_error: Literal["fail", "skip"] = option("fail", ON_ERROR_HELP, on_resume="warn")

    def __attrs_post_init__(self) -> None:
        if self.val_path is not None and self.val_fraction is not None:
            raise ValueError("give val_path or val_fraction, not both")
        for name in ("path", "val_path"):  # a resumed run may start in another directory
            object.__setattr__(self, name, _absolute(getattr(self, name)))


def _absolute(path: Any) -> Any:
    if isinstance(path, tuple):
        return tuple(_absolute(part) for part in path)
    if path is None or "://" in str(path):
        return path
    return str(Path(path).expanduser().absolute())


@attrs.frozen(kw_only=True)
class HubConfig:
    """What all data sets on the hub have."""

    shards: int = option(
        240, "training shards, from the first on (the last of the data set is for validation); fetched as the run "
        "comes to them", validator=at_least(1),
    )  # fmt: skip
    text_column: str = option("text", COLUMN_HELP)
    revision: str = option("main", "branch, tag or commit of the data set on the hub")
    workers: int = option(4, "files that are fetched at the same time", validator=at_least(1), on_resume="free")
    on_error: Literal["fail", "skip"] = option("fail", ON_ERROR_HELP, on_resume="warn")


@attrs.frozen(kw_only=True)
class FinewebEduConfig(HubConfig):
    """FineWeb-Edu, 100 billion tokens, shuffled: about 100 MB and 250 million characters a shard, 1,822 of them."""


@attrs.frozen(kw_only=True)
class ClimbmixConfig(HubConfig):
    """ClimbMix, 400 billion tokens, shuffled: about 100 MB and 250 million characters a shard, 6,542 of them."""


@attrs.frozen(kw_only=True)
class HubParquetConfig(HubConfig):
    """Any data set on the hub that holds parquet files; the last in the order of names is for validation."""

    repo: str = option(help="the data set, such as karpathy/fineweb-edu-100b-shuffle")
    files: str = option("*.parquet", "pattern of the names of its shards; * also matches /")
