"""The plan: what a run will do, computed before anything expensive. Every "auto" becomes a number with its formula."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from nanochat_core.config.load import LoadedExperiment, Origin, add_places, unverified_options
from nanochat_core.config.schema import Choice, Experiment
from nanochat_core.distributed.world import World
from nanochat_core.errors import ConfigError, NanochatError, PluginError, Problem
from nanochat_core.hardware.devices import GIB, DeviceSpec, cpu_has_bf16, planning_for
from nanochat_core.hardware.machine import compute_dtype, device_spec, peak_flops
from nanochat_core.interfaces.model import (
    Model,
    ModelContext,
    Optimizer,
    OptimizerContext,
    Resolved,
    Tokenizer,
    TokenizerContext,
)
from nanochat_core.planning import batch_size
from nanochat_core.planning.memory import estimate_memory
from nanochat_core.planning.schedule import phases

REFERENCE_BATCH = 2**19  # tokens; the best batch of the reference model


@attrs.frozen
class Plan:
    """The numbers of a run.

    Args:
        world_size: ranks, one device each.
        vocab_size: tokens of the tokenizer.
        rows_per_step: sequences an optimizer step, all ranks.
        accumulation_steps: micro-batches a rank and step.
        num_iterations: optimizer steps; ``horizon``: why so many.
        parameter_counts: by role, and ``total``.
        scaling_parameters: how many of them the data : parameter ratio counts.
        relative_data: the same over that of the family's reference model (D / D12); None for a model without.
        flops_per_token: forward and backward.
        memory: bytes a device by purpose, estimated; ``room``: bytes that they may take together.
        checkpoint_bytes: of a checkpoint, model and the optimizer state of all ranks; ``checkpoints``: how many a run
            saves.
        choices: what "auto" chose the rows of a micro-batch from, with the memory of each; empty when they were given.
        description: what the model says of itself.
        dtype: of matrix products, such as ``bfloat16``.
    """

    world_size: int
    device: str
    dtype: str
    compile: bool
    vocab_size: int
    max_seq_len: int
    device_batch_size: int
    total_batch_size: int
    rows_per_step: int
    accumulation_steps: int
    num_iterations: int
    horizon: str
    warmup_steps: int
    warmdown_steps: int
    parameter_counts: Mapping[str, int]
    scaling_parameters: int
    relative_data: float | None
    flops_per_token: float
    activation_checkpointing: bool
    memory: Mapping[str, int]
    room: int
    choices: Mapping[int, Mapping[str, int]]
    checkpoint_bytes: int
    checkpoints: int
    description: Mapping[str, str | int]

    @property
    def total_tokens(self) -> int:
        return self.num_iterations * self.total_batch_size

    @property
    def total_flops(self) -> float:
        return self.flops_per_token * self.total_tokens


@attrs.frozen
class Planned:
    """A plan, the experiment with every "auto" filled in, and the origins of all values.

    Args:
        problems: why it can't run here.
        unverified: options in force whose code never ran on its hardware, by dotted key: what never ran where.
    """

    plan: Plan
    experiment: Experiment
    origins: Mapping[str, Origin]
    problems: tuple[Problem, ...] = ()
    unverified: Mapping[str, str] = attrs.field(factory=dict)


def planned_vocab_size(choice: Choice) -> int:
    """Vocabulary size of a tokenizer before it is trained: its option, or that of a tokenizer that needs no training.

    Raises:
        PluginError: when a tokenizer without an option ``vocab_size`` asks for documents.
    """
    size = getattr(choice.config, "vocab_size", None)
    if isinstance(size, int):
        return size

    def no_documents() -> Iterable[str]:
        raise PluginError(
            f"tokenizer plugin {choice.plugin!r} trains on documents but has no option vocab_size: its config class "
            f"needs one, so that a run can be planned before the training"
        )

    tokenizer: Tokenizer = choice.build(TokenizerContext(documents=no_documents))
    return tokenizer.vocab_size


def build_model(
    choice: Choice, context: ModelContext, device: torch.device, activation_checkpointing: bool = False
) -> Model:
    """Build a model on ``device`` and check its side of the contract.

    Raises:
        PluginError: when the factory returns no Model.
        ConfigError: when its vocabulary is smaller than the tokenizer's, or it can't checkpoint its activations.
    """
    with torch.device(device):
        model = choice.build(context)
    if not isinstance(model, Model):
        raise PluginError(
            f"the factory of model {choice.plugin!r} must return a nanochat_core.Model, not {type(model)}"
        )
    for attribute in ("vocab_size", "hidden_size"):
        if not isinstance(getattr(model, attribute, None), int):
            raise PluginError(f"model {choice.plugin!r} must set self.{attribute} to an int")
    if model.vocab_size < context.vocab_size:
        message = (
            f"the tokenizer has {context.vocab_size} tokens but the model only {model.vocab_size}: "
            f"raise the model's vocabulary or lower tokenizer.vocab_size"
        )
        raise ConfigError([Problem("model.plugin", message)])
    unknown = {n for n, _ in model.named_parameters()} - set(model.parameter_roles())
    if unknown:
        raise PluginError(f"parameter_roles() of model {choice.plugin!r} leaves out {', '.join(sorted(unknown))}")
    if activation_checkpointing:
        try:
            model.checkpoint_activations()
        except NotImplementedError:
            message = f'model plugin "{choice.plugin}" can\'t compute activations again: set it to false'
            raise ConfigError([Problem("train.activation_checkpointing", message)]) from None
    return model


def optimizer_context(
    model: Model, world: World, total_batch_size: int, num_iterations: int, relative_data: float | None
) -> OptimizerContext:
    """What an optimizer may know of ``model``."""
    return OptimizerContext(
        parameters={n: p for n, p in model.named_parameters() if p.requires_grad},
        roles=dict(model.parameter_roles()),
        hidden_size=model.hidden_size,
        world=world,
        total_batch_size=total_batch_size,
        num_iterations=num_iterations,
        relative_data=relative_data,
    )


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


def format_plan(planned: Planned) -> str:
    """The banner of a run."""
    plan = planned.plan

    def count(n: int) -> str:
        return f"{n:,}"

    counts = plan.parameter_counts
    tokens_micro = plan.device_batch_size * plan.max_seq_len
    rows: list[tuple[str, str]] = [
        ("device", f"{plan.world_size} x {plan.device}, {plan.dtype}{', compiled' * plan.compile}")
    ]
    rows.append(("vocab size", count(plan.vocab_size)))
    rows += [(name, count(v) if isinstance(v, int) else v) for name, v in plan.description.items()]
    by_role = ", ".join(f"{role} {count(n)}" for role, n in counts.items() if role != "total")
    rows.append(("parameters", f"{count(counts['total'])} ({by_role})"))
    rows.append(("FLOPs a token", f"{plan.flops_per_token:.4e}"))
    rows.append(
        ("micro-batch and rank", f"{plan.device_batch_size} x {plan.max_seq_len} = {count(tokens_micro)} tokens")
    )
    rows.append(("total batch size", f"{count(plan.total_batch_size)} tokens a step"))
    rows.append(("accumulation steps", count(plan.accumulation_steps)))
    rows.append(("steps", f"{count(plan.num_iterations)} ({plan.horizon})"))
    rows.append(("schedule", f"warmup {plan.warmup_steps}, warmdown {plan.warmdown_steps} steps"))
    ratio = plan.total_tokens / plan.scaling_parameters
    rows.append(("tokens", f"{count(plan.total_tokens)}, tokens : params ratio {ratio:.2f}"))
    rows.append(("total FLOPs", f"{plan.total_flops:.4e}"))
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in plan.memory.items())
    known = "activations" in plan.memory
    total = sum(plan.memory.values())
    estimate = f"about {total / 2**20:,.0f} MiB a device ({parts})"
    if total > plan.room:
        estimate += f", more than the {plan.room / 2**20:,.0f} MiB it may take"
    rows.append(("memory", estimate if known else f"{estimate}; activations unknown for this model"))
    rows += [("unverified", f"{key}: {note}") for key, note in planned.unverified.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def time_training(planned: Planned, device: torch.device, seconds: float = 5.0) -> float:
    """Tokens a second of forward and backward passes, measured on random tokens for about ``seconds``."""
    import time

    plan, experiment = planned.plan, planned.experiment
    context = ModelContext(plan.vocab_size, plan.max_seq_len, device, getattr(torch, plan.dtype))
    torch.manual_seed(experiment.train.seed)
    model: nn.Module = build_model(
        experiment.model, context, torch.device("cpu"), experiment.train.activation_checkpointing
    ).to(device)
    ids = torch.randint(plan.vocab_size, (plan.device_batch_size, plan.max_seq_len), device=device)
    done, start = 0, time.perf_counter()
    while done < 2 or (time.perf_counter() - start < seconds and done < 50):
        with torch.autocast(device.type, dtype=context.dtype, enabled=context.dtype is not torch.float32):
            loss = model(ids, ids)
        loss.backward()
        loss.item()
        done += 1
        if done == 1:  # the first pass warms up
            start = time.perf_counter()
    return (done - 1) * ids.numel() / (time.perf_counter() - start)
