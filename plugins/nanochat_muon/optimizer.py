"""The optimizer ``muon_adamw``: who gets which method and learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nanochat_core import GradientReducer, Multipliers, Optimizer, OptimizerContext, PluginError
from nanochat_muon.config import MuonAdamWConfig
from nanochat_muon.muon import muon_update


@attrs.frozen
class AdamW:
    """How parameters of one role are updated."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


def adamw_by_role(config: MuonAdamWConfig, hidden_size: int) -> dict[str, AdamW]:
    """AdamW's settings for each role that Muon doesn't take."""
    width_factor = (hidden_size / 768) ** -0.5
    betas, eps, decay = (config.adam_beta1, config.adam_beta2), config.adam_eps, config.weight_decay
    return {
        "embedding": AdamW(config.embedding_lr * width_factor, decay, betas, eps),
        "head": AdamW(config.unembedding_lr * width_factor, decay, betas, eps),
        "scalar": AdamW(config.scalar_lr, 0.0, betas, eps),
    }


class MuonAdamW(Optimizer):
    """Every rank holds all state. Moments and momentum are float32, whatever the parameter's dtype."""

    def __init__(self, config: MuonAdamWConfig, context: OptimizerContext) -> None:
        self.config = config
        self.parameters = dict(context.parameters)
        self.reducer = GradientReducer(context.parameters, context.world)
        methods = adamw_by_role(config, context.hidden_size)
        self.adamw: dict[str, AdamW] = {}
        self.groups: dict[tuple[int, ...], list[str]] = {}  # matrices of one shape are updated together
        for name, parameter in self.parameters.items():
            role = context.roles[name]
            if role == "matrix" and parameter.ndim == 2:
                self.groups.setdefault(tuple(parameter.shape), []).append(name)
            elif role in methods:
                self.adamw[name] = methods[role]
            else:
                raise PluginError(
                    f"optimizer muon_adamw can't train {name!r} of shape {tuple(parameter.shape)} and role {role!r}: "
                    f"a model's parameter_roles must say matrix (2-D only), {', '.join(methods)}"
                )
        self.buffers: dict[tuple[int, ...], Tensor] = {}
        self.moments: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # step, first, second

    def begin_reduce(self) -> None:
        self.reducer.begin()

    def reduce(self) -> Tensor:
        return self.reducer.finish()

    @torch.no_grad()
    def update(self, scale: float, multipliers: Multipliers) -> None:
        momentum = self.momentum(multipliers.step)
        for shape, names in self.groups.items():
            parameters = [self.parameters[n] for n in names]
            muon_update(
                parameters,
                [_grad(p) for p in parameters],
                self._buffer(shape),
                scale=scale,
                lr=self.config.matrix_lr * multipliers.lr,
                momentum=momentum,
                weight_decay=self.config.matrix_weight_decay,
                steps=self.config.ns_steps,
                dtype=newton_schulz_dtype(self.config.ns_dtype, parameters[0]),
            )
        for name, method in self.adamw.items():
            self._adamw(name, method, scale, multipliers.lr)
        self.discard()

    def _adamw(self, name: str, method: AdamW, scale: float, lr_multiplier: float) -> None:
        parameter = self.parameters[name]
        step, first, second = self._moments(name)
        master = parameter.detach().to(first.dtype)  # the parameter itself where it is float32
        adamw(
            [master],
            [_grad(parameter).to(first.dtype).mul_(scale)],
            [first],
            [second],
            [],
            [step],
            fused=parameter.device.type in ("cpu", "cuda", "mps"),
            amsgrad=False,
            beta1=method.betas[0],
            beta2=method.betas[1],
            lr=method.lr * lr_multiplier,
            weight_decay=method.weight_decay,
            eps=method.eps,
            maximize=False,
        )
        if master.dtype != parameter.dtype:
            parameter.copy_(master)

    def momentum(self, step: int) -> float:
        """Muon's momentum at an optimizer step."""
        done = min(1.0, step / self.config.momentum_warmup_steps) if self.config.momentum_warmup_steps else 1.0
        return (1 - done) * self.config.momentum_start + done * self.config.momentum

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        if shape not in self.buffers:
            names = self.groups[shape]
            like = self.parameters[names[0]]
            self.buffers[shape] = torch.zeros(len(names), *shape, dtype=_state_dtype(like), device=like.device)
        return self.buffers[shape]

    def _moments(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        if name not in self.moments:
            like, dtype = self.parameters[name], _state_dtype(self.parameters[name])
            zeros = (torch.zeros_like(like, dtype=dtype), torch.zeros_like(like, dtype=dtype))
            self.moments[name] = (torch.zeros((), dtype=torch.float32, device=like.device), *zeros)
        return self.moments[name]

    def discard(self) -> None:
        self.reducer.discard()

    def state_dict(self) -> dict[str, Tensor]:
        state = {}
        for shape, buffer_GRC in self.buffers.items():
            state.update({f"{name}/momentum": b for name, b in zip(self.groups[shape], buffer_GRC, strict=True)})
        for name, moments in self.moments.items():
            for what, tensor in zip(("step", "exp_avg", "exp_avg_sq"), moments, strict=True):
                state[f"{name}/{what}"] = tensor
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.buffers, self.moments = {}, {}
        for shape, names in self.groups.items():
            for index, name in enumerate(names):
                if f"{name}/momentum" in state:
                    self._buffer(shape)[index].copy_(state[f"{name}/momentum"])
        for name in self.adamw:
            if f"{name}/step" in state:
                for what, tensor in zip(("step", "exp_avg", "exp_avg_sq"), self._moments(name), strict=True):
                    tensor.copy_(state[f"{name}/{what}"])

    def state_bytes(self) -> int:
        sizes = {name: p.numel() * _state_dtype(p).itemsize for name, p in self.parameters.items()}
        return sum(size * (2 if name in self.adamw else 1) for name, size in sizes.items())


def newton_schulz_dtype(wanted: str, parameter: Tensor) -> torch.dtype:
    """bfloat16 where it is fast; float64 parameters stay in float64."""
    if parameter.dtype == torch.float64:
        return torch.float64
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    return torch.bfloat16 if has_fast_bfloat16(parameter.device) else torch.float32


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 have hardware of their own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "reduce gives every parameter a gradient"
    return parameter.grad


def build(config: MuonAdamWConfig, context: OptimizerContext) -> MuonAdamW:
    """The factory.

    Raises:
        PluginError: when a parameter has a role that is not known.
    """
    return MuonAdamW(config, context)
