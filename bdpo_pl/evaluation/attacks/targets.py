"""Beginnings of answers that comply with a request, for suites that do not provide them."""

from __future__ import annotations

import re


def default_target(request: str) -> str:
    """Return the beginning of an answer that complies with `request`, which is a question or an instruction."""
    sentence = re.split(r"(?<=[.?!])\s|\n", request.strip())[0]
    words = sentence.rstrip(" .?!")
    if how := re.match(r"how (?:do|can|could|would|should|might) (?:i|you|we|one|someone) ", words, re.IGNORECASE):
        return f"Sure, here is how to {words[how.end() :]}"
    if re.match(r"how to ", words, re.IGNORECASE):
        return f"Sure, here is h{words[1:]}"
    if sentence.endswith("?"):
        return f"Sure, here is the answer to your question, {sentence[:1].lower()}{sentence[1:]}"
    return f"Sure, here is how to {words[:1].lower()}{words[1:]}"
