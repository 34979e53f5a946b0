"""Credentials in addresses are shown nowhere."""

from __future__ import annotations

import pytest

from nanochat_core import DataError, mask_credentials
from nanochat_core.config.origins import Origin


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://KEY:SECRET@bucket/a.parquet", "s3://***@bucket/a.parquet"),
        ("s3://KEY:SEC/RET@bucket/a", "s3://***@bucket/a"),
        ("s3://KEY:SEC@RET@bucket/a", "s3://***@bucket/a"),
        ("https://TOKEN@host/x", "https://***@host/x"),
        ("s3://bucket/a?secret_key=S&region=eu", "s3://bucket/a?secret_key=***&region=eu"),
        ("s3://bucket?access_key=K;secret_key=S", "s3://bucket?access_key=***;secret_key=***"),
        ("https://h/a?X-Amz-Signature=00&X-Amz-Credential=K%2F1&b=2#c", "https://h/a?X-Amz-Signature=***&X-Amz-Credential=***&b=2#c"),
        ("https://h/a?Signature=S&AWSAccessKeyId=K&Expires=1", "https://h/a?Signature=***&AWSAccessKeyId=***&Expires=1"),
        ("https://h/a?sv=1&sig=S%3D", "https://h/a?sv=1&sig=***"),
        ("--set data.path='https://u:p@h/?token=t' and \"http://x:y@h\"",
         "--set data.path='https://***@h/?token=***' and \"http://***@h\""),
    ],
)  # fmt: skip
def test_they_are_masked(text: str, masked: str) -> None:
    assert mask_credentials(text) == masked
    assert mask_credentials(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "a b", "model.depth=12", "https://host:8080/a@b/c", "s3://bucket/key=1/part?region=eu&scheme=http",
        "user@host", "hf://datasets/a/b@main/c",
    ],
)  # fmt: skip
def test_other_texts_stay(text: str) -> None:
    assert mask_credentials(text) == text


def test_messages_and_origins_are_masked() -> None:
    error = DataError("https://u:p@h/x can't be read", key="path")
    error.add_places({"path": "--set data.path=https://u:p@h/x"})
    assert "u:p" not in str(error)
    assert "u:p" not in "".join(map(str, error.problems))
    assert Origin("--set data.path=s3://u:p@h").text == "--set data.path=s3://***@h"
