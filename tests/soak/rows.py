"""Random rows over all schemas and templates: pairs whose numbers add up, or an error that names the file."""

import json

from makers import CHATML, build_tokenizer, safe_rlhf_row

from bdpo_pl.data.loading import LoadOptions, load_pairs
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError

BATCH, SECONDS = 50, 10
GOAL = {"rows": 1_000_000}

_LONG = 400
_KINDS = 9
_MESSAGES = (1, 2, 5, 6, 7)
_MORE = ("extra", "label", "tools")

_TEMPLATES = (
    None,
    CHATML,
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
)
_WORDS = (
    "a", "garden", " ", "\n", "\n\nHuman: q", "\n\nAssistant: a", "<|im_end|>", "<|im_start|>system\n", "</s>",
    "é", "你好", "👩\u200d🔬", "\u200b", "\u202e", "\x00", "\x1b[2J", "\ud800", "{{ 7 * 7 }}", "<think>", "1",
    "word " * 25,
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


def _row(rng, kind, odd=0.15, more=_MORE):
    """A row of one of nine layouts, and whether nothing is wrong with it."""
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
    elif kind == 5:
        row = {
            "conversations": _conversation(rng),
            "chosen": _message(rng, rng.choice(["assistant", "assistant", None])),
            "rejected": _message(rng, "assistant"),
            "system": _text(rng),
        }
    elif kind == 6:
        row = {"system": _text(rng), rng.choice(["question", "input"]): _text(rng)}
        row |= {"chosen": _text(rng), "rejected": _text(rng)}
    elif kind == 7:
        row = {"input": {"messages": _conversation(rng)}} | {
            name: [_message(rng, "assistant")] for name in ("preferred_output", "non_preferred_output")
        }
    else:
        row = {"prompt": rng.choice(_WORDS), "completion": _text(rng), "label": rng.random() < 0.5}
    if rng.random() < odd:
        row[rng.choice([*row, *more])] = rng.choice(_ODD)
        return row, False
    if rng.random() < odd / 3:
        row.pop(rng.choice(list(row)))
        return row, False
    return row, kind == 0


def draw(rng):
    """Draw a file of rows of one layout and a few of others, and how it is read."""
    kind, template = rng.randrange(_KINDS), rng.randrange(len(_TEMPLATES))
    others, more = range(_KINDS), _MORE
    # Most files are long and leave out bad rows, so that each of their rows is looked at.
    count = rng.choice([1, 2, 5]) if rng.random() < 0.3 else _LONG
    if count == _LONG and rng.random() < 0.9:
        # Most of these have no row that ends the file whatever it leaves out: messages that no template writes, or a
        # column that nothing reads.
        if template == 0 and kind in _MESSAGES:
            template = rng.randrange(1, len(_TEMPLATES))
        if kind < 3:
            others = [k for k in others if k != 6 and (template or k not in _MESSAGES)]
        more = _MORE if kind not in (3, 4) else _MORE[:2]
    # A file is what its first row is, and an odd one may end it there.
    rows = [_row(rng, kind, 0.05 if count < _LONG else 0.0, more)]
    rows += [_row(rng, kind if rng.random() < 0.95 else rng.choice(others), 0.15, more) for _ in range(count - 1)]
    return {
        "rows": [row for row, _ in rows],
        "plain": [plain for _, plain in rows],
        "template": template,
        "truncation": rng.choice(["drop", "keep_start", "keep_end"]),
        "window": rng.choice([16, 64, 512]),
        "bad_rows": rng.choice(["auto", "drop", "error"]) if count < _LONG else "drop",
    }


def prepare():
    for number, template in enumerate(_TEMPLATES):
        tokenizer = build_tokenizer(chat=template is not None)
        tokenizer.chat_template = template
        _TOKENIZERS[number] = PairTokenizer(tokenizer)


def _written(template, prompt, response):
    """The text that a model reads of a plain row, and the response's end, by rules written again for each template."""
    if template == 0:
        return f"{prompt}{response}</s>"
    if template == 1:
        return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>"
    return f"[user] {prompt.strip()}</s>[assistant] {response.strip()}</s>"


def check(case, folder, counts):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in case["rows"]), encoding="utf-8")
    tokenizer = _TOKENIZERS[case["template"]]
    truncation = Truncation(case["window"], case["truncation"])
    try:
        table, report = load_pairs("train", str(path), tokenizer, truncation, LoadOptions(bad_rows=case["bad_rows"]))
    except InputError as error:
        # Where no row is left, all were read; otherwise one has ended the file.
        counts["rows"] += len(case["rows"]) if "rows can be used" in str(error) else 1
        counts["files refused"] += 1
        return None if str(path) in str(error) else f"the error does not name the file: {error}"
    counts["rows"] += len(case["rows"])
    counts["pairs kept"] += len(table)
    if len(table) != report.kept:
        return f"the report says {report.kept} kept, the table has {len(table)}"
    if report.kept + report.num_dropped != report.read or report.read != len(case["rows"]):
        return f"{report.kept} kept and {report.num_dropped} dropped of {report.read}, and {len(case['rows'])} rows"
    counts[f"rows of {report.notes['schema']}"] += len(case["rows"])
    for i in range(len(table)):
        pair = table[i]
        if not (pair.prompt_ids and pair.chosen_ids and pair.rejected_ids):
            return f"pair {i} has an empty part"
        longest = max(len(pair.prompt_ids + pair.chosen_ids), len(pair.prompt_ids + pair.rejected_ids))
        if longest > case["window"]:
            return f"pair {i} is longer than the window"
        if pair.chosen_ids == pair.rejected_ids:
            return f"pair {i} has two equal responses"
        number = int(table.places[i].rpartition(" ")[2]) - 1
        if case["plain"][number] and longest < case["window"]:
            row = case["rows"][number]
            for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
                found = tokenizer.tokenizer.decode(pair.prompt_ids + ids)
                wanted = _written(case["template"], row["prompt"], row[side])
                if found != wanted:
                    return f"pair {i}, {side}: {found!r} for {wanted!r}"
            counts["texts read back"] += 2
    return None


def smaller(case):
    rows = case["rows"]

    def of(kept):
        return {**case, "rows": [rows[i] for i in kept], "plain": [case["plain"][i] for i in kept]}

    every = range(len(rows))
    if len(rows) > 3:
        yield of(every[: len(rows) // 2])
        yield of(every[len(rows) // 2 :])
    if len(rows) > 1:
        for i in every:
            yield of([k for k in every if k != i])
        return
    for name, value in rows[0].items():
        yield {**case, "rows": [{k: v for k, v in rows[0].items() if k != name}], "plain": [False]}
        if isinstance(value, str | list) and len(value) > 1:
            yield {**case, "rows": [{**rows[0], name: value[: len(value) // 2]}]}
