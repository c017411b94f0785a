"""Token ids of texts, joined from those of their words, each of which is encoded once.

Byte-pair tokenizers cut a text into pieces before they merge anything, and most of them cut before every single space.
The ids of such a text are those of its parts, one after the other. Words recur, and looking them up is faster than
encoding them again. Whether a tokenizer cuts there is read from its description and tested with the characters on both
sides of such a space; if it does not, every text is encoded as a whole.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable
from itertools import chain
from typing import Any

Ids = list[int]

# A space between two printable ASCII characters. The space comes first because a search for one character is fast.
_CUT = re.compile(r" (?<=[!-~] )(?=[!-~])")
_BEFORE = ("a", "7", ".", " ", "\n")
_PRINTABLE = [chr(code) for code in range(ord("!"), ord("~") + 1)]
# What a word may begin with; the longer ones are contractions, which some tokenizers treat apart.
_AFTER = [
    "a",
    "Zz",
    "s",
    "T",
    "re",
    "Ve9",
    "m-",
    "ll",
    "d\n",
    "n't",
    "I'm",
    "0",
    "1999",
    "'s",
    "...",
    "(a",
    *string.punctuation,
]
_KEEPS_CUTS = {"NFC", "NFD", "NFKC", "NFKD"}
"""Normalizers that do not change a space between ASCII characters."""
_MOST_WORDS = 1 << 18
_LONGEST_WORD = 64
_TRIED = 64


class Words:
    """A word-wise encoder of texts.

    Args:
        whole: encoder of texts as wholes, without the tokens that a tokenizer adds around a text.
    """

    def __init__(self, whole: Callable[[list[str]], list[Ids]]) -> None:
        self._whole = whole
        # Words with a space before them, and those at the beginning of a text.
        self._later: dict[str, tuple[int, ...]] = {}
        self._first: dict[str, tuple[int, ...]] = {}
        self._agrees: bool | None = None

    def encode(self, texts: list[str]) -> list[Ids]:
        """Return the token ids of `texts`."""
        if self._agrees is False:
            return self._whole(texts)
        first, later = self._first, self._later
        if len(first) + len(later) > _MOST_WORDS:
            first.clear()
            later.clear()
        parts = [cut_at_words(text) for text in texts]
        heads = [part[0] for part in parts]
        rests = [part[1:] for part in parts]
        new_heads = list(set(heads) - first.keys())
        new_rests = list({word for rest in rests for word in rest if word not in later})
        found = self._whole([*new_heads, *(f" {word}" for word in new_rests)])
        first.update(zip(new_heads, map(tuple, found), strict=False))
        later.update(zip(new_rests, map(tuple, found[len(new_heads) :]), strict=True))
        look_up = later.__getitem__
        ids = [
            [*first[head], *chain.from_iterable(map(look_up, rest))] for head, rest in zip(heads, rests, strict=True)
        ]
        for known, new in ((first, new_heads), (later, new_rests)):
            for word in new:
                if len(word) > _LONGEST_WORD:
                    del known[word]
        if self._agrees is None:
            self._agrees = ids[:_TRIED] == self._whole(texts[:_TRIED])
            if not self._agrees:
                return self._whole(texts)
        return ids


def cut_at_words(text: str) -> list[str]:
    """Return the parts of `text` between single spaces, each between two printable ASCII characters."""
    return _CUT.split(text)


def cuts_before_words(backend: Any) -> bool:
    """Return true if a tokenizer of the package tokenizers never joins what a single space separates."""
    cutter, model = backend.pre_tokenizer, backend.model
    if type(model).__name__ != "BPE" or model.dropout or cutter is None:
        return False
    # A rule that looks back could read a word differently after another word.
    if b"(?<" in cutter.__getstate__():
        return False
    if backend.normalizer is not None:
        normalizer = json.loads(backend.normalizer.__getstate__())
        if not {step["type"] for step in normalizer.get("normalizers", [normalizer])} <= _KEEPS_CUTS:
            return False
    for token in backend.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word or _CUT.search(token.content):
            return False

    def pieces(text: str) -> list[str]:
        return [piece for piece, _ in cutter.pre_tokenize_str(text)]

    rights = [(f" {word}", pieces(f" {word}")) for word in _AFTER]
    lefts = [*_PRINTABLE, *(before + last for before in _BEFORE for last in ("a", "T", "n", "9", ".", "'", ")", "-"))]
    for left in lefts:
        alone = pieces(left)
        if any(pieces(left + right) != alone + cut for right, cut in rights):
            return False
    return True


def added_around(whole: Callable[[list[str], bool], list[Ids]]) -> tuple[Ids, Ids] | None:
    """Return the token ids that a tokenizer adds before and after any text; None if they are not the same for all.

    Args:
        whole: encoder of texts, with or without the added tokens.
    """
    found: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    texts = ["a b", "\n\nx", "7."]
    for plain, more in zip(whole(texts, False), whole(texts, True), strict=True):
        places = [i for i in range(len(more) - len(plain) + 1) if more[i : i + len(plain)] == plain]
        if len(places) != 1:
            return None
        found.add((tuple(more[: places[0]]), tuple(more[places[0] + len(plain) :])))
    if len(found) != 1:
        return None
    before, after = found.pop()
    return list(before), list(after)
