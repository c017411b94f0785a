"""Continuous batches against `generate` of transformers, one prompt at a time."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from makers import build_model, build_tokenizer, large

from bdpo_pl.evaluation.answerers import GenerationOptions, LocalAnswerer
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt
from bdpo_pl.forward import decoding_trial
from bdpo_pl.forward.decoding import Decoder
from bdpo_pl.forward.decoding_trial import why_not_continuous
from bdpo_pl.forward.generation import generate

NEW = 7
MODELS = {
    "grouped heads, tied": {"architecture": "qwen2", "tie_word_embeddings": True},
    "untied": {"architecture": "llama", "num_key_value_heads": 4},
    "learned positions": {"architecture": "gpt2"},
    "windows longer than all": {"architecture": "gemma2", "sliding_window": 64},
}


def prompts(shared=4, lengths=(5, 21, 9, 5, 12, 30, 7, 6, 5)):
    """Token ids of different lengths with a common beginning."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 400, (n,), generator=g).tolist() for n in lengths]
    return [rows[0][:shared] + row[shared:] for row in rows]


def alone(model, ids, new=NEW, stops=()):
    """What `generate` writes after one prompt, without the stop token, and whether there was one."""
    row = model.generate(
        torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=sorted(stops) or None, pad_token_id=0,
        temperature=None, top_p=None, top_k=None,
    )[0, len(ids) :].tolist()  # fmt: skip
    return (row[:-1], True) if row[-1] in stops else (row, False)


@dataclass
class Case:
    """A model, prompts that begin alike, tokens that end some answers at once and some midway, and the answers."""

    model: Any
    rows: list
    stops: set
    expected: list


@pytest.fixture(params=MODELS, scope="module")
def case(request):
    model, rows = large(build_model(**MODELS[request.param])).eval(), prompts()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        written = [alone(model, row)[0] for row in rows]
    stops = {written[0][0], written[1][2], written[3][4]}
    ends = [next((k for k, token in enumerate(tokens) if token in stops), None) for tokens in written]
    expected = [(tokens[:end], end is not None) for tokens, end in zip(written, ends, strict=True)]
    assert len(set(ends)) > 2
    assert None in ends
    return Case(model, rows, stops, expected)


@torch.no_grad()
@pytest.mark.parametrize("num_slots", [1, 3, 16])
def test_tokens_are_those_of_each_prompt_alone_and_no_finished_row_is_computed(case, num_slots):
    decoder = Decoder(case.model, case.stops, max_new_tokens=NEW, num_slots=num_slots)
    found = {done.number: (done.tokens, done.finished) for done in decoder.decode(case.rows)}
    assert [found[i] for i in range(len(case.rows))] == case.expected
    # A row of a pass chooses a token, the stop token included; the common beginning is a row of its own.
    assert decoder.rows == 1 + sum(len(tokens) + finished for tokens, finished in case.expected)
    assert decoder.passes == decoder.rows if num_slots == 1 else decoder.passes < decoder.rows


@torch.no_grad()
def test_sequences_that_end_are_told_before_the_others_go_on(case):
    decoder = Decoder(case.model, case.stops, max_new_tokens=NEW, num_slots=len(case.rows))
    steps = [len(case.expected[done.number][0]) + done.finished for done in decoder.decode(case.rows)]
    assert steps == sorted(steps)


@torch.no_grad()
def test_prompts_without_a_common_beginning(case):
    rows = prompts(shared=0)
    found = {d.number: d.tokens for d in Decoder(case.model, (), max_new_tokens=3, num_slots=4).decode(rows)}
    assert [found[i] for i in range(len(rows))] == [alone(case.model, row, 3)[0] for row in rows]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_repetition_penalty_and_attention_of_the_model(attention):
    model = large(build_model()).eval()
    model.set_attn_implementation(attention)
    rows = prompts()
    before = [alone(model, row) for row in rows]
    model.generation_config.repetition_penalty = 1.8
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
    expected = [alone(model, row) for row in rows]
    assert before != expected
    assert why_not_continuous(model, rows, NEW, 0) is None
    found = {
        d.number: (d.tokens, d.finished) for d in Decoder(model, {4}, max_new_tokens=NEW, num_slots=4).decode(rows)
    }
    assert [found[i] for i in range(len(rows))] == [alone(model, row, stops={4}) for row in rows]


@torch.no_grad()
def test_what_rounding_could_decide_is_decided_alone():
    model, tokenizer = large(build_model("llama", tie_word_embeddings=False)).eval(), build_tokenizer()
    rows = prompts()
    first = alone(model, rows[0])[0][0]
    # The best token after this prompt now has a twin.
    model.lm_head.weight[first + 1] = model.lm_head.weight[first]
    found = {d.number: d.tokens for d in Decoder(model, (), max_new_tokens=NEW, num_slots=4).decode(rows)}
    assert found[0] is None
    assert sum(tokens is None for tokens in found.values()) < len(rows)
    responses = generate(model, tokenizer, rows, max_new_tokens=NEW, batch_size=4)
    expected = [alone(model, row, stops={tokenizer.eos_token_id}) for row in rows]
    assert [(r.num_tokens, r.finished) for r in responses] == [(len(tokens), end) for tokens, end in expected]
    assert [r.text for r in responses] == [tokenizer.decode(t, skip_special_tokens=True).strip() for t, _ in expected]
    # Half precision could decide most of them so: there they stay.
    half = Decoder(model.bfloat16(), (), max_new_tokens=NEW, num_slots=4)
    assert all(done.tokens is not None for done in half.decode(rows))


def settings(model, **changed):
    for name, value in changed.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build_model("gemma2"), "reaches back 16 tokens, and a prompt with its answer has up to 37"),
        (lambda: build_model("mamba"), "carries a state"),
        (lambda: settings(build_model(), no_repeat_ngram_size=2), "settings have no_repeat_ngram_size"),
        (
            lambda: build_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rotary embedding changes with the length",
        ),
    ],
)
def test_other_models_are_answered_in_padded_batches_and_it_is_told(make, reason):
    model, tokenizer, told = large(make()).eval(), build_tokenizer(), []
    rows = prompts(lengths=(30, 9, 5))
    responses = generate(model, tokenizer, rows, max_new_tokens=NEW, batch_size=1, on_note=told.append)
    assert len(told) == 1
    assert reason in told[0]
    expected = [alone(model, row, stops={tokenizer.eos_token_id, 4}) for row in rows]
    assert [r.num_tokens for r in responses] == [len(tokens) for tokens, _ in expected]


@pytest.mark.parametrize(
    "changed", [{"repetition_penalty": 99.0}, {"no_repeat_ngram_size": 1}, {"encoder_repetition_penalty": 0.01}]
)
@torch.no_grad()
def test_padding_is_no_token_that_an_answer_repeats(changed):
    model, tokenizer = settings(large(build_model("gemma2")).eval(), **changed), build_tokenizer()
    rows = prompts(lengths=(30, 9, 9, 5))
    stops = {tokenizer.eos_token_id, 4}
    expected = [alone(model, row, stops=stops) for row in rows]
    # A token of the answer to a prompt that is shorter than others.
    pad = next(token for token in expected[3][0] if token not in rows[3])
    tokenizer.pad_token_id = pad
    told = []
    responses = generate(model, tokenizer, rows, max_new_tokens=NEW, batch_size=4, on_note=told.append)
    assert [r.text for r in responses] == [tokenizer.decode(t, skip_special_tokens=True).strip() for t, _ in expected]
    assert f"and only prompts of equal length are batched, because of {next(iter(changed))}" in told[0]


def compare_with_single_prompts(model, tokenizer, rows, stops):
    """Responses to `rows`, which are those of each prompt alone by `generate` of transformers."""
    responses = generate(model, tokenizer, rows, max_new_tokens=NEW, batch_size=4)
    for row, found in zip(rows, responses, strict=True):
        output = model.generate(
            torch.tensor([row]), max_new_tokens=NEW, do_sample=False, eos_token_id=sorted(stops), pad_token_id=0,
            return_dict_in_generate=False, tokenizer=tokenizer,
        )[0, len(row) :].tolist()  # fmt: skip
        kept = output[:-1] if output[-1] in stops else output
        assert found.num_tokens == len(kept)
        assert found.text == tokenizer.decode(kept, skip_special_tokens=True).strip()
    return responses


@torch.no_grad()
def test_a_minimal_length_is_that_of_each_prompt_alone():
    many = list(range(5, 200))
    model = settings(large(build_model()).eval(), min_length=10, eos_token_id=many)
    tokenizer = build_tokenizer()
    responses = compare_with_single_prompts(model, tokenizer, prompts(), {*many, tokenizer.eos_token_id, 4})
    assert len({response.num_tokens for response in responses}) > 1


@torch.no_grad()
def test_answers_end_at_the_stop_strings_of_the_model():
    model, tokenizer, rows = large(build_model()).eval(), build_tokenizer(), prompts()
    # What the model writes in the middle of its first answer, and, in two tokens, at the end of its second.
    strings = ["do", "bouror"]
    settings(model, stop_strings=strings)
    responses = compare_with_single_prompts(model, tokenizer, rows, {tokenizer.eos_token_id, 4})
    assert (responses[0].num_tokens, responses[0].finished) == (3, True)
    assert responses[0].text.endswith("do")
    assert (responses[1].num_tokens, responses[1].finished) == (NEW, True)
    assert any(not response.finished for response in responses)


@pytest.mark.parametrize(
    "changed", [{"return_dict_in_generate": True, "no_repeat_ngram_size": 2}, {"prompt_lookup_num_tokens": 3},
                {"prompt_lookup_num_tokens": 3, "no_repeat_ngram_size": 2}]
)  # fmt: skip
@torch.no_grad()
def test_settings_that_change_no_token(changed):
    model, tokenizer = settings(large(build_model()).eval(), **changed), build_tokenizer()
    compare_with_single_prompts(model, tokenizer, prompts(), {tokenizer.eos_token_id, 4})


@torch.no_grad()
def test_trial_finds_a_model_that_does_not_heed_its_mask(monkeypatch):
    model = large(build_model("llama")).eval()
    layer = model.model.layers[1]
    heeds = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **given: heeds(*args, **{**given, "attention_mask": None}))
    assert "logits differ by" in why_not_continuous(model, prompts(), NEW, 0)
    fails = large(build_model("llama")).eval()
    monkeypatch.setattr(fails.model.layers[0], "forward", lambda *args, cache, **given: cache.get_seq_length())
    assert "have no common length" in why_not_continuous(fails, prompts(), NEW, 0)


@torch.no_grad()
def test_trial_is_held_once_for_a_model_and_its_attention(monkeypatch):
    tried, objection = [], decoding_trial._objection
    monkeypatch.setattr(decoding_trial, "_objection", lambda *args: tried.append(args) or objection(*args))
    model = build_model().eval()
    for attention in ("sdpa", "sdpa", "eager"):
        model.set_attn_implementation(attention)
        assert why_not_continuous(model, prompts(), NEW, 0) is None
    assert len(tried) == 2


def test_running_out_of_memory_in_the_trial_is_no_objection(monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA out of memory")

    model = build_model().eval()
    monkeypatch.setattr(decoding_trial.Decoder, "_forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        why_not_continuous(model, prompts(), NEW, 0)


@torch.no_grad()
def test_prefilled_answers_in_the_chat_template():
    model, tokenizer = large(build_model()).eval(), build_tokenizer()
    asked = [
        EvaluationPrompt(f"{'how ' * (i % 3)}do i water it ?", "it", prefill="first ," * (i % 2)) for i in range(6)
    ]
    answerer = LocalAnswerer(
        {}, tokenizer, lambda: (model, tokenizer), GenerationOptions(max_new_tokens=NEW, batch_size=2)
    )
    questions = answerer.questions(asked)
    told = []
    answers = answerer.answer(questions, lambda number, answer: told.append((number, answer)))
    stops = {tokenizer.eos_token_id, 4}
    for prompt, question, answer in zip(asked, questions, answers, strict=True):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text + prompt.prefill, add_special_tokens=False)["input_ids"]
        assert question.asked == ids
        tokens, finished = alone(model, ids, stops=stops)
        written = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert answer.text == (f"{prompt.prefill} {written}".strip() if prompt.prefill else written)
        assert (answer.num_tokens, answer.finished) == (len(tokens), finished)
    assert dict(told) == dict(enumerate(answers))
    assert answerer.notes == []
