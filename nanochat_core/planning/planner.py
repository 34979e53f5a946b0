"""Planning: from an experiment to its plan, in which every "auto" has a value and its formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from nanochat_core.config.load import LoadedExperiment
from nanochat_core.config.origins import Origin, add_places
from nanochat_core.config.schema import Experiment, Train
from nanochat_core.config.tables import unverified_options
from nanochat_core.distributed.world import World
from nanochat_core.errors import ConfigError, NanochatError, Problem
from nanochat_core.hardware.casting import dtype_of
from nanochat_core.hardware.devices import DeviceSpec, planning_for
from nanochat_core.hardware.machine import device_spec
from nanochat_core.interfaces.logger import RunLabels
from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.optimizer import Optimizer
from nanochat_core.interfaces.types import Resolved
from nanochat_core.planning import batch_size
from nanochat_core.planning.autos import auto_compile, auto_device_batch_size, auto_dtype, auto_total_batch_size
from nanochat_core.planning.build import build_model, optimizer_context, optimizer_from, planned_vocab_size
from nanochat_core.planning.memory import estimate_memory
from nanochat_core.planning.plan import Plan, Planned
from nanochat_core.planning.schedule import phases
from nanochat_core.plugins.choice import MOST_STEPS, Choice

META = torch.device("meta")


def make_plan(
    loaded: LoadedExperiment, world_size: int, device: torch.device | DeviceSpec, *, measure: bool = True
) -> Planned:
    """Plan a run on ``world_size`` devices like ``device``. The model is built on the meta device, without memory.

    Args:
        device: a device of this machine, or the specification of one that this machine need not have.
        measure: whether to measure the speed of this machine where an "auto" depends on it, which stays "auto" if not.

    Raises:
        ConfigError: when batch sizes don't divide, the horizon is shorter than a step, or an "auto" has no formula.
    """
    return plan_batches(loaded, world_size, device, (), measure=measure)[0]


def plan_batches(
    loaded: LoadedExperiment,
    world_size: int,
    device: torch.device | DeviceSpec,
    batches: Sequence[int] | None = None,
    *,
    measure: bool = True,
) -> tuple[Planned, dict[int, Mapping[str, int]]]:
    """Plan a run as ``make_plan`` does, and estimate what other values of ``device_batch_size`` would need.

    Args:
        batches: the values, in rows; None for all that "auto" chooses from.

    Returns:
        The plan, and ``Plan.memory`` by rows of a micro-batch.

    Raises:
        ConfigError: when batch sizes don't divide, the horizon is shorter than a step, or an "auto" has no formula.
    """
    spec = device if isinstance(device, DeviceSpec) else device_spec(device)
    there = torch.device(spec.type) if isinstance(device, DeviceSpec) else device
    devices = _Devices(world_size, spec, there, measure)
    try:
        with planning_for(spec):
            return _plan(_Draft(loaded.experiment, dict(loaded.origins)), devices, batches)
    except NanochatError as error:
        add_places(error, loaded.origins)
        raise


@attrs.frozen
class _Devices:
    """The devices that a run is planned for: ``world_size`` of the kind ``spec``, whose speed may be measured."""

    world_size: int
    spec: DeviceSpec
    device: torch.device
    measure: bool

    @property
    def ranks(self) -> str:
        return f" x {self.world_size} ranks" if self.world_size > 1 else ""


@attrs.define
class _Draft:
    """An experiment whose "auto" values are being filled in, and the origins of all values."""

    experiment: Experiment
    origins: dict[str, Origin]

    def resolve(self, table: str, options: Mapping[str, Resolved]) -> None:
        """Replace "auto" options of a table by their values."""
        if not options:
            return
        values = {name: resolved.value for name, resolved in options.items()}
        part = getattr(self.experiment, table)
        if isinstance(part, Choice):
            new: Any = attrs.evolve(part, config=attrs.evolve(part.config, **values))
        else:
            new = attrs.evolve(part, **values)
        changed: dict[str, Any] = {table: new}
        self.experiment = attrs.evolve(self.experiment, **changed)
        for name, resolved in options.items():
            key = f"{table}.{name}"
            source = self.place(key)
            text = f"auto: {resolved.formula}" + (f" [{source}]" if source else "")
            self.origins[key] = Origin(text, self.origins[key].layer if key in self.origins else -1)

    def place(self, key: str) -> str:
        """Return where a value was given, such as ``file:line``; empty for a default."""
        origin = self.origins.get(key)
        return "" if origin is None or origin.layer < 0 else origin.text


@attrs.frozen
class _ModelSize:
    """The size of a model; the fields are those of ``Plan``."""

    vocab_size: int
    parameter_counts: Mapping[str, int]
    scaling_parameters: int
    relative_data: float | None
    flops_per_token: float


@attrs.frozen
class _Steps:
    """The optimizer steps of a run.

    Args:
        total_batch_size: tokens per step, over all ranks.
        rows_per_rank: sequences per rank and step.
        num_iterations: number of steps; ``horizon``: the option or formula that gave this number.
    """

    total_batch_size: int
    rows_per_rank: int
    num_iterations: int
    horizon: str


@attrs.frozen
class _Estimate:
    """Estimates of memory by rows of a micro-batch, each made once.

    Args:
        model: the model, on the meta device.
        alone: its optimizer, built for one rank, since there are no other ranks to communicate with.
        rows_per_rank: sequences per rank and step.
        state_bytes: bytes of optimizer state on a device.
    """

    model: Model
    alone: Optimizer
    rows_per_rank: int
    max_seq_len: int
    state_bytes: int
    _known: dict[int, Mapping[str, int]] = attrs.field(factory=dict, init=False)

    def memory(self, rows: int) -> Mapping[str, int]:
        """Return the bytes per device, by purpose."""
        if rows not in self._known:
            self._known[rows] = estimate_memory(
                self.model,
                self.alone,
                rows,
                self.max_seq_len,
                accumulates=rows < self.rows_per_rank,
                state_bytes=self.state_bytes,
            )
        return self._known[rows]


def _plan(
    draft: _Draft, devices: _Devices, batches: Sequence[int] | None
) -> tuple[Planned, dict[int, Mapping[str, int]]]:
    """Run the steps of planning in order. Each step uses the results of those before it."""
    unverified = unverified_options(draft.experiment)
    if draft.experiment.train.dtype == "auto":
        draft.resolve("train", {"dtype": auto_dtype(devices.device)})
    vocab_size = planned_vocab_size(draft.experiment.tokenizer)
    model = build_model(
        draft.experiment.model,
        draft.experiment.train,
        vocab_size,
        devices.device,
        for_training=True,
        built_on=META,
    )
    draft.resolve("model", model.resolved_options())
    size = _measure(model, draft.experiment.train, vocab_size)
    steps = _plan_steps(draft, devices, size)
    optimizer, alone = _plan_optimizers(draft, devices, model, size, steps)
    max_seq_len = draft.experiment.train.max_seq_len
    estimate = _Estimate(model, alone, steps.rows_per_rank, max_seq_len, optimizer.state_bytes())
    sizes = batch_size.sizes(steps.rows_per_rank, max_seq_len, devices.spec)
    choices = _plan_device_batch_size(draft, devices, steps, estimate, sizes)
    if draft.experiment.train.compile == "auto":
        dtype = dtype_of(draft.experiment.train.dtype)
        flops = size.flops_per_token * steps.total_batch_size * steps.num_iterations
        draft.resolve("train", {"compile": auto_compile(devices.device, dtype, flops, measure=devices.measure)})
    description = {**model.describe(), **optimizer.describe()}
    plan = _assemble(draft.experiment, devices, size, steps, estimate, choices, description)
    unsupported = {f"model.{option}": why for option, why in model.unsupported().items()}
    problems = tuple(Problem(key, why, draft.place(key)) for key, why in unsupported.items())
    problems += tuple(attrs.evolve(p, where=draft.place(p.key)) for p in logger_problems(draft.experiment))
    planned = Planned(plan, draft.experiment, draft.origins, problems, unverified)
    return planned, {rows: estimate.memory(rows) for rows in (sizes if batches is None else batches)}


def logger_problems(experiment: Experiment) -> list[Problem]:
    """Return what the backends of an experiment's loggers would refuse."""
    run = experiment.run
    labels = RunLabels(run.name, run.project, run.group, run.tags)
    return [problem for choice in experiment.loggers for problem in choice.backend_problems(labels)]


def _measure(model: Model, train: Train, vocab_size: int) -> _ModelSize:
    def scaling(counts: Mapping[str, int]) -> int:
        if train.scaling_parameters == "all":
            return counts["total"]
        return counts.get("matrix", 0) + counts.get("head", 0)

    counts, reference = dict(model.parameter_counts()), model.reference_counts()
    relative = None if reference is None else scaling(counts) / scaling(reference)
    return _ModelSize(vocab_size, counts, scaling(counts), relative, float(model.flops_per_token(train.max_seq_len)))


def _plan_steps(draft: _Draft, devices: _Devices, size: _ModelSize) -> _Steps:
    if draft.experiment.train.total_batch_size == "auto":
        if size.relative_data is None:
            raise _problem(
                "train.total_batch_size",
                'this model has no reference model, which "auto" needs: give a number of tokens',
            )
        draft.resolve("train", {"total_batch_size": auto_total_batch_size(size.relative_data)})
    train = draft.experiment.train
    total = train.total_batch_size
    assert isinstance(total, int)
    rows_per_rank = _rows_per_rank(train, total, devices)
    if train.device_batch_size != "auto":
        _check_accumulation(train, total, rows_per_rank, train.device_batch_size, devices)
    num_iterations, horizon = _horizon(train, size, total)
    return _Steps(total, rows_per_rank, num_iterations, horizon)


def _plan_optimizers(
    draft: _Draft, devices: _Devices, model: Model, size: _ModelSize, steps: _Steps
) -> tuple[Optimizer, Optimizer]:
    """Build, on the meta device, the optimizer of one of all ranks, and that of a run with a single rank."""

    def built(ranks: int) -> Optimizer:
        world = World(rank=0, size=ranks, device=META)
        context = optimizer_context(model, world, steps.total_batch_size, steps.num_iterations, size.relative_data)
        return optimizer_from(draft.experiment.optimizer, context)

    optimizer = built(devices.world_size)
    draft.resolve("optimizer", optimizer.resolved_options())
    return optimizer, optimizer if devices.world_size == 1 else built(1)


def _plan_device_batch_size(
    draft: _Draft, devices: _Devices, steps: _Steps, estimate: _Estimate, sizes: Sequence[int]
) -> dict[int, Mapping[str, int]]:
    """Fill in ``train.device_batch_size`` if it is "auto", and return ``Plan.choices``."""
    if draft.experiment.train.device_batch_size != "auto":
        return {}
    choices = {rows: estimate.memory(rows) for rows in sizes}
    needs = {rows: sum(memory.values()) for rows, memory in choices.items()}
    limit = batch_size.room(devices.spec, devices.world_size)
    draft.resolve("train", {"device_batch_size": auto_device_batch_size(steps.rows_per_rank, needs, limit)})
    return choices


def _assemble(
    experiment: Experiment,
    devices: _Devices,
    size: _ModelSize,
    steps: _Steps,
    estimate: _Estimate,
    choices: Mapping[int, Mapping[str, int]],
    description: Mapping[str, str | int],
) -> Plan:
    """Return the plan of an experiment that has no "auto" left."""
    train = experiment.train
    rows = train.device_batch_size
    assert isinstance(rows, int)
    warmup, warmdown = phases(experiment.schedule, steps.num_iterations)
    parameters = sum(t.nbytes for t in estimate.model.state_dict().values())
    save_every = experiment.checkpoint.save_every or steps.num_iterations
    return Plan(
        world_size=devices.world_size,
        device=devices.spec.name,
        dtype=train.dtype,
        compile=train.compile is True,
        vocab_size=size.vocab_size,
        max_seq_len=train.max_seq_len,
        device_batch_size=rows,
        total_batch_size=steps.total_batch_size,
        rows_per_step=steps.total_batch_size // train.max_seq_len,
        accumulation_steps=steps.rows_per_rank // rows,
        num_iterations=steps.num_iterations,
        horizon=steps.horizon,
        warmup_steps=warmup,
        warmdown_steps=warmdown,
        parameter_counts=size.parameter_counts,
        scaling_parameters=size.scaling_parameters,
        relative_data=size.relative_data,
        flops_per_token=size.flops_per_token,
        activation_checkpointing=train.activation_checkpointing,
        memory=estimate.memory(rows),
        choices=choices,
        room=batch_size.room(devices.spec, devices.world_size),
        checkpoint_bytes=parameters + estimate.alone.state_bytes(),
        checkpoints=1 + (steps.num_iterations - 1) // save_every,
        description=description,
    )


def _problem(key: str, message: str) -> ConfigError:
    return ConfigError([Problem(key, message)])


def _rows_per_rank(train: Train, total: int, devices: _Devices) -> int:
    """Return the rows per rank and step. Raises ConfigError, with batch sizes that work, when they are not whole."""
    step = train.max_seq_len * devices.world_size
    if total % step:
        near = sorted({max(total // step, 1) * step, (total // step + 1) * step})
        raise _problem(
            "train.total_batch_size",
            f"{total} is not a multiple of max_seq_len {train.max_seq_len}{devices.ranks}; use "
            f"{' or '.join(map(str, near))}",
        )
    return total // step


def _check_accumulation(train: Train, total: int, rows_per_rank: int, rows: int, devices: _Devices) -> None:
    """Raise ConfigError, with sizes that work, when the rows of a micro-batch don't divide those of a rank."""
    length = train.max_seq_len
    if rows * length > max(batch_size.MOST_TOKENS_ON_GPU, length):
        most = batch_size.MOST_TOKENS_ON_GPU // length or 1
        message = f"{rows} sequences of {length} tokens fit on no device: lower it to {most} or less"
        raise _problem("train.device_batch_size", message)
    if rows_per_rank % rows == 0:
        return
    works = batch_size.divisors(rows_per_rank)
    below, over = [b for b in works if b < rows][-3:], [b for b in works if b > rows][:1]
    unit = rows * length * devices.world_size
    near = sorted({max(total // unit, 1) * unit, (total // unit + 1) * unit})
    raise _problem(
        "train.device_batch_size",
        f"total_batch_size {total} / (device_batch_size {rows} x max_seq_len {length}{devices.ranks}) is not a whole "
        f"number of accumulation steps; device_batch_size {', '.join(map(str, below + over))} would work, "
        f"or total_batch_size {' or '.join(map(str, near))}",
    )


def _horizon(train: Train, size: _ModelSize, batch: int) -> tuple[int, str]:
    """Return the number of optimizer steps, and the option or formula that gave it."""
    if train.num_iterations is not None:
        return train.num_iterations, "num_iterations"
    if train.target_flops is not None:
        steps = round(train.target_flops / (size.flops_per_token * batch))
        key, why = "target_flops", f"target_flops {train.target_flops:.4g} / (FLOPs per token x total_batch_size)"
    else:
        ratio = train.target_param_data_ratio or 20.0
        steps = int(ratio * size.scaling_parameters / batch)
        which = "parameters" if train.scaling_parameters == "all" else "matrix and head parameters"
        key, why = (
            "target_param_data_ratio",
            f"{ratio:g} tokens x {size.scaling_parameters:,} {which} / total_batch_size",
        )
    if steps < 1:
        raise _problem(f"train.{key}", f"gives less than one step of {batch} tokens: increase it ({why})")
    if steps > MOST_STEPS:
        raise _problem(f"train.{key}", f"gives more than {MOST_STEPS:,} steps: decrease it ({why})")
    return steps, why
