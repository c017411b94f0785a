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
from bdpo_pl.forward.generation import encode_prompts


class SuffixPrompt:
    """A request with a suffix.

    A token that holds the suffix's first or last sign together with what stands next to it, as some tokenizers have
    them, is not one of the suffix's: it stays.

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
        InputError: the suffix cannot be found in the prompt's tokens, or does not survive.
    """

    def __init__(self, tokenizer: Any, request: str, suffix: str, *, use_template: bool = True) -> None:
        self._tokenizer = tokenizer
        self._use_template = use_template
        turn = f"{request.rstrip()} {suffix.strip()}"
        (ids,) = self._encode([turn])
        *beginnings, whole = self._decode([ids[:k] for k in range(len(ids) + 1)])
        ends = [len(text) for text in (*beginnings, whole)]
        place = whole.rfind(turn)
        start = next((k for k, end in enumerate(ends) if end >= place + len(request.rstrip())), 0)
        stop = max((k for k, end in enumerate(ends) if end <= place + len(turn)), default=0)
        self.before, self.initial, self.after = ids[:start], ids[start:stop], ids[stop:]
        self._text_before = beginnings[start] if start < len(ids) else whole
        self._head, self._tail = turn[: ends[start] - place], turn[ends[stop] - place :]
        if place < 0 or not self.initial or not self.survive([self.initial])[0]:
            raise InputError(
                f"gcg.suffix {suffix!r} is not to be found after the request {request[-40:]!r} once the prompt is "
                "tokenised; choose one of plain words or signs with spaces between them"
            )

    def text(self, suffix: Sequence[int]) -> str:
        """The user's turn with the suffix of these ids."""
        return self._texts([suffix])[0]

    def survive(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each suffix's text, in its place, is tokenised into the same ids again."""
        again = self._encode(self._texts(suffixes))
        return [ids == [*self.before, *suffix, *self.after] for ids, suffix in zip(again, suffixes, strict=True)]

    def _texts(self, suffixes: Sequence[Sequence[int]]) -> list[str]:
        wholes = self._decode([[*self.before, *suffix] for suffix in suffixes])
        return [self._head + whole[len(self._text_before) :] + self._tail for whole in wholes]

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
