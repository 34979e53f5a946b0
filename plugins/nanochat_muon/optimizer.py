"""The optimizer ``muon_adamw``: Muon or AdamW for each parameter, with state sharded over ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nanochat_core import Multipliers, Optimizer, OptimizerContext, PluginError, Resolved, has_fast_bfloat16, wide_dtype
from nanochat_muon import settings
from nanochat_muon.config import MuonAdamWConfig
from nanochat_muon.muon import muon_update, variance_shape
from nanochat_muon.settings import AdamW
from nanochat_muon.sharding import Exchange, Message, Share, gather_rows, lay_out

CHUNK = 2**26  # elements updated together: limits memory, and lets communication start before all are updated


@attrs.define(eq=False)
class Matrices:
    """Matrices of one shape [R, C] and dtype. This rank owns one matrix of each message, or none of the last one.

    Args:
        shares: the G matrices that this rank owns.
        messages: their messages, and the last one even if this rank owns none of it; empty with one rank.
        buffer_GRC: their momentum.
        variance: NorMuon's second moment, [G, R, 1] or [G, 1, C].
    """

    shares: Sequence[Share]
    messages: Sequence[Message]
    buffer_GRC: Tensor
    variance: Tensor | None

    def chunks(self) -> Iterator[slice]:
        """Slices of shares and messages that are updated together; equal on all ranks."""
        rows, columns = self.buffer_GRC.shape[1:]
        size = max(1, CHUNK // max(1, rows * columns))
        for start in range(0, max(len(self.shares), len(self.messages)), size):
            yield slice(start, start + size)


@attrs.define(eq=False)
class Moments:
    """AdamW's state for the share of a parameter that this rank owns.

    Args:
        share: the share.
        method: settings of AdamW.
        step: number of updates so far, float32 ().
        first, second: moments, shaped like the share.
    """

    share: Share
    method: AdamW
    step: Tensor
    first: Tensor
    second: Tensor

    def named(self) -> dict[str, Tensor]:
        return {"step": self.step, "exp_avg": self.first, "exp_avg_sq": self.second}


class MuonAdamW(Optimizer):
    """Muon for matrices, AdamW for all other parameters. State is sharded over the ranks and at least float32.

    Raises:
        PluginError: when a parameter has an unknown role, or the role matrix and not two dimensions.
        ConfigError: when matrix_weight_decay_scale is "auto" and the model has no reference.
    """

    def __init__(self, config: MuonAdamWConfig, context: OptimizerContext) -> None:
        self._resolved = settings.resolve(config, context)
        self.config = settings.fill_in(config, self._resolved)
        self.parameters, self.world = dict(context.parameters), context.world
        methods = settings.adamw_by_role(self.config, context.hidden_size)
        roles = {name: settings.known_role(context.roles[name], methods) for name in self.parameters}
        for name, role in roles.items():
            shape = tuple(self.parameters[name].shape)
            if role not in methods and not (role == "matrix" and len(shape) == 2):
                known = ", ".join(r for r in methods if "." not in r)
                raise PluginError(
                    f"optimizer muon_adamw can't train {name!r} of shape {shape} and role {context.roles[name]!r}: "
                    f"a model's parameter_roles must give matrix (2-D only), {known}"
                )
        follows_data = config.matrix_weight_decay_scale == "auto"
        self._described = settings.describe(self.config, roles.values(), methods, follows_data)

        matrices = [name for name, role in roles.items() if role == "matrix"]
        messages = lay_out(self.parameters, matrices, self.world)
        self.exchange = Exchange(list(self.parameters.values()), messages, self.world)
        if self.world.size > 1:
            shares = [share for message in messages for share in message.shares]
        else:
            shares = [Share(name, parameter) for name, parameter in self.parameters.items()]
        self.matrices = self._matrices(matrices, shares, messages)
        self.moments = [_moments(s, methods[roles[s.name]]) for s in shares if roles[s.name] != "matrix"]

    def _matrices(self, names: Collection[str], shares: Sequence[Share], messages: Sequence[Message]) -> list[Matrices]:
        """Matrices grouped by shape, the largest group first, so that the last communication is short."""
        groups: dict[tuple[torch.Size, torch.dtype], set[str]] = {}
        for name in names:
            parameter = self.parameters[name]
            groups.setdefault((parameter.shape, parameter.dtype), set()).add(name)
        made = []
        for ((rows, columns), dtype), group in sorted(groups.items(), key=lambda g: -len(g[1]) * g[0][0].numel()):
            own = [s for s in shares if s.name in group]
            like = torch.zeros((), dtype=wide_dtype(dtype), device=self.parameters[next(iter(group))].device)
            variance = None
            if self.config.variance_reduction:
                variance = like.new_zeros(len(own), *variance_shape(rows, columns))
            theirs = [m for m in messages if m.names[0] in group]
            made.append(Matrices(own, theirs, like.new_zeros(len(own), rows, columns), variance))
        return made

    def begin_reduce(self) -> None:
        self.exchange.begin()

    def reduce(self) -> Tensor:
        return self.exchange.finish()

    @torch.no_grad()
    def update(self, scale: float, multipliers: Multipliers) -> None:
        sent: list[Message] = []

        def send(messages: Sequence[Message]) -> None:
            for message in messages:
                message.start_gather()  # overlaps with the next updates
            sent.extend(messages)

        for moments in self.moments:
            _adamw(moments, scale, multipliers.lr)
            if moments.share.message is not None:
                send([moments.share.message])
        for group in self.matrices:
            for chunk in group.chunks():
                self._muon(group, chunk, scale, multipliers)
                send(group.messages[chunk])
        for message in sent:
            message.finish_gather()
        self.discard()

    def _muon(self, group: Matrices, chunk: slice, scale: float, multipliers: Multipliers) -> None:
        c, shares = self.config, group.shares[chunk]
        if not shares:
            return
        decay = settings.matrix_decay(c) * settings.decay_factor(
            c.matrix_weight_decay_schedule, multipliers.step, multipliers.num_iterations
        )
        muon_update(
            [share.target for share in shares],
            [share.gradient() for share in shares],
            group.buffer_GRC[chunk],
            None if group.variance is None else group.variance[chunk],
            c,
            scale=scale,
            lr=settings.matrix_lr(c) * multipliers.lr,
            momentum=settings.momentum(c, multipliers.step, multipliers.warmdown),
            weight_decay=decay,
            dtype=orthogonalization_dtype(c.ns_dtype, shares[0].target),
        )

    def discard(self) -> None:
        self.exchange.discard()

    def state_dict(self) -> dict[str, Tensor]:
        """Per matrix ``momentum`` and, with variance reduction, ``variance`` ([R, 1] or [1, C]); per other parameter
        ``step``, ``exp_avg`` and ``exp_avg_sq``. Tensors gathered from other ranks are on the CPU."""
        matrices = self._matrix_state() if self.world.size == 1 else self._gathered_matrix_state()
        return {**dict(matrices), **dict(self._moment_state())}

    def _matrix_state(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.matrices:
            for index, share in enumerate(group.shares):
                yield f"{share.name}/momentum", group.buffer_GRC[index]
                if group.variance is not None:
                    yield f"{share.name}/variance", group.variance[index]

    def _gathered_matrix_state(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.matrices:
            for index, message in enumerate(group.messages):
                for kind, own in (("momentum", group.buffer_GRC), ("variance", group.variance)):
                    if own is not None:
                        mine = own[index] if index < len(own) else own.new_zeros(own.shape[1:])
                        rows = gather_rows(mine, self.world)
                        yield from ((f"{n}/{kind}", row) for n, row in zip(message.names, rows, strict=False))

    def _moment_state(self) -> Iterator[tuple[str, Tensor]]:
        for moments in self.moments:
            for kind, own in moments.named().items():
                yield f"{moments.share.name}/{kind}", own if kind == "step" else moments.share.collect(own)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the part of the state that this rank owns. Tensors that are missing from it start at zero."""

        def load(own: Tensor, share: Share, kind: str) -> None:
            saved = state.get(f"{share.name}/{kind}")
            if saved is None:
                own.zero_()
            else:
                own.copy_(share.of(saved) if kind.startswith("exp") else saved)

        for group in self.matrices:
            for index, share in enumerate(group.shares):
                load(group.buffer_GRC[index], share, "momentum")
                if group.variance is not None:
                    load(group.variance[index], share, "variance")
        for moments in self.moments:
            for kind, own in moments.named().items():
                load(own, moments.share, kind)

    def state_bytes(self) -> int:
        kept = [t for group in self.matrices for t in (group.buffer_GRC, group.variance) if t is not None]
        kept += [t for moments in self.moments for t in (moments.first, moments.second)]
        return sum(t.nbytes for t in kept)

    def resolved_options(self) -> Mapping[str, Resolved]:
        return self._resolved

    def describe(self) -> Mapping[str, str | int]:
        return self._described


def _moments(share: Share, method: AdamW) -> Moments:
    dtype = wide_dtype(share.target.dtype)
    step = torch.zeros((), dtype=torch.float32, device=share.target.device)
    first, second = (torch.zeros_like(share.target, dtype=dtype) for _ in range(2))
    return Moments(share, method, step, first, second)


def _adamw(moments: Moments, scale: float, lr_multiplier: float) -> None:
    method, target = moments.method, moments.share.target.detach()
    master = target.to(moments.first.dtype)  # the parameter itself if it is float32
    adamw(
        [master],
        [moments.share.gradient().to(master.dtype).mul_(scale)],
        [moments.first],
        [moments.second],
        [],
        [moments.step],
        fused=target.device.type in ("cpu", "cuda", "mps", "meta"),
        amsgrad=False,
        beta1=method.betas[0],
        beta2=method.betas[1],
        lr=method.lr * lr_multiplier,
        weight_decay=method.weight_decay,
        eps=method.eps,
        maximize=False,
    )
    if master is not target:
        target.copy_(master)


def orthogonalization_dtype(requested: str, parameter: Tensor) -> torch.dtype:
    """Dtype of orthogonalization: "auto" is bfloat16 where it is fast; float64 parameters keep float64."""
    if parameter.dtype == torch.float64:
        return torch.float64
    if requested != "auto":
        return torch.bfloat16 if requested == "bfloat16" else torch.float32
    return torch.bfloat16 if has_fast_bfloat16(parameter.device) else torch.float32


def build(config: MuonAdamWConfig, context: OptimizerContext) -> MuonAdamW:
    """Build the optimizer.

    Raises:
        PluginError: when a parameter has an unknown role, or the role matrix and not two dimensions.
        ConfigError: when matrix_weight_decay_scale is "auto" and the model has no reference.
    """
    return MuonAdamW(config, context)
