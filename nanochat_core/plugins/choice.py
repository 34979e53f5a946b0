"""A plugin entry that an experiment picks, and the keys that the core reserves on its table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import attrs

from nanochat_core.errors import NanochatError, PluginError
from nanochat_core.plugins.calls import plugin_call, remember
from nanochat_core.plugins.options import above, at_least, file_name, option, shown
from nanochat_core.plugins.registry import Entry, Kind

PLUGIN_TABLES: Mapping[str, Kind] = {
    "tokenizer": "tokenizer",
    "data": "data_source",
    "model": "model",
    "optimizer": "optimizer",
}
# Bounds of options: no run is that long, and everything that is computed from them stays exact.
MOST_STEPS = 10**12
MOST_SECONDS = 10**6

PLUGIN_LISTS: Mapping[str, Kind] = {"evaluators": "evaluator", "loggers": "logger"}


LONGEST_ENTRY_NAME = 100  # characters: it becomes a part of names of files and metrics


def _entry_name(_: Any, attribute: Any, value: str) -> None:
    file_name(_, attribute, value)
    if not value or "." in value:
        raise ValueError(f"must be a name without dots, because it becomes part of keys, not {shown(value)}")
    if len(value) > LONGEST_ENTRY_NAME:
        raise ValueError(f"must be at most {LONGEST_ENTRY_NAME} characters long, not {len(value)}")


@attrs.frozen
class EntryKeys:
    """Keys the core reserves on every table that names a plugin."""

    plugin: str = option(help="name of the plugin entry")


@attrs.frozen
class NamedKeys(EntryKeys):
    """Keys the core reserves on the tables of lists."""

    name: str = option("", "identity of the entry; default: the plugin's name", validator=_entry_name)


@attrs.frozen
class LoggerKeys(NamedKeys):
    """Keys the core reserves on ``[[loggers]]``."""

    timeout: float = option(
        60.0,
        "seconds that a logger may take to start, to handle one record, and to send the rest at the end; after that "
        "it is terminated, and nanochat log-sync can send the records it missed",
        validator=above(0, MOST_SECONDS),
    )


@attrs.frozen
class EvaluatorKeys(NamedKeys):
    """Keys the core reserves on ``[[evaluators]]``."""

    every: int = option(
        0, "number of steps from one evaluation to the next; 0 is off", validator=at_least(0, MOST_STEPS)
    )
    at_start: bool = option(False, "evaluate before the first step")
    at_end: bool = option(True, "evaluate after the last step")
    time_budget: float | None = option(
        None,
        "seconds an evaluation may take; its result up to then is marked as partial",
        validator=above(0, MOST_SECONDS),
    )


@attrs.frozen
class DataSourceKeys(EntryKeys):
    """Keys the core reserves on ``[data]``."""

    packing: Literal["stream", "best_fit"] = option(
        "stream",
        "how documents fill rows of tokens: stream concatenates documents and cuts them into rows; best_fit starts "
        "every row with a document, and crops documents that fit nowhere",
    )
    packing_window: int = option(64, "number of documents that best_fit packs together", validator=at_least(1, 2**16))
    epochs: int | Literal["repeat", "error"] = option(
        "repeat",
        "when the training data are used up: repeat reads them again, error ends the run after saving, a number ends "
        "it after that many passes",
        validator=at_least(1, 10**6),
        on_resume="free",
    )
    cache: bool = option(False, "keep the tokens on disk, so that text is tokenized only once", on_resume="free")
    threads: int = option(
        1, "number of threads per process that read and tokenize", validator=at_least(1, 1024), on_resume="free"
    )


RESERVED: Mapping[str, type[EntryKeys]] = {
    "data_source": DataSourceKeys,
    "evaluator": EvaluatorKeys,
    "logger": LoggerKeys,
}


@attrs.frozen
class Choice:
    """A plugin entry picked by an experiment.

    Args:
        keys: the values of the keys that the core reserves on the table.
        entry: the registered entry; None when no installed plugin has it, which ``nanochat show`` allows.
        config: the plugin's own typed config; without an entry the raw options.
        places: where each option is set, as ``file:line`` or similar, by dotted key; for an option that is not set, the
            place of the table.
    """

    keys: EntryKeys
    entry: Entry | None
    config: Any
    places: Mapping[str, str] = attrs.field(factory=dict, eq=False, repr=False)

    @property
    def plugin(self) -> str:
        return self.keys.plugin

    @property
    def name(self) -> str:
        return getattr(self.keys, "name", "") or self.keys.plugin

    @property
    def table(self) -> str:
        """Dotted key of its table, such as ``data`` or ``evaluators.mine``; empty without an entry."""
        if self.entry is None:
            return ""
        table = next(t for t, kind in (*PLUGIN_TABLES.items(), *PLUGIN_LISTS.items()) if kind == self.entry.kind)
        return f"{table}.{self.name}" if table in PLUGIN_LISTS else table

    def metric_name(self, metric: str) -> str:
        """Return the ledger's name of an evaluator's metric: an entry renamed in TOML prefixes it with its name."""
        return metric if self.name == self.plugin else f"{self.name}/{metric}"

    def build(self, context: Any) -> Any:
        """Import the factory and call it.

        Raises:
            PluginError: when the factory can't be imported or raises.
            NanochatError: from the factory, about its options or the data; with full keys and places of the options.
        """
        assert self.entry is not None, "load() refuses experiments with unknown plugins"
        factory = self.entry.load()
        with self.calling("can't be built"):
            made = factory(self.config, context)
            remember(made, self.title)
            return made

    @property
    def title(self) -> str:
        """What messages call it, such as ``model 'mine' of my-package 1.0``."""
        if self.entry is None:
            return repr(self.name)
        kind = self.entry.kind.replace("_", " ")
        return f"{kind} {self.name!r} of {self.entry.distribution} {self.entry.version}"

    def breaks(self, rule: str) -> PluginError:
        """Return the error for a plugin that breaks a rule of its contract, such as ``the factory must ...``."""
        return PluginError(f"{self.title} breaks its contract: {rule}")

    @contextlib.contextmanager
    def calling(self, what: str = "failed") -> Iterator[None]:
        """Return a context for code of the plugin: ``plugin_call`` and ``naming_options`` together."""
        with self.naming_options(), plugin_call(f"{self.title} {what}"):
            yield

    @contextlib.contextmanager
    def naming_options(self) -> Iterator[None]:
        """Return a context that completes keys in errors of the plugin: ``path`` becomes ``FILE:LINE: data.path``."""
        try:
            yield
        except NanochatError as error:
            error.in_table(self.table)
            error.add_places(self.places)
            raise
