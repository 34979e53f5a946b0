"""What an evaluation must leave as it was: settings of torch and the process, and the model.

Facts that cost microseconds are compared, such as identities and version counters. Weights are not copied: a change of
their values can be noticed, not undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from nanochat_core.plugins.surroundings import SETTINGS, Setting, Surroundings

SAMPLED = 16  # numbers of each parameter that are compared, for changes that version counters don't show
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_METHODS = ("forward", "hidden", "logits", "_compiled_hidden", "_call_impl")  # as attributes of an instance


def _autocast() -> tuple[Any, ...]:
    types = ("cpu", "cuda")
    return (
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in types),
        torch.is_autocast_cache_enabled(),
    )


def _set_autocast(before: tuple[Any, ...]) -> None:
    for kind, (enabled, dtype) in zip(("cpu", "cuda"), before[:2], strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(before[2])


def _device() -> Any:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


TORCH_SETTINGS: Mapping[str, Setting] = {
    **SETTINGS,
    "grad mode": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "number of threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "default device": Setting(_device, torch.set_default_device),
    "autocast": Setting(_autocast, _set_autocast),
    "anomaly mode": Setting(
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda before: torch.autograd.set_detect_anomaly(*before),
    ),
    "determinism": Setting(
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda before: torch.use_deterministic_algorithms(before[0], warn_only=before[1]),
    ),
    "precision of matrix products": Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "numpy's treatment of errors": Setting(np.geterr, lambda before: np.seterr(**before)),
}


@attrs.frozen
class _Parameter:
    """What a parameter was: ``data`` shares its memory and version counter."""

    parameter: nn.Parameter
    data: Tensor
    version: int
    requires_grad: bool
    grad: Tensor | None
    grad_version: int
    hooks: dict[str, Any]


class ModelFacts:
    """The parameters, persistent buffers, modules and hooks of a model at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [(module, _tables_of(module)) for module in model.modules()]
        self._parameters = {name: _facts_of(p) for name, p in model.named_parameters()}
        self._buffers = [(b, b.detach().clone(), b._version) for b in _persistent_buffers(model)]
        self._sample = self._sampled()

    def put_back(self) -> tuple[list[str], list[str]]:
        """Put back what has changed.

        Returns:
            What has changed, and the names of parameters (or gradients) whose values have changed, which can't be put
            back.
        """
        changed = set[str]()
        for module, before in self._modules:
            for name, table in _tables_of(module).items():
                if not _same(table, before[name]):
                    changed.add("hooks" if "hooks" in name else "parameters and modules")
                    _restore(module, name, before[name])
        lost = []
        for name, facts in self._parameters.items():
            changed.update(_put_back(facts))
            if facts.parameter._version != facts.version:
                lost.append(name)
            elif facts.grad is not None and facts.grad._version != facts.grad_version:
                lost.append(f"gradient of {name}")
        for buffer, copy, version in self._buffers:
            if buffer._version != version:
                changed.add("buffers")
                buffer.data.copy_(copy)
        return sorted(changed), lost or self._differing()

    def _sampled(self) -> Tensor:
        """Some numbers of each parameter, on its device: [parameters, SAMPLED]."""
        with torch.no_grad():
            rows = []
            for facts in self._parameters.values():
                flat_N = facts.data.reshape(-1) if facts.data.is_contiguous() else facts.data[:1].reshape(-1)
                some_N = flat_N[:: max(1, len(flat_N) // SAMPLED)][:SAMPLED].float()
                rows.append(nn.functional.pad(some_N, (0, SAMPLED - len(some_N))))
            return torch.stack(rows) if rows else torch.empty(0, SAMPLED)

    def _differing(self) -> list[str]:
        after = self._sampled()
        if after.is_meta:
            return []
        same_P = ((after == self._sample) | (after.isnan() & self._sample.isnan())).all(1).tolist()
        return [name for name, same in zip(self._parameters, same_P, strict=True) if not same]


def _facts_of(parameter: nn.Parameter) -> _Parameter:
    grad = parameter.grad
    hooks = {name: getattr(parameter, name, None) for name in _TENSOR_HOOKS}
    return _Parameter(
        parameter,
        parameter.detach(),
        parameter._version,
        parameter.requires_grad,
        grad,
        0 if grad is None else grad._version,
        {name: None if table is None else dict(table) for name, table in hooks.items()},
    )


def _put_back(facts: _Parameter) -> Iterator[str]:
    """Put back what a parameter is, not its values. Yields what had changed."""
    parameter, before = facts.parameter, facts.data
    if parameter.dtype != before.dtype or parameter.data_ptr() != before.data_ptr() or parameter.shape != before.shape:
        yield "dtype, shape or memory of parameters"
        parameter.data = before
    if parameter.requires_grad != facts.requires_grad:
        yield "requires_grad"
        parameter.requires_grad_(facts.requires_grad)
    if parameter.grad is not facts.grad:
        yield "gradients"
        parameter.grad = facts.grad
    for name, table in facts.hooks.items():
        now = getattr(parameter, name, None)
        if (now or {}) != (table or {}):
            yield "hooks"
            if now is not None:
                now.clear()
                now.update(table or {})


def _persistent_buffers(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _tables_of(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """What a module consists of, by table. Buffers that are not saved are left out: models make them when needed."""
    persistent = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    own = vars(module)
    return {
        "_parameters": dict(module._parameters),
        "_modules": dict(module._modules),
        "_buffers": persistent,
        "methods": {name: own[name] for name in _METHODS if name in own},
        **{name: dict(own.get(name) or {}) for name in _HOOKS},
    }


def _same(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


def _restore(module: nn.Module, name: str, before: Mapping[Any, Any]) -> None:
    own = vars(module)
    if name == "methods":
        for method in _METHODS:
            own.pop(method, None)
        own.update(before)
    elif name == "_buffers":
        kept = {n: b for n, b in module._buffers.items() if n in module._non_persistent_buffers_set}
        module._buffers = {**before, **kept}
    else:
        table = own[name]
        table.clear()
        table.update(before)


class Undisturbed:
    """What training has that an evaluation must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self._process, self._model = Surroundings(TORCH_SETTINGS), ModelFacts(model)

    def put_back(self) -> tuple[list[str], list[str]]:
        """Put back what has changed. Returns what changed, and the names of parameters that could not be put back."""
        process = self._process.put_back()  # first: a default dtype or device would disturb what follows
        model, lost = self._model.put_back()
        return [*process, *(f"the model's {what}" for what in model)], lost
