"""The text of tokens as they come: whole characters only, and nothing that may become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from nanochat_core.interfaces.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text, in time linear in its length.

    Args:
        tokenizer: gives the bytes of tokens.
        stop: strings that end the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = [_StopString(text) for text in stop]
        self._held = ""  # the end of the text so far, the longest that may begin a stop string

    def add(self, token: int) -> tuple[str, str | None]:
        """Return the text that is now certain, and the stop string that ended it, if any."""
        return self._pass(self._utf8.decode(self._tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """Return the rest of the text, when no more tokens come. Half a character becomes U+FFFD."""
        text, stopped_by = self._pass(self._utf8.decode(b"", final=True))
        return text if stopped_by is not None else text + self._held

    def _pass(self, new: str) -> tuple[str, str | None]:
        text = self._held + new
        for place, character in enumerate(new, len(self._held) + 1):
            found = [stop for stop in self._stops if stop.add(character)]
            if found:
                first = max(found, key=lambda stop: len(stop.text))
                self._held = ""
                return text[: place - len(first.text)], first.text
        held = max((stop.matched for stop in self._stops), default=0)
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain], None


class _StopString:
    """Looks for a string, character by character (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._borders = [0]  # of each beginning of the text: length of the longest end of it that is a beginning too
        for character in text[1:]:
            self._borders.append(self._next(self._borders[-1], character))

    def add(self, character: str) -> bool:
        """Whether the string ends with this character."""
        self.matched = self._next(self.matched, character)
        return self.matched == len(self.text)

    def _next(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + 1 if self.text[matched] == character else 0
