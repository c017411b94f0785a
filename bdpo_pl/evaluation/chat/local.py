"""A Hugging Face causal language model in this process, as a chat model."""

from __future__ import annotations

from collections.abc import Sequence

import jinja2
import torch

from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.chat_model import Message
from bdpo_pl.forward.generation import encode_conversations, generate
from bdpo_pl.forward.response_text import begins_in_thought
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.loading import ModelSource, frozen, load_model, load_tokenizer


class LocalChat:
    """A causal language model that answers greedily, with the tokenizer's chat template.

    Args:
        model: causal language model on its device.
        tokenizer: the model's tokenizer.
        name: name in reports.
        max_new_tokens: maximum number of tokens in an answer.
        batch_size: number of conversations answered at a time.

    Raises:
        InputError: the tokenizer has no chat template, or a number is out of range.
    """

    def __init__(
        self, model: CausalLM, tokenizer: TokenizerLike, name: str, *, max_new_tokens: int = 512, batch_size: int = 8
    ) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                f"{name} cannot hold a conversation: its tokenizer has no chat template; choose a chat model"
            )
        if max_new_tokens < 1 or batch_size < 1:
            raise InputError(f"max_new_tokens and batch_size must be at least 1; got {max_new_tokens} and {batch_size}")
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size

    @classmethod
    def load(cls, source: ModelSource, dtype: torch.dtype, device: torch.device, **options: int) -> LocalChat:
        """Load the model of `source`.

        Args:
            source: source of the model.
            dtype: dtype of its weights.
            device: device of the model.
            **options: `max_new_tokens`, `batch_size`.

        Raises:
            InputError: the model cannot be loaded, or has no chat template.
        """
        tokenizer = load_tokenizer(source)
        return cls(frozen(load_model(source, dtype), device), tokenizer, source.name, **options)

    def reply(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Return the next turn of each conversation, in order.

        Raises:
            InputError: the chat template rejects a conversation, or one does not fit into the model's window.
        """
        if not conversations:
            return []
        try:
            ids = encode_conversations(self._tokenizer, [[dict(turn) for turn in turns] for turns in conversations])
        except jinja2.TemplateError as error:  # as some templates do for a system turn
            raise InputError(
                f"the chat template of {self.name} refuses the conversation ({error}); choose another chat model"
            ) from error
        responses = generate(
            self._model, self._tokenizer, ids, max_new_tokens=self._max_new_tokens, batch_size=self._batch_size
        )
        # A thought that the prompt opens would look like words of the answer.
        opened = (begins_in_thought(self._tokenizer, row) for row in ids)
        return [f"<think>{r.text}" if opens else r.text for opens, r in zip(opened, responses, strict=True)]
