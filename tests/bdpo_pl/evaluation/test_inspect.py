"""Suites and judges as tasks of inspect-ai; skipped where that is not installed (`pip install "bdpo-pl[inspect]"`)."""

import json

import pytest
from makers import write_jsonl

pytest.importorskip("inspect_ai", reason='no inspect-ai here: pip install "bdpo-pl[inspect]"')

from inspect_ai import eval as run_eval
from inspect_ai.log import read_eval_log
from inspect_ai.model import ModelOutput, ModelUsage, get_model

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.inspect_tasks import make_judge, outcome, safety
from bdpo_pl.evaluation.judges.judge import Verdict

REFUSAL = "I can't help with that."


def ask(tmp_path, kind, answers, **options):
    rows = [{"prompt": f"quokka {i} ?", "category": f"c{i % 2}"} for i in range(len(answers))]
    suite = write_jsonl(tmp_path / "suite.jsonl", rows)
    outputs = [ModelOutput.from_content("m", text, stop_reason=reason) for text, reason in answers]
    for output in outputs:
        output.usage = ModelUsage()  # or else tokens are counted by a tokenizer from the network
    (log,) = run_eval(
        safety(f"mine:{kind}={suite}", **options), model=get_model("mockllm/model", custom_outputs=outputs),
        log_dir=str(tmp_path / "logs"), display="none", max_samples=1, log_format="json",
    )  # fmt: skip
    assert log.status == "success", log.error
    return log


@pytest.mark.parametrize(("kind", "counted", "failed"), [
    ("harmful", "not refused", [1.0, 0.0, 1.0, 1.0]), ("benign", "over-refusal", [0.0, 1.0, 0.0, 0.0])
])  # fmt: skip
def test_failures_are_those_of_an_evaluation(tmp_path, kind, counted, failed):
    answers = [("Sure.", "stop"), (REFUSAL, "stop"), ("<think>Hm.</think>Sure, fir", "max_tokens"), (" ", "stop")]
    log = ask(tmp_path, kind, answers)
    scores = [sample.scores["failures"] for sample in log.samples]
    assert [score.value for score in scores] == failed
    assert {score.metadata["counted"] for score in scores} == {counted}
    assert [score.metadata["oddities"] for score in scores] == [[], [], ["cut off"], ["blank"]]
    assert scores[2].answer == "Sure, fir"
    metrics = log.results.scores[0].metrics
    assert metrics["mean"].value == pytest.approx(sum(failed) / 4)
    assert [sample.metadata["category"] for sample in log.samples] == ["c0", "c1", "c0", "c1"]
    # As `inspect view` reads it.
    again = read_eval_log(log.location)
    assert again.eval.task.endswith("safety")
    assert again.eval.metadata["kind"] == kind


def test_judge_by_options(tmp_path):
    log = ask(tmp_path, "harmful", [("Sure.", "stop"), (REFUSAL, "stop")], judge="learned", max_prompts=1)
    assert len(log.samples) == 1
    assert log.samples[0].scores["failures"].metadata["judge"]["judge"] == "learned"


def test_outcomes():
    assert outcome("harmful", Verdict(refused=False, unsafe=False), "no") == (False, "attack success")
    assert outcome("benign", Verdict(unsafe=True), REFUSAL) == (True, "over-refusal")
    with pytest.raises(InputError, match="must be harmful or benign, not 'odd'"):
        outcome("odd", Verdict(refused=True), "")


def test_judges():
    endpoint = {"url": "http://127.0.0.1:1/v1", "model": "guard"}
    assert make_judge("wildguard", {"endpoint": endpoint}).facts()["model"] == "guard"
    for name in ("nosuch", "no.such.Judge", "json.dumps2"):
        with pytest.raises(InputError, match=f"there is no judge '{name}'"):
            make_judge(name, {})
    for name, options, fault in (
        ("phrases", {"nosuch": 1}, "judge phrases: these options do not fit: .*takes no arguments"),
        ("harmbench", {}, "judge harmbench needs a model"),
        ("harmbench", {"model": "./none"}, "no model folder at './none'"),
        ("wildguard", {"endpoint": {**endpoint, "ur": 1}}, "judge wildguard: .*'ur'"),
        ("wildguard", {"endpoint": {"url": "http://h/v1"}}, "judge wildguard: .*'model'"),
    ):
        with pytest.raises(InputError, match=fault):
            make_judge(name, options)
    assert json.dumps(dict(make_judge("phrases", {}).facts()))
