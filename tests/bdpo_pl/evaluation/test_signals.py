"""A signal ends an evaluation with its own status; the same command then asks nothing twice."""

import json
import os
import signal
from pathlib import Path

import pytest
from makers import write_jsonl

import bdpo_pl.evaluation.answerers as asking
from bdpo_pl.evaluate import main
from bdpo_pl.forward.generation import Response

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture
def command(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"harmful quokka {i} ?"} for i in range(6)]
    suite = write_jsonl(tmp_path / "harmful.jsonl", rows)
    return [f"m={model_dir}", f"--suites=harm:harmful={suite}", "--generation.batch_size=2"]


@pytest.mark.parametrize(("number", "batch"), [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGTERM, 3)])
def test_signal_while_a_model_answers(command, monkeypatch, capsys, number, batch):
    asked, stop = [], [batch]

    def generate(model, tokenizer, ids, *, on_response, **_):
        for i, prompt in enumerate(map(tokenizer.decode, ids)):
            if stop and len(asked) == 2 * (stop[0] - 1):
                os.kill(os.getpid(), number)
            asked.append(prompt)
            on_response(i, Response("I can't help with that." if "2" in prompt else "sure", 3, True))

    monkeypatch.setattr(asking, "generate", generate)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == STATUS[number]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    said = " ".join(capsys.readouterr().err.split())
    assert f"stopped by {number.name}; the verdicts so far are kept in --folder; the same command continues" in said
    folder = Path("runs/evaluation")
    assert not (folder / "report.html").exists()
    assert sum("judged" in line for line in (folder / "verdicts.jsonl").read_text().splitlines()) == 2 * (batch - 1)
    stop.clear()
    main(command)
    assert len(asked) == len(set(asked)) == 6
    gone_on = json.loads((folder / "evaluation.json").read_text())
    main([*command, "--folder=whole"])
    assert gone_on == json.loads(Path("whole/evaluation.json").read_text())
