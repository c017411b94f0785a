"""The boundary, proven for each row: over templates that do what published ones do."""

import chat_templates as T
import pytest
import torch
from chat_templates import tokenizer_for
from encoded_rows import HERE, SYSTEM, TURNS, USER, check, encode, say, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from makers import build_model, build_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.rows import PreferenceRow, RowError
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PairTokenizer, PreferencePair
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.forward.generation import encode_conversations

MERGES = [("b", "c"), ("a", "b")]
TEMPLATES = {
    name: getattr(T, name)
    for name in (
        "CHATML", "DEFAULT_SYSTEM", "LLAMA3", "LLAMA3_FIRST", "LLAMA32", "GEMMA", "MISTRAL", "QWEN3", "QWEN35_THINK",
        "GPT_OSS", "VICUNA", "FOREIGN", "PARTS",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chosen", ["in the morning .", "a", " t ", "user\nassistant", "<|im_end|> not <s> </s>"])
def test_response_is_its_text_behind_the_generation_prompt(name, chosen):
    tokenizer = tokenizer_for(TEMPLATES[name])
    for prompt in ([USER], [USER, *say("why ?"), {"role": "user", "content": "slugs ."}], [SYSTEM, USER]):
        if name == "GEMMA" and prompt[0] is SYSTEM:
            continue
        pair, _ = encode(tokenizer, prompt, say(chosen), say("i cannot help ."))
        assert isinstance(pair, PreferencePair), pair
        check(tokenizer, prompt, pair, chosen, "i cannot help .")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    asked=st.text(min_size=1, max_size=20).filter(str.strip),
    said=st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and text.strip() != "no ."),
)
def test_any_words_are_cut_exactly_or_refused(name, asked, said):
    tokenizer = tokenizer_for(TEMPLATES[name])
    try:
        pair, _ = encode(tokenizer, [{"role": "user", "content": asked}], say(said), say("no ."))
    except UnicodeEncodeError:
        return
    if isinstance(pair, RowError):
        assert pair.reason in ("other prompt tokens with a response", "changed by the template")
        return
    words = trained(pair.chosen_ids, pair.chosen_trained)
    assert tokenizer.decode(words[:-1]).strip().endswith(said.strip())


def test_system_message_that_the_template_moves_is_kept():
    """Mistral v3's wrote it before generation and left it out before an answer: the prompt was `<s>[INST]`."""
    tokenizer = tokenizer_for(T.MISTRAL)
    pair, read = encode(tokenizer, [SYSTEM, USER], say("in the morning ."), say("no ."))
    assert tokenizer.decode(pair.prompt_ids) == "<s>[INST] answer briefly .\n\nhow do i water it ?[/INST]"
    assert tokenizer.decode(pair.chosen_ids) == " in the morning .<|im_end|>"
    assert not pair.merged
    assert read.counts["prompts that the template writes differently before an answer"] == 1


def test_template_that_ignores_the_generation_prompt_opens_the_turn_all_the_same():
    """Llama 3's first release: every response began and ended with the header of a turn."""
    first, later = tokenizer_for(T.LLAMA3_FIRST), tokenizer_for(T.LLAMA3)
    pairs = [encode(tokenizer, [USER], say("so ."), say("no ."))[0] for tokenizer in (first, later)]
    assert pairs[0] == pairs[1]
    assert first.decode(pairs[0].chosen_ids) == "so .<|eot_id|>"
    assert encode_conversations(first, [[USER]]) == encode_conversations(later, [[USER]])


def test_empty_thought_of_the_template_is_read_and_not_trained_on():
    tokenizer = tokenizer_for(T.QWEN3)
    pair, read = encode(tokenizer, [USER], say("so ."), say("no ."))
    assert tokenizer.decode(pair.chosen_ids) == "<think>\n\n</think>\n\nso .<|im_end|>"
    assert tokenizer.decode(trained(pair.chosen_ids, pair.chosen_trained)) == "so .<|im_end|>"
    assert read.added == {"<think>\n\n</think>\n\n"}
    closed, _ = encode(tokenizer, [USER], say("so ."), say("no ."), template_kwargs={"enable_thinking": False})
    assert closed.chosen_trained is None
    assert closed.prompt_ids + closed.chosen_ids == pair.prompt_ids + pair.chosen_ids


def test_open_thought_is_closed_behind_the_very_generation_prompt():
    """Qwen3.5's: the two line breaks were one token, so training read another prompt than generation."""
    tokenizer = tokenizer_for(T.QWEN35_THINK)
    tokenizer.add_tokens(["\n\n"])
    pair, _ = encode(tokenizer, [USER], say("so ."), say("no ."))
    assert pair.prompt_ids == encode_conversations(tokenizer, [[USER]])[0]
    assert tokenizer.decode(pair.chosen_ids) == "\n</think>\n\nso .<|im_end|>"
    assert tokenizer.decode(trained(pair.chosen_ids, pair.chosen_trained)) == "so .<|im_end|>"


def test_thought_that_only_generation_opens_is_refused_with_the_option_that_mends_it():
    tokenizer = tokenizer_for(T.DEEPSEEK)
    error, _ = encode(tokenizer, [USER], say("so ."), say("no ."))
    assert isinstance(error, RowError)
    assert "data.chat_template_kwargs='{thinking: false}'" in str(error)
    pair, _ = encode(tokenizer, [USER], say("so ."), say("no ."), template_kwargs={"thinking": False})
    assert tokenizer.decode(pair.prompt_ids).endswith("<｜Assistant｜></think>")
    assert tokenizer.decode(pair.chosen_ids) == "so .<|im_end|>"


def test_without_such_a_variable_the_remedy_is_a_copy_of_the_template_and_it_works(tmp_path):
    error, _ = encode(tokenizer_for(T.R1_DISTILL), [USER], say("so ."), say("no ."))
    assert isinstance(error, RowError)
    remedy = "data.chat_template=FILE, a copy of the template whose generation prompt does not end with '<think>\\n'"
    assert remedy in str(error)
    copy = tmp_path / "copy.jinja"
    copy.write_text(T.R1_DISTILL.replace("<｜Assistant｜><think>\n", "<｜Assistant｜>"), encoding="utf-8")
    tokenizer = tokenizer_for(T.R1_DISTILL)
    pair, _ = encode(tokenizer, [USER], say("so ."), say("no ."), chat_template=str(copy))
    check(tokenizer, [USER], pair, "so .", "no .")
    assert tokenizer.decode(pair.prompt_ids).endswith("<｜Assistant｜>")


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    ("thoughts", "seen", "learnt"),
    [
        ("train", "<think>\ni wonder\n</think>\n\nso .<|im_end|>", "<think>\ni wonder\n</think>\n\nso .<|im_end|>"),
        ("mask", "<think>\ni wonder\n</think>\n\nso .<|im_end|>", "so .<|im_end|>"),
        ("strip", "<think>\n\n</think>\n\nso .<|im_end|>", "so .<|im_end|>"),
    ],
)
def test_thoughts_are_trained_masked_or_stripped(inline, thoughts, seen, learnt):
    tokenizer = tokenizer_for(T.CHATML if inline else T.QWEN3)
    for token in ("<think>", "</think>"):
        tokenizer.add_tokens([token])
    if inline:
        chosen, seen = say("<think>\ni wonder\n</think>\n\nso ."), seen.replace("<think>\n\n</think>\n\n", "")
    else:
        chosen = say("so .", reasoning_content="i wonder")
    pair, read = encode(tokenizer, [USER], chosen, say("no ."), thoughts=thoughts)
    assert tokenizer.decode(pair.chosen_ids) == seen
    assert tokenizer.decode(trained(pair.chosen_ids, pair.chosen_trained)) == learnt
    assert read.counts.get("responses with thoughts", 0) == (thoughts != "strip")


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("words", ["4", ""])
def test_masked_thoughts_end_where_they_end_beside_tool_calls(inline, words):
    tokenizer = tokenizer_for(T.QWEN3)
    calls = [{"function": {"name": "rain", "arguments": {"days": 2}}}]
    thought = "two and two is 4 so i ask"
    chosen = (
        say(f"<think>\n{thought}\n</think>\n\n{words}", tool_calls=calls)
        if inline
        else say(words, reasoning_content=thought, tool_calls=calls)
    )
    pair, _ = encode(tokenizer, [USER], chosen, say("no ."), thoughts="mask")
    call = '<tool_call>\n{"name": "rain", "arguments": {"days": 2}}\n</tool_call><|im_end|>'
    assert thought in tokenizer.decode(pair.chosen_ids)
    assert tokenizer.decode(trained(pair.chosen_ids, pair.chosen_trained)) == words + call


def test_thoughts_that_cannot_be_told_from_the_words_are_not_masked():
    """A template that writes a thought behind the words, or twice, or no words beside a call."""
    calls = [{"function": {"name": "rain", "arguments": {}}}]
    for said, written in (
        ("so .", "{{ m.content }}<think>{{ m.thinking }}</think>"),
        ("so .", "{{ m.thinking }}{{ m.thinking }}{{ m.content }}"),
        ("", "{{ m.thinking }}{{ m.content if not m.tool_calls }}"),
    ):
        template = T.CHATML.replace("{{ m.content }}", written + "{{ m.tool_calls | tojson if m.tool_calls }}")
        error, _ = encode(
            tokenizer_for(template), [USER], say(said, thinking="hm", tool_calls=calls), say("no ."), thoughts="mask"
        )
        assert isinstance(error, RowError)
        assert "data.thoughts=strip" in str(error)


def test_thoughts_that_the_template_drops_are_refused():
    tokenizer = tokenizer_for(T.CHATML)
    error, _ = encode(tokenizer, [USER], say("so .", reasoning_content="i wonder"), say("no ."))
    assert isinstance(error, RowError)
    assert "data.thoughts=strip" in str(error)


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "LLAMA3_FIRST", "GEMMA", "QWEN3", "GPT_OSS", "VICUNA", "MISTRAL"])
def test_of_several_turns_the_assistants_words_alone_are_trained_on(name):
    tokenizer = tokenizer_for(TEMPLATES[name])
    pair, read = encode(tokenizer, [USER], TURNS, say("no ."))
    learnt = tokenizer.decode(trained(pair.chosen_ids, pair.chosen_trained))
    assert "slugs" in tokenizer.decode(pair.chosen_ids)
    assert "slugs" not in learnt
    end = tokenizer.decode(pair.chosen_ids[-1:])
    first_end = "" if name == "GPT_OSS" else end  # generation does not stop at what ends its earlier turns
    assert learnt.replace(" ", "") == f"why?{first_end}settraps.{end}"
    assert pair.rejected_trained is None or name in ("QWEN3", "GPT_OSS")
    assert read.counts["responses of several turns"] == 1


def test_mask_is_that_of_the_templates_own_generation_marks():
    """The oracle: transformers' mask of the assistant's tokens, by marks in the template."""
    marked = T.CHATML.replace(
        "{{ m.role }}\n{{ m.content }}<|im_end|>\n",
        "{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n",
    )
    tokenizer = tokenizer_for(marked)
    said = tokenizer.apply_chat_template([USER, *TURNS], return_dict=True, return_assistant_tokens_mask=True)
    pair, _ = encode(tokenizer, [USER], TURNS, say("no ."))
    ours = [False] * len(pair.prompt_ids) + list(pair.chosen_trained)
    assert [bool(flag) for flag in said["assistant_masks"]][: len(ours)] == ours
    assert said["input_ids"][: len(ours)] == pair.prompt_ids + pair.chosen_ids


def test_tools_and_their_calls_reach_the_template():
    tokenizer = tokenizer_for(T.QWEN3)
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}]
    call = {"function": {"name": "rain", "arguments": {"days": 2}}}
    chosen = [
        *say("", tool_calls=[call]), {"role": "tool", "content": "none"}, *say("water it .")
    ]  # fmt: skip
    pair, _ = encode(tokenizer, [USER], chosen, say("no ."), tools)
    assert '"name": "rain"' in tokenizer.decode(pair.prompt_ids)
    learnt = tokenizer.decode(trained(pair.chosen_ids, pair.chosen_trained))
    assert '<tool_call>\n{"name": "rain", "arguments": {"days": 2}}\n</tool_call><|im_end|>' in learnt
    assert "none" in tokenizer.decode(pair.chosen_ids)
    assert "none" not in learnt
    for template in (T.CHATML, T.LLAMA3):
        error, _ = encode(tokenizer_for(template), [USER], say("so ."), say("no ."), tools)
        assert "writes no tools" in str(error)
        error, _ = encode(tokenizer_for(template), [USER], say("so .", tool_calls=[call]), say("no ."))
        assert "leaves out the tool calls" in str(error)


def test_message_that_the_template_leaves_out_is_refused():
    tokenizer = tokenizer_for(T.CHATML.replace("{% for m in messages %}", "{% for m in messages[-2:] %}"))
    error, _ = encode(tokenizer, [SYSTEM, USER, *say("why ?"), USER], say("so ."), say("no ."))
    assert "leaves out (a part of) the system message" in str(error)


CALL = {"function": {"name": "rain", "arguments": {"days": 2}}}
TOOLS = [{"type": "function", "function": {"name": "rain"}}]
HISTORY = [USER, *say("", tool_calls=[CALL]), {"role": "tool", "content": '{"none": "\\n"}'}, *say("water it ."), USER]
_CALLS = T.QWEN3[T.QWEN3.index("{% for call") : T.QWEN3.index("<|im_end|>\n{% elif")]
_TOOL = "<tool_response>\n{{ m.content }}\n</tool_response>"


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        (T.QWEN3.replace(_CALLS, ""), "tool calls"),
        (T.QWEN3.replace(_TOOL, ""), "a message of the role 'tool'"),
        (T.QWEN3.replace("{{ m.content | trim }}", "{{ m.content | trim if loop.last }}"), "an earlier turn of the"),
        (T.QWEN3, None),
        (T.QWEN3.replace("{{ m.content }}\n</tool", "{{ m.content | tojson }}\n</tool"), None),
    ],
)
def test_earlier_turns_that_the_template_leaves_out_are_refused(template, left_out):
    for prompt in (HISTORY, HISTORY[:3]):
        if left_out and left_out.startswith("an earlier") and prompt is not HISTORY:
            continue
        pair, _ = encode(tokenizer_for(template), prompt, say("so ."), say("no ."), TOOLS)
        assert isinstance(pair, RowError) is bool(left_out)
        assert (left_out or "") in str(pair)
    pair, _ = encode(tokenizer_for(template), [USER], [*HISTORY[1:], *say("so .")], say("no ."), TOOLS)
    assert isinstance(pair, RowError) is bool(left_out)


@pytest.mark.parametrize("said", ["<think>hm</think>why ?", "hm</think>why ?"])
def test_thoughts_of_earlier_turns_may_go(said):
    template = T.R1_DISTILL.replace("<｜Assistant｜><think>\n", "<｜Assistant｜>")
    pair, _ = encode(tokenizer_for(template), [USER, *say(said), USER], say("so ."), say("no ."))
    assert isinstance(pair, PreferencePair)


def test_date_is_pinned():
    tokenizer = tokenizer_for(T.LLAMA32)
    pair, _ = encode(tokenizer, [USER], say("so ."), say("no ."))
    assert tokenizer.decode(pair.prompt_ids).startswith("26 Jul 2024 ")
    assert tokenizer.decode(encode_conversations(tokenizer, [[USER]])[0]).startswith("26 Jul 2024 ")
    dated = PairTokenizer(tokenizer, template_kwargs={"date_string": "1 May 2025"})
    (pair,) = dated.encode([PreferenceRow([USER], say("so ."), say("no ."), HERE)])
    assert tokenizer.decode(pair.prompt_ids).startswith("1 May 2025 ")
    # One set of variables for all that renders with this tokenizer: generation, evaluation and attacks.
    assert encode_conversations(tokenizer, [[USER]]) == [pair.prompt_ids]


def test_markers_that_the_tokenizer_lacks_end_no_turn():
    tokenizer = tokenizer_for(T.FOREIGN)
    pair, read = encode(tokenizer, [USER], say("so ."), say("no ."))
    assert tokenizer.decode(pair.chosen_ids) == "so .<|im_end|>"
    assert read.counts["ended by EOS, the template ends no turn with a token"] == 1


def test_one_merged_token_is_merged_and_more_are_refused():
    tokenizer = build_tokenizer(chat=False)
    pair, _ = encode(tokenizer, "my gar", "den", "lic")
    assert pair.merged
    # "ab" alone is one token; before a "c" it is "a", and "bc" spans the boundary: two tokens are others.
    bpe = models.BPE({letter: i for i, letter in enumerate(["a", "b", "c", "x", "d", "bc", "ab", "</s>"])}, MERGES)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), eos_token="</s>")
    error, _ = encode(tokenizer, "xab", "c", "d")
    assert isinstance(error, RowError)
    assert error.reason == "other prompt tokens with a response"


def test_keep_start_keeps_what_opens_the_assistants_turn():
    tokenizer = tokenizer_for(T.CHATML)
    pair, _ = encode(tokenizer, "w " * 60, "yes .", "no .")
    cut = Truncation(32, "keep_start").apply(pair, None)
    assert tokenizer.decode(cut.prompt_ids).endswith(" w w<|im_end|>\n<|im_start|>assistant\n")
    assert len(cut.prompt_ids) + max(len(cut.chosen_ids), len(cut.rejected_ids)) == 32


def test_keep_start_keeps_what_opens_the_turn_under_a_rows_own_variables_and_behind_a_tool():
    asked = [{**USER, "content": "w " * 60}]
    pair, _ = encode(
        tokenizer_for(T.QWEN3), asked, say("yes ."), say("no ."), template_kwargs={"enable_thinking": False}
    )
    opening = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert kept(tokenizer_for(T.QWEN3), pair).endswith(f" w{opening}")
    # A tool's turn is closed by another text than a user's.
    template = T.CHATML.replace("<|im_end|>", "{{ '<|im_out|>' if m.role == 'tool' else '<|im_end|>' }}")
    template = template.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}")
    asked = [USER, *say("", tool_calls=[CALL]), {"role": "tool", "content": "w " * 60}]
    pair, _ = encode(tokenizer_for(template), asked, say("yes ."), say("no ."))
    assert kept(tokenizer_for(template), pair).endswith("<|im_out|>\n<|im_start|>assistant\n")
    # A template that takes no other words of a tool shows nowhere what closes its turn: the pair is left out.
    picky = template.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.role == 'tool' and 'w' not in m.content %}{{ 1 / 0 }}{% endif %}",
    )
    pair, _ = encode(tokenizer_for(picky), asked, say("yes ."), say("no ."))
    assert (pair.header, Truncation(48, "keep_start").apply(pair, None)) == (None, None)
    assert Truncation(48, "keep_end").apply(pair, None) is not None


def kept(tokenizer, pair):
    return tokenizer.decode(Truncation(48, "keep_start").apply(pair, None).prompt_ids)


def test_masks_are_cut_with_their_responses():
    pair = PreferencePair([1] * 4, [5] * 6, [6] * 3, chosen_trained=(False, False, True, True, True, True))
    cut = Truncation(7, "keep_end", max_prompt_length=3).apply(pair, None)
    assert cut.chosen_trained == (False, False, True, True)
    assert Truncation(3, "keep_end", max_prompt_length=1).apply(pair, None) is None


def test_masked_tokens_are_not_scored_in_any_layout():
    """The oracle: a plain forward pass, with labels of −100 at the masked tokens."""
    model = build_model(vocab_size=400).eval()
    pairs = [
        PreferencePair([5, 6, 7], [8, 9, 10, 11], [12, 13], chosen_trained=(False, True, False, True)),
        PreferencePair([14, 15], [16, 17], [18, 19, 20], rejected_trained=(False, False, True)),
    ]
    table = PairTable.from_pairs(pairs, [1])
    assert [table[i] for i in range(2)] == pairs
    assert table.trained_lengths.tolist() == [[2, 2], [2, 1]]
    other = PairTable.from_pairs([PreferencePair(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs], [1])
    assert table.content_digest() != other.content_digest()
    assert table.select(torch.tensor([1]).numpy())[0] == pairs[1]
    for layout in (RowLayout.SPLIT, RowLayout.SHARED):
        batch = lay_out(pair_documents(pairs), layout, 0)
        flat = batch.input_ids.flatten()
        for s, (pair, side) in enumerate((pair, side) for side in ("chosen", "rejected") for pair in pairs):
            ids, flags = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_trained") or (True,) * 9
            labels = [token for token, flag in zip(ids, flags, strict=False) if flag]
            mine = batch.sequence_ids == s
            assert batch.labels[mine].tolist() == labels
            # Each is predicted from the token before it.
            before = [([pair.prompt_ids[-1], *ids])[k] for k, flag in enumerate(flags[: len(ids)]) if flag]
            assert flat[batch.score_index[mine]].tolist() == before
    from bdpo_pl.forward.responses import response_logps

    ours = response_logps(model, lay_out(pair_documents(pairs), RowLayout.SPLIT, 0))
    for s, (pair, side) in enumerate((pair, side) for side in ("chosen", "rejected") for pair in pairs):
        ids, flags = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_trained") or (True,) * 9
        whole = torch.tensor([pair.prompt_ids + ids])
        labels = [-100] * len(pair.prompt_ids) + [t if flag else -100 for t, flag in zip(ids, flags, strict=False)]
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(
                model(whole).logits[0, :-1].double(), torch.tensor(labels[1:]), reduction="sum"
            )
        assert ours[s].item() == pytest.approx(-loss.item(), abs=1e-4)
