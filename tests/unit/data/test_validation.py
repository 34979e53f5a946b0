"""Rows of the validation set."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.fakes import FakeTokenizer
from hypothesis import given
from hypothesis import strategies as st

from nanochat_core import IGNORED, DataError
from nanochat_core.data.validation import validation_rows

TOKENIZER = FakeTokenizer()


@given(st.lists(st.text(max_size=12), max_size=40), st.integers(0, 300), st.integers(1, 9))
def test_validation_rows(documents: list[str], tokens: int, T: int) -> None:
    flat = [token for text in documents for token in [TOKENIZER.bos_id, *TOKENIZER.encode(text)]]
    if len(flat) < 2:
        with pytest.raises(DataError, match="to predict"):
            validation_rows(documents, TOKENIZER, tokens, T)
        return
    ids, targets = validation_rows(documents, TOKENIZER, tokens, T)
    wanted = max(tokens // T, 1)
    real = min(wanted * T, len(flat) - 1)
    assert ids.shape == targets.shape == (-(-real // T), T)
    assert ids.dtype == targets.dtype == np.int32
    filled = ids.size - real
    assert 0 <= filled < T
    assert ids.flatten().tolist() == flat[:real] + [0] * filled
    assert targets.flatten().tolist() == flat[1 : real + 1] + [IGNORED] * filled
