"""Display of one training pair as the model reads it: prompt, both responses, their boundary and the trained tokens."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from bdpo_pl.data.control_tokens import Ids
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenizer_like import TokenizerLike

BOUNDARY = "▌"
_MASKED = "⟦{}⟧"


def example_table(table: PairTable, tokenizer: TokenizerLike, index: int = 0) -> Table:
    """Return one pair of `table` for the terminal.

    Control tokens are shown in their spelling; `▌` marks where the response begins; text in ⟦ ⟧ is read but not trained
    on.
    """
    pair = table[index]
    shown = Table(title=f"Example: {table.places[index]}", title_justify="left", show_header=False, expand=True)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    shown.add_row("prompt", Text(readable(tokenizer.decode(pair.prompt_ids))))
    for name, ids, trained in (
        ("chosen", pair.chosen_ids, pair.chosen_trained),
        ("rejected", pair.rejected_ids, pair.rejected_trained),
    ):
        shown.add_row(name, Text(BOUNDARY + marked(tokenizer, ids, trained)))
    shown.add_row("tokens", f"{len(pair.prompt_ids)} + {len(pair.chosen_ids)} and {len(pair.rejected_ids)}")
    return shown


def marked(tokenizer: TokenizerLike, ids: Ids, trained: tuple[bool, ...] | None) -> str:
    """Return the text of a response, with untrained parts in ⟦ ⟧."""
    flags = trained or (True,) * len(ids)
    runs: list[tuple[bool, Ids]] = []
    for token, flag in zip(ids, flags, strict=True):
        if not runs or runs[-1][0] is not flag:
            runs.append((flag, []))
        runs[-1][1].append(token)
    texts = [(flag, readable(tokenizer.decode(run))) for flag, run in runs]
    return "".join(text if flag else _MASKED.format(text) for flag, text in texts)


def readable(text: str) -> str:
    """Return `text` with escaped control characters, which could command a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
