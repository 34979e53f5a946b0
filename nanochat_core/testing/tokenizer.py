"""The contract check of tokenizers; plugin authors import it from ``nanochat_core.testing``."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_core.data.table_tokenizer import TEXTS
from nanochat_core.interfaces.tokenizer import Tokenizer, TokenizerContext, vocabulary_problems
from nanochat_core.testing.checks import Check

# Texts that are hard for tokenizers: white space of all kinds, characters that look alike, invisible characters.
AWKWARD_TEXTS = (
    "",
    " ",
    "\n",
    "\r\n\r\n\t \n  x  ",
    "a" * 300 + " " * 300 + "\n" * 300,
    "It's 12345 and 1,234.5e-6; x_1 != y",
    "naïve Größe ΑΒΓ Привет שלום नमस्ते 漢字かな 한글",
    "e\u0301 \u00e9 \u212b \ufb01 \u2460 \u1e9b\u0323",  # canonically equivalent, compatible: not the same
    "👩‍👩‍👧‍👦🏳️‍🌈 🙂",
    "\x00\x01\x7f\u0080\u00a0\u00ad\u200b\u200e\u2028\u3000\ufeff\ufffd\ufffe\U0010ffff",
    "\u2581\u2581a \u0120b \u010a <0x41> <unk> <s></s> [UNK] ##a </w>",
    "<|endoftext|> <|bos|>",
)
# Ranges of code points that random texts are drawn from.
RANGES = (
    (0, 0x80),
    (0x20, 0x7F),
    (0x80, 0x250),
    (0x370, 0x600),
    (0x2000, 0x2100),
    (0x3040, 0x9FFF),
    (0xAC00, 0xD7A4),
    (0xE000, 0xF900),
    (0x1F300, 0x1FAFF),
    (0x10000, 0x110000),
)
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "12",
    "3456",
    "while",
    "Größe",
    "and",
    "漢字",
    "ask:",
    "why?\n\n",
)

_IN_ANOTHER_PROCESS = """
import pickle, sys
tokenizer, texts = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps((tokenizer.fingerprint, [tokenizer.encode(text) for text in texts])))
"""


def sample_documents(count: int = 300) -> list[str]:
    """Return documents of some thousand made-up words, enough to train a small vocabulary; the same at every call."""
    rng = random.Random(3)
    words = [*WORDS] + ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randrange(1, 10))) for _ in range(2000)]
    return [" ".join(rng.choices(words, k=100)) + "." for _ in range(count)]


def _texts() -> list[str]:
    rng = random.Random(1)
    texts = [*AWKWARD_TEXTS, *TEXTS]
    for _ in range(150):
        characters = [chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randrange(1, 30))]
        texts.append("".join(c for c in characters if not 0xD800 <= ord(c) < 0xE000))
    return [*texts, *sample_documents(3)]


def check_tokenizer(
    factory: Callable[[Any, TokenizerContext], Tokenizer],
    config: Any,
    documents: Callable[[], Iterable[str]] = sample_documents,
    *,
    other_process: bool = True,
) -> Tokenizer:
    """Check that a tokenizer keeps its contract, on awkward texts and random ones.

    It is built twice, saved, loaded, pickled, and used from several threads.

    Args:
        factory, config: as in the registration.
        documents: returns the documents to train on.
        other_process: whether to use it in a fresh process too, which takes as long as importing it.

    Returns:
        The tokenizer.

    Raises:
        AssertionError: with a line for every rule that is broken.
    """
    tokenizer = factory(config, TokenizerContext(documents=documents))
    assert isinstance(tokenizer, Tokenizer), f"the factory must return a nanochat_core.Tokenizer, not {tokenizer!r}"
    check = _TokenizerCheck(tokenizer)
    check.run(check.vocabulary)
    check.run(check.round_trip)
    check.run(check.special_tokens_in_text)
    check.run(check.documents)
    check.run(check.surrogates)
    check.run(check.threads)
    check.another("built again", lambda: factory(config, TokenizerContext(documents=documents)))
    check.another("pickled", lambda: pickle.loads(pickle.dumps(tokenizer)))
    check.run(lambda: check.saved(factory, config), "saved and loaded")
    if other_process:
        check.run(check.other_process)
    check.finish()
    return tokenizer


class _TokenizerCheck(Check):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__("tokenizer")
        self.tokenizer, self.texts = tokenizer, _texts()

    def vocabulary(self) -> None:
        tokenizer = self.tokenizer
        for problem in vocabulary_problems(tokenizer):
            self.expect(False, problem)
        size, special, counts = tokenizer.vocab_size, dict(tokenizer.special_tokens), tokenizer.token_bytes()
        self.expect("<|bos|>" in special, "special_tokens has no <|bos|>")
        self.expect(len(set(special.values())) == len(special), "two special tokens have the same id")
        self.expect(all(0 <= i < size for i in special.values()), "a special token has an id outside [0, vocab_size)")
        self.expect(
            isinstance(counts, np.ndarray) and counts.dtype == np.int32 and counts.shape == (size,),
            "token_bytes() must be an int32 array of vocab_size numbers",
        )
        names = {i: name for name, i in special.items()}
        tokens = [tokenizer.decode_bytes([i]) for i in range(size)]
        for i, token in enumerate(tokens):
            if i in names:
                self.expect(counts[i] == 0, f"token_bytes() must be 0 for the special token {names[i]}")
                self.expect(token == names[i].encode(), f"decode_bytes of the special token {names[i]} gives {token!r}")
            else:
                self.expect(counts[i] == len(token), f"token {i} is {token!r}, but token_bytes() gives {counts[i]}")
        rng = random.Random(2)
        ids = [rng.randrange(size) for _ in range(100)]
        together = b"".join(tokens[i] for i in ids)
        self.expect(tokenizer.decode_bytes(ids) == together, "decode_bytes does not concatenate the bytes of tokens")
        single = {token: i for i, token in enumerate(tokens) if len(token) == 1 and i not in names}
        if len(single) == 256:  # then all bytes can be encoded
            data = rng.randbytes(300)
            spelt = [single[bytes([b])] for b in data]
            self.expect(tokenizer.decode_bytes(spelt) == data, "decode_bytes changes bytes that are not valid UTF-8")

    def round_trip(self) -> None:
        tokenizer, counts = self.tokenizer, self.tokenizer.token_bytes()
        special = set(tokenizer.special_tokens.values())
        self.expect(list(tokenizer.encode("")) == [], "the empty text has tokens")
        for text in self.texts:
            ids = tokenizer.encode(text)
            back = tokenizer.decode_bytes(ids)
            self.expect(back == text.encode(), f"{text!r} is decoded as {back!r}")
            self.expect(tokenizer.decode(ids) == text, f"decode gives a different text than {text!r}")
            self.expect(all(0 <= i < tokenizer.vocab_size for i in ids), f"{text!r} has ids outside [0, vocab_size)")
            self.expect(not special & set(ids), f"{text!r} is encoded with special tokens")
            size = int(counts[ids].sum()) if len(ids) else 0
            self.expect(size == len(text.encode()), f"{text!r}: token_bytes sum to {size}, not {len(text.encode())}")
            self.expect(tokenizer.encode(text) == ids, f"{text!r} has different tokens the second time")

    def special_tokens_in_text(self) -> None:
        special = set(self.tokenizer.special_tokens.values())
        for name in self.tokenizer.special_tokens:
            for text in (name, f"a{name}b {name}\n{name}"):
                ids = self.tokenizer.encode(text)
                self.expect(not special & set(ids), f"{name} in a text becomes the special token; it must stay text")
                self.expect(self.tokenizer.decode_bytes(ids) == text.encode(), f"{text!r} is not decoded as it was")

    def documents(self) -> None:
        made = self.tokenizer.encode_documents(self.texts)
        self.expect(len(made) == len(self.texts), "encode_documents gives a different number of documents")
        for text, ids in zip(self.texts, made, strict=False):
            self.expect(ids.dtype == np.int32 and ids.ndim == 1, "encode_documents must give 1-D int32 arrays")
            expected = [self.tokenizer.bos_id, *self.tokenizer.encode(text)]
            self.expect(ids.tolist() == expected, f"encode_documents of {text!r} differs from bos and encode")
        self.expect(len(self.tokenizer.encode_documents([])) == 0, "encode_documents([]) gives documents")

    def surrogates(self) -> None:
        ids = self.tokenizer.encode("a\ud800b")  # such text occurs in real data, and must not end a run
        self.tokenizer.decode(ids)

    def threads(self) -> None:
        texts = [text for text in self.texts if text] * 4
        with ThreadPoolExecutor(4) as pool:
            at_once = list(pool.map(self.tokenizer.encode, texts))
        self.expect(at_once == [self.tokenizer.encode(t) for t in texts], "encode is not safe to call from threads")

    def another(self, how: str, make: Callable[[], Tokenizer]) -> None:
        self.run(lambda: self.same(make(), how), how)

    def same(self, other: Tokenizer, how: str) -> None:
        mine = self.tokenizer
        self.expect(other.fingerprint == mine.fingerprint, f"{how}, it has a different fingerprint")
        self.expect(other.vocab_size == mine.vocab_size, f"{how}, it has a different vocab_size")
        self.expect(dict(other.special_tokens) == dict(mine.special_tokens), f"{how}, it has different special tokens")
        self.expect(np.array_equal(other.token_bytes(), mine.token_bytes()), f"{how}, it has different token_bytes")
        different = [text for text in self.texts if other.encode(text) != mine.encode(text)]
        self.expect(not different, f"{how}, it gives different tokens, such as for {different[:1]}")

    def saved(self, factory: Callable[[Any, TokenizerContext], Tokenizer], config: Any) -> None:
        def no_documents() -> Sequence[str]:
            raise AssertionError("it asks for documents although context.saved is given")

        with tempfile.TemporaryDirectory() as name:
            self.tokenizer.save(Path(name))
            self.same(factory(config, TokenizerContext(documents=no_documents, saved=Path(name))), "saved and loaded")

    def other_process(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
        done = subprocess.run(
            [sys.executable, "-c", _IN_ANOTHER_PROCESS],
            input=pickle.dumps((self.tokenizer, self.texts)),
            capture_output=True,
            env=environment,
            check=False,
        )
        if done.returncode:
            self.wrong.append(f"another process can't use it: {done.stderr.decode(errors='replace')}")
            return
        fingerprint, ids = pickle.loads(done.stdout)
        self.expect(fingerprint == self.tokenizer.fingerprint, "in another process, it has a different fingerprint")
        expected = [self.tokenizer.encode(text) for text in self.texts]
        self.expect(ids == expected, "in another process, it gives different tokens")
