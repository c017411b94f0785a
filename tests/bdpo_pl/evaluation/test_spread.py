"""A model on several devices, here processes on a CPU: answers, verdicts and errors are as with one."""

import json
import os
import select
import signal
from contextlib import closing, suppress
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path

import pytest
import spread_models
import torch
from children import serve, start
from makers import write_jsonl
from torch.multiprocessing import ProcessExitedException

import bdpo_pl.evaluation.answerers as asking
from bdpo_pl.errors import InputError, MachineError
from bdpo_pl.evaluate import main
from bdpo_pl.evaluation import spread
from bdpo_pl.evaluation.answerers import GenerationOptions, LocalAnswerer
from bdpo_pl.evaluation.answering import Asker
from bdpo_pl.evaluation.judges.phrases import PhraseJudge
from bdpo_pl.evaluation.subjects import subject
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.verdict_log import RecordFile

CPU = torch.device("cpu")
OPTIONS = GenerationOptions(max_new_tokens=6, batch_size=2)
PROMPTS = [EvaluationPrompt(text, text) for text in (f"{'slugs and ' * (i % 4)}snails {i} ?" for i in range(9))]
LIMIT = 120_000
"""Milliseconds until a process that should end is given up."""


@pytest.fixture(autouse=True)
def fast_processes(monkeypatch):
    serve()
    monkeypatch.setattr(spread, "PROCESSES", get_context("forkserver"))


@pytest.fixture
def model(model_dir):
    return subject(str(model_dir))


def on_devices(model, further):
    return model.answerer(torch.float32, partial(model.load, torch.float32, CPU), OPTIONS, further)


def counted(monkeypatch):
    """Prompts that this process generates for."""
    asked, generate = [], asking.generate

    def count(model, tokenizer, prompts, **options):
        asked.extend(prompts)
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr(asking, "generate", count)
    return asked


def test_answers_are_those_of_one_device(model, monkeypatch):
    one = on_devices(model, [])
    assert isinstance(one, LocalAnswerer)
    questions = one.questions(PROMPTS)
    expected = one.answer(questions)
    assert len({answer.text for answer in expected}) > 3
    asked, taken = counted(monkeypatch), {}
    with closing(on_devices(model, [CPU, CPU])) as three:
        assert three.questions(PROMPTS) == questions
        assert three.answer(questions, taken.__setitem__) == expected
        assert taken == dict(enumerate(expected))
        assert len(asked) == 3
        before = {child.pid for child in active_children()}
        assert len(before) == 2
        # A single question is nothing for the others.
        assert three.answer(questions[4:5]) == expected[4:5]
        assert three.answer(questions[:5]) == expected[:5]
        assert {child.pid for child in active_children()} == before
        assert len(asked) == 6
        # An attack's search asks here alone.
        assert three.respond([prompt.text for prompt in PROMPTS]) == [answer.text for answer in expected]
        assert len(asked) == 15
    assert not active_children()


def test_why_there_are_no_continuous_batches_is_told_once(model_dir, tmp_path, model):
    settings = json.loads((model_dir / "generation_config.json").read_text())
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, "no_repeat_ngram_size": 2}))
    with closing(on_devices(subject(str(tmp_path)), [CPU])) as two:
        two.answer(two.questions(PROMPTS[:4]))
        (note,) = two.notes
    assert "no_repeat_ngram_size" in note


@pytest.mark.parametrize(
    ("load", "kind", "said"),
    [
        ("unreadable", InputError, "answers on cpu: weights.safetensors is damaged; fetch it again"),
        ("too_large", MachineError, r"answers on cpu: loading the model ran out of memory \(CUDA .*; lower devices"),
        ("faulty", MachineError, "(?s)answers on cpu: loading the model failed.*ZeroDivisionError: a fault of ours"),
        ("killed", MachineError, "answers on cpu was killed by SIGKILL. The system kills .*; lower devices"),
        ("left", MachineError, "answers on cpu ended with status 7"),
    ],
)
def test_process_that_fails_is_named_and_what_came_is_taken(model, model_dir, load, kind, said):
    own = on_devices(model, [])
    taken = {}
    sound = partial(subject(str(model_dir)).load, torch.float32, CPU)
    further = [("cpu", getattr(spread_models, load)), ("cpu", sound)]
    many = own.questions(PROMPTS)
    with closing(spread.SpreadAnswerer(own, OPTIONS, further)) as three:
        with pytest.raises(kind, match=said):
            three.answer(many, taken.__setitem__)
        assert not active_children()
        expected = own.answer(many)
        assert all(answer == expected[number] for number, answer in taken.items())
        assert taken
        # More than a pipe holds, for a process that does not read.
        with pytest.raises(kind, match=said):
            three.answer(many * 300, lambda number, answer: None)


def test_running_out_of_memory_here_is_told_as_with_one_device(model, monkeypatch):
    def generate(*_, **__):
        raise RuntimeError("CUDA out of memory")

    with closing(on_devices(model, [CPU])) as two:
        questions = two.questions(PROMPTS)
        monkeypatch.setattr(asking, "generate", generate)
        with pytest.raises(InputError, match="generating 2 responses at a time ran out of memory; lower generation"):
            two.answer(questions)
    assert not active_children()


def test_verdicts_outlive_a_process_and_nothing_is_judged_twice(model, tmp_path):
    suite = Suite("mine", "harmful", PROMPTS)
    judged = []

    class Judge(PhraseJudge):
        def judge(self, exchanges):
            judged.extend(exchange.prompt for exchange in exchanges)
            for child in active_children()[:kill]:
                child.kill()
            return super().judge(exchanges)

    def ask(answerer):
        with RecordFile(tmp_path / "v.jsonl", False) as records, closing(answerer):
            return Asker(Judge(), records, OPTIONS).ask(suite, answerer)

    kill = 1
    own = on_devices(model, [])
    with pytest.raises(MachineError, match=r"killed by SIGKILL.*The verdicts so far are in .*v\.jsonl: the same comm"):
        ask(spread.SpreadAnswerer(own, OPTIONS, [("cpu", spread_models.endless)]))
    assert 0 < len(judged) < len(PROMPTS)
    kill = 0
    found = ask(on_devices(model, [CPU]))
    assert sorted(judged) == sorted(prompt.text for prompt in PROMPTS)
    (tmp_path / "v.jsonl").unlink()
    assert found == ask(own)


@pytest.fixture
def command(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{'very ' * i}harmful quokka {i} ?"} for i in range(8)]
    suite = write_jsonl(tmp_path / "harmful.jsonl", rows)
    return [f"m={model_dir}", f"--suites=harm:harmful={suite}", "--generation.batch_size=2", "--device=cpu",
            "--generation.max_new_tokens=4"]  # fmt: skip


def results(folder):
    found = json.loads((Path(folder) / "evaluation.json").read_text())
    return found["facts"].pop("device"), found


def verdicts(folder):
    lines = (Path(folder) / "verdicts.jsonl").read_text().splitlines()[1:]
    return sorted(line for line in lines if json.loads(line).get("judged"))


def test_killed_command_leaves_no_process_and_goes_on_where_it_was(command, tmp_path):
    main([*command, "--folder=one"])
    with pytest.raises(ProcessExitedException):
        start(spread_models.evaluate_until_killed, ([*command, "--folder=two", "--devices=2"], 3, "pids"), 1)
    pids = [int(pid) for pid in Path("pids").read_text().split()]
    assert len(pids) == 1
    for pid in pids:
        with suppress(ProcessLookupError):
            ended = select.poll()
            ended.register(os.pidfd_open(pid), select.POLLIN)
            assert ended.poll(LIMIT)
    assert len(verdicts("two")) == 3
    main([*command, "--folder=two", "--devices=2"])
    assert verdicts("two") == verdicts("one")
    (device, one), (devices, two) = results("one"), results("two")
    assert (device, devices) == ("cpu", "cpu, cpu")
    assert one == two


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_processes_too(command, monkeypatch, capsys, number):
    add = RecordFile.add_verdict

    def add_verdict(self, *args):
        add(self, *args)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(RecordFile, "add_verdict", add_verdict)
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--devices=2"])
    assert stopped.value.code == 128 + number
    assert f"stopped by {number.name}; the verdicts so far are kept" in " ".join(capsys.readouterr().err.split())
    assert not active_children()
    assert len(verdicts("runs/evaluation")) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--devices=0"], "--devices must be at least 1 and at most 1024; got 0"),
        (["--devices=some"], "devices"),
        (["--devices=2", "http://127.0.0.1:1/v1#m"], "devices is 2, and no model is loaded here; leave it out"),
    ],
)
def test_devices_that_make_no_sense_are_refused(command, capsys, options, said):
    with pytest.raises(SystemExit) as stopped:
        main([*(command[1:] if "http" in options[-1] else command), *options])
    assert stopped.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
