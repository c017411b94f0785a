"""Conversations encoded as pairs, which of their tokens are trained on, and what must hold of them."""

from bdpo_pl.data.rows import PreferenceRow
from bdpo_pl.data.sources import Record
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.forward.generation import encode_conversations, stop_ids

HERE = Record("file.jsonl", 1, {"prompt": ""})
USER = {"role": "user", "content": "how do i water it ?"}
SYSTEM = {"role": "system", "content": "answer briefly ."}
TURNS = [
    {"role": "assistant", "content": "why ?"},
    {"role": "user", "content": "slugs ."},
    {"role": "assistant", "content": "set traps ."},
]
ENDS = {"generation_config": type("G", (), {"eos_token_id": None})()}


def say(text, **more):
    return [{"role": "assistant", "content": text, **more}]


def encode(tokenizer, prompt, chosen, rejected, tools=None, template_kwargs=None, **options):
    row = PreferenceRow(prompt, chosen, rejected, HERE, tools=tools, template_kwargs=template_kwargs or {})
    pairs = PairTokenizer(tokenizer, **options)
    return pairs.encode([row])[0], pairs.read_as


def trained(ids, flags):
    return ids if flags is None else [i for i, flag in zip(ids, flags, strict=True) if flag]


def check(tokenizer, prompt, pair, chosen, rejected, merged=False):
    """What must hold of a row whose response is a single answer."""
    (opened,) = encode_conversations(tokenizer, [prompt])
    assert pair.prompt_ids == (opened[: len(pair.prompt_ids)] if merged else opened)
    assert pair.merged is merged
    stops = stop_ids(type("M", (), ENDS), tokenizer)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for ids, flags, said in (
        (pair.chosen_ids, pair.chosen_trained, chosen),
        (pair.rejected_ids, pair.rejected_trained, rejected),
    ):
        *words, last = trained(ids, flags)
        assert last in stops
        assert ids[-1] == last
        assert not special & set(words), "a marker of another turn is trained on"
        assert tokenizer.decode(words).strip().endswith(said.strip())
        assert tokenizer.decode(words).strip() == said.strip() or merged
