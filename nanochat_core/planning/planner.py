"""From an experiment to its plan: every "auto" becomes a number, with the formula that gave it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from nanochat_core.config.load import LoadedExperiment
from nanochat_core.config.origins import Origin, add_places
from nanochat_core.config.tables import unverified_options
from nanochat_core.distributed.world import World
from nanochat_core.errors import ConfigError, NanochatError, Problem
from nanochat_core.hardware.devices import GIB, DeviceSpec, cpu_has_bf16, planning_for
from nanochat_core.hardware.machine import compute_dtype, device_spec, peak_flops
from nanochat_core.interfaces.model import ModelContext
from nanochat_core.interfaces.optimizer import Optimizer
from nanochat_core.interfaces.types import Resolved
from nanochat_core.planning import batch_size
from nanochat_core.planning.build import build_model, optimizer_context, planned_vocab_size
from nanochat_core.planning.memory import estimate_memory
from nanochat_core.planning.plan import Plan, Planned
from nanochat_core.planning.schedule import phases
from nanochat_core.plugins.choice import Choice

REFERENCE_BATCH = 2**19  # tokens; the best batch of the reference model


def make_plan(loaded: LoadedExperiment, world_size: int, device: torch.device | DeviceSpec) -> Planned:
    """Plan a run on ``world_size`` devices like ``device``. Builds the model without memory, on the meta device.

    Args:
        device: one that is here, or what is known of one that need not be.

    Raises:
        ConfigError: when batch sizes don't divide, the horizon is shorter than a step, or an "auto" has no formula.
    """
    return plan_batches(loaded, world_size, device, ())[0]


def plan_batches(
    loaded: LoadedExperiment, world_size: int, device: torch.device | DeviceSpec, batches: Sequence[int] | None = None
) -> tuple[Planned, dict[int, Mapping[str, int]]]:
    """The same, and what other values of ``device_batch_size`` would need: ``Plan.memory`` by rows of a micro-batch.

    Args:
        batches: which; None for all that "auto" chooses from.
    """
    try:
        planner = _Planner(loaded, world_size, device)
        with planning_for(planner.spec):
            planned = planner.plan()
            rows = planner.sizes if batches is None else batches
            plan = planned.plan
            known = {**plan.choices, plan.device_batch_size: plan.memory}
            return planned, {b: known[b] if b in known else planner.memory(b) for b in rows}
    except NanochatError as error:
        add_places(error, loaded.origins)
        raise


class _Planner:
    def __init__(self, loaded: LoadedExperiment, world_size: int, device: torch.device | DeviceSpec) -> None:
        self.experiment = loaded.experiment
        self.origins = dict(loaded.origins)
        self.unverified = unverified_options(loaded.experiment)
        self.world_size = world_size
        self.spec = device if isinstance(device, DeviceSpec) else device_spec(device)
        self.device = torch.device(self.spec.type) if isinstance(device, DeviceSpec) else device

    def plan(self) -> Planned:
        train = self.experiment.train
        dtype = compute_dtype(train.dtype, self.device)
        if train.dtype == "auto":
            self._resolve("train", {"dtype": Resolved(str(dtype)[6:], _dtype_reason(self.device, dtype))})
        vocab_size = planned_vocab_size(self.experiment.tokenizer)
        context = ModelContext(vocab_size, train.max_seq_len, self.device, dtype)
        meta = torch.device("meta")
        model = build_model(self.experiment.model, context, meta, train.activation_checkpointing)
        self._resolve("model", model.resolved_options())

        counts = dict(model.parameter_counts())
        scaling, reference = self._scaling(counts), model.reference_counts()
        relative = None if reference is None else scaling / self._scaling(reference)
        if self.experiment.train.total_batch_size == "auto":
            self._resolve("train", {"total_batch_size": self._auto_batch(relative)})
        total_batch_size = self.experiment.train.total_batch_size
        assert isinstance(total_batch_size, int)
        per_rank = self._rows_per_rank(total_batch_size)
        if train.device_batch_size != "auto":
            self._check_accumulation(total_batch_size, per_rank, train.device_batch_size)
        flops = float(model.flops_per_token(train.max_seq_len))
        iterations, horizon = self._horizon(scaling, flops, total_batch_size)

        def optimizer_for(ranks: int) -> Optimizer:
            world = World(rank=0, size=ranks, device=meta)
            context = optimizer_context(model, world, total_batch_size, iterations, relative)
            built: Optimizer = self.experiment.optimizer.build(context)
            return built

        optimizer = optimizer_for(self.world_size)
        self._resolve("optimizer", optimizer.resolved_options())
        alone = optimizer if self.world_size == 1 else optimizer_for(1)  # on the meta device nobody answers messages

        def memory(rows: int) -> Mapping[str, int]:
            return estimate_memory(
                model, alone, rows, train.max_seq_len, accumulates=rows < per_rank, state_bytes=optimizer.state_bytes()
            )

        self.memory = memory
        self.sizes = batch_size.sizes(per_rank, train.max_seq_len, self.spec)
        choices: dict[int, Mapping[str, int]] = {}
        if train.device_batch_size == "auto":
            choices = {rows: memory(rows) for rows in self.sizes}
            self._resolve("train", {"device_batch_size": self._auto_device_batch(per_rank, choices)})
        rows = self.experiment.train.device_batch_size
        assert isinstance(rows, int)
        if train.compile == "auto":
            self._resolve(
                "train", {"compile": _compile_pays(self.device, dtype, flops * total_batch_size * iterations)}
            )
        warmup, warmdown = phases(self.experiment.schedule, iterations)
        plan = Plan(
            world_size=self.world_size,
            device=self.spec.name,
            dtype=str(dtype)[6:],
            compile=bool(self.experiment.train.compile),
            vocab_size=vocab_size,
            max_seq_len=train.max_seq_len,
            device_batch_size=rows,
            total_batch_size=total_batch_size,
            rows_per_step=total_batch_size // train.max_seq_len,
            accumulation_steps=per_rank // rows,
            num_iterations=iterations,
            horizon=horizon,
            warmup_steps=warmup,
            warmdown_steps=warmdown,
            parameter_counts=counts,
            scaling_parameters=scaling,
            relative_data=relative,
            flops_per_token=flops,
            activation_checkpointing=train.activation_checkpointing,
            memory=choices[rows] if choices else memory(rows),
            choices=choices,
            room=batch_size.room(self.spec, self.world_size),
            checkpoint_bytes=sum(t.nbytes for t in model.state_dict().values()) + alone.state_bytes(),
            checkpoints=1 + (iterations - 1) // (self.experiment.checkpoint.save_every or iterations),
            description={**model.describe(), **optimizer.describe()},
        )
        keys = {f"model.{option}": why for option, why in model.unsupported().items()}
        problems = tuple(Problem(key, why, self._where(key)) for key, why in keys.items())
        return Planned(plan, self.experiment, self.origins, problems, self.unverified)

    def _where(self, key: str) -> str:
        origin = self.origins.get(key)
        return "" if origin is None or origin.layer < 0 else origin.text

    def _problem(self, key: str, message: str) -> ConfigError:
        return ConfigError([Problem(key, message)])

    def _resolve(self, table: str, options: Mapping[str, Resolved]) -> None:
        """Replace "auto" options of a table by what they became."""
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
            source = self._where(key)
            text = f"auto: {resolved.formula}" + (f" [{source}]" if source else "")
            self.origins[key] = Origin(text, self.origins[key].layer if key in self.origins else -1)

    def _scaling(self, counts: Mapping[str, int]) -> int:
        if self.experiment.train.scaling_parameters == "all":
            return counts["total"]
        return counts.get("matrix", 0) + counts.get("head", 0)

    def _auto_batch(self, relative_data: float | None) -> Resolved:
        if relative_data is None:
            raise self._problem(
                "train.total_batch_size", 'this model names no reference for "auto": give a number of tokens'
            )
        batch = 2 ** round(math.log2(REFERENCE_BATCH * relative_data**0.383))
        return Resolved(batch, f"2^19 (D / D12)^0.383, D / D12 = {relative_data:.3g}, to the nearest power of two")

    def _auto_device_batch(self, per_rank: int, choices: Mapping[int, Mapping[str, int]]) -> Resolved:
        limit = batch_size.room(self.spec, self.world_size)
        needs = {rows: sum(memory.values()) for rows, memory in choices.items()}
        rows = batch_size.largest_that_fits(self.sizes, self.sizes[-1], lambda b: needs[b] <= limit) or self.sizes[0]
        size, most = f"{needs[rows] / GIB:.2f} GiB", f"{limit / GIB:.2f} GiB"
        if needs[rows] > limit:
            return Resolved(rows, f"the smallest, though its {size}, estimated, are more than the {most} there are")
        text = f"the largest of {', '.join(map(str, self.sizes))} (they divide the {per_rank} rows of a rank and step) "
        return Resolved(rows, f"{text}that fits: {size} of {most}, estimated")

    def _rows_per_rank(self, total: int) -> int:
        """Rows a rank and step; refuses what does not divide, naming what would."""
        length, size = self.experiment.train.max_seq_len, self.world_size
        if total % (length * size):
            step = length * size
            near = sorted({max(total // step, 1) * step, (total // step + 1) * step})
            raise self._problem(
                "train.total_batch_size",
                f"{total} is not a multiple of max_seq_len {length}{self._ranks}; near it are "
                f"{' and '.join(map(str, near))}",
            )
        return total // (length * size)

    def _check_accumulation(self, total: int, per_rank: int, rows: int) -> None:
        """Refuses rows of a micro-batch that don't divide those of a rank, naming what would."""
        if per_rank % rows == 0:
            return
        length = self.experiment.train.max_seq_len
        works = batch_size.divisors(per_rank)
        below, over = [b for b in works if b < rows][-3:], [b for b in works if b > rows][:1]
        unit = rows * length * self.world_size
        near = sorted({max(total // unit, 1) * unit, (total // unit + 1) * unit})
        raise self._problem(
            "train.device_batch_size",
            f"total_batch_size {total} / (device_batch_size {rows} x max_seq_len {length}{self._ranks}) is not a whole "
            f"number of accumulation steps; device_batch_size {', '.join(map(str, below + over))} would work, "
            f"or total_batch_size {' or '.join(map(str, near))}",
        )

    @property
    def _ranks(self) -> str:
        return f" x {self.world_size} ranks" if self.world_size > 1 else ""

    def _horizon(self, scaling: int, flops_per_token: float, batch: int) -> tuple[int, str]:
        train = self.experiment.train
        if train.num_iterations is not None:
            return train.num_iterations, "num_iterations"
        if train.target_flops is not None:
            steps = round(train.target_flops / (flops_per_token * batch))
            key, why = "target_flops", f"target_flops {train.target_flops:.4g} / (FLOPs a token x total_batch_size)"
        else:
            ratio = train.target_param_data_ratio or 20.0
            steps = int(ratio * scaling / batch)
            which = "parameters" if train.scaling_parameters == "all" else "matrix and head parameters"
            key, why = "target_param_data_ratio", f"{ratio:g} tokens x {scaling:,} {which} / total_batch_size"
        if steps < 1:
            raise self._problem(f"train.{key}", f"gives less than one step of {batch} tokens: raise it ({why})")
        return steps, why


def _dtype_reason(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cpu":
        return "this CPU has AMX or avx512_bf16" if cpu_has_bf16() else "this CPU has no fast bfloat16"
    gains = "gains" if dtype is torch.bfloat16 else "does not gain"
    instead = ", but from float16" if dtype is torch.float16 else ""
    return f"this {device.type.upper()} device {gains} from bfloat16{instead}"


def _compile_pays(device: torch.device, dtype: torch.dtype, flops: float) -> Resolved:
    """Whether compiling earns its seconds back over a run of ``flops``."""
    if device.type == "mps":
        return Resolved(False, "off on MPS")
    if device.type == "cuda":
        return Resolved(True, "on for CUDA")
    peak, _ = peak_flops(device, dtype)
    seconds = flops / (0.25 * peak)  # eager training reaches about a quarter of the matmul peak
    worth = seconds > 240  # compiling takes some 20 s and saves a fifth: twice what earns it back
    return Resolved(
        worth, f"about {seconds:.0f} s of training {'earn' if worth else 'do not earn'} the compile time back"
    )
