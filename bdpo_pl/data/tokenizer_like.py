"""A type for the tokenizers of transformers: the attributes that this project uses.

transformers' own classes are not checked (mypy skips the package). Annotated with this protocol, a misspelled attribute
or a forgotten None is an error of `make lint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer


class TokenizerLike(Protocol):
    """A tokenizer; the attribute of a token that it does not have is `None`."""

    name_or_path: str
    chat_template: str | dict[str, str] | None
    padding_side: str
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer in Rust, if it is a fast one."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Added tokens by their id."""

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """Special tokens by the names that templates use."""

    @property
    def all_special_ids(self) -> Sequence[int]:
        """Ids of the special tokens."""

    @property
    def all_special_tokens(self) -> Sequence[str]:
        """The special tokens."""

    def __call__(self, text: str | Sequence[str], text_pair: str | None = None, **options: object) -> Mapping[str, Any]:
        """Return `input_ids` and what else the model reads."""

    def __len__(self) -> int:
        """Return the number of tokens, added ones included."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""

    def batch_decode(self, sequences: Sequence[Sequence[int]], **options: bool) -> list[str]:
        """Return the texts of several sequences."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""

    def convert_tokens_to_ids(self, tokens: str) -> int:
        """Return the id of a token."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        """Return the token of an id."""

    def get_vocab(self) -> Mapping[str, int]:
        """Return all tokens with their ids."""

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """Return the chat template for conversations with or without tools."""

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: object) -> Any:
        """Return a conversation as the chat template writes it, as text or as ids."""

    def pad(self, encoded_inputs: Iterable[Mapping[str, Any]], *, return_tensors: str) -> Any:
        """Return one batch of several inputs."""

    def save_pretrained(self, save_directory: Path) -> Any:
        """Write the tokenizer's files."""
