"""The engine: continuations of many prompts at once, which begin and end while others run (continuous batching).

The idea of admitting and removing sequences at every step is of Orca (Yu et al. 2022). N sequences, D hidden size, V
tokens.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nanochat_core.errors import NanochatError
from nanochat_core.generation.prefixes import PrefixStore
from nanochat_core.generation.request import Completion, Event, Reason, Request
from nanochat_core.generation.rows import device_of, make_rows
from nanochat_core.generation.sampler import Sampler
from nanochat_core.generation.text import TextStream
from nanochat_core.hardware.casting import weights_at_rest
from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.tokenizer import Tokenizer


@attrs.define(eq=False)
class _Sequence:
    """One continuation of a request, waiting or in a row."""

    number: int
    sample: int
    request: Request
    draws: random.Random
    stream: TextStream | None
    text: list[int]  # prompt and new tokens
    unread: list[int]
    seen_V: Tensor | None = None
    pinned: bool = False  # whether the states of its prompt are kept for it
    cancelled: bool = False


class Engine:
    """Continues prompts, many at a time. Not thread-safe: one thread submits, steps and cancels.

    The tokens of a continuation do not depend on what else runs. (Sums are rounded differently in batches of other
    sizes, so that tokens can differ where two logits are equal within the rounding of the dtype.)

    Args:
        model: in eval mode; its weights may change between steps, but not while continuations run.
        tokenizer: for text in events, and for stop strings; None: tokens only.
        max_rows: maximum number of continuations in a forward pass; others wait.
        context: maximum number of tokens of a prompt with its continuation; None: the model's ``max_positions``.
        chunk: maximum number of prompt tokens that a step reads, so that running continuations do not wait long.
        prefix_tokens: number of tokens of finished texts whose states are kept, in case a prompt begins like one of
            them; call ``forget`` when the weights change.
        vocab_size: number of tokens that may be chosen; None: the tokenizer's, or the model's.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        *,
        max_rows: int = 32,
        context: int | None = None,
        chunk: int = 512,
        prefix_tokens: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        if max_rows < 1 or chunk < 1:
            raise ValueError("max_rows and chunk must be at least 1")
        self.model, self.tokenizer, self.max_rows, self.chunk = model, tokenizer, max_rows, chunk
        self.context = context if context is not None else model.max_positions
        self.vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer is not None else model.vocab_size)
        self._device = device_of(model)
        self._casts: dict[Any, Any] = {}
        self._rows: Any = None
        self._prefixes = PrefixStore(prefix_tokens)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # by row; the first ``_ready`` have read all but their newest token
        self._ready = 0
        self._ended: list[Event] = []  # of sequences that never ran
        self._sampler: tuple[list[_Sequence], Sampler] | None = None
        self._next_number = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do for ``step``."""
        return bool(self._waiting or self._running or self._ended)

    def check(self, request: Request) -> None:
        """Check what depends on the model.

        Raises:
            NanochatError: when the prompt does not fit the context or the vocabulary, or stop strings need a tokenizer.
        """
        prompt = request.prompt
        if self.context is not None and len(prompt) >= self.context:
            raise NanochatError(
                f"has {len(prompt)} tokens; with room for a new one the model's context takes {self.context - 1}: "
                "shorten it",
                key="prompt",
            )
        wrong = next((token for token in prompt if not 0 <= token < self.model.vocab_size), None)
        if wrong is not None:
            raise NanochatError(f"has the token {wrong}; the model has 0 to {self.model.vocab_size - 1}", key="prompt")
        if request.stop and self.tokenizer is None:
            raise NanochatError("needs a tokenizer", key="stop")

    def submit(self, request: Request) -> int:
        """Accept a request, and return its number.

        Raises:
            NanochatError: see ``check``.
        """
        self.check(request)
        prompt = list(request.prompt)
        number, self._next_number = self._next_number, self._next_number + 1
        for sample in range(request.samples):
            if not request.max_tokens:
                self._ended.append(Event(number, sample, reason="length"))
                continue
            stream = TextStream(self.tokenizer, request.stop) if self.tokenizer is not None else None
            draws = random.Random(request.seed + sample)
            self._waiting.append(_Sequence(number, sample, request, draws, stream, list(prompt), list(prompt)))
        return number

    def forget(self) -> None:
        """Drop the states of finished texts. Call this when the weights have changed and nothing runs."""
        self._prefixes = PrefixStore(self._prefixes.max_tokens)

    def cancel(self, number: int) -> None:
        """End all continuations of a request; the next step frees their rows, and says so in events."""
        for sequence in [*self._waiting, *self._running]:
            if sequence.number == number:
                sequence.cancelled = True

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Choose the next token of every running continuation, let waiting ones begin, and return what came of it."""
        events, self._ended = self._ended, []
        with weights_at_rest(self._casts):
            events += self._drop_cancelled()
            self._admit()
            states_ND, sequences = self._read()
            if sequences:
                events += self._choose(self.model.logits(states_ND)[:, : self.vocab_size].float(), sequences)
        return events

    def stream(self, request: Request) -> Iterator[Event]:
        """Submit a request and yield its events as they come. Closing the iterator cancels the request.

        What else runs goes on meanwhile, but its events are lost: this is for one request at a time.
        """
        return self._stream(self.submit(request), request.samples)

    def _stream(self, number: int, left: int) -> Iterator[Event]:
        try:
            while left:
                for event in self.step():
                    if event.request == number:
                        left -= event.reason is not None
                        yield event
        finally:
            if left:
                self.cancel(number)

    def complete(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Return the continuations of each request, when all have ended. All are checked before any begins."""
        for request in requests:
            self.check(request)
        numbers = [self.submit(request) for request in requests]
        events: dict[tuple[int, int], list[Event]] = {
            (number, sample): []
            for number, request in zip(numbers, requests, strict=True)
            for sample in range(request.samples)
        }
        while self.busy:
            for event in self.step():
                if (event.request, event.sample) in events:
                    events[event.request, event.sample].append(event)
        return [
            [Completion.of(events[number, sample]) for sample in range(request.samples)]
            for number, request in zip(numbers, requests, strict=True)
        ]

    def _drop_cancelled(self) -> list[Event]:
        gone = [sequence for sequence in [*self._waiting, *self._running] if sequence.cancelled]
        for sequence in gone:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
                self._unpin(sequence)
            else:
                self._leave(sequence)
        return [self._end(sequence, "cancelled") for sequence in gone]

    def _admit(self) -> None:
        """Give rows to waiting sequences. Samples of a request begin when the first of them has read the prompt."""
        if not self._waiting:
            return
        if self._rows is None:
            self._rows = make_rows(self.model, self.max_rows)
        shares = self._rows.keeps_prefixes
        admitted: list[tuple[_Sequence, Any, int]] = []
        held = deque[_Sequence]()
        while self._waiting and len(self._running) + len(admitted) < self.max_rows:
            sequence = self._waiting.popleft()
            if shares and sequence.sample and not sequence.pinned:
                held.append(sequence)
                continue
            admitted.append((sequence, *self._prefixes.find(sequence.unread)) if shares else (sequence, None, 0))
            self._unpin(sequence)
        self._waiting.extendleft(reversed(held))
        for sequence, saved, length in sorted(admitted, key=lambda a: len(a[0].unread) - a[2]):  # for little padding
            self._rows.add(self._limit(sequence), saved, length)
            sequence.unread = sequence.unread[length:]
            self._running.append(sequence)

    def _limit(self, sequence: _Sequence) -> int:
        limit = len(sequence.request.prompt) + sequence.request.max_tokens
        return limit if self.context is None else min(limit, self.context)

    def _read(self) -> tuple[Tensor, list[_Sequence]]:
        """Let ready rows read their newest token, and others some of their prompt. Returns the states after the last
        token of sequences that have read all, and these sequences."""
        decoded, states = self._running[: self._ready], []
        if decoded:
            states.append(self._rows.read(0, [sequence.unread for sequence in decoded]))
            for sequence in decoded:
                sequence.unread = []
        budget: float = self.chunk if self._rows is not None and self._rows.keeps_prefixes else math.inf
        while budget > self.chunk // 4 and self._ready < len(self._running):
            texts = self._next_prompts(budget)
            found_ND = self._rows.read(self._ready, texts)
            budget -= len(texts) * max(map(len, texts))
            whole = 0
            for sequence, text in zip(self._running[self._ready :], texts, strict=False):
                sequence.unread = sequence.unread[len(text) :]
                whole += not sequence.unread  # only the last one may have more to read
            for row in range(self._ready, self._ready + whole):
                self._share_prompt(row)
            self._ready += whole
            states.append(found_ND[:whole])
        return torch.cat(states) if states else torch.empty(0), self._running[: self._ready]

    def _next_prompts(self, budget: float) -> list[list[int]]:
        """Texts for the next rows that are not ready, so many that little of the forward pass is padding."""
        texts: list[list[int]] = []
        tokens = longest = 0
        for sequence in self._running[self._ready :]:
            text = sequence.unread
            width = max(longest, len(text))
            if texts and ((len(texts) + 1) * width > min(budget, 1.5 * (tokens + len(text)) + 16)):
                break
            texts.append(text if len(text) <= budget else text[: int(budget)])
            tokens, longest = tokens + len(text), width
        return texts

    def _share_prompt(self, row: int) -> None:
        """Keep the states of a prompt for the other samples of its request."""
        sequence = self._running[row]
        others = [other for other in self._waiting if other.number == sequence.number and not other.pinned]
        if sequence.sample or not others or not self._rows.keeps_prefixes:
            return
        prompt = sequence.request.prompt
        self._prefixes.put(prompt, self._rows.save(row, len(prompt)), pins=len(others))
        for other in others:
            other.pinned = True

    def _unpin(self, sequence: _Sequence) -> None:
        if sequence.pinned:
            self._prefixes.unpin(sequence.request.prompt)
            sequence.pinned = False

    def _choose(self, logits_NV: Tensor, sequences: list[_Sequence]) -> list[Event]:
        if self._sampler is None or self._sampler[0] != sequences:
            self._sampler = (list(sequences), Sampler([s.request for s in sequences], self._device))
        sampler = self._sampler[1]
        draws = [s.draws.random() if s.request.temperature else 0.0 for s in sequences]
        tokens_N = sampler.pick(logits_NV, draws, self._seen(sequences, logits_NV) if sampler.penalizes else None)
        reports = self._logprobs(logits_NV, tokens_N, sequences)
        events, leaving = [], []
        for index, (sequence, token) in enumerate(zip(list(sequences), tokens_N.tolist(), strict=True)):
            events += self._accept(sequence, token, *reports.get(index, (None, ())))
            if events[-1].reason is not None:
                leaving.append(sequence)
        for sequence in leaving:
            self._leave(sequence)
        return events

    def _accept(
        self, sequence: _Sequence, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]
    ) -> list[Event]:
        """Events of a new token, and of the end if it is the last."""
        if token in sequence.request.stop_tokens:
            return [self._end(sequence, "stop", token)]
        sequence.text.append(token)
        sequence.unread = [token]
        if sequence.seen_V is not None:
            sequence.seen_V[token] = True
        text, stopped_by = sequence.stream.add(token) if sequence.stream is not None else ("", None)
        events = [Event(sequence.number, sequence.sample, token, text, logprob, top)]
        if stopped_by is not None:
            events.append(Event(sequence.number, sequence.sample, reason="stop", stopped_by=stopped_by))
        elif len(sequence.text) >= self._limit(sequence):
            events.append(self._end(sequence, "length"))
        return events

    def _end(self, sequence: _Sequence, reason: Reason, stopped_by: int | None = None) -> Event:
        rest = sequence.stream.finish() if sequence.stream is not None else ""
        return Event(sequence.number, sequence.sample, text=rest, reason=reason, stopped_by=stopped_by)

    def _leave(self, sequence: _Sequence) -> None:
        """Free the row of a sequence: rows that are ready stay before the others."""
        row = self._running.index(sequence)
        if self._prefixes.max_tokens and self._rows.keeps_prefixes and row < self._ready:
            read = len(sequence.text) - len(sequence.unread)
            self._prefixes.put(sequence.text[:read], self._rows.save(row, read))
        moves = []
        hole = row
        if row < self._ready:
            self._ready -= 1
            moves.append((self._ready, hole))
            hole = self._ready
        moves.append((len(self._running) - 1, hole))
        moves = [(source, target) for source, target in moves if source != target]
        self._rows.remove(row, moves)
        for source, target in moves:
            self._running[target] = self._running[source]
        self._running.pop()

    def _logprobs(
        self, logits_NV: Tensor, tokens_N: Tensor, sequences: list[_Sequence]
    ) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        """Log-probabilities of the chosen and of the most likely tokens, by index of the sequences that want them."""
        wanted = {i: s.request.logprobs for i, s in enumerate(sequences) if s.request.logprobs is not None}
        if not wanted:
            return {}
        rows = torch.tensor(list(wanted), device=logits_NV.device)
        found_NV = logits_NV[rows].log_softmax(-1)
        chosen = found_NV.gather(1, tokens_N[rows, None])[:, 0].tolist()
        best, ids = (x.tolist() for x in found_NV.topk(min(max(wanted.values()), found_NV.shape[1])))
        return {
            index: (chosen[n], tuple(zip(ids[n][:count], best[n][:count], strict=True)))
            for n, (index, count) in enumerate(wanted.items())
        }

    def _seen(self, sequences: list[_Sequence], logits_NV: Tensor) -> Tensor:
        for sequence in sequences:
            if sequence.seen_V is None:
                sequence.seen_V = torch.zeros(logits_NV.shape[1], dtype=torch.bool, device=logits_NV.device)
                known = [token for token in sequence.text if token < logits_NV.shape[1]]
                sequence.seen_V[torch.tensor(known, dtype=torch.int64, device=logits_NV.device)] = True
        return torch.stack([sequence.seen_V for sequence in sequences if sequence.seen_V is not None])
