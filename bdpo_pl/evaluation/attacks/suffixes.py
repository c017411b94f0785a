"""A suffix of free tokens at the end of a user's turn, and the tokens that it may contain.

The search optimises token ids, but the model gets text. A suffix *survives* if its text, tokenised again in its place
within the chat template, gives the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.errors import InputError
from bdpo_pl.forward.generation import encode_prompts


class SuffixPrompt:
    """A request with a suffix.

    Some tokenizers merge the suffix's first or last character with its neighbour into one token. Such a token does not
    belong to the suffix: it stays fixed.

    Args:
        tokenizer: the model's tokenizer.
        request: the user's text before the suffix.
        suffix: initial suffix.
        use_template: render the prompt with the chat template, if there is one.

    Attributes:
        before: ids before the suffix.
        initial: ids of the first suffix.
        after: ids after the suffix, up to the beginning of the answer.

    Raises:
        InputError: the suffix cannot be located in the prompt's tokens, or does not survive.
    """

    def __init__(self, tokenizer: TokenizerLike, request: str, suffix: str, *, use_template: bool = True) -> None:
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
                f"gcg.suffix {suffix!r} was not found after the request {request[-40:]!r} once the prompt is "
                "tokenised; choose one of plain words or signs with spaces between them"
            )

    def text(self, suffix: Sequence[int]) -> str:
        """Return the user's turn with the suffix of these ids."""
        return self._texts([suffix])[0]

    def survive(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        """Return whether each suffix survives: its text, tokenised in its place, gives the same ids again."""
        again = self._encode(self._texts(suffixes))
        return [ids == [*self.before, *suffix, *self.after] for ids, suffix in zip(again, suffixes, strict=True)]

    def _texts(self, suffixes: Sequence[Sequence[int]]) -> list[str]:
        wholes = self._decode([[*self.before, *suffix] for suffix in suffixes])
        return [self._head + whole[len(self._text_before) :] + self._tail for whole in wholes]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return encode_prompts(self._tokenizer, texts, use_template=self._use_template)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        # Decoded together with the prefix, because many tokenizers drop a leading space of the first token.
        return self._tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def allowed_tokens(tokenizer: TokenizerLike, num_embeddings: int, *, ascii_only: bool) -> Tensor:
    """Return which tokens a suffix may contain: none that is special, added, empty or part of a character.

    Args:
        tokenizer: the model's tokenizer.
        num_embeddings: V, number of the model's embeddings, which may exceed the number of tokens.
        ascii_only: allow only printable ASCII, which a person could type.

    Returns:
        (V,) bool.

    Raises:
        InputError: no token is allowed.
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
    """Draw suffixes that differ from `suffix` in one token, without duplicates.

    Args:
        suffix: (n,) ids.
        gradient: (n, V) gradient of the loss with respect to the one-hot tokens.
        allowed: (V,) bool.
        topk: number of tokens with the most negative gradient to draw from, at each position.
        width: number of draws; duplicates are removed.
        generator: generator of the random draws.
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
