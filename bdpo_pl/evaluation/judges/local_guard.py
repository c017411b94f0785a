"""A guard model in this process. Conversations are encoded in its own form, not as for a chat model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.chat_model import Message
from bdpo_pl.forward.generation import generate
from bdpo_pl.forward.next_token import next_token_logits
from bdpo_pl.models.loading import ModelSource, frozen, load_config, load_model, load_tokenizer

Encode = Callable[[Any, list[Message]], list[int]]
"""Function from (tokenizer, conversation) to token ids, up to the beginning of the answer."""


class LocalGuard:
    """A guard model that answers greedily. Its weights are loaded on the first call.

    Args:
        source: source of the model.
        encode: function that puts a conversation into the form that the model was trained with.
        dtype: dtype of its weights.
        device: device of the model.
        batch_size: number of conversations answered at a time.
        max_new_tokens: maximum number of tokens in an answer.

    Raises:
        InputError: there is no such model, or it has no tokenizer.
    """

    def __init__(
        self,
        source: ModelSource,
        encode: Encode,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int = 16,
        max_new_tokens: int = 32,
    ) -> None:
        self.name = source.name
        self._source, self._encode = source, encode
        self._dtype, self._device = dtype, device
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        load_config(source)
        self._tokenizer = load_tokenizer(source)
        self._model: Any = None

    def reply(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Return the next turn of each conversation, in order.

        Raises:
            InputError: the weights cannot be loaded, or a conversation is too long for the model.
        """
        ids = [self._encode(self._tokenizer, list(conversation)) for conversation in conversations]
        try:
            answers = generate(
                self._loaded(),
                self._tokenizer,
                ids,
                max_new_tokens=self._max_new_tokens,
                batch_size=self._batch_size,
            )
        except InputError as error:
            raise InputError(f"judge {self.name}: {error}") from error
        return [answer.text for answer in answers]

    def shares(self, conversations: Sequence[Sequence[Message]], words: Sequence[str]) -> list[list[float]]:
        """Return, for each conversation, the probabilities of `words` as the first token; they sum to 1.

        Raises:
            InputError: a word is not one token, the weights cannot be loaded, or a conversation is too long.
        """
        if not conversations:
            return []
        known = self._tokenizer.get_vocab()
        if missing := [word for word in words if word not in known]:
            raise InputError(
                f"judge.model: the tokenizer of {self.name} has no token {missing[0]!r}, with which this judge's model "
                "answers; is it the right model?"
            )
        ids = [self._encode(self._tokenizer, list(conversation)) for conversation in conversations]
        try:
            logits = next_token_logits(
                self._loaded(), ids, [known[word] for word in words], batch_size=self._batch_size
            )  # fmt: skip
        except InputError as error:
            raise InputError(f"judge {self.name}: {error}") from error
        return logits.softmax(-1).tolist()

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = frozen(load_model(self._source, self._dtype), self._device)
        return self._model
