"""Interruption, state and folder of a GCG attack, and what is told before any work."""

import dataclasses
import json

import pytest
import torch
from makers import build_model, build_tokenizer, large
from quick_gcg import PROMPTS, QUICK

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.attacks.attack import StateFile
from bdpo_pl.evaluation.attacks.gcg import attack, results
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("forwards", [2, 9, 25, 40])
def test_interrupted_attack_goes_on_to_the_same_end(model, tokenizer, tmp_path, forwards):
    expected = list(results(PROMPTS, model, tokenizer, QUICK, folder=tmp_path / "whole"))
    count = 0

    def interrupt(*args):
        nonlocal count
        count += 1
        if count == forwards:
            raise InterruptionError

    hook = model.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(InterruptionError):
            attack(PROMPTS, model, tokenizer, QUICK, folder=tmp_path / "cut")
    finally:
        hook.remove()
    steps = []
    handle = model.register_forward_pre_hook(lambda *args: steps.append(1))
    resumed = list(results(PROMPTS, model, tokenizer, QUICK, folder=tmp_path / "cut"))
    handle.remove()
    assert resumed == expected
    files = [sorted((tmp_path / folder).iterdir()) for folder in ("whole", "cut")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    # A finished attack is not run again.
    before = len(steps)
    handle = model.register_forward_pre_hook(lambda *args: steps.append(1))
    assert list(results(PROMPTS, model, tokenizer, QUICK, folder=tmp_path / "cut")) == expected
    handle.remove()
    assert len(steps) == before


def test_state_lies_under_a_warning_where_it_was_asked_for_and_nowhere_else(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    progress = []
    attack(PROMPTS, model, tokenizer, QUICK, on_progress=lambda *p: progress.append(p))
    assert list(tmp_path.iterdir()) == []
    assert progress == [(1, 2), (2, 2)]
    attack(PROMPTS[:1], model, tokenizer, QUICK, folder=tmp_path / "state")
    (file,) = (tmp_path / "state").iterdir()
    assert "do not publish" in json.loads(file.read_text().splitlines()[0])["warning"]
    assert file.stat().st_mode & 0o077 == 0


def test_another_model_or_option_begins_anew(tokenizer, tmp_path):
    model = large(build_model())
    attack(PROMPTS[:1], model, tokenizer, QUICK, folder=tmp_path)
    attack(PROMPTS[:1], model, tokenizer, dataclasses.replace(QUICK, batch_size=3, save_every=1), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    attack(PROMPTS[:1], model, tokenizer, dataclasses.replace(QUICK, seed=1), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    attack(PROMPTS[:1], model, tokenizer, QUICK, folder=tmp_path, use_template=False)
    assert len(list(tmp_path.iterdir())) == 3
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    attack(PROMPTS[:1], model, tokenizer, QUICK, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-40], lambda text: text + "{}\n", lambda text: "", lambda text: "[]"]
)
def test_damaged_state_is_told(model, tokenizer, tmp_path, damage):
    attack(PROMPTS[:1], model, tokenizer, QUICK, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(damage(file.read_text()))
    with pytest.raises(InputError, match=f"{file.name}.*remove it"):
        attack(PROMPTS[:1], model, tokenizer, QUICK, folder=tmp_path)


def test_folder_that_cannot_be_written_is_told_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        StateFile(tmp_path / "file" / "state", "gcg", {})


def test_prompts_that_cannot_be_attacked_are_told_before_any_work(model, tokenizer):
    long = EvaluationPrompt("why ? " * 300, "why ?", place="line 3", target="set")
    with pytest.raises(InputError, match=r"line 3: .*positions for 512"):
        attack([PROMPTS[0], long], model, tokenizer, QUICK)
    with pytest.raises(InputError, match="line 1: with its suffix and an answer it does not fit"):
        next(results(PROMPTS, model, tokenizer, QUICK, fits=lambda text: ". . . . ." not in text))
    deaf = build_tokenizer()
    deaf.chat_template = deaf.chat_template.replace("message['content']", "message['content'][:4]")
    with pytest.raises(InputError, match=r"line 1: gcg.suffix '. . . . .' was not found"):
        attack(PROMPTS, model, deaf, QUICK)
