"""The prompt/response boundary, BOS and EOS, null prompts."""

from dataclasses import replace

import numpy as np
import pytest
from chat_templates import QWEN3, tokenizer_for
from makers import build_tokenizer, preference_rows, write_jsonl

from bdpo_pl.data.loading import load_pairs
from bdpo_pl.data.mixture import join
from bdpo_pl.data.rows import PreferenceRow, RowError
from bdpo_pl.data.sources import Record
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError

HERE = Record("file.jsonl", 1, {})


def row(prompt, chosen, rejected, rendered=False):
    return PreferenceRow(prompt, chosen, rejected, HERE, rendered=rendered)


def encode(tokenizer, *args, **kwargs):
    return PairTokenizer(tokenizer, **kwargs).encode([row(*args)])[0]


def test_chat_pair_is_the_templates_own_text_cut_at_the_response(chat_tokenizer):
    pair = encode(chat_tokenizer, "how do i water it ?", "in the morning .", "i cannot help .")
    decode = chat_tokenizer.decode
    assert decode(pair.prompt_ids) == "<|im_start|>user\nhow do i water it ?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(pair.chosen_ids) == "in the morning .<|im_end|>"
    assert decode(pair.rejected_ids) == "i cannot help .<|im_end|>"
    assert not pair.merged


def test_messages_and_text_give_the_same_tokens(chat_tokenizer):
    text = encode(chat_tokenizer, "how ?", "so .", "no .")
    messages = encode(
        chat_tokenizer,
        [{"role": "user", "content": "how ?"}],
        [{"role": "assistant", "content": "so ."}],
        [{"role": "assistant", "content": "no ."}],
    )
    assert text == messages


def test_plain_text_gets_one_bos_and_one_eos():
    tokenizer = build_tokenizer(bos=True, chat=False)
    for prompt in ("how do i", "<s>how do i"):
        pair = encode(tokenizer, prompt, " water it", " set traps", control_tokens="parse")
        assert pair.prompt_ids.count(tokenizer.bos_token_id) == 1
        assert pair.prompt_ids[0] == tokenizer.bos_token_id
        for response in (pair.chosen_ids, pair.rejected_ids):
            assert response.count(tokenizer.eos_token_id) == 1
            assert response[-1] == tokenizer.eos_token_id


def test_eos_written_in_the_text_is_not_doubled():
    tokenizer = build_tokenizer(chat=False)
    pair = encode(tokenizer, "how do i", " water it</s>", " set traps", control_tokens="parse")
    assert pair.chosen_ids.count(tokenizer.eos_token_id) == 1


def test_control_token_in_a_plain_text_is_text_or_a_named_error():
    tokenizer = build_tokenizer(chat=False)
    error = encode(tokenizer, "how do i", " water it</s>", " set traps")
    assert isinstance(error, RowError)
    assert "control token '</s>'" in str(error)
    assert "data.control_tokens=parse" in str(error)
    pair = encode(tokenizer, "how do i", " water it</s>", " set traps", control_tokens="text")
    assert pair.chosen_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(pair.chosen_ids) == " water it</s></s>"
    with pytest.raises(InputError, match=r"data\.control_tokens"):
        PairTokenizer(build_tokenizer(), control_tokens="parse")


def test_folder_without_a_tokenizer_is_named():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    with pytest.raises(InputError, match=r"lacks its tokenizer's files"):
        PairTokenizer(empty)


def test_boundary_inside_a_token_is_cut_at_the_common_prefix_and_reported():
    tokenizer = build_tokenizer(chat=False)
    # "gar" + "den" merge into tokens that the prompt alone does not have.
    whole = tokenizer("my garden")["input_ids"]
    apart = tokenizer("my gar")["input_ids"]
    assert whole[: len(apart)] != apart
    pair = encode(tokenizer, "my gar", "den", "lic")
    assert pair.merged
    assert pair.prompt_ids + pair.chosen_ids == [*whole, tokenizer.eos_token_id]
    assert pair.prompt_ids + pair.rejected_ids == [*tokenizer("my garlic")["input_ids"], tokenizer.eos_token_id]
    assert pair.prompt_ids == apart[: len(pair.prompt_ids)]
    assert len(pair.prompt_ids) < len(apart)


def test_tokens_together_equal_tokens_of_the_whole_text(chat_tokenizer):
    pair = encode(chat_tokenizer, "wie geht's? 你好 🙂", "gut, danke 🌱", "schlecht …")
    text = chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": "wie geht's? 你好 🙂"}, {"role": "assistant", "content": "gut, danke 🌱"}],
        tokenize=False,
    )
    assert pair.prompt_ids + pair.chosen_ids == chat_tokenizer(text.rstrip("\n"))["input_ids"]


def test_tokenizer_that_appends_eos_does_not_end_the_prompt_with_it():
    from tokenizers import processors

    tokenizer = build_tokenizer(bos=True, chat=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    pair = encode(tokenizer, "how do i", " water it", " set traps")
    assert tokenizer.eos_token_id not in pair.prompt_ids
    assert pair.chosen_ids.count(tokenizer.eos_token_id) == 1


def test_null_prompt_is_an_empty_turn_or_bos_or_eos(chat_tokenizer):
    ids = PairTokenizer(chat_tokenizer).null_prompt_ids()
    assert chat_tokenizer.decode(ids) == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    with_bos, without = build_tokenizer(bos=True, chat=False), build_tokenizer(chat=False)
    assert PairTokenizer(with_bos).null_prompt_ids() == [with_bos.bos_token_id]
    assert PairTokenizer(without).null_prompt_ids() == [without.eos_token_id]
    assert PairTokenizer(chat_tokenizer, chat_template="none").null_prompt_ids() == [chat_tokenizer.eos_token_id]
    named = PairTokenizer(chat_tokenizer, null_prompt="hello").null_prompt_ids()
    assert "user\nhello<" in chat_tokenizer.decode(named)


def test_rendered_rows_are_not_templated(chat_tokenizer):
    pair = encode(chat_tokenizer, "Human: how ?\nAssistant:", " so .", " no .", True)
    assert chat_tokenizer.decode(pair.prompt_ids) == "Human: how ?\nAssistant:"


def test_template_from_a_file(tmp_path):
    tokenizer = build_tokenizer()
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
                        "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    pair = encode(tokenizer, "how ?", "so .", "no .", chat_template=str(template))
    assert tokenizer.decode(pair.prompt_ids) == "[user] how ?\n[assistant]"
    assert pair.chosen_ids[-1] == tokenizer.eos_token_id
    with pytest.raises(InputError, match=r"missing\.jinja"):
        PairTokenizer(tokenizer, chat_template=str(tmp_path / "missing.jinja"))


def test_faults_name_the_row(chat_tokenizer):
    ends_with_assistant = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    error = encode(chat_tokenizer, ends_with_assistant, "c", "d")
    assert isinstance(error, RowError)
    assert "file.jsonl, line 1" in str(error)
    picky = build_tokenizer()
    picky.chat_template = "{{ raise_exception('no system role') }}"
    error = encode(picky, "a", "b", "c")
    assert isinstance(error, RowError)
    assert "no system role" in str(error)
    with pytest.raises(InputError, match="no chat template"):
        encode(build_tokenizer(chat=False), [{"role": "user", "content": "a"}], "b", "c")


def test_tokenizer_without_eos_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        PairTokenizer(tokenizer)


@pytest.mark.parametrize("emoji", ["🙂", "👩‍🌾🌱"])
def test_all_tokens_of_an_answers_last_character_are_trained(emoji):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] "
        "{% endif %}"
    )
    chosen = [
        {"role": "assistant", "content": f"so {emoji}"},
        {"role": "user", "content": f"why {emoji}"},
        {"role": "assistant", "content": f"kind {emoji}"},
    ]
    pair = encode(tokenizer, "how ?", chosen, [{"role": "assistant", "content": "no ."}])
    size = len(tokenizer(f" {emoji}", add_special_tokens=False)["input_ids"])
    assert size > 2
    trained = [i for i, flag in zip(pair.chosen_ids, pair.chosen_trained, strict=True) if flag]
    assert tokenizer.decode(trained).count(emoji) == 2
    assert "why" not in tokenizer.decode(trained)


THINKING, SILENT = {"enable_thinking": True}, {"enable_thinking": False}


def load_asked(path, tokenizer, variables):
    rows = [
        {**row, "chat_template_kwargs": v} for row, v in zip(preference_rows(len(variables)), variables, strict=True)
    ]
    return load_pairs("train", str(write_jsonl(path, rows)), PairTokenizer(tokenizer), Truncation(256))


def test_null_prompt_ends_like_the_prompts_of_rows_with_variables_of_their_own(tmp_path):
    """The prompt ended with an empty thought and the null prompt did not, so the first token bore the difference."""
    tokenizer = tokenizer_for(QWEN3)
    plain = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    closed = plain + "<think>\n\n</think>\n\n"
    table, _ = load_asked(tmp_path / "a.jsonl", tokenizer, [SILENT, SILENT])
    assert list(map(tokenizer.decode, table.null_prompts)) == [closed]
    # Of rows that differ, each has the null prompt that ends like its prompt.
    mixed, report = load_asked(tmp_path / "b.jsonl", tokenizer, [THINKING, SILENT, {**SILENT, "a": 1}, {}])
    assert [tokenizer.decode(mixed.null_prompt_of(i)) for i in range(4)] == [plain, closed, closed, plain]
    assert mixed.content_digest() != replace(mixed, own_null_prompts=None).content_digest()
    part = mixed.select(np.array([2, 1]))
    assert (part.null_prompt_ids, part.own_null_prompts) == (mixed.null_prompt_of(1), None)
    joined, _ = join([part, table], [1.0, 1.0], [report, report], "keep")
    assert joined.null_prompts == table.null_prompts
    joined, _ = join([table, mixed], [1.0, 1.0], [report, report], "keep")
    found = [tokenizer.decode(joined.null_prompt_of(i)) for i in range(6)]
    assert found == [closed, closed, plain, closed, closed, plain]


def test_null_prompt_has_the_variables_that_all_rows_have(tmp_path):
    tokenizer = tokenizer_for("{{ a }}{{ b }}" + QWEN3)
    for variables, shown in (([{"a": "x", "b": "y"}] * 2, "xy"), ([{"a": "x", "b": "y"}, {"a": "x", "b": "z"}], "x")):
        table, _ = load_asked(tmp_path / "a.jsonl", tokenizer, variables)
        assert [tokenizer.decode(ids).partition("<")[0] for ids in table.null_prompts] == [shown]
