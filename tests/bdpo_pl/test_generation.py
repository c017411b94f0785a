"""Batched generation against one prompt at a time."""

import torch
from makers import build_model, build_tokenizer

from bdpo_pl.generation import generate_responses

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
