"""Random rows over all schemas and templates: pairs whose numbers add up, or an error that names the file."""

import json

from makers import CHATML, build_tokenizer, safe_rlhf_row

from bdpo_pl.data.loading import LoadOptions, load_pairs
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError

BATCH, SECONDS = 40, 10

_TEMPLATES = (
    None,
    CHATML,
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
)
_WORDS = (
    "a", "garden", " ", "\n", "\n\nHuman: q", "\n\nAssistant: a", "<|im_end|>", "<|im_start|>system\n", "</s>",
    "é", "你好", "👩\u200d🔬", "\u200b", "\u202e", "\x00", "\x1b[2J", "\ud800", "{{ 7 * 7 }}", "<think>", "1",
    "word " * 60,
)  # fmt: skip
_ODD = (None, True, 0, -1, 1.5, [], {}, [[]], [None], "", {"role": "user"})
_TOKENIZERS = {}


def _text(rng):
    return "".join(rng.choice(_WORDS) for _ in range(rng.randrange(1, 5)))


def _message(rng, role=None):
    message = {"role": role or rng.choice(["user", "assistant", "system", "tool"]), "content": _text(rng)}
    if rng.random() < 0.1:
        message[rng.choice(["role", "content", "name", "tool_calls"])] = rng.choice(_ODD)
    return message


def _conversation(rng):
    turns = [_message(rng, "user")]
    for _ in range(rng.randrange(3)):
        turns.append(_message(rng, "assistant" if turns[-1].get("role") == "user" else "user"))
    return turns


def _row(rng):
    kind = rng.randrange(6)
    if kind == 0:
        row = {"prompt": _text(rng), "chosen": _text(rng), "rejected": _text(rng)}
    elif kind == 1:
        row = {"prompt": _conversation(rng)} | {name: [_message(rng, "assistant")] for name in ("chosen", "rejected")}
    elif kind == 2:
        begin = _conversation(rng)
        row = {name: [*begin, _message(rng, "assistant")] for name in ("chosen", "rejected")}
    elif kind == 3:
        begin = f"\n\nHuman: {_text(rng)}\n\nAssistant: "
        row = {"chosen": begin + _text(rng), "rejected": begin + _text(rng)}
    elif kind == 4:
        safe = [rng.random() < 0.5, rng.random() < 0.5]
        row = safe_rlhf_row(_text(rng), [_text(rng), _text(rng)], safe, rng.randrange(2))
    else:
        row = {
            "conversations": _conversation(rng),
            "chosen": _message(rng),
            "rejected": _message(rng),
            "system": _text(rng),
        }
    if rng.random() < 0.2:
        row[rng.choice([*row, "extra", "tools", "label"])] = rng.choice(_ODD)
    if rng.random() < 0.1:
        row.pop(rng.choice(list(row)))
    return row


def draw(rng):
    same = rng.random() < 0.7
    rows = []
    for _ in range(rng.randrange(1, 6)):
        rows.append(_row(rng))
        if same:
            # Rows of the first one's schema, with other words.
            rows += [{**rows[0], "chosen": _text(rng)} if isinstance(rows[0].get("chosen"), str) else rows[0]]
    return {
        "rows": rows,
        "template": rng.randrange(len(_TEMPLATES)),
        "truncation": rng.choice(["drop", "keep_start", "keep_end"]),
        "window": rng.choice([16, 64, 512]),
        "bad_rows": rng.choice(["auto", "drop", "error"]),
    }


def check(case, folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in case["rows"]), encoding="utf-8")
    number = case["template"]
    if number not in _TOKENIZERS:
        tokenizer = build_tokenizer(chat=_TEMPLATES[number] is not None)
        tokenizer.chat_template = _TEMPLATES[number]
        _TOKENIZERS[number] = PairTokenizer(tokenizer)
    tokenizer = _TOKENIZERS[number]
    truncation = Truncation(case["window"], case["truncation"])
    try:
        table, report = load_pairs("train", str(path), tokenizer, truncation, LoadOptions(bad_rows=case["bad_rows"]))
    except InputError as error:
        return None if str(path) in str(error) else f"the error does not name the file: {error}"
    if len(table) != report.kept:
        return f"the report says {report.kept} kept, the table has {len(table)}"
    for i in range(len(table)):
        pair = table[i]
        if not (pair.prompt_ids and pair.chosen_ids and pair.rejected_ids):
            return f"pair {i} has an empty part"
        if max(map(len, (pair.prompt_ids + pair.chosen_ids, pair.prompt_ids + pair.rejected_ids))) > case["window"]:
            return f"pair {i} is longer than the window"
        if pair.chosen_ids == pair.rejected_ids:
            return f"pair {i} has two equal responses"
    return None


def smaller(case):
    rows = case["rows"]
    for i in range(len(rows)):
        if len(rows) > 1:
            yield {**case, "rows": rows[:i] + rows[i + 1 :]}
    for i, row in enumerate(rows):
        for name, value in row.items():
            yield {**case, "rows": [*rows[:i], {k: v for k, v in row.items() if k != name}, *rows[i + 1 :]]}
            if isinstance(value, str | list) and len(value) > 1:
                yield {**case, "rows": [*rows[:i], {**row, name: value[: len(value) // 2]}, *rows[i + 1 :]]}
