"""JSON objects in the reply of a chat model, which writes words, code fences or thoughts around them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def json_objects(reply: str, *, strict: bool = True, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield every JSON object in `reply` that is not nested in another, in order.

    Args:
        reply: the model's whole reply.
        strict: refuse bare line breaks within texts.
        most: number of braces that are tried; None: all of them.
    """
    decoder = json.JSONDecoder(strict=strict)
    at, tried = reply.find("{"), 0
    while at >= 0 and (most is None or tried < most):
        tried += 1
        try:
            value, end = decoder.raw_decode(reply, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield value
        at = reply.find("{", end)
