"""Measurements on the device before a run: whether an "auto" ``device_batch_size`` fits a GPU, and training speed.

Unverified: the measurement of memory has never run on a GPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import attrs
import torch

from nanochat_core.distributed.world import World
from nanochat_core.hardware.casting import autocast
from nanochat_core.interfaces.optimizer import Multipliers
from nanochat_core.planning.batch_size import largest_that_fits
from nanochat_core.planning.build import build_model, build_optimizer
from nanochat_core.planning.out_of_memory import OutOfMemory
from nanochat_core.planning.plan import Planned


def settle_batch_size(planned: Planned, world: World, fits: Callable[[int], bool] | None = None) -> Planned:
    """Return the plan with the largest micro-batch that fits on every rank, if it was "auto" on GPUs. Otherwise the
    plan is returned unchanged. Collective: every rank calls it.

    Args:
        fits: whether this rank's device can train with the given number of rows; None to try it on the device.

    Raises:
        OutOfMemory: when even the smallest does not fit.
    """
    plan = planned.plan
    if not plan.choices or (fits is None and world.device.type != "cuda"):
        return planned
    on_this_rank = fits or (lambda rows: _fits(planned, world, rows))
    rows = largest_that_fits(
        list(plan.choices), plan.device_batch_size, lambda rows: all(world.all_gather_object(on_this_rank(rows)))
    )
    if rows is None:
        raise OutOfMemory(plan, "probing device_batch_size")
    accumulation = plan.rows_per_step // (rows * plan.world_size)
    train = attrs.evolve(planned.experiment.train, device_batch_size=rows)
    key, tried = "train.device_batch_size", f", tested on {plan.world_size} devices: {rows}"
    origin = planned.origins[key]
    return attrs.evolve(
        planned,
        plan=attrs.evolve(plan, device_batch_size=rows, accumulation_steps=accumulation, memory=plan.choices[rows]),
        experiment=attrs.evolve(planned.experiment, train=train),
        origins={**planned.origins, key: attrs.evolve(origin, text=origin.text + tried)},
    )


def _fits(planned: Planned, world: World, rows: int) -> bool:
    """Whether forward passes, backward passes and an update fit into the memory available on this rank's GPU."""
    torch.cuda.reset_peak_memory_stats(world.device)
    try:
        _try_step(planned, world, rows)
        return torch.cuda.max_memory_allocated(world.device) <= planned.plan.room
    except torch.OutOfMemoryError:
        return False
    finally:  # the tensors of the step are no longer referenced here
        gc.collect()
        torch.cuda.empty_cache()


def _try_step(planned: Planned, world: World, rows: int) -> None:
    """Run a training step on this rank alone, without compiling, which takes at least the memory of compiled code.

    With several ranks the memory of the sharded optimizer state is only reserved and no update is made: a rank that ran
    out of memory between two messages would leave the others waiting.
    """
    plan, train = planned.plan, planned.experiment.train
    model = build_model(planned.experiment.model, train, plan.vocab_size, world.device, for_training=True)
    model.to(world.device).train()
    if world.size == 1:
        optimizer = build_optimizer(planned.experiment.optimizer, model, plan, world)
    else:
        reserved = torch.empty(plan.memory["optimizer state"], dtype=torch.uint8, device=world.device)
    ids_BT = torch.zeros(rows, plan.max_seq_len, dtype=torch.int64, device=world.device)
    for _ in range(2):  # in the second pass gradients exist already
        with autocast(world.device, plan.torch_dtype):
            loss = model(ids_BT, ids_BT)
        loss.backward()
    if world.size == 1:
        optimizer.reduce()
        optimizer.update(0.0, Multipliers(0, plan.num_iterations, lr=0.0))
    else:
        del reserved


def time_training(planned: Planned, device: torch.device, seconds: float = 5.0) -> float:
    """Measure forward and backward passes on random tokens for about ``seconds``; return tokens per second."""
    plan, experiment = planned.plan, planned.experiment
    torch.manual_seed(experiment.train.seed)
    model = build_model(experiment.model, experiment.train, plan.vocab_size, device, for_training=True).to(device)
    ids = torch.randint(plan.vocab_size, (plan.device_batch_size, plan.max_seq_len), device=device)
    done, start = 0, time.perf_counter()
    while done < 2 or (time.perf_counter() - start < seconds and done < 50):
        with autocast(device, plan.torch_dtype):
            loss = model(ids, ids)
        loss.backward()
        loss.item()
        done += 1
        if done == 1:  # the first pass warms up
            start = time.perf_counter()
    return (done - 1) * ids.numel() / (time.perf_counter() - start)
