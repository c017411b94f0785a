"""Batched generation against one prompt at a time."""

import pytest
import torch
from makers import build_model, build_tokenizer

from bdpo_pl.errors import InputError
from bdpo_pl.forward.generation import encode_prompts, generate, generate_responses, stop_ids

PROMPTS = ["how do i keep my garden safe ?", "why ?", "set traps . ask a neighbour and read the label", "how ?"]


def one_by_one(model, tokenizer, prompt, max_new_tokens):
    """Greedy decoding written out."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(max_new_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@torch.no_grad()
def test_batched_responses_equal_single_ones_in_the_order_of_the_prompts():
    model, tokenizer = build_model().train(), build_tokenizer()
    responses = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=3)
    assert responses == [one_by_one(model.eval(), tokenizer, prompt, 8) for prompt in PROMPTS]
    assert len(set(responses)) > 1


def test_mode_is_left_as_it_was_and_no_gradient_is_kept():
    model = build_model().train()
    generate_responses(model, build_tokenizer(), PROMPTS[:1], max_new_tokens=2)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_without_a_template_the_prompt_is_plain_text():
    model, tokenizer = build_model().eval(), build_tokenizer(bos=True, chat=False)
    ids = tokenizer("how do i")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    with torch.no_grad():
        first = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    expected = tokenizer.decode([first], skip_special_tokens=True).strip()
    assert generate_responses(model, tokenizer, ["how do i"], max_new_tokens=1) == [expected]


def test_the_end_of_a_turn_stops_a_response_though_it_is_no_end_of_sequence():
    model, tokenizer = build_model().eval(), build_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "</s>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert stop_ids(model, tokenizer) == {end, tokenizer.eos_token_id}
    without_turns = build_tokenizer(chat=False)
    assert stop_ids(model, without_turns) == {without_turns.eos_token_id}


def test_a_response_tells_whether_it_was_cut():
    model, tokenizer = build_model().eval(), build_tokenizer()
    ids = encode_prompts(tokenizer, PROMPTS)
    told = {}
    cut = generate(model, tokenizer, ids, max_new_tokens=3, batch_size=3, on_response=told.__setitem__)
    assert [told[i] for i in range(4)] == cut
    assert [(r.num_tokens, r.finished) for r in cut] == [(3, False)] * 4
    # The third token of the first response, made a stop token, ends it after two.
    with torch.no_grad():
        row = model.generate(torch.tensor([ids[0]]), max_new_tokens=3, do_sample=False)[0, -3:].tolist()
    model.generation_config.eos_token_id = row[2]
    ended = generate(model, tokenizer, ids[:1], max_new_tokens=8)[0]
    assert (ended.num_tokens, ended.finished) == (row.index(row[2]), True)


def test_what_does_not_fit_the_window_is_said():
    model, tokenizer = build_model(max_position_embeddings=16).eval(), build_tokenizer()
    with pytest.raises(InputError, match=r"1 of 1 prompts .* 16 positions; lower max_new_tokens"):
        generate_responses(model, tokenizer, PROMPTS[:1], max_new_tokens=16)
