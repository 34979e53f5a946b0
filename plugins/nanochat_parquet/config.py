"""Options of the data sources ``parquet``, ``hub_parquet``, ``fineweb_edu`` and ``climbmix``."""

from typing import Any, Literal

import attrs

from nanochat_core import at_least, between, expand_path, option

COLUMN_HELP = "column of strings, one document per row; a null is an empty document"
ON_ERROR_HELP = "effect of a row group or text that can't be read: fail ends the run; skip makes its documents empty"


def _are_places(_: Any, attribute: Any, value: Any) -> None:
    if value in ((), ""):
        raise ValueError("must name a directory, file, pattern or URL")
    _absolute(value)


@attrs.frozen
class ParquetConfig:
    """Options of ``parquet``. By default the last shard by name is for validation, the others are for training."""

    path: str | tuple[str, ...] = option(
        help="directory of *.parquet files, file, pattern such as data/*.parquet, or URL (http, https, s3, gs, "
        "or any other that fsspec knows); or a list of these",
        validator=_are_places,
        on_resume="free",  # the fingerprint notices other data
    )
    text_column: str = option("text", COLUMN_HELP)
    val_path: str | tuple[str, ...] | None = option(
        None,
        "directory, file, pattern, URL or list of these, of the validation shards; all shards of path are for training "
        "then",
        validator=_are_places,
        on_resume="free",
    )
    val_fraction: float | None = option(
        None,
        "use every k-th document for validation, not the last shard; k = 1 / val_fraction",
        validator=between(1e-6, 0.5),
    )
    on_error: Literal["fail", "skip"] = option("fail", ON_ERROR_HELP, on_resume="warn")

    def __attrs_post_init__(self) -> None:
        if self.val_path is not None and self.val_fraction is not None:
            raise ValueError("give val_path or val_fraction, not both")
        for name in ("path", "val_path"):  # a run may be resumed from another directory
            object.__setattr__(self, name, _absolute(getattr(self, name)))


def _absolute(path: Any) -> Any:
    if isinstance(path, tuple):
        return tuple(_absolute(part) for part in path)
    if path is None or "://" in str(path):
        return path
    return str(expand_path(path))


@attrs.frozen(kw_only=True)
class HubConfig:
    """Options that all data sets on the hub share."""

    shards: int = option(
        240,
        "number of training shards, from the first on (the last of the data set is for validation); each is fetched "
        "before it is needed",
        validator=at_least(1, 10**6),
    )
    text_column: str = option("text", COLUMN_HELP)
    revision: str = option("main", "branch, tag or commit of the data set on the hub")
    workers: int = option(4, "number of files fetched at the same time", validator=at_least(1, 256), on_resume="free")
    on_error: Literal["fail", "skip"] = option("fail", ON_ERROR_HELP, on_resume="warn")


@attrs.frozen(kw_only=True)
class FinewebEduConfig(HubConfig):
    """FineWeb-Edu, 100 billion tokens, shuffled: 1,822 shards, each of about 100 MB and 250 million characters."""


@attrs.frozen(kw_only=True)
class ClimbmixConfig(HubConfig):
    """ClimbMix, 400 billion tokens, shuffled: 6,542 shards, each of about 100 MB and 250 million characters."""


@attrs.frozen(kw_only=True)
class HubParquetConfig(HubConfig):
    """Any data set on the hub that holds parquet files; the last file by name is for validation."""

    repo: str = option(help="the data set, such as karpathy/fineweb-edu-100b-shuffle")
    files: str = option("*.parquet", "pattern of the names of its shards; * matches / too")
