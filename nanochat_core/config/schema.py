"""What an experiment is: attrs classes of the core's tables, and strict structuring of any config class by cattrs."""

from __future__ import annotations

import math
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs
import cattrs

from nanochat_core.errors import NanochatError, PluginError, did_you_mean
from nanochat_core.plugins.options import above, at_least, between, option
from nanochat_core.plugins.registry import Entry

# ------------------------------------------------------------------------------------------- tables of the core


def _plain_name(_: Any, attribute: Any, value: str) -> None:
    if value != value.strip() or any(c in value for c in '/\\\0:"') or value.startswith("."):
        raise ValueError(f"must be usable as a directory name, not {value!r}")


def _finite(_: Any, attribute: Any, value: Any) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"must be a finite number greater than 0, not {value}")


def _entry_name(_: Any, attribute: Any, value: str) -> None:
    _plain_name(_, attribute, value)
    if not value or "." in value:
        raise ValueError(f"must be a name without dots, so that keys can hold it, not {value!r}")


@attrs.frozen
class Run:
    name: str = option(
        "", "name of the experiment and of its directory; default: the file's name",
        validator=_plain_name, on_resume="refuse",
    )  # fmt: skip
    project: str = option("nanochat", "project that loggers file the run under")
    group: str = option("", "group of runs that belong together, such as the arms of an ablation")
    tags: tuple[str, ...] = option((), "tags for loggers")


@attrs.frozen
class Schedule:
    warmup_ratio: float | None = option(
        None, "part of the run over which the learning rate rises linearly; or give warmup_steps",
        validator=between(0, 1),
    )  # fmt: skip
    warmup_steps: int | None = option(None, "the same in optimizer steps", validator=at_least(0))
    warmdown_ratio: float = option(
        0.2, "part of the run, at its end, over which the learning rate falls linearly", validator=between(0, 1)
    )
    final_lr_frac: float = option(
        0.0, "learning rate at the very end, as a part of the full one", validator=between(0, 1)
    )


@attrs.frozen
class Train:
    max_seq_len: int = option(2048, "context length T, in tokens", validator=at_least(1), on_resume="refuse")
    device_batch_size: int | Literal["auto"] = option(
        32, "sequences a device and micro-batch: lower it when memory runs out; auto: the largest that fits",
        validator=at_least(1), on_resume="free",
    )  # fmt: skip
    total_batch_size: int | Literal["auto"] = option(
        524288, "tokens an optimizer step, all devices; auto: 2^19 (D / D12)^0.383 to the nearest power of two",
        validator=at_least(1), on_resume="refuse",
    )  # fmt: skip
    num_iterations: int | None = option(None, "horizon: optimizer steps", validator=at_least(1))
    target_flops: float | None = option(None, "horizon: FLOPs of the whole training", validator=_finite)
    target_param_data_ratio: float | None = option(
        None, "horizon: training tokens a parameter; 20 when no horizon is given", validator=_finite
    )
    scaling_parameters: Literal["all", "matrix_and_head"] = option(
        "all", "which parameters the ratio and the auto batch size count"
    )
    grad_clip: float = option(1.0, "largest global gradient norm; 0 is off", validator=at_least(0), on_resume="warn")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "what matrix products are computed in; auto: bfloat16 where the hardware gains from it, else float16 "
        "on CUDA devices that gain from that. Gradients of float16 are kept in range by a loss scale",
        on_resume="refuse",
    )  # fmt: skip
    compile: bool | Literal["auto"] = option("auto", "torch.compile; auto: when the run is long enough to earn it back")
    activation_checkpointing: bool = option(
        False,
        "keep only what enters each block, and compute the rest again in the backward pass: less memory, more time",
    )
    profile: int = option(
        0, "optimizer steps to trace once training has settled, which slows them; profile/ in the run directory has "
        "the trace; 0 is off", validator=at_least(0), unverified="kernels of a CUDA device were never traced",
    )  # fmt: skip
    max_skipped_steps: int = option(
        10, "steps in a row with a loss or gradient that is not finite before the run stops", validator=at_least(0)
    )
    stall_warning: float = option(
        300.0, "seconds without progress after which a stall is reported, with where each rank is; inf is off",
        validator=above(0), on_resume="free",
    )  # fmt: skip
    deterministic: bool = option(
        False, "only algorithms that repeat bit for bit, on CUDA slower ones; an operation without such is an error. "
        "A CPU repeats without it", on_resume="warn", unverified="it never ran on a CUDA device",
    )  # fmt: skip
    seed: int = option(1337, "seed of the initial weights", validator=between(0, 2**63 - 1), on_resume="refuse")
    init_from: str | None = option(None, "start from the newest checkpoint of this run", on_resume="refuse")


@attrs.frozen
class Checkpoint:
    save_every: int | None = option(
        None, "save a checkpoint every so many steps; the end is always saved", validator=at_least(1)
    )
    asynchronous: bool = option(
        False, "write checkpoints in the background: training waits only for the copy off the device, and for the "
        "save before, if that is still being written",
    )  # fmt: skip
    keep_last: int | None = option(
        None, "keep the newest so many checkpoints; without any keep_ option all are kept, with one the newest and "
        "what any of them keeps", validator=at_least(1),
    )  # fmt: skip
    keep_every: int | None = option(
        None, "keep checkpoints of steps that are a multiple of this", validator=at_least(1)
    )
    keep_best: int | None = option(
        None, "keep so many checkpoints that best_metric finds best, of those evaluated at their very step",
        validator=at_least(1),
    )  # fmt: skip
    best_metric: str = option("val/bpb", "what keep_best looks at: an evaluation metric as the ledger names it")
    best_is: Literal["smallest", "largest"] = option("smallest", "which value of best_metric is best")

    def __attrs_post_init__(self) -> None:
        if self.save_every is not None and self.keep_every is not None and self.keep_every % self.save_every:
            raise ValueError(
                f"keep_every must be a multiple of save_every, {self.save_every}, not {self.keep_every}: other steps "
                f"have no checkpoint"
            )


HORIZONS = ("num_iterations", "target_flops", "target_param_data_ratio")
WARMUPS = ("warmup_ratio", "warmup_steps")

# -------------------------------------------------------------------------------------------- what plugins fill


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
        "seconds that a logger may take to start, over one record, and to send the rest at the end; then it is ended, "
        "and nanochat log-sync can send what it missed",
        validator=_finite,
    )


@attrs.frozen
class EvaluatorKeys(NamedKeys):
    """Keys the core reserves on ``[[evaluators]]``."""

    every: int = option(0, "evaluate every so many steps; 0 is off", validator=at_least(0))
    at_start: bool = option(False, "evaluate before the first step")
    at_end: bool = option(True, "evaluate after the last step")
    time_budget: float | None = option(
        None, "seconds an evaluation may take; what it found until then is marked as partial", validator=above(0)
    )


@attrs.frozen
class DataSourceKeys(EntryKeys):
    """Keys the core reserves on ``[data]``."""

    packing: Literal["stream", "best_fit"] = option(
        "stream",
        "rows of tokens: stream cuts documents laid end to end; best_fit starts every row with a document, and crops "
        "what fits nowhere",
    )
    packing_window: int = option(64, "documents that best_fit packs together", validator=at_least(1))
    epochs: int | Literal["repeat", "error"] = option(
        "repeat",
        "when the training data are used up: repeat reads them again, error ends the run after saving, a number ends "
        "it after so many passes",
        validator=at_least(1), on_resume="free",
    )  # fmt: skip
    cache: bool = option(False, "keep the tokens on disk, so that they are made only once", on_resume="free")
    threads: int = option(1, "threads of each process that read and tokenize", validator=at_least(1), on_resume="free")


RESERVED: Mapping[str, type[EntryKeys]] = {
    "data_source": DataSourceKeys, "evaluator": EvaluatorKeys, "logger": LoggerKeys,
}  # fmt: skip


@attrs.frozen
class Choice:
    """A plugin entry picked by an experiment.

    Args:
        keys: the values of the keys that the core reserves on the table.
        entry: None when no installed plugin has it (``nanochat show`` goes on then).
        config: the plugin's own typed config; without an entry the raw options.
    """

    keys: EntryKeys
    entry: Entry | None
    config: Any

    @property
    def plugin(self) -> str:
        return self.keys.plugin

    @property
    def name(self) -> str:
        return getattr(self.keys, "name", "") or self.keys.plugin

    def build(self, context: Any) -> Any:
        """Import the factory and call it.

        Raises:
            PluginError: with the original traceback, when the factory can't be imported or raises.
            NanochatError: what the factory says of its options or of the data.
        """
        assert self.entry is not None, "load() refuses experiments with unknown plugins"
        factory = self.entry.load()
        try:
            return factory(self.config, context)
        except NanochatError:
            raise
        except Exception as error:
            raise PluginError(
                f"{self.entry.kind} {self.name!r} of {self.entry.distribution} {self.entry.version} can't be built: "
                f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            ) from error


@attrs.frozen
class Experiment:
    """A whole experiment: frozen, plain data."""

    run: Run
    tokenizer: Choice
    data: Choice
    model: Choice
    optimizer: Choice
    schedule: Schedule
    train: Train
    checkpoint: Checkpoint
    evaluators: tuple[Choice, ...]
    loggers: tuple[Choice, ...]

    def packages(self) -> set[str]:
        """Top-level modules of its plugins."""
        choices = (self.tokenizer, self.data, self.model, self.optimizer, *self.evaluators, *self.loggers)
        return {choice.entry.factory.split(".")[0].split(":")[0] for choice in choices if choice.entry is not None}


CORE_TABLES: Mapping[str, type] = {"run": Run, "schedule": Schedule, "train": Train, "checkpoint": Checkpoint}
PLUGIN_TABLES: Mapping[str, Any] = {
    "tokenizer": "tokenizer", "data": "data_source", "model": "model", "optimizer": "optimizer",
}  # fmt: skip
PLUGIN_LISTS: Mapping[str, Any] = {"evaluators": "evaluator", "loggers": "logger"}
TABLES = ("run", "tokenizer", "data", "model", "optimizer", "schedule", "train", "checkpoint", "evaluators", "loggers")

# ------------------------------------------------------------------------------------------ strict structuring


class Mismatch(ValueError):
    """A value that does not fit its type, or a table with several such values: (key path, message) pairs."""

    def __init__(self, problems: list[tuple[tuple[str, ...], str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{'.'.join(path)}: {text}" if path else text for path, text in problems))


def type_name(tp: Any) -> str:
    """A type in a user's words: ``int``, ``"auto" or int``, ``list of str``."""
    if tp is type(None):
        return "nothing"
    if tp is Path:
        return "path"
    origin, args = get_origin(tp), get_args(tp)
    if origin is Literal:
        return " or ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in args if a is not type(None))
    if origin in (tuple, list):
        return f"list of {type_name(args[0])}"
    return getattr(tp, "__name__", str(tp))


def _strict(tp: Any) -> Callable[[Any, Any], Any]:
    """Hook for one plain type: no coercion, but whole numbers are fine where a float is wanted."""

    def structure(value: Any, _: Any) -> Any:
        if tp is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if tp is Path and isinstance(value, str):
            return Path(value).expanduser().absolute()
        if isinstance(value, tp) and (tp is bool or not isinstance(value, bool)):
            return value
        shown = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else value
        raise Mismatch([((), f"must be {type_name(tp)}, not {shown}")])

    return structure


def _union_hook(tp: Any) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if value is None and type(None) in get_args(tp):  # of a checkpoint; TOML has none
            return None
        for member in get_args(tp):
            if member is type(None):
                continue
            try:
                return converter.structure(value, member)
            except Mismatch:
                pass
        shown = f'"{value}"' if isinstance(value, str) else value
        raise Mismatch([((), f"must be {type_name(tp)}, not {shown}")])

    return structure


def _literal_hook(tp: Any) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        for allowed in get_args(tp):
            if value == allowed and type(value) is type(allowed):
                return value
        shown = f'"{value}"' if isinstance(value, str) else value
        raise Mismatch([((), f"must be {type_name(tp)}, not {shown}")])

    return structure


def _list_hook(tp: Any) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise Mismatch([((), f"must be a {type_name(tp)}, not {value!r}")])
        return tuple(converter.structure(item, get_args(tp)[0]) for item in value)

    return structure


def _attrs_hook(cls: Any) -> Callable[[Any, Any], Any]:
    fields = _typed_fields(cls)

    def structure(table: Any, _: Any) -> Any:
        if not isinstance(table, Mapping):
            raise Mismatch([((), f"must be a table, not {table!r}")])
        problems: list[tuple[tuple[str, ...], str]] = []
        for key in table:
            if key not in fields:
                problems.append(((key,), f"unknown key{did_you_mean(key, fields)}"))
        values = {}
        for name, field in fields.items():
            if name in table:
                try:
                    values[name] = converter.structure(table[name], field.type)
                except Mismatch as error:
                    problems += [((name, *path), text) for path, text in error.problems]
                    continue
                if field.validator is not None:
                    try:
                        field.validator(None, field, values[name])
                    except (ValueError, TypeError) as error:
                        problems.append(((name,), str(error.args[0]) if error.args else str(error)))
            elif field.default is attrs.NOTHING:
                problems.append(((name,), f"missing: give a value ({type_name(field.type)})"))
        if problems:
            raise Mismatch(problems)
        try:
            return cls(**values)  # runs __attrs_post_init__, where a class checks fields against each other
        except (ValueError, TypeError) as error:
            name, must, rest = str(error).partition(" must ")
            if name in fields:  # "depth must be even" is about that field
                raise Mismatch([((name,), f"{must.lstrip()}{rest}")]) from error
            raise Mismatch([((), str(error))]) from error

    return structure


def _typed_fields(cls: type) -> dict[str, Any]:
    """Fields of an attrs class by name, their types resolved."""
    hints = typing.get_type_hints(cls)
    return {f.name: f.evolve(type=hints[f.name]) for f in attrs.fields(cls) if f.init}


def _make_converter() -> cattrs.Converter:
    made = cattrs.Converter(forbid_extra_keys=True)
    for plain in (bool, int, float, str, Path):
        made.register_structure_hook(plain, _strict(plain))
    hooks: list[tuple[Callable[[Any], bool], Callable[[Any], Callable[[Any, Any], Any]]]] = [
        (lambda t: get_origin(t) in (Union, types.UnionType), _union_hook),
        (lambda t: get_origin(t) is Literal, _literal_hook),
        (lambda t: get_origin(t) is tuple, _list_hook),
        (attrs.has, _attrs_hook),
    ]
    for applies, make_hook in hooks:
        made.register_structure_hook_factory(applies, make_hook)
    return made


converter = _make_converter()


def fields_of(cls: type) -> dict[str, Any]:
    """Attributes of a config class by name: ``.type`` (resolved), ``.default``, ``.metadata["help"]``."""
    return _typed_fields(cls)


def to_plain(config: Any, keep_none: bool = False) -> dict[str, Any]:
    """A config as plain data for TOML or JSON: lists for tuples, str for paths. TOML has no None: absence is the
    default."""
    if isinstance(config, Mapping):
        return dict(config)

    def plain(value: Any) -> Any:
        if attrs.has(type(value)):
            return to_plain(value, keep_none)
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    values = {f.name: getattr(config, f.name) for f in attrs.fields(type(config)) if f.init}
    return {name: plain(value) for name, value in values.items() if keep_none or value is not None}


_SIMPLE = (bool, int, float, str, Path, type(None))


def _typable(tp: Any) -> bool:
    origin, args = get_origin(tp), get_args(tp)
    if origin in (Union, types.UnionType):
        return all(_typable(a) for a in args)
    if origin is tuple:
        return len(args) == 2 and args[1] is Ellipsis and _typable(args[0])
    return tp in _SIMPLE or origin is Literal or attrs.has(tp)


def check_config_class(kind: str, name: str, config: type) -> None:
    """Refuse a config class that TOML could not fill.

    Raises:
        PluginError: naming the class, the field, and what would do.
    """
    where = f"config class {config!r} of {kind} {name!r}"
    if not (isinstance(config, type) and attrs.has(config)):
        raise PluginError(f"{where} must be an attrs class: decorate it with @attrs.frozen")
    try:
        fields = _typed_fields(config)
    except (NameError, KeyError) as error:
        raise PluginError(
            f"{where} has a field type that can't be resolved ({error}): import types at run time, "
            f"not under TYPE_CHECKING"
        ) from error
    reserved = set(_typed_fields(RESERVED.get(kind, EntryKeys))) | {"remove"}
    for field in fields.values():
        if field.name in reserved:
            raise PluginError(f"{where} may not have a field {field.name!r}: the core uses that key; rename it")
        if not _typable(field.type):
            raise PluginError(
                f"{where}: TOML can't fill field {field.name!r} of type {field.type}: use bool, int, float, str, Path, "
                f"Literal, X | None, tuple[X, ...] or a nested attrs class"
            )
