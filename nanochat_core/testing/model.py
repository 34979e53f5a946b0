"""The contract check of models; plugin authors import it from ``nanochat_core.testing``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_core.interfaces.model import (
    Cache,
    Model,
    ModelContext,
    base_role,
    description_problems,
    output_problems,
)
from nanochat_core.interfaces.types import IGNORED
from nanochat_core.testing.checks import Check

ROLES = ("matrix", "embedding", "head", "scalar")


def check_model(
    factory: Callable[[Any, ModelContext], Model],
    config: Any,
    *,
    vocab_size: int = 67,
    max_seq_len: int = 16,
    tolerance: float = 1e-4,
) -> Model:
    """Check that a model keeps its contract, on the CPU in float32.

    Shapes and dtypes are right; position t does not depend on tokens after t, nor a row on other rows; the loss is the
    cross-entropy of the logits; the same seed gives the same weights; a model that is saved and loaded gives the same
    logits. Caches, and checkpointed activations, where a model has them, don't change results.

    Args:
        factory, config: as in the registration; a small config is enough.
        vocab_size: number of tokens of the tokenizer.
        max_seq_len: tokens per row.
        tolerance: relative and absolute difference allowed between results that are computed in different shapes.

    Returns:
        The model.

    Raises:
        AssertionError: with a line for every rule that is broken.
    """
    context = ModelContext(vocab_size, max_seq_len, torch.device("cpu"), torch.float32)

    def build() -> Model:
        torch.manual_seed(5)
        return factory(config, context)

    model = build()
    assert isinstance(model, Model), f"the factory must return a nanochat_core.Model, not {model!r}"
    check = _ModelCheck(model, build, vocab_size, max_seq_len, tolerance)
    parts = (
        check.shapes,
        check.loss,
        check.causality,
        check.rows,
        check.gradients,
        check.roles,
        check.seed,
        check.meta,
        check.saved_and_loaded,
        check.cache,
        check.row_cache,
        check.checkpointed_activations,
    )
    for part in parts:
        check.run(part)
    check.finish()
    return model


class _ModelCheck(Check):
    def __init__(self, model: Model, build: Callable[[], Model], vocab: int, length: int, tolerance: float) -> None:
        super().__init__("model")
        self.model, self.build, self.vocab, self.length, self.tolerance = model, build, vocab, length, tolerance
        generator = torch.Generator().manual_seed(1)
        tokens_BT = torch.randint(vocab, (3, length + 1), generator=generator)
        self.ids_BT, self.targets_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()
        # A fresh model may give all tokens the same probability, which would hide errors; a few steps change that.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            model(self.ids_BT, self.targets_BT).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.eval()

    def _logits(self, model: Model, ids_BT: Tensor) -> Tensor:
        with torch.no_grad():
            hidden_BTD = model.hidden(ids_BT)
            return model.logits(hidden_BTD.flatten(0, 1)).view(*ids_BT.shape, -1)

    def _close(self, a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a.float(), b.float(), rtol=self.tolerance, atol=self.tolerance)

    def shapes(self) -> None:
        model = self.model
        for problem in (*description_problems(model, self.length), *output_problems(model)):
            self.expect(False, problem)
        self.expect(model.vocab_size >= self.vocab, "vocab_size is less than the tokenizer's")
        for length in (self.length, 5, 1):
            with torch.no_grad():
                hidden_BTD = model.hidden(self.ids_BT[:, :length])
                logits_NV = model.logits(hidden_BTD[:, -1])
            shape = (3, length, model.hidden_size)
            self.expect(hidden_BTD.shape == shape, f"hidden gives {tuple(hidden_BTD.shape)}, not [B, T, D] = {shape}")
            found, shape2 = tuple(logits_NV.shape), (3, model.vocab_size)
            self.expect(found == shape2, f"logits gives {found}, not [N, V] = {shape2}")
            self.expect(logits_NV.dtype == torch.float32, f"logits must be float32, not {logits_NV.dtype}")

    def loss(self) -> None:
        targets_BT = self.targets_BT.clone()
        targets_BT[0, :3] = IGNORED
        logits_BTV = self._logits(self.model, self.ids_BT)
        expected_N = nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
        )
        with torch.no_grad():
            each_BT = self.model(self.ids_BT, targets_BT, "none")
            total = self.model(self.ids_BT, targets_BT)
        self.expect(
            self._close(each_BT.flatten(), expected_N), 'forward(..., "none") is not the cross-entropy of logits'
        )
        self.expect(self._close(total, expected_N.sum()), "forward is not the sum of the cross-entropies")
        self.expect(not each_BT[0, :3].any(), "ignored targets have a loss other than 0")

    def causality(self) -> None:
        before_BTV = self._logits(self.model, self.ids_BT)
        changed_BT = self.ids_BT.clone()
        at = self.length // 2
        changed_BT[:, at] = (changed_BT[:, at] + 1) % self.vocab
        after_BTV = self._logits(self.model, changed_BT)
        self.expect(self._close(before_BTV[:, :at], after_BTV[:, :at]), "a position sees tokens that come after it")
        self.expect(not torch.equal(before_BTV[:, at], after_BTV[:, at]), "a position does not see its own token")

    def rows(self) -> None:
        together_BTV = self._logits(self.model, self.ids_BT)
        alone_BTV = torch.cat([self._logits(self.model, row_BT) for row_BT in self.ids_BT.split(1)])
        self.expect(self._close(together_BTV, alone_BTV), "a row depends on the other rows of its batch")
        again_BTV = self._logits(self.model, self.ids_BT)
        self.expect(
            torch.equal(together_BTV, again_BTV), "the same input gives different logits the second time (in eval mode)"
        )

    def gradients(self) -> None:
        model = self.model
        model.train()
        try:
            loss = model(self.ids_BT, self.targets_BT)
            loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    finite = parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
                    self.expect(finite, f"parameter {name} gets no gradient, or one that is not finite")
        finally:
            model.zero_grad(set_to_none=True)
            model.eval()

    def roles(self) -> None:
        model, roles = self.model, dict(self.model.parameter_roles())
        names = {name for name, _ in model.named_parameters()}
        self.expect(set(roles) == names, f"parameter_roles and the model differ in {sorted(set(roles) ^ names)[:3]}")
        for name, parameter in model.named_parameters():
            role = roles.get(name, "scalar")
            self.expect(
                base_role(role) in ROLES, f"parameter {name} has role {role!r}: optimizers know {', '.join(ROLES)}"
            )
            self.expect(base_role(role) != "matrix" or parameter.ndim == 2, f"parameter {name} is a matrix but not 2-D")
        counts = dict(model.parameter_counts())
        total = sum(p.numel() for p in model.parameters())
        self.expect(counts.get("total") == total, f"parameter_counts gives {counts.get('total')} in total, not {total}")
        parts = sum(count for role, count in counts.items() if role != "total")
        self.expect(parts == total, "the counts of parameter_counts do not add up to total")
        flops = model.flops_per_token(self.length)
        self.expect(math.isfinite(flops) and flops > 0, f"flops_per_token gives {flops}")

    def seed(self) -> None:
        first, second = self.build().state_dict(), self.build().state_dict()
        same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        self.expect(same, "the same seed gives different weights: draw them from torch's default generator")

    def meta(self) -> None:
        with torch.device("meta"):
            counts = dict(self.build().parameter_counts())
        expected = dict(self.model.parameter_counts())
        self.expect(counts == expected, "built on the meta device, it has different parameter_counts")

    def saved_and_loaded(self) -> None:
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        other = self.build()
        other.load_state_dict(state)
        other.eval()
        same = torch.equal(self._logits(self.model, self.ids_BT), self._logits(other, self.ids_BT))
        self.expect(same, "saved and loaded, it gives different logits: keep all it needs in parameters and buffers")

    def cache(self) -> None:
        model = self.model
        cache: Cache | None = model.new_cache(3, self.length)
        if cache is None:
            return
        self.expect(cache.length == 0, "a new cache is not empty")
        with torch.no_grad():
            whole_BTD = model.hidden(self.ids_BT)
            chunks, at = [], 0
            for size in (5, 1, 1, self.length - 7):
                chunks.append(model.hidden(self.ids_BT[:, at : at + size], cache))
                at += size
                self.expect(cache.length == at, f"after {at} tokens the length of the cache is {cache.length}")
        self.expect(self._close(torch.cat(chunks, 1), whole_BTD), "hidden states differ with a cache")

    def row_cache(self) -> None:
        cache = self.model.new_row_cache(3, self.length)
        if cache is None:
            return
        self.expect(cache.max_tokens >= self.length, "a row cache holds fewer tokens than were asked for")
        texts: list[list[int]] = [[], [], []]

        def read(what: str, start: int, counts: list[int]) -> None:
            width = max(counts)
            ids_BT = self.targets_BT[start : start + len(counts), :width].clone()  # padding is not zero
            for row, count in enumerate(counts, start):
                at = len(texts[row])
                ids_BT[row - start, :count] = self.ids_BT[row, at : at + count]
                texts[row] += ids_BT[row - start, :count].tolist()
            with torch.no_grad():
                states_BTD = self.model.hidden(ids_BT, cache.rows(start, start + len(counts), counts))
                for row, count in enumerate(counts, start):
                    if count:
                        alone_TD = self.model.hidden(torch.tensor([texts[row]]))[0, -count:]
                        same = self._close(states_BTD[row - start, :count], alone_TD)
                        self.expect(same, f"hidden states in a row cache differ from those of the text alone {what}")
            lengths = [len(text) for text in texts]
            self.expect(list(cache.lengths) == lengths, f"the lengths of a row cache are wrong {what}")

        third = self.length // 3
        read("after prompts of different lengths", 0, [third, 1, 2 * third])
        read("after one token each", 0, [1, 1, 1])
        read("after chunks, one of them empty", 0, [2, 0, 1])
        saved, length = cache.save(2, third), third
        cache.clear(0)
        texts[0] = []
        read("in a row that was freed", 0, [3])
        cache.load(1, saved, length)
        texts[1] = texts[2][:length]
        read("in a row with a copied prefix", 1, [2, 1])
        read("after all of that", 0, [1, 1, 1])

    def checkpointed_activations(self) -> None:
        again = self.build()
        try:
            again.checkpoint_activations()
        except NotImplementedError:
            return
        again.load_state_dict(self.model.state_dict())
        found = []
        for model in (self.model, again):
            model.train()
            torch.manual_seed(7)  # for dropout
            loss = model(self.ids_BT, self.targets_BT)
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            found.append((loss.detach(), gradients))
            model.zero_grad(set_to_none=True)
            model.eval()
        (loss, kept), (same_loss, computed_again) = found
        self.expect(self._close(loss, same_loss), "checkpoint_activations changes the loss")
        for name, gradient in kept.items():
            other = computed_again[name]
            same = gradient is other or (gradient is not None and other is not None and self._close(gradient, other))
            self.expect(same, f"checkpoint_activations changes the gradient of parameter {name}")
