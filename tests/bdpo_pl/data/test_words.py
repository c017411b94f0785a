"""Encoding word by word: the very ids of whole texts, for tokenizers that cut before words, and for no others."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import build_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from bdpo_pl.data import control_tokens
from bdpo_pl.data.control_tokens import ControlTokens
from bdpo_pl.data.words import _CUT, Words, added_around, cut_at_words, cuts_before_words

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SUPERWORDS = r"\p{L}+( \p{L}+)*|\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
LOOKS_BACK = r"(?<=o) w+| ?\p{L}+|\s+|[^\s\p{L}]+"
TEXT = (
    "How do I water it? I'd say: don't!  Twice,\n\n(in 2024) it's 3.5 l… naïve e\u0301 café is\tgood \n x "
    "we'll see, they've 100 % of it. A\u00a0B <|im_end|> not  two.\r\n 日本 a 本 b "
)


def bpe(cutter, normalizer=None, added=(), model=None):
    tokenizer = Tokenizer(model or models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = cutter, normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "how to water : twice a day , it is good to see"] * 4, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def split(pattern):
    by_regex = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([by_regex, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTTING = {
    "gpt2": bpe(GPT2),
    "gpt2, prefix": bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "digits": bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])),
    "qwen": bpe(split(QWEN), normalizers.NFC(), [AddedToken("<|im_end|>", special=True), AddedToken("twice")]),
}
JOINING = {
    "superwords": bpe(split(SUPERWORDS)),
    "looks back": bpe(split(LOOKS_BACK)),
    "sentencepiece": bpe(None, normalizers.Replace(" ", "▁")),
    "no cutter": bpe(None),
    "strips": bpe(GPT2, None, [AddedToken("<mask>", lstrip=True)]),
    "two words": bpe(GPT2, None, [AddedToken("to water")]),
    "dropout": bpe(GPT2, model=models.BPE(dropout=0.1)),
}


def encoder(tokenizer):
    return lambda texts: [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


@pytest.mark.parametrize("name", JOINING)
def test_a_tokenizer_that_may_join_words_is_found_out(name):
    assert not cuts_before_words(JOINING[name])


@pytest.mark.parametrize("name", CUTTING)
def test_ids_are_those_of_the_whole_text(name):
    tokenizer = CUTTING[name]
    assert cuts_before_words(tokenizer)
    whole = encoder(tokenizer)
    texts = [TEXT, *TEXT.split("\n"), "", " ", "a", " a", "a ", "x" * 100 + " y" * 100]
    words = Words(whole)
    for _ in range(2):
        assert words.encode(texts) == whole(texts)
    for text in texts:
        assert cut_at_words(text) == _CUT.split(text)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(CUTTING)),
    texts=st.lists(
        st.text(st.sampled_from("aZ9. '\n\r\t-s(é\u0301日\u00a0<|im_end>~")) | st.text(max_size=30), max_size=5
    ),
)
def test_ids_of_any_texts_are_those_of_the_whole_texts(name, texts):
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    whole = encoder(CUTTING[name])
    assert Words(whole).encode(texts) == whole(texts)
    for text in texts:
        assert cut_at_words(text) == _CUT.split(text)


def test_a_wrong_join_is_noticed_on_the_first_texts_and_words_are_forgotten(monkeypatch):
    joins = encoder(JOINING["superwords"])
    words = Words(joins)
    assert words.encode(["how to water"]) == joins(["how to water"])
    assert words.encode(["it is good to see"] * 3) == joins(["it is good to see"] * 3)
    whole = encoder(CUTTING["gpt2"])
    words = Words(whole)
    monkeypatch.setattr("bdpo_pl.data.words._MOST_WORDS", 2)
    for text in ("how to water twice", "a day", "it is good"):
        assert words.encode([text]) == whole([text])
        assert len(words._later) <= 3


def test_many_texts_are_encoded_so_and_get_what_the_tokenizer_adds(monkeypatch):
    tokenizer = build_tokenizer(bos=True)
    control = ControlTokens(tokenizer)
    texts = [f"how do i keep it {i} ?" for i in range(control_tokens._MANY)]
    for added in (False, True):
        expected = tokenizer(texts, add_special_tokens=added)["input_ids"]
        assert control.encode(texts, add_special_tokens=added) == expected
    expected_without = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert control._words is not None
    assert control._words._agrees
    assert control._around == ([1], [])
    # Processes that are spawned get a copy.
    assert pickle.loads(pickle.dumps(control._words)).encode(texts) == expected_without
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert state["pre_tokenizer"]["type"] == "ByteLevel"


def test_what_is_not_the_same_around_every_text_is_not_added():
    assert added_around(lambda texts, added: [[5] * (len(t) + added) for t in texts]) is None
    assert added_around(lambda texts, added: [[len(t), *([7] if added else [])] for t in texts]) == ([], [7])
