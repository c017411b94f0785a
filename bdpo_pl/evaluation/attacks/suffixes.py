"""A suffix of free tokens at the end of a user's turn, and which tokens it may be made of.

Token ids are optimised and a text is sent. The two agree only if the text is tokenised into the same ids again, in its
place within the chat template: a suffix of which that is not so does not *survive*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdpo_pl.errors import InputError
from bdpo_pl.generation import encode_prompts


class SuffixPrompt:
    """A request with a suffix.

    Args:
        tokenizer: the model's.
        request: the user's text before the suffix.
        suffix: to begin with.
        use_template: render the prompt with the chat template, if there is one.

    Attributes:
        before: ids before the suffix.
        initial: ids of the first suffix.
        after: ids after it, up to where the answer begins.

    Raises:
        InputError: the suffix cannot be told apart from the request, or does not survive.
    """

    def __init__(self, tokenizer: Any, request: str, suffix: str, *, use_template: bool = True) -> None:
        self._tokenizer = tokenizer
        self._use_template = use_template
        self._request = request.rstrip()
        plain, whole = self._encode([self._request, f"{self._request} {suffix}"])
        start = _common(plain, whole)
        num_after = len(plain) - start
        # What both begin and end with is not the suffix's.
        self.before, self.initial = whole[:start], whole[start : len(whole) - num_after]
        self.after = whole[len(whole) - num_after :]
        self._text_before = self._decode([self.before])[0]
        if self.after != plain[start:] or not self.initial or not self.survive([self.initial])[0]:
            raise InputError(
                f"gcg.suffix {suffix!r} cannot be told apart from the request {self._request[-40:]!r} once it is "
                "tokenised; choose one of plain words or signs with spaces between them"
            )

    def text(self, suffix: Sequence[int]) -> str:
        """The user's turn with the suffix of these ids."""
        return self._request + self._decode([[*self.before, *suffix]])[0][len(self._text_before) :]

    def survive(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each suffix's text, in its place, is tokenised into the same ids again."""
        wholes = self._decode([[*self.before, *suffix] for suffix in suffixes])
        texts = [self._request + whole[len(self._text_before) :] for whole in wholes]
        again = self._encode(texts)
        return [
            ids == [*self.before, *suffix, *self.after] and whole.startswith(self._text_before)
            for ids, suffix, whole in zip(again, suffixes, wholes, strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return encode_prompts(self._tokenizer, texts, use_template=self._use_template)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        # With what comes before it: alone, many tokenizers take the first token's space away.
        return self._tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def allowed_tokens(tokenizer: Any, num_embeddings: int, *, ascii_only: bool) -> Tensor:
    """Which tokens a suffix may hold: none that is special or added, empty or part of a character.

    Args:
        tokenizer: the model's.
        num_embeddings: V, of the model; it may have more than the tokenizer has tokens.
        ascii_only: printable ASCII alone, which a person could type.

    Returns:
        (V,) bool.

    Raises:
        InputError: nothing is left.
    """
    barred = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [i for i in range(min(num_embeddings, len(tokenizer))) if i not in barred]
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    good = [
        i
        for i, text in zip(ids, texts, strict=True)
        if text and "\ufffd" not in text and (not ascii_only or (text.isascii() and text.isprintable()))
    ]
    if not good:
        raise InputError("the tokenizer has no token that a suffix may hold; set gcg.ascii_only to false")
    allowed = torch.zeros(num_embeddings, dtype=torch.bool)
    allowed[good] = True
    return allowed


def draw(
    suffix: Tensor, gradient: Tensor, allowed: Tensor, topk: int, width: int, generator: torch.Generator
) -> list[list[int]]:
    """Suffixes that differ from `suffix` in one token, each once.

    Args:
        suffix: (n,) ids.
        gradient: (n, V) of the loss by the one-hot tokens.
        allowed: (V,) bool.
        topk: tokens of most negative gradient to draw from, at each place.
        width: how many to draw; repeated ones are left out.
        generator: of the draws.
    """
    barred = ~allowed.to(gradient.device)
    promise = (-gradient.float()).masked_fill(barred, -torch.inf)
    best = promise.topk(min(topk, int(allowed.sum())), dim=1).indices.cpu()
    places = torch.randint(len(suffix), (width,), generator=generator)
    ranks = torch.randint(best.shape[1], (width,), generator=generator)
    swaps = suffix.repeat(width, 1)
    swaps[torch.arange(width), places] = best[places, ranks]
    unchanged = tuple(suffix.tolist())
    return [list(swap) for swap in dict.fromkeys(map(tuple, swaps.tolist())) if swap != unchanged]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the beginning that `a` and `b` share."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
