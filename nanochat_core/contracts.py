"""Contract checks of all kinds but tokenizers; plugin authors import them from ``nanochat_core.testing``."""

from __future__ import annotations

import math
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from nanochat_core.distributed import World
from nanochat_core.interfaces import (
    IGNORED,
    Batch,
    Cache,
    DataContext,
    DataSource,
    Evaluation,
    Evaluator,
    EvaluatorContext,
    Logger,
    LoggerContext,
    Model,
    ModelContext,
    Multipliers,
    Optimizer,
    OptimizerContext,
    Split,
    Tokenizer,
    Tokens,
    base_role,
)

ROLES = ("matrix", "embedding", "head", "scalar")
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


class _Check:
    """Collects everything that doesn't hold."""

    def __init__(self, what: str) -> None:
        self.what, self.wrong = what, list[str]()

    def expect(self, holds: bool, message: str) -> None:
        if not holds and message not in self.wrong:
            self.wrong.append(message)

    def run(self, part: Callable[[], None]) -> None:
        try:
            part()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            self.wrong.append(f"{part.__name__.strip('_').replace('_', ' ')}: {reason}")

    def finish(self) -> None:
        assert not self.wrong, f"the {self.what} breaks its contract:\n" + "\n".join(self.wrong)


# -------------------------------------------------------------------------------------------------------- models


def check_model(
    factory: Callable[[Any, ModelContext], Model],
    config: Any,
    *,
    vocab_size: int = 67,
    max_seq_len: int = 16,
    tolerance: float = 1e-4,
) -> Model:
    """Check that a model keeps its contract, on the CPU in float32.

    Shapes and dtypes; position t sees nothing after t, a row nothing of other rows; the loss is the cross-entropy of
    the logits; the same seed gives the same weights; what is saved and loaded goes on exactly. A cache, and activations
    that are computed again, change nothing, where a model has them.

    Args:
        factory, config: as in the registration; a small config will do.
        tolerance: how far results may differ that only differ in shape.

    Returns:
        The model.

    Raises:
        AssertionError: with a line for everything that doesn't hold.
    """
    context = ModelContext(vocab_size, max_seq_len, torch.device("cpu"), torch.float32)

    def build() -> Model:
        torch.manual_seed(5)
        return factory(config, context)

    model = build()
    assert isinstance(model, Model), f"the factory must return a nanochat_core.Model, not {model!r}"
    check = _ModelCheck(model, build, vocab_size, max_seq_len, tolerance)
    parts = (
        check.shapes, check.loss, check.causality, check.rows, check.gradients, check.roles, check.seed, check.meta,
        check.saved_and_loaded, check.cache, check.checkpointed_activations,
    )  # fmt: skip
    for part in parts:
        check.run(part)
    check.finish()
    return model


class _ModelCheck(_Check):
    def __init__(self, model: Model, build: Callable[[], Model], vocab: int, length: int, tolerance: float) -> None:
        super().__init__("model")
        self.model, self.build, self.vocab, self.length, self.tolerance = model, build, vocab, length, tolerance
        generator = torch.Generator().manual_seed(1)
        tokens_BT = torch.randint(vocab, (3, length + 1), generator=generator)
        self.ids_BT, self.targets_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()
        # A fresh model may give every token the same chance, which would hide a lot: a few steps make it its own.
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
        self.expect(not each_BT[0, :3].any(), "ignored targets have a loss")

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
            torch.equal(together_BTV, again_BTV), "the same input gives other logits the second time (eval mode)"
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
        self.expect(set(roles) == names, f"parameter_roles misses or invents {sorted(set(roles) ^ names)[:3]}")
        for name, parameter in model.named_parameters():
            role = roles.get(name, "scalar")
            self.expect(
                base_role(role) in ROLES, f"parameter {name} has role {role!r}: optimizers know {', '.join(ROLES)}"
            )
            self.expect(base_role(role) != "matrix" or parameter.ndim == 2, f"parameter {name} is a matrix but not 2-D")
        counts = dict(model.parameter_counts())
        total = sum(p.numel() for p in model.parameters())
        self.expect(counts.get("total") == total, f"parameter_counts says {counts.get('total')} in total, not {total}")
        parts = sum(count for role, count in counts.items() if role != "total")
        self.expect(parts == total, "the counts of parameter_counts do not add up to total")
        flops = model.flops_per_token(self.length)
        self.expect(math.isfinite(flops) and flops > 0, f"flops_per_token gives {flops}")

    def seed(self) -> None:
        first, second = self.build().state_dict(), self.build().state_dict()
        same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        self.expect(same, "the same seed gives other weights: draw them from torch's default generator")

    def meta(self) -> None:
        with torch.device("meta"):
            counts = dict(self.build().parameter_counts())
        expected = dict(self.model.parameter_counts())
        self.expect(counts == expected, "built on the meta device it counts other parameters")

    def saved_and_loaded(self) -> None:
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        other = self.build()
        other.load_state_dict(state)
        other.eval()
        same = torch.equal(self._logits(self.model, self.ids_BT), self._logits(other, self.ids_BT))
        self.expect(same, "saved and loaded it gives other logits: something it needs is in no parameter or buffer")

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
                self.expect(cache.length == at, f"after {at} tokens the cache says {cache.length}")
        self.expect(self._close(torch.cat(chunks, 1), whole_BTD), "with a cache the states are others than without")

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
        self.expect(self._close(loss, same_loss), "with checkpoint_activations the loss is another")
        for name, gradient in kept.items():
            other = computed_again[name]
            same = gradient is other or (gradient is not None and other is not None and self._close(gradient, other))
            self.expect(same, f"with checkpoint_activations parameter {name} gets another gradient")


# ---------------------------------------------------------------------------------------------------- optimizers


class _Tiny(Model):
    """Predicts a token from the one before: a parameter of every role, and nothing else."""

    def __init__(self, vocab_size: int = 32, width: int = 16) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size = vocab_size, width
        self.embedding = nn.Embedding(vocab_size, width)
        self.block = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, vocab_size, bias=False)

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        x_BTD = self.embedding(ids_BT)
        return (x_BTD + torch.tanh(self.block(x_BTD))) * self.gain

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return self.head(hidden_ND).float()


def check_optimizer(
    factory: Callable[[Any, OptimizerContext], Optimizer], config: Any, *, steps: int = 30
) -> Optimizer:
    """Check that an optimizer keeps its contract, on the CPU with one rank.

    ``reduce`` gives the norm of the gradients; ``scale`` and the learning-rate factor are honoured; ``discard`` touches
    nothing; the loss falls; a state that is saved and loaded goes on exactly.

    Args:
        factory, config: as in the registration.
        steps: in which the loss of a tiny model must fall.

    Returns:
        The optimizer, after some steps.

    Raises:
        AssertionError: with a line for everything that doesn't hold.
    """
    check = _OptimizerCheck(factory, config, steps)
    optimizer = check.build(check.model())
    assert isinstance(optimizer, Optimizer), f"the factory must return a nanochat_core.Optimizer, not {optimizer!r}"
    for part in (check.norm, check.scale, check.learning_rate, check.discard, check.state, check.resume, check.learns):
        check.run(part)
    check.finish()
    return optimizer


class _OptimizerCheck(_Check):
    def __init__(self, factory: Callable[[Any, OptimizerContext], Optimizer], config: Any, steps: int) -> None:
        super().__init__("optimizer")
        self.factory, self.config, self.steps = factory, config, steps
        generator = torch.Generator().manual_seed(1)
        self.ids_BT = torch.randint(32, (4, 16), generator=generator)
        self.targets_BT = (self.ids_BT * 5 + 3) % 32

    def model(self) -> _Tiny:
        torch.manual_seed(2)
        return _Tiny()

    def build(self, model: _Tiny) -> Optimizer:
        parameters = dict(model.named_parameters())
        context = OptimizerContext(parameters, model.parameter_roles(), model.hidden_size, ALONE, 64, self.steps)
        return self.factory(self.config, context)

    def step(self, model: _Tiny, optimizer: Optimizer, step: int, lr: float = 1.0, factor: float = 1.0) -> float:
        """One step on the mean loss, which is returned; gradients are ``factor`` times too large and scaled back."""
        optimizer.begin_reduce()
        loss = model(self.ids_BT, self.targets_BT)
        (loss * factor).backward()
        optimizer.reduce()
        optimizer.update(1 / (64 * factor), Multipliers(step, self.steps, lr))
        return loss.item() / 64

    def _parameters(self, model: _Tiny) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def _same(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    def norm(self) -> None:
        model = self.model()
        optimizer = self.build(model)
        optimizer.begin_reduce()
        model(self.ids_BT, self.targets_BT).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        expected = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        norm = optimizer.reduce()
        right = norm.shape == () and norm.dtype == torch.float32
        self.expect(right, f"reduce must give a float32 scalar, not {norm.dtype} {tuple(norm.shape)}")
        self.expect(math.isclose(norm.item(), expected, rel_tol=1e-4), f"reduce gives {norm.item()}, not {expected}")
        optimizer.update(1 / 64, Multipliers(0, self.steps, 1.0))
        optimizer.begin_reduce()
        model(self.ids_BT, self.targets_BT).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        expected = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        self.expect(
            math.isclose(optimizer.reduce().item(), expected, rel_tol=1e-4), "update leaves old gradients behind"
        )

    def scale(self) -> None:
        results = []
        for factor in (1.0, 64.0):
            model = self.model()
            optimizer = self.build(model)
            for step in range(3):
                self.step(model, optimizer, step, factor=factor)
            results.append(self._parameters(model))
        close = all(torch.allclose(results[0][n], results[1][n], rtol=1e-4, atol=1e-6) for n in results[0])
        self.expect(
            close, "gradients times 64 and a scale of 1/64 give another update: scale is not applied to gradients"
        )

    def learning_rate(self) -> None:
        model = self.model()
        optimizer = self.build(model)
        before = self._parameters(model)
        self.step(model, optimizer, 0, lr=0.0)
        self.expect(self._same(before, self._parameters(model)), "a learning-rate factor of 0 changes parameters")
        self.step(model, optimizer, 1)
        after = self._parameters(model)
        still = [name for name in before if torch.equal(before[name], after[name])]
        self.expect(not still, f"update leaves {', '.join(still)} as they are")

    def discard(self) -> None:
        model = self.model()
        optimizer = self.build(model)
        self.step(model, optimizer, 0)
        parameters, state = self._parameters(model), {k: v.clone() for k, v in optimizer.state_dict().items()}
        optimizer.begin_reduce()
        (model(self.ids_BT, self.targets_BT) * math.nan).backward()
        optimizer.reduce()
        optimizer.discard()
        self.expect(self._same(parameters, self._parameters(model)), "discard changes parameters")
        self.expect(self._same(state, optimizer.state_dict()), "discard changes the state")
        self.step(model, optimizer, 1)
        finite = all(torch.isfinite(p).all() for p in model.parameters())
        self.expect(finite, "after discard the gradients are still there")

    def state(self) -> None:
        model = self.model()
        optimizer = self.build(model)
        before = optimizer.state_bytes()
        self.step(model, optimizer, 0)
        names = set(self._parameters(model))
        for key, tensor in optimizer.state_dict().items():
            self.expect(isinstance(tensor, Tensor), f"state_dict()[{key!r}] is no tensor")
            name, slash, what = key.rpartition("/")
            known = bool(slash and what) and (name in names or not name)
            self.expect(known, f"state_dict key {key!r} is not <parameter name>/<what>")
        self.expect(optimizer.state_bytes() == before, "state_bytes says something else after the first update")

    def resume(self) -> None:
        whole = self.model()
        optimizer = self.build(whole)
        for step in range(3):
            self.step(whole, optimizer, step)
        state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
        part = self.model()
        part.load_state_dict(whole.state_dict())
        resumed = self.build(part)
        resumed.load_state_dict(state)
        self.expect(self._same(resumed.state_dict(), state), "load_state_dict does not restore what state_dict gave")
        for step in range(3, 6):
            self.step(whole, optimizer, step)
            self.step(part, resumed, step)
        same = self._same(self._parameters(whole), self._parameters(part))
        self.expect(same, "a resumed optimizer goes on differently: its state is not complete")

    def learns(self) -> None:
        model = self.model()
        optimizer = self.build(model)
        losses = [self.step(model, optimizer, step) for step in range(self.steps)]
        self.expect(
            losses[-1] < losses[0] - 0.05, f"in {self.steps} steps the loss goes from {losses[0]} to {losses[-1]}"
        )


# -------------------------------------------------------------------------------------------------- data sources


def check_data_source(factory: Callable[[Any, DataContext], DataSource], config: Any) -> DataSource:
    """Check that a data source keeps its contract.

    Both splits have documents; they can be read by index and slice, in any order; built again, with an empty cache, it
    has the same documents and fingerprints, without which no run could be resumed.

    Returns:
        The data source.

    Raises:
        AssertionError: with a line for everything that doesn't hold.
    """
    check = _Check("data source")
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        source = factory(config, DataContext(Path(first)))
        assert isinstance(source, DataSource), f"the factory must return a nanochat_core.DataSource, not {source!r}"
        again = factory(config, DataContext(Path(second)))
        splits: tuple[Split, ...] = ("train", "val")
        for split in splits:
            check.run(lambda s=split: _check_split(check, source, again, s))  # type: ignore[misc]
    described = source.describe()
    for key, value in described.items():
        check.expect(isinstance(value, str | int), f"describe()[{key!r}] must be a str or an int, not {value!r}")
    check.expect(all(isinstance(line, str) for line in source.problems()), "problems() must be lines of text")
    check.finish()
    return source


def _check_split(check: _Check, source: DataSource, again: DataSource, split: Split) -> None:
    documents = source.documents(split)
    count = len(documents)
    check.expect(count > 0, f"{split} has no documents")
    if not count:
        return
    some = sorted({0, count // 3, count // 2, count - 1})
    texts = {i: documents[i] for i in some}
    for i, text in texts.items():
        check.expect(isinstance(text, str), f"document {i} of {split} is no str")
    backwards = {i: documents[i] for i in reversed(some)}
    check.expect(backwards == texts, f"documents of {split} are others when read in another order")
    check.expect(
        list(documents[0:count:7]) == [documents[i] for i in range(0, count, 7)], f"slices of {split} are wrong"
    )
    check.expect(list(documents[count:]) == [], f"a slice past the end of {split} is not empty")
    try:
        documents[count]
        check.expect(False, f"{split} has a document past its end; raise IndexError")
    except IndexError:
        pass
    others = again.documents(split)
    same = len(others) == count and all(others[i] == text for i, text in texts.items())
    check.expect(same, f"built again it has other documents in {split}")
    check.expect(source.fingerprint(split) == again.fingerprint(split), f"built again {split} has another fingerprint")
    int(source.fingerprint(split), 16)


# ---------------------------------------------------------------------------------------------------- evaluators


class _Bytes(Tokenizer):
    """Bytes as tokens, so that checks need no plugin."""

    vocab_size = 257
    special_tokens: Mapping[str, int] = {"<|bos|>": 256}  # type: ignore[assignment]
    fingerprint = "0"

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="replace"))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(b"<|bos|>" if i == 256 else bytes([i]) for i in ids)

    def token_bytes(self) -> Tokens:
        return np.array([1] * 256 + [0], dtype=np.int32)

    def save(self, directory: Path) -> None:
        pass


def check_evaluator(factory: Callable[[Any, EvaluatorContext], Evaluator], config: Any) -> Evaluation:
    """Check that an evaluator keeps its contract, with a tiny model of bytes.

    It finds something, of types that the ledger can hold; it finds the same again; it leaves the model as it was.

    Returns:
        What it found.

    Raises:
        AssertionError: with a line for everything that doesn't hold.
    """
    check = _Check("evaluator")
    torch.manual_seed(3)
    model = _Tiny(vocab_size=257).eval()
    length = 32

    def rows(split: Split, tokens: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(len(split))
        for start in range(0, min(tokens, 512), 4 * length):
            tokens_BT = torch.randint(97, 123, (4, length + 1), generator=generator)
            targets_BT = tokens_BT[:, 1:].clone()
            targets_BT.view(-1)[max(0, min(tokens, 512) - start) :] = IGNORED
            yield Batch(tokens_BT[:, :-1].contiguous(), targets_BT)

    context = EvaluatorContext(_Bytes(), ALONE, length, 4, rows)
    evaluator = factory(config, context)
    assert isinstance(evaluator, Evaluator), f"the factory must return a nanochat_core.Evaluator, not {evaluator!r}"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = []
    for step in (0, 10):
        torch.manual_seed(4)
        with torch.no_grad():
            found.append(evaluator.evaluate(model, step))
    first, second = found
    for evaluation in found:
        assert isinstance(evaluation, Evaluation), (
            f"evaluate must return a nanochat_core.Evaluation, not {evaluation!r}"
        )
        check.expect(bool(evaluation.metrics or evaluation.texts), "it finds neither metrics nor texts")
        for name, value in evaluation.metrics.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            check.expect(number, f"metric {name!r} must be a Python int or float, not {type(value).__name__}")
        for name, text in evaluation.texts.items():
            check.expect(isinstance(text, str), f"text {name!r} must be a str, not {type(text).__name__}")
        taken = {"step", "time", "evaluator"} & {*evaluation.metrics, *evaluation.texts}
        check.expect(not taken, f"{', '.join(sorted(taken))} are names of the ledger: give the metric another name")
    check.expect(set(first.metrics) == set(second.metrics), "it gives other metrics the second time")
    if not check.wrong:
        same = all(
            value == second.metrics[name] or (value != value and second.metrics[name] != second.metrics[name])
            for name, value in first.metrics.items()
        )
        check.expect(same, "the same model gives other metrics the second time: seed what is random")
    after = model.state_dict()
    check.expect(all(torch.equal(before[name], after[name]) for name in before), "it changes the model's parameters")
    check.expect(all(p.grad is None for p in model.parameters()), "it leaves gradients behind")
    check.finish()
    return first


# ------------------------------------------------------------------------------------------------------- loggers

Series = Mapping[str, Mapping[int, float]]


def check_logger(
    factory: Callable[[Any, LoggerContext], Logger],
    config: Any,
    read: Callable[[Path], Series] | None = None,
) -> None:
    """Check that a logger keeps its contract: over a run that is interrupted after step 7 and resumed from step 4.

    Args:
        factory, config: as in the registration.
        read: reads back what the logger wrote for the run in this directory: metric name to step to value. With it,
            the check sees that no step is lost or doubled, and that values are exact (to float32).

    Raises:
        AssertionError: with a line for everything that doesn't hold.
    """
    check = _Check("logger")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "runs" / "checked" / "run-1"
        directory.mkdir(parents=True)
        check.run(lambda: _log_a_run(check, factory, config, directory, read))
    check.finish()


def _log_a_run(
    check: _Check,
    factory: Callable[[Any, LoggerContext], Logger],
    config: Any,
    directory: Path,
    read: Callable[[Path], Series] | None,
) -> None:
    import json

    def record(step: int, **values: float | str) -> dict[str, Any]:
        return {"step": step, "time": 1.7e9 + step, **values}

    def training(step: int) -> dict[str, Any]:
        return record(step, **{"train/loss": 5.0 / (step + 1), "train/epoch": 0})

    evaluation = record(4, evaluator="bpb", **{"val/bpb": 1.25})
    sample = record(8, evaluator="samples", **{"samples/0": "Hot *is*\n  <b>cold</b> \u00e9\u4e2d", "val/odd": "nan"})
    first = [*map(training, range(4)), evaluation, *map(training, range(4, 8)), sample]
    rewound = [*map(training, range(4)), evaluation, *map(training, range(4, 8)), sample, training(8)]
    context = LoggerContext(
        directory, "checked", "run-1", "nanochat", "group", ("a", "b"), {"model": {"plugin": "gpt"}}, 9, 0,
        report=lambda line: None,
    )  # fmt: skip
    ledger = directory / "metrics.jsonl"
    ledger.write_text("".join(json.dumps(r) + "\n" for r in first))
    logger = factory(config, context)
    assert isinstance(logger, Logger), f"the factory must return a nanochat_core.Logger, not {logger!r}"
    for line in first:
        logger.log(line)
    logger.finish("failed")
    ledger.write_text("".join(json.dumps(r) + "\n" for r in rewound))
    resumed = factory(config, attrs.evolve(context, start_step=4))
    for line in rewound:
        if line not in first or (resumed.rewinds and line["step"] >= 4):  # as the core does it
            resumed.log(line)
    resumed.finish("finished")
    if read is None:
        return
    found = read(directory)
    expected: dict[str, dict[int, float]] = {}
    for line in rewound:
        for key, value in line.items():
            if key not in ("step", "time", "evaluator") and not isinstance(value, str):
                expected.setdefault(key, {})[line["step"]] = value
    for key, series in expected.items():
        have = dict(found.get(key, {}))
        check.expect(have.keys() == series.keys(), f"{key} has steps {sorted(have)}, not {sorted(series)}")
        close = all(math.isclose(have[step], series[step], rel_tol=1e-6) for step in series if step in have)
        check.expect(close, f"{key} has other values than it was told")
