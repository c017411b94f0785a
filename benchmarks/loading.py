"""Loading of preference pairs: `python -m benchmarks.loading --tokenizer FOLDER --pairs FILE [--rows N | --prove]`.

With `--rows`, the rows of the file are repeated, each time with another number in the first question, until there are
N; the time to load them and the memory that this takes are printed. With `--prove`, every pair of a file in HH-RLHF's
layout is compared with plain transformers, and the differences and refusals are counted. Only numbers are printed.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdpo_pl.data.files import read_file
from bdpo_pl.data.loading import LoadOptions, load_pairs
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation

_MARK = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_GB = 1 << 20
"""Kilobytes, in which the system counts memory, to a gigabyte."""


def repeated(rows: list[dict[str, str]], number: int) -> Iterator[dict[str, str]]:
    """Yield `number` rows: `rows` again and again, each round with its number after the first question."""
    for i in range(number):
        round_, row = i // len(rows), rows[i % len(rows)]
        yield {
            side: row[side].replace("\n\nAssistant:", f" ({round_})\n\nAssistant:", 1) if round_ else row[side]
            for side in ("chosen", "rejected")
        }


def measure(tokenizer: Any, path: Path, max_length: int) -> dict[str, float]:
    """Load `path`; return pairs, seconds by the clock and of all processors, and the largest memory, in GB.

    Memory is that of this process, and of the largest process that helped it.
    """
    start, before = time.perf_counter(), _processor_seconds()
    table, _ = load_pairs("train", str(path), PairTokenizer(tokenizer), Truncation(max_length), LoadOptions())
    seconds = time.perf_counter() - start
    return {
        "pairs": len(table),
        "seconds": seconds,
        "pairs_per_second": len(table) / seconds,
        "processor_seconds": _processor_seconds() - before,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _GB,
        "memory_of_a_helper": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / _GB,
    }


def _processor_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def prove(tokenizer: Any, path: Path) -> dict[str, Any]:
    """Compare every pair of `path` with plain transformers.

    Returns:
        Rows, pairs, refusals by reason, and the number of differences by kind: `prompt` (other tokens than those that
        generation begins from), `response` (other words than the data's), `end` (no token that ends a turn).
    """
    rows = dict(read_file(path))
    pairs = PairTokenizer(tokenizer)
    table, report = load_pairs("train", str(path), pairs, Truncation(10**6), LoadOptions(duplicates="keep"))
    differences: Counter[str] = Counter()
    template = pairs.encoder.template
    ends = {tokenizer.eos_token_id, pairs.encoder.end_of_turn}
    for i in range(len(table)):
        row, pair = rows[int(table.places[i].rsplit(" ", 1)[1])], table[i]
        turns, answers = _turns(row)
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if not prompt.endswith(tokenizer.decode(pair.prompt_ids[-1:])):
            # Llama 3's first template opens no turn for generation; what opens one before an answer is read instead.
            whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "x"}], tokenize=False)
            prompt = whole[: whole.rindex("x")]
        expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        differences["prompt"] += expected != pair.prompt_ids
        for answer, ids, trained in (
            (answers[0], pair.chosen_ids, pair.chosen_trained),
            (answers[1], pair.rejected_ids, pair.rejected_trained),
        ):
            said = ids if trained is None else [t for t, flag in zip(ids, trained, strict=True) if flag]
            differences["response"] += tokenizer.decode(said[:-1]).strip() != answer
            differences["end"] += said[-1] not in ends
    return {
        "rows": len(rows),
        "pairs": len(table),
        "differences": dict(+differences),
        "refused": {reason: len(places) for reason, places in report.dropped.items()},
        "added": [repr(text) for text in sorted(pairs.read_as.added)],
        "writes_date": template.writes_date,
    }


def _turns(row: dict[str, str]) -> tuple[list[dict[str, str]], list[str]]:
    """Return the turns before the last answers, and these, of a row whose dialogues part at the last answer."""
    asked = row["chosen"].rpartition("\n\nAssistant:")[0]
    marks = _MARK.split(asked)[1:]
    turns = [{"role": _ROLES[m], "content": said.strip()} for m, said in zip(marks[::2], marks[1::2], strict=True)]
    return turns, [row[side].rpartition("\n\nAssistant:")[2].strip() for side in ("chosen", "rejected")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of a model or tokenizer, or its hub name")
    parser.add_argument("--pairs", type=Path, required=True, help="file of JSON lines in HH-RLHF's layout")
    parser.add_argument("--rows", type=int, default=0, help="rows to repeat the file to; default: as it is")
    parser.add_argument("--max_length", type=int, default=1024, help="window in tokens")
    parser.add_argument("--prove", action="store_true", help="compare every pair with plain transformers instead")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    if options.prove:
        print(json.dumps(prove(tokenizer, options.pairs)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.pairs
        if options.rows:
            path = Path(folder) / "pairs.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for row in repeated([row for _, row in read_file(options.pairs)], options.rows):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(
            json.dumps({name: round(value, 2) for name, value in measure(tokenizer, path, options.max_length).items()})
        )


if __name__ == "__main__":
    main()
