"""Features of the learned judge: hashed n-grams of an answer's words, kinds of refusal phrases, and its shape."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from bdpo_pl.refusals import KINDS, WEAK, constants_sha256, is_refusal, refusal_kinds, rules_sha256

BUCKETS = 1 << 14
"""Number of buckets for hashed n-grams; two n-grams in one bucket share a weight."""

_OPENING_WORDS = 12
_READ_WORDS = 60
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[^\w\s]|\w+")
_STEP = re.compile(r"(?m)^\s*(?:[-*•]|\d+[.)]|step \d)")
_SHAPE = ("refuses by the phrases", "length", "steps", "lines", "code", "words of the request")
WIDTH = BUCKETS + len(KINDS) + len(_SHAPE) + 1
"""Number of features of an answer; the last one is always 1."""


def features(prompt: str, response: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices, values) of the features that are not 0.

    An n-gram counts once, however often it occurs, and again if it occurs in the opening. The vector of all n-grams has
    length 1, so that long answers weigh as much as short ones.
    """
    words = _words(response)[:_READ_WORDS]
    grams = {f"o{gram}" for gram in _grams(["^", *words[:_OPENING_WORDS]])} | {f"r{gram}" for gram in _grams(words)}
    hashed = sorted({zlib.crc32(gram.encode()) % BUCKETS for gram in grams})
    dense = _dense(prompt, response, words)
    index = np.concatenate([np.array(hashed, dtype=np.int64), BUCKETS + np.arange(len(dense))])
    values = np.concatenate([np.full(len(hashed), len(hashed) ** -0.5 if hashed else 0.0), dense])
    return index, values


def matrix(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Return the (n, WIDTH) features of (prompt, response) pairs."""
    rows = np.zeros((len(pairs), WIDTH))
    for row, pair in zip(rows, pairs, strict=True):
        index, values = features(*pair)
        row[index] = values
    return rows


def _dense(prompt: str, response: str, words: list[str]) -> np.ndarray:
    kinds = refusal_kinds(response)
    asked = {word for word in _words(prompt) if len(word) > 3}
    shape = [
        float(is_refusal(response)),
        min(np.log1p(len(response)) / 8.0, 1.0),
        min(len(_STEP.findall(response)), 5) / 5.0,
        min(response.count("\n"), 10) / 10.0,
        float("```" in response),
        len(asked & set(words)) / len(asked) if asked else 0.0,
    ]
    # Not scaled down: there are few phrases, and each is more informative than one of dozens of n-grams.
    return np.array([*(float(kind in kinds) for kind in KINDS), *shape, 1.0])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'").replace("‘", "'"))


def _grams(words: list[str]) -> set[str]:
    return {" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}


def plainly_refuses(response: str) -> bool:
    """Return true if the phrases alone prove that `response` refuses: it opens with a kind that no compliance uses."""
    return is_refusal(response) and not set(refusal_kinds(response)) <= WEAK


def rules() -> dict[str, str]:
    """Return the digests of what decides the features besides the answer: the phrases and this module's constants."""
    return {"phrases sha256": rules_sha256(), "features sha256": constants_sha256(globals())}
