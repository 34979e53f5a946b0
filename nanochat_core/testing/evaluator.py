"""The contract check of evaluators; plugin authors import it from ``nanochat_core.testing``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat_core.evaluation.contract import BadResult, checked, reserved_problem
from nanochat_core.evaluation.undisturbed import Undisturbed
from nanochat_core.interfaces.evaluator import Evaluation, Evaluator, EvaluatorContext
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.interfaces.types import IGNORED, Batch, Split, Tokens
from nanochat_core.testing.checks import ALONE, Check
from nanochat_core.testing.optimizer import TinyModel


class _Bytes(Tokenizer):
    """A tokenizer whose tokens are bytes, so that checks need no plugin."""

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

    It returns metrics or texts, of types that the ledger can hold; a second evaluation returns the same; the model is
    left as it was.

    Returns:
        The first evaluation.

    Raises:
        AssertionError: with a line for every rule that is broken.
    """
    check = Check("evaluator")
    torch.manual_seed(3)
    model = TinyModel(vocab_size=257).eval()
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
    found = []
    for step in (0, 10):
        torch.manual_seed(4)
        with torch.no_grad():
            undisturbed = Undisturbed(model)
            try:
                found.append(evaluator.evaluate(model, step))
            finally:
                changed, lost = undisturbed.put_back()
        check.expect(not lost, f"it changes the model's parameters: {', '.join(lost[:3])}")
        check.expect(not changed, f"it leaves changed: {', '.join(changed)}")
    first, second = found
    for evaluation in found:
        try:
            checked(evaluation)
        except BadResult as error:
            check.expect(False, str(error))
            check.finish()
        check.expect(bool(evaluation.metrics or evaluation.texts), "it returns neither metrics nor texts")
        for name in (*evaluation.metrics, *evaluation.texts):
            problem = reserved_problem(name, {}, "")
            check.expect(not problem, problem)
    check.expect(set(first.metrics) == set(second.metrics), "a second evaluation has different metrics")
    if not check.wrong:
        same = all(
            value == second.metrics[name] or (value != value and second.metrics[name] != second.metrics[name])
            for name, value in first.metrics.items()
        )
        check.expect(same, "a second evaluation of the same model has different values: seed random numbers")
    check.finish()
    return first
