"""Requests to the Hugging Face hub. What answers may be anybody: a mirror, a proxy, or who sits between it and us.

So an answer has a limit in bytes, is not decompressed, and is checked before it is used; see also ``hub_listing``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants as hub_constants
from huggingface_hub.utils import build_hf_headers, get_session

from nanochat_core import DataError

REDIRECTS = 10
JSON_BYTES = 64 << 20  # the names of a million files
JSON_SECONDS = 120.0


class Refused(Exception):
    """The hub answers with an error.

    Args:
        status: of HTTP.
        code: the hub's name for it, such as ``RepoNotFound``; empty if it gives none.
    """

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"the hub answers {status}")
        self.status, self.code = status, code


@contextmanager
def request(
    method: str, url: str, *, headers: Mapping[str, str] | None = None, data: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """The hub's response, before its content is read. The bodies of errors and redirects are never read.

    Credentials are not sent to another host that a redirect names.

    Raises:
        Refused: when the hub answers with an error.
        DataError: when it redirects too often, or from https to http.
    """
    session, timeout = get_session(), hub_constants.HF_HUB_DOWNLOAD_TIMEOUT
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **(headers or {})}
    asked = session.build_request(method, url, headers=headers, data=data, timeout=timeout)
    for _ in range(REDIRECTS):
        response = session.send(asked, stream=True, follow_redirects=False)
        try:
            if response.next_request is None:
                if response.status_code not in (200, 206):
                    raise Refused(response.status_code, response.headers.get("X-Error-Code", ""))
                yield response
                return
            if asked.url.scheme == "https" and response.next_request.url.scheme != "https":
                raise DataError("the hub redirects to an address without https: check HF_ENDPOINT and your proxy")
            asked = response.next_request
        finally:
            response.close()
    raise DataError(f"the hub redirects more than {REDIRECTS} times: check HF_ENDPOINT and your proxy")


def request_json(method: str, url: str, data: Mapping[str, Any] | None = None) -> Any:
    """The content of the hub's answer, which has to be JSON. It may have any type.

    Raises:
        OSError: when it takes too long.
        DataError: when it is too large, or not JSON.
    """
    end, content = time.monotonic() + JSON_SECONDS, bytearray()
    with request(method, url, data=data) as response:
        for block in response.iter_raw():
            content += block
            if len(content) > JSON_BYTES:
                raise unusable(f"it has more than {JSON_BYTES:,} bytes")
            if time.monotonic() > end:
                raise OSError(f"it took more than {JSON_SECONDS:g} s")
    try:
        return json.loads(bytes(content))
    except RecursionError:
        raise unusable("it is nested too deeply") from None
    except ValueError:
        raise unusable("it is not JSON") from None


def unusable(why: str) -> DataError:
    """The error for an answer that no hub gives. Another attempt would not help."""
    return DataError(f"the hub's answer can't be used: {why}; check HF_ENDPOINT, your proxy, and data.repo")
