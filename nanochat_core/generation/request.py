"""What is asked of the engine, and what it answers. All limits of sampling parameters are here."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import attrs

from nanochat_core.errors import NanochatError
from nanochat_core.files import shorten

Reason = Literal["stop", "length", "cancelled"]
MAX_LOGPROBS = 100


@attrs.frozen(kw_only=True)
class Request:
    """A prompt with how to continue it.

    Args:
        prompt: the tokens to continue, at least one; a new document begins with bos.
        max_tokens: maximum number of new tokens.
        temperature: divisor of the logits before the softmax; 0 takes the most likely token every time.
        top_k: sample among the ``top_k`` most likely tokens; None: among all.
        top_p: then among the most likely of these that together have at least this probability.
        min_p: then among those that have at least this share of the most likely token's probability.
        repetition_penalty: divides positive logits of tokens that the text already has, and multiplies negative ones
            (Keskar et al. 2019, https://arxiv.org/abs/1909.05858).
        seed: seed of the draws. Sample i of a request draws as a request with ``seed + i`` would.
        stop_tokens: tokens that end the text; they are not part of it.
        stop: strings that end the text, which is cut before them.
        logprobs: report the log-probability of each token, and of this many most likely ones; None: of none. They are
            the model's own, before temperature, penalty and truncation.
        samples: number of continuations.

    Raises:
        NanochatError: for a value out of range; its ``key`` is the name of the parameter.
    """

    prompt: Sequence[int]
    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 42
    stop_tokens: Collection[int] = ()
    stop: Sequence[str] = ()
    logprobs: int | None = None
    samples: int = 1

    def __attrs_post_init__(self) -> None:
        if not len(self.prompt):
            raise NanochatError("must have at least one token, such as the tokenizer's bos_id", key="prompt")
        if isinstance(self.stop, str):
            raise NanochatError("must be a list of strings, not a string", key="stop")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise NanochatError("has an entry that is empty or not a string: leave it out", key="stop")
        self._whole("max_tokens", 0)
        self._number("temperature", _finite(self.temperature) >= 0, "at least 0")
        self._whole("top_k", 1, optional=True)
        self._number("top_p", 0 < _finite(self.top_p) <= 1, "greater than 0 and at most 1")
        self._number("min_p", 0 <= _finite(self.min_p) <= 1, "from 0 to 1")
        self._number("repetition_penalty", _finite(self.repetition_penalty) > 0, "greater than 0")
        self._whole("seed", 0, 2**63 - 1)
        self._whole("logprobs", 0, MAX_LOGPROBS, optional=True)
        self._whole("samples", 1)

    def _whole(self, name: str, least: int, most: int | None = None, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            wanted = f"at least {least}" if most is None else f"from {least} to {most}"
            raise NanochatError(f"must be a whole number, {wanted}, not {shorten(value)}", key=name)

    def _number(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise NanochatError(f"must be a number, {wanted}, not {shorten(getattr(self, name))}", key=name)


def _finite(value: Any) -> float:
    """The value, or NaN (which no comparison accepts) if it is no number, or none that float32 holds."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and abs(value) < 1e38 else math.nan


@attrs.frozen
class Event:
    """What came of one step for one continuation: a token, or its end.

    Args:
        request: the number that ``submit`` returned.
        sample: index of the continuation among those of the request.
        token: the new token; None in the last event.
        text: text that is now certain: it ends between characters, and before anything that may become a stop string.
            Empty without a tokenizer.
        logprob: log-probability of the token, if it was asked for.
        top: the most likely tokens with their log-probabilities, if they were asked for.
        reason: None while it goes on; "stop" after a stop token or string, "length" after ``max_tokens`` tokens or at
            the end of the context, "cancelled" after ``cancel``.
        stopped_by: the stop token or string.
    """

    request: int
    sample: int
    token: int | None = None
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    reason: Reason | None = None
    stopped_by: int | str | None = None


@attrs.frozen
class Completion:
    """A whole continuation.

    Args:
        tokens: the new tokens, without a stop token. With a stop string they contain it, whereas ``text`` does not.
        text: their text; empty without a tokenizer.
        reason: why it ended, see ``Event``.
        stopped_by: the stop token or string.
        logprobs: log-probability of each token, if it was asked for.
        top: for each token the most likely ones with their log-probabilities, if they were asked for.
    """

    tokens: list[int]
    text: str
    reason: Reason
    stopped_by: int | str | None = None
    logprobs: list[float] = attrs.field(factory=list)
    top: list[tuple[tuple[int, float], ...]] = attrs.field(factory=list)

    @classmethod
    def of(cls, events: Sequence[Event]) -> Completion:
        """Put together the events of one continuation, to its end."""
        tokens = [event for event in events if event.token is not None]
        last = events[-1]
        assert last.reason is not None, "the continuation has not ended"
        return cls(
            [event.token for event in tokens if event.token is not None],
            "".join(event.text for event in events),
            last.reason,
            last.stopped_by,
            [event.logprob for event in tokens if event.logprob is not None],
            [event.top for event in tokens if event.top],
        )
