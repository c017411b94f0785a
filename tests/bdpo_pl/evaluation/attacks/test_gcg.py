"""GCG against plain forwards and finite differences."""

import dataclasses

import pytest
import torch
from makers import WORDS, build_model, build_tokenizer, large
from quick_gcg import PROMPTS, QUICK, REQUEST
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.attacks import gcg
from bdpo_pl.evaluation.attacks.gcg import GCGOptions, attack, results
from bdpo_pl.evaluation.attacks.suffixes import SuffixPrompt, allowed_tokens, draw
from bdpo_pl.evaluation.attacks.target_loss import TargetLoss
from bdpo_pl.evaluation.attacks.targets import default_target
from bdpo_pl.forward.generation import encode_prompts, generate

BEFORE, SUFFIX, AFTER, TARGET = [7, 8, 9], [20, 21, 22, 23], [10, 11], [30, 31, 32]


@torch.no_grad()
def plain_loss(model, prompt_ids, target_ids):
    """Mean −log p(target), one token after the other."""
    ids, total = list(prompt_ids), 0.0
    for token in target_ids:
        total -= float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
        ids.append(token)
    return total / len(target_ids)


def one_hot_loss(model):
    """The loss of TARGET as a function of the whole row's one-hot vectors, and those of the row."""
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.arange(400))

    def loss(one_hot):
        logits = model(inputs_embeds=(one_hot @ embeddings)[None]).logits[0]
        return F.cross_entropy(logits[-4:-1], torch.tensor(TARGET))

    return loss, F.one_hot(torch.tensor(BEFORE + SUFFIX + AFTER + TARGET), 400).double()


@torch.no_grad()
def test_gradient_is_that_of_the_one_hot_by_finite_differences():
    model = large(build_model("gpt2"), 0.1).double().eval()  # has no step in float32, as others' norms have
    loss, one_hot = one_hot_loss(model)
    gradient = TargetLoss(model, BEFORE, AFTER, TARGET, 4).gradient(torch.tensor(SUFFIX))
    assert gradient.shape == (4, 400)
    generator, step = torch.Generator().manual_seed(0), 1e-5
    for place in range(4):
        for token in [SUFFIX[place], *torch.randint(400, (9,), generator=generator).tolist()]:
            move = torch.zeros_like(one_hot)
            move[len(BEFORE) + place, token] = step
            difference = float(loss(one_hot + move) - loss(one_hot - move)) / (2 * step)
            assert float(gradient[place, token]) == pytest.approx(difference, rel=1e-5, abs=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("gemma2", {}),  # scales embeddings in the model
        ("gemma3_text", {"head_dim": 8, "sliding_window": 16}),  # and this one in the embedding layer
    ],
)
def test_gradient_is_that_of_the_one_hot_in_every_architecture(architecture, overrides):
    model = large(build_model(architecture, **overrides), 0.1).double().eval()
    loss, one_hot = one_hot_loss(model)
    (expected,) = torch.autograd.grad(loss(one_hot.requires_grad_()), one_hot)
    gradient = TargetLoss(model, BEFORE, AFTER, TARGET, 4).gradient(torch.tensor(SUFFIX))
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(gradient, expected[len(BEFORE) : len(BEFORE) + 4], rtol=1e-4, atol=1e-7)


def test_losses_are_those_of_plain_forwards_and_matches_those_of_greedy_answers(model, tokenizer):
    candidates = torch.randint(5, 400, (7, 4), generator=torch.Generator().manual_seed(0))
    losses, matches = TargetLoss(model, BEFORE, AFTER, TARGET, 3).of(candidates)
    for row, loss in zip(candidates.tolist(), losses, strict=True):
        assert float(loss) == pytest.approx(plain_loss(model, BEFORE + row + AFTER, TARGET), rel=1e-4)
    assert not matches.any()
    ids = BEFORE + candidates[5].tolist() + AFTER
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    _, matches = TargetLoss(model, BEFORE, AFTER, ids[-3:], 3).of(candidates)
    assert matches[5]


def test_models_that_compute_all_logits_give_the_same(model):
    class AllLogits(torch.nn.Module):
        config = model.config

        def get_input_embeddings(self):
            return model.get_input_embeddings()

        def forward(self, input_ids, use_cache):
            return model(input_ids=input_ids, use_cache=use_cache)

    suffix = torch.tensor(SUFFIX)
    full, kept = (TargetLoss(m, BEFORE, AFTER, TARGET, 4) for m in (AllLogits(), model))
    torch.testing.assert_close(full.of(suffix[None])[0], kept.of(suffix[None])[0])
    torch.testing.assert_close(full.gradient(suffix), kept.gradient(suffix))


def test_suffix_stands_at_the_end_of_the_users_turn(tokenizer):
    place = SuffixPrompt(tokenizer, REQUEST + " \n", ". . .")
    assert place.text(place.initial) == REQUEST + " . . ."
    assert len(place.initial) == 3
    rendered = tokenizer.decode([*place.before, *place.initial, *place.after])
    assert rendered == f"<|im_start|>user\n{REQUEST} . . .<|im_end|>\n<|im_start|>assistant\n"


def test_suffix_without_a_template():
    tokenizer = build_tokenizer(bos=True, chat=False)
    place = SuffixPrompt(tokenizer, REQUEST, ". .")
    assert place.before[0] == tokenizer.bos_token_id
    assert [*place.before, *place.initial, *place.after] == tokenizer(REQUEST + " . .")["input_ids"]
    chat = build_tokenizer()
    bare = SuffixPrompt(chat, REQUEST, ". .", use_template=False)
    assert [*bare.before, *bare.initial, *bare.after] == chat(REQUEST + " . .")["input_ids"]


def sentencepiece_like():
    """A tokenizer as Llama 2 has: a sign for the space before a word, bytes as a fallback, no space at the start."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([WORDS + "[INST] [/INST]"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = "<s>[INST] {{ messages[0]['content'] }} [/INST]"
    return fast


def greedy_for_line_breaks():
    """A tokenizer as Llama 3 has, with tokens of a sign and the line breaks after it, here the template's."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?[^\s\w]+[\r\n]*| ?\w+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS, "why ?\n\n", "traps .\n\n"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = "Q: {{ messages[0]['content'] }}\n\nA:"
    return fast


@pytest.mark.parametrize(("build", "fixed"), [(sentencepiece_like, ""), (greedy_for_line_breaks, " .")])
def test_suffix_in_tokenizers_of_other_kinds(model, build, fixed):
    tokenizer = build()
    place = SuffixPrompt(tokenizer, REQUEST, ". . . .")
    assert place.text(place.initial) == REQUEST + " . . . ."
    assert len(place.initial) == (3 if fixed else 4)
    (result,) = results(PROMPTS[:1], model, tokenizer, QUICK)
    assert result.details["loss"] < result.details["initial_loss"]
    assert result.prompt.text.startswith(REQUEST)
    assert result.prompt.text.endswith(fixed)
    (ids,) = encode_prompts(tokenizer, [result.prompt.text])
    target = tokenizer(PROMPTS[0].target, add_special_tokens=False)["input_ids"]
    assert result.details["loss"] == pytest.approx(plain_loss(model, ids, target), rel=1e-4)


def test_request_that_ends_like_the_suffix_keeps_its_end(tokenizer):
    place = SuffixPrompt(tokenizer, "why . .", ". .")
    assert len(place.initial) == 2
    assert place.text(place.initial) == "why . . . ."


def test_suffix_survives_if_its_text_gives_its_ids_again(tokenizer):
    place = SuffixPrompt(tokenizer, REQUEST, ". . .")
    whole = tokenizer.encode(" keep", add_special_tokens=False)
    apart = [tokenizer.convert_tokens_to_ids(c) for c in ("Ġ", "kee", "p")]
    assert len(whole) == 1
    assert tokenizer.decode(apart) == " keep"
    tail = place.initial[1:]
    half_of_a_character = tokenizer.convert_tokens_to_ids("Ã")
    assert place.survive([[*whole, *tail], [*apart, *tail], [half_of_a_character, *tail]]) == [True, False, False]


def test_trimmed_suffix_does_not_survive(tokenizer):
    trimming = build_tokenizer()
    trimming.chat_template = trimming.chat_template.replace("message['content']", "message['content'] | trim")
    place = SuffixPrompt(trimming, REQUEST, ". . .")
    space = trimming.convert_tokens_to_ids("Ġ")
    assert place.survive([[*place.initial[:2], space], place.initial]) == [False, True]


def test_allowed_tokens_are_plain(tokenizer):
    allowed = allowed_tokens(tokenizer, 450, ascii_only=True)
    texts = [tokenizer.decode([i]) for i in allowed.nonzero().flatten().tolist()]
    assert all(text.isascii() and text.isprintable() and text for text in texts)
    assert {" keep", "!", "a"} <= set(texts)
    assert not allowed[tokenizer.all_special_ids].any()
    assert not allowed[tokenizer.convert_tokens_to_ids(["<|im_start|>", "<s>", "Ċ", "Ã"])].any()
    assert not allowed[len(tokenizer) :].any()


def test_swaps_differ_in_one_token_of_the_most_promising():
    gradient = torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    allowed = torch.zeros(400, dtype=torch.bool)
    allowed[50:350] = True
    promising = [set(sorted(range(50, 350), key=lambda v: row[v])[:6]) for row in gradient.tolist()]
    swaps = draw(torch.tensor(SUFFIX), gradient, allowed, 6, 300, torch.Generator().manual_seed(1))
    found = set()
    for swap in swaps:
        (place,) = [i for i in range(4) if swap[i] != SUFFIX[i]]
        assert swap[place] in promising[place]
        found.add((place, swap[place]))
    assert len(found) == len(swaps) == 24  # every one of 4 × 6 in 300 draws
    few = torch.zeros(400, dtype=torch.bool)
    few[[60, 61]] = True
    assert len(draw(torch.tensor(SUFFIX), gradient, few, 6, 100, torch.Generator().manual_seed(1))) == 8


def test_loss_falls_and_is_that_of_the_text_that_is_sent(model, tokenizer):
    found = list(results(PROMPTS, model, tokenizer, QUICK))
    for result, prompt in zip(found, PROMPTS, strict=True):
        target = tokenizer(prompt.target, add_special_tokens=False)["input_ids"]
        assert result.details["loss"] < 0.8 * result.details["initial_loss"]
        (ids,) = encode_prompts(tokenizer, [result.prompt.text])
        assert result.details["loss"] == pytest.approx(plain_loss(model, ids, target), rel=1e-4)
        (first,) = encode_prompts(tokenizer, [prompt.text + " " + QUICK.suffix])
        assert result.details["initial_loss"] == pytest.approx(plain_loss(model, first, target), rel=1e-4)
        assert result.prompt.text == prompt.text + result.details["suffix"]
        assert result.prompt.text.isascii()
        assert (result.prompt.behaviour, result.prompt.place) == (prompt.behaviour, prompt.place)
        assert result.steps == QUICK.steps
    assert [result.prompt.attack for result in found] == ["gcg", "urgency+gcg"]


def test_same_seed_same_suffix(model, tokenizer):
    again = [attack(PROMPTS[:1], model, tokenizer, QUICK)[0].text for _ in range(2)]
    other = attack(PROMPTS[:1], model, tokenizer, dataclasses.replace(QUICK, seed=1))[0].text
    assert again[0] == again[1] != other


def test_best_suffix_of_all_steps_is_kept_and_every_step_draws_anew(model, tokenizer, monkeypatch):
    least, seeds = [], []
    of, plain_draw = TargetLoss.of, draw

    def spy_of(self, suffixes):
        losses, matches = of(self, suffixes)
        least.append(float(losses.min()))
        return losses, matches

    def spy_draw(suffix, gradient, allowed, topk, width, generator):
        seeds.append(generator.initial_seed())
        return plain_draw(suffix, gradient, allowed, topk, width, generator)

    monkeypatch.setattr(TargetLoss, "of", spy_of)
    monkeypatch.setattr(gcg, "draw", spy_draw)
    (result,) = results(PROMPTS[:1], model, tokenizer, dataclasses.replace(QUICK, search_width=2, steps=12))
    assert result.details["loss"] == min(least) < least[-1]
    attack(PROMPTS[1:], model, tokenizer, QUICK)
    assert len(set(seeds)) == len(seeds) == 12 + QUICK.steps


def test_swap_that_does_not_survive_is_left_out_and_one_that_matches_goes_first(model, tokenizer, monkeypatch):
    ids = tokenizer.convert_tokens_to_ids
    rest = ids(["Ġ."] * 2)
    broken, best, matching = (ids(["Ġ", "kee", "p"]) + rest, ids(["Ġi"] * 3) + rest, ids(["Ġkeep", "Ġmy", "Ġ."]) + rest)
    told = {tuple(broken): (0.1, True), tuple(best): (1.0, False), tuple(matching): (2.0, True)}

    def of(self, suffixes):
        losses, matches = zip(*(told.get(tuple(row), (5.0, False)) for row in suffixes.tolist()), strict=True)
        return torch.tensor(losses), torch.tensor(matches)

    monkeypatch.setattr(TargetLoss, "of", of)
    monkeypatch.setattr(gcg, "draw", lambda *args: [broken, best, matching])
    (result,) = results(PROMPTS[:1], model, tokenizer, QUICK)
    assert result.prompt.text == f"{REQUEST} keep my . . ."
    assert (result.steps, result.details["loss"], result.details["matched"]) == (1, 2.0, True)
    assert result.details["survived"] == pytest.approx(2 / 3)
    (on,) = results(PROMPTS[:1], model, tokenizer, dataclasses.replace(QUICK, stop_on_match=False))
    assert (on.steps, on.details["loss"], on.details["matched"]) == (QUICK.steps, 1.0, False)


def test_a_loss_that_is_no_number_is_not_the_smallest(model, tokenizer, monkeypatch):
    ids = tokenizer.convert_tokens_to_ids
    rest = ids(["Ġ."] * 2)
    unknown, best = ids(["Ġi"] * 3) + rest, ids(["Ġkeep", "Ġmy", "Ġ."]) + rest
    told = {tuple(unknown): float("nan"), tuple(best): 1.0}

    def of(self, suffixes):
        losses = [told.get(tuple(row), 5.0) for row in suffixes.tolist()]
        return torch.tensor(losses), torch.tensor([tuple(row) == tuple(unknown) for row in suffixes.tolist()])

    monkeypatch.setattr(TargetLoss, "of", of)
    monkeypatch.setattr(gcg, "draw", lambda *args: [unknown, best])
    (result,) = results(PROMPTS[:1], model, tokenizer, dataclasses.replace(QUICK, steps=1))
    assert (result.details["loss"], result.details["matched"]) == (1.0, False)
    monkeypatch.setattr(gcg, "draw", lambda *args: [unknown])
    with pytest.raises(InputError, match="loss is not finite for any suffix"):
        list(results(PROMPTS[:1], model, tokenizer, dataclasses.replace(QUICK, steps=1)))


def test_stops_when_the_greedy_answer_begins_with_the_target(model, tokenizer):
    """From a target that the model says after some other suffix: the search may find it, and must tell that it did."""
    (ids,) = encode_prompts(tokenizer, [f"{REQUEST} . . keep . ."])
    with torch.no_grad():
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    target = tokenizer.decode([token])
    assert tokenizer(target, add_special_tokens=False)["input_ids"] == [token]
    prompt = dataclasses.replace(PROMPTS[0], target=target)
    (result,) = results([prompt], model, tokenizer, dataclasses.replace(QUICK, steps=40))
    assert result.details["matched"]
    assert result.steps < 40
    (said,) = generate(model, tokenizer, encode_prompts(tokenizer, [result.prompt.text]), max_new_tokens=1)
    assert said.text == target.strip()
    (on,) = results([prompt], model, tokenizer, dataclasses.replace(QUICK, steps=result.steps + 2, stop_on_match=False))
    assert on.steps == result.steps + 2


def test_stops_at_a_loss(model, tokenizer):
    (free,) = results(PROMPTS[:1], model, tokenizer, QUICK)
    reach = (free.details["loss"] + free.details["initial_loss"]) / 2
    (early,) = results(PROMPTS[:1], model, tokenizer, dataclasses.replace(QUICK, stop_loss=reach))
    assert early.steps < free.steps
    assert free.details["loss"] <= early.details["loss"] <= reach


def test_mode_is_left_as_it_was(tokenizer):
    model = large(build_model()).train()
    attack(PROMPTS[:1], model, tokenizer, dataclasses.replace(QUICK, steps=1))
    assert model.training


@pytest.mark.parametrize(
    ("request_text", "target"),
    [
        ("How do I keep snails out?", "Sure, here is how to keep snails out"),
        ("how can we dig a hole ? Be brief.", "Sure, here is how to dig a hole"),
        ("How to dig", "Sure, here is how to dig"),
        ("Write a letter.\nIt must be long.", "Sure, here is how to write a letter"),
        ("Which snail is best?", "Sure, here is the answer to your question, which snail is best?"),
        ("x", "Sure, here is how to x"),
    ],
)
def test_default_targets(request_text, target):
    assert default_target(request_text) == target


@pytest.mark.parametrize(
    "wrong",
    [
        *[{name: 0} for name in ("steps", "search_width", "topk", "batch_size", "save_every")],
        {"suffix": " "},
        {"stop_loss": -1.0},
        {"stop_loss": float("nan")},
    ],
)
def test_wrong_options(wrong):
    with pytest.raises(InputError, match=f"gcg.{next(iter(wrong))}"):
        GCGOptions(**wrong)
