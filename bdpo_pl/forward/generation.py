"""Batched greedy generation of responses to prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bdpo_pl.data.chat_template import Conversation, Message, chat_encoder
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.errors import InputError
from bdpo_pl.forward.decoding import Decoder, longest_first
from bdpo_pl.forward.decoding_trial import why_not_continuous
from bdpo_pl.forward.equivalence import evaluating
from bdpo_pl.forward.masks import TRAINING_ONLY, set_attention
from bdpo_pl.forward.response_text import ResponseText
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.loading import num_positions
from bdpo_pl.models.precision import device_of

InBatch = Callable[[Sequence[list[int]]], list[tuple[list[int], bool]]]
"""`padded` with everything but the prompts."""
Generated = tuple[int, list[int], bool]
"""Number of a prompt, generated tokens without the stop token, and whether there was one."""


# Settings of generation that look at the tokens before, or count them, and take padding for some of them → value
# without effect. `repetition_penalty` does so in some releases of transformers: in 5.14, and not in 5.24.
_READ_PADDING = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
}


@dataclass(frozen=True)
class Response:
    """A model's response to a prompt.

    Attributes:
        text: text of the response, without special tokens, but with `<think>` and `</think>` around thoughts; see
            `ResponseText`.
        num_tokens: number of generated tokens, without the stop token.
        finished: true if the model stopped by itself, before `max_new_tokens`.
    """

    text: str
    num_tokens: int
    finished: bool


def generate_responses(
    model: CausalLM,
    tokenizer: TokenizerLike,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    use_template: bool = True,
) -> list[str]:
    """Return the texts of `generate` on `prompts`, each as the user's turn of the chat template, if there is one."""
    if not prompts:  # tokenizers reject an empty batch
        return []
    ids = encode_prompts(tokenizer, prompts, use_template=use_template)
    responses = generate(model, tokenizer, ids, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [response.text for response in responses]


def encode_prompts(tokenizer: TokenizerLike, prompts: Sequence[str], *, use_template: bool = True) -> list[list[int]]:
    """Return the token ids of `prompts`, ready to be answered.

    Args:
        tokenizer: tokenizer of the model.
        prompts: texts of the user.
        use_template: render each prompt as the user's turn of the chat template, if there is one.
    """
    if use_template and tokenizer.chat_template:
        return encode_conversations(tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts])
    return chat_encoder(tokenizer).texts(prompts)


def encode_conversations(tokenizer: TokenizerLike, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Return the token ids of conversations by the tokenizer's chat template, up to the beginning of the answer.

    A control token that is spelled in a message remains text. The template's variables are those of `chat_encoder`.
    """
    return chat_encoder(tokenizer).prompts([Conversation(messages) for messages in conversations])


@torch.no_grad()
def generate(
    model: CausalLM,
    tokenizer: TokenizerLike,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    on_response: Callable[[int, Response], None] = lambda number, response: None,
    on_note: Callable[[str], None] = rank_zero_info,
) -> list[Response]:
    """Generate greedy responses to `prompts`, returned in order.

    They are decoded in continuous batches (`bdpo_pl.forward.decoding`) or, if a trial finds that the model cannot be,
    by the model's own `generate` in padded batches of prompts of similar length. In float32, the tokens of continuous
    batches are those that `generate` finds for each prompt alone.

    Args:
        model: causal language model; generation runs on its device, in evaluation mode.
        tokenizer: tokenizer of the model.
        prompts: token ids of each prompt.
        max_new_tokens: maximum number of tokens in a response.
        batch_size: number of prompts answered at a time.
        on_response: function that is called with the number of a prompt and its response, as each one ends.
        on_note: function that is called with a notice if the model cannot be decoded in continuous batches.

    Raises:
        InputError: a prompt and its response do not fit into the model's positions.
    """
    if not prompts:
        return []
    check_fits(model, prompts, max_new_tokens)
    stops = stop_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    responses: dict[int, Response] = {}
    text_of = ResponseText(tokenizer)

    def take(number: int, tokens: list[int], finished: bool) -> None:
        responses[number] = Response(text_of(tokens), len(tokens), finished)
        on_response(number, responses[number])

    with _generating(model):
        in_batches = partial(padded, model, tokenizer, max_new_tokens=max_new_tokens, stops=stops, pad_id=pad_id)
        if objection := why_not_continuous(model, prompts, max_new_tokens, pad_id):
            reads = _reads_padding(model)
            alike = f", and only prompts of equal length are batched, because of {reads}" if reads else ""
            on_note(f"Responses are generated in padded batches, which take longer: {objection}{alike}")
            order = longest_first(prompts)
            found = in_padded_batches(in_batches, prompts, order, batch_size, equal_lengths=bool(reads))
        else:
            decoder = Decoder(model, stops, max_new_tokens=max_new_tokens, num_slots=batch_size)
            found = in_continuous_batches(decoder, in_batches, prompts)
        for generated in found:
            take(*generated)
    return [responses[i] for i in range(len(prompts))]


def in_padded_batches(
    in_batch: InBatch,
    prompts: Sequence[list[int]],
    order: Sequence[int],
    batch_size: int,
    *,
    equal_lengths: bool = False,
) -> Iterator[Generated]:
    """Answer `prompts` in padded batches, in the given order, and yield the answers of each batch as it ends.

    Args:
        in_batch: function that answers a batch.
        prompts: token ids of each prompt.
        order: numbers of the prompts in the order of the batches.
        batch_size: maximum number of prompts in a batch.
        equal_lengths: end a batch where the length changes, so that nothing is padded.
    """
    start = 0
    while start < len(order):
        chosen = list(order[start : start + batch_size])
        if equal_lengths:
            length = len(prompts[chosen[0]])
            chosen = list(takewhile(lambda i, length=length: len(prompts[i]) == length, chosen))  # type: ignore[misc]
        start += len(chosen)
        for number, row in zip(chosen, in_batch([prompts[i] for i in chosen]), strict=True):
            yield number, *row


def in_continuous_batches(decoder: Decoder, in_batch: InBatch, prompts: Sequence[list[int]]) -> Iterator[Generated]:
    """Answer `prompts` by `decoder`, and those that it hands back alone; yield the answers as they end."""
    for done in decoder.decode(prompts):
        if done.tokens is None:
            yield done.number, *in_batch([prompts[done.number]])[0]
        else:
            yield done.number, done.tokens, done.finished


class _StopStrings:
    """A condition that ends each response behind one of the model's stop strings, as transformers does.

    Args:
        tokenizer: tokenizer of the model.
        strings: one string or several.
        width: number of tokens of the prompts.

    Attributes:
        ends: row of the batch → its number of generated tokens when a string first ended it. Padding follows.
    """

    def __init__(self, tokenizer: TokenizerLike, strings: str | list[str], width: int) -> None:
        from transformers import StopStringCriteria

        self._found = StopStringCriteria(tokenizer, strings)
        self._width = width
        self.ends: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: object) -> Tensor:
        """Return which rows end here, (B,) bool."""
        done: Tensor = self._found(input_ids, scores, **options)
        for row in done.nonzero().flatten().tolist():
            self.ends.setdefault(row, input_ids.shape[1] - self._width)
        return done


def padded(
    model: CausalLM,
    tokenizer: TokenizerLike,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stops: set[int],
    pad_id: int,
) -> list[tuple[list[int], bool]]:
    """Return the generated tokens without the stop token, and whether there was one, of each of `prompts`.

    A stop string of the model's settings ends a response as well, and remains in it.
    """
    ids, mask = pad_left(prompts, pad_id, device_of(model))
    strings = getattr(model.generation_config, "stop_strings", None)
    at_strings = _StopStrings(tokenizer, strings, ids.shape[1]) if strings else None
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad_id,
        stop_strings=None,
        stopping_criteria=[at_strings] if at_strings else None,
        return_dict_in_generate=False,
        # It changes no token, and does not go with batches.
        prompt_lookup_num_tokens=None,
        # Greedy decoding ignores a model's sampling defaults, and would warn about each of them.
        temperature=None,
        top_p=None,
        top_k=None,
    )
    found = []
    for number, row in enumerate(output[:, ids.shape[1] :].tolist()):
        length = next((k for k, token in enumerate(row) if token in stops), len(row))
        end = at_strings.ends.get(number, len(row) + 1) if at_strings else len(row) + 1
        found.append((row[: min(length, end)], length < len(row) or end <= length))
    return found


def _reads_padding(model: CausalLM) -> str:
    """Return the settings of the model's `generate` that take padding for earlier tokens; empty if it has none."""
    given = {name: getattr(model.generation_config, name, None) for name in _READ_PADDING}
    return ", ".join(name for name, value in given.items() if value is not None and value != _READ_PADDING[name])


def stop_ids(model: CausalLM, tokenizer: TokenizerLike) -> set[int]:
    """Return the tokens that end a response: the model's, the tokenizer's, and the one that ends a turn.

    Many chat models end a turn with a token that is neither the model's nor the tokenizer's end of sequence. Without
    it, they would continue with the user's next turn.
    """
    found: set[int] = set()
    for named in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found.update(named if isinstance(named, (list, tuple)) else () if named is None else (named,))
    end = _end_of_turn(tokenizer)
    return found if end is None else found | {end}


def _end_of_turn(tokenizer: TokenizerLike) -> int | None:
    """Return the added token that the chat template puts right after the assistant's text, if there is one."""
    return chat_encoder(tokenizer).end_of_turn


@contextmanager
def _generating(model: CausalLM) -> Iterator[None]:
    """Hold `model` in a state for generation while the context is open.

    It is in evaluation mode, its layers are not compiled, and its attention is one that supports a cache.
    """
    attention = model.config._attn_implementation
    try:
        # Masks of blocks or documents and compiled layers are for training; here shapes change with every token.
        if attention in TRAINING_ONLY:
            set_attention(model, "sdpa")
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        set_attention(model, attention)


def check_fits(model: CausalLM, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    """Raise `InputError` if a prompt and `max_new_tokens` more tokens do not fit into the model's positions."""
    window = num_positions(model.config)
    longest = max(map(len, prompts), default=0)
    if window is not None and longest + max_new_tokens > window:
        over = sum(len(prompt) + max_new_tokens > window for prompt in prompts)
        raise InputError(
            f"{over} of {len(prompts)} prompts (the longest has {longest} tokens) and a response of up to "
            f"{max_new_tokens} do not fit into the model's {window} positions; lower max_new_tokens, or leave them out"
        )


def pad_left(rows: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask of `rows`, padded on the left, so that generation follows the last token."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)
