"""The end-to-end benchmark at a shape of no consequence, and what it proves on the way: our losses are TRL's."""

import json
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from children import command
from transformers import AutoTokenizer

from bdpo_pl import embedded
from bdpo_pl.data.packing import RowLayout
from bdpo_pl.forward import prefix_sharing
from bdpo_pl.forward.document_attention import DOCUMENTS
from benchmarks.jobs import __main__ as jobs
from benchmarks.jobs import problem as problems
from benchmarks.jobs import scoring
from benchmarks.jobs.__main__ import curve_lines, loss_difference, markdown, seconds_to
from benchmarks.jobs.problem import DPOProblem, build, read
from benchmarks.jobs.real import build_real

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(module, *arguments):
    result = command(module, ["--device", "cpu", "--model", "tiny", *arguments], timeout=500)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_our_jobs_run_and_learn(tmp_path):
    arguments = ["--mixes", "balanced", "--spread", "0.5", "--scale", "0.2", "--pairs", "48", "--learning-rate", "3e-3"]
    only = ["--only", "ours, B-DPO", "--curve", "3", "--out", str(tmp_path)]
    printed = run("benchmarks.jobs", *arguments, *only)
    assert "| balanced 96/96, σ 0.5 | ours, B-DPO |" in printed
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-cpu-end-to-end.json"))
    (row,) = report["rows"]
    assert row["row_layout"] == "shared"
    assert row["losses"][0] == pytest.approx(0.6931, abs=1e-3)
    assert len(row["curve"]) == 3
    assert row["curve"][-1][1] < row["curve"][0][1]
    assert row["job_s"] == pytest.approx(row["scoring_s"] + row["training_s"])


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is in the extra `bench`")
def test_dpo_losses_are_trls_over_twenty_steps(tmp_path, monkeypatch):
    """Each trainer in a process that is forked, not started anew: most of its time would be imports."""

    def forked(line, timeout, letters):
        result = command(line[2], line[3:], timeout=500)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    monkeypatch.setattr(jobs, "result_of", forked)
    arguments = ["--mixes", "prompt-heavy", "--spread", "0.5", "--scale", "0.2", "--pairs", "80"]
    only = ["--only", "ours, DPO", "TRL DPO, precomputed reference", "--learning-rate", "2e-3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.jobs", "--device", "cpu", "--model", "tiny", *arguments, *only])
    jobs.main()
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    ours, theirs = (row["losses"] for row in report["rows"])
    assert len(ours) == len(theirs) == 20
    assert max(ours) - min(ours) > 0.02
    assert report["loss_differences"] == [pytest.approx(0, abs=1e-3)]


@pytest.mark.parametrize(
    ("pays", "layout", "attention"), [(2e8, RowLayout.SHARED, "sdpa"), (0.0, RowLayout.UNPADDED, DOCUMENTS)]
)
def test_scoring_benchmark_has_one_layout_for_all_mixes_and_plain_attention_beside_it(
    tmp_path, monkeypatch, capsys, pays, layout, attention
):
    used = []

    def watch(name):
        function = getattr(scoring, name)

        def watched(model, *args, layout=None):
            used.append((name, layout, model.config._attn_implementation))
            return function(model, *args, **({"layout": layout} if layout else {}))

        monkeypatch.setattr(scoring, name, watched)

    watch("score_pairs")
    watch("epoch_forward")
    monkeypatch.setattr(prefix_sharing, "_PAYS", pays)
    sizes = ["--model", "tiny", "--mixes", "balanced", "response-heavy", "--pairs", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.jobs.scoring", "--device", "cpu", *sizes, "--out", str(tmp_path)])
    scoring.main()
    assert capsys.readouterr().out.count("× an epoch's forward") == 2
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-cpu-scoring.json"))
    assert [row["layout"] for row in report["rows"]] == [layout.value] * 2
    turn = [("score_pairs", layout, attention), ("score_pairs", None, "sdpa"), ("epoch_forward", None, "sdpa")]
    assert used == turn * 4


def test_published_pairs_are_messages_that_fit_the_window(tmp_path):
    start = "\n\nHuman: what is it ?\n\nAssistant:"
    answers = [(" a plant .", " no ."), (" a tool .", " no" * 60), (" a boat .", " no idea ."), ("", " no .")]
    rows = [{"chosen": start + chosen, "rejected": start + rejected} for chosen, rejected in answers]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    problem = build_real(DPOProblem(num_pairs=2, window=40), embedded.MODEL_DIR, str(pairs), tmp_path / "a")
    found, train, held_out = read(tmp_path / "a")
    assert found == problem
    assert found.max_length == 40
    assert held_out == []
    assert {row["chosen"][0]["content"] for row in train} == {"a plant .", "a boat ."}
    assert all(row["prompt"] == [{"role": "user", "content": "what is it ?"}] for row in train)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "tokenizer")
    sides = [[*row["prompt"], *row[side]] for row in train for side in ("chosen", "rejected")]
    assert found.num_tokens == sum(len(tokenizer.apply_chat_template(s, return_dict=False)) for s in sides)
    with pytest.raises(SystemExit, match="only 2 pairs that fit 40 tokens"):
        build_real(DPOProblem(num_pairs=3, window=40), embedded.MODEL_DIR, str(pairs), tmp_path / "b")


def test_problem_has_the_lengths_it_says(tmp_path):
    problem = DPOProblem(model="tiny", mix="response-heavy", scale=0.5, num_pairs=300, num_held_out=2, spread=0.5)
    build(problem, tmp_path)
    again, train, held_out = read(tmp_path)
    assert again == problem
    assert len(train) == 300
    assert len(held_out) == 2
    prompts = [len(row["prompt"].split()) for row in train]
    responses = [len(row[side].split()) + 1 for row in train for side in ("chosen", "rejected")]
    assert sum(prompts) / 300 == pytest.approx(32, rel=0.1)
    assert sum(responses) / 600 == pytest.approx(96, rel=0.1)
    assert max(responses) > 2 * 96
    assert max(map(max, zip(prompts, responses, strict=False))) < problem.max_length


def test_a_model_of_a_gpu_is_written_by_a_process_of_its_own(tmp_path, monkeypatch):
    """What it held of the device is free again when it ends. Here a thread takes its place."""
    begun, threads = [], []

    class Elsewhere(ThreadPoolExecutor):
        def __init__(self, number, context):
            super().__init__(number)
            begun.append(context.get_start_method())

    monkeypatch.setattr(problems, "ProcessPoolExecutor", Elsewhere)
    monkeypatch.setattr(problems, "_write_model", lambda *arguments: threads.append(threading.current_thread()))
    for device in ("cpu", "cuda"):
        build(DPOProblem(model="tiny", num_pairs=1, device=device), tmp_path)
    assert begun == ["spawn"]
    assert [thread is threading.current_thread() for thread in threads] == [True, False]


def test_time_to_a_loss_is_read_off_the_curve():
    curve = [[1.0, 0.69], [2.0, 0.67], [3.0, 0.63]]
    assert seconds_to(0.65, curve) == pytest.approx(2.5)
    assert seconds_to(0.69, curve) == 1.0
    assert seconds_to(0.5, curve) is None
    # The first time counts, of a curve that leaves it again too.
    assert seconds_to(0.6, [[1.0, 0.5], [2.0, 0.7], [3.0, 0.4]]) == 1.0
    rows = [{"contender": "a", "curve": curve}, {"contender": "b", "curve": [[4.0, 0.69], [8.0, 0.65]]}]
    assert curve_lines(rows) == [
        "a: held-out DPO loss 0.6500 after 2.5 s",
        "b: held-out DPO loss 0.6500 after 8.0 s",
    ]


RUN = {
    "scoring_s": 1.0,
    "training_s": 1.0,
    "num_pairs": 4,
    "num_tokens": 40,
    "peak_bytes": 1,
    "losses": [],
    "curve": [],
}


def test_rounds_that_are_over_are_handed_on(monkeypatch):
    seconds = iter([4.0, 9.0, 2.0, 6.0, 3.0, 3.0])
    monkeypatch.setattr(jobs, "build", lambda problem, folder: None)
    monkeypatch.setattr(jobs, "child", lambda *arguments: RUN | {"job_s": next(seconds)})
    seen = []
    rows = jobs.compare(DPOProblem(), ["a", "b"], 3, after_round=seen.append)
    # A whole run needs no more than what is returned; a stop before it loses one round.
    assert [[row["jobs_s"] for row in found] for found in seen] == [[[4.0], [9.0]], [[4.0, 2.0], [9.0, 6.0]]]
    assert [(row["contender"], row["job_s"], row["jobs_s"]) for row in rows] == [
        ("a", 3.0, [4.0, 2.0, 3.0]), ("b", 6.0, [9.0, 6.0, 3.0]),
    ]  # fmt: skip


def test_a_race_that_is_stopped_has_written_and_shown_its_rounds(monkeypatch, tmp_path, capsys):
    seconds = iter([4.0, 9.0, 2.0, 6.0])

    def until_it_is_stopped(*arguments):
        if (job_s := next(seconds, None)) is None:
            raise KeyboardInterrupt
        return RUN | {"job_s": job_s}

    monkeypatch.setattr(jobs, "build", lambda problem, folder: None)
    monkeypatch.setattr(jobs, "child", until_it_is_stopped)
    what = ["--mixes", "balanced", "--spread", "0", "--only", "ours, DPO", "TRL DPO, live reference", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.jobs", "--device", "cpu", *what, "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        jobs.main()
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-cpu-end-to-end.json"))
    assert report.keys() == {"command", "date", "machine", "rows", "loss_differences"}
    assert [(row["job_s"], row["jobs_s"]) for row in report["rows"]] == [(3.0, [4.0, 2.0]), (7.5, [9.0, 6.0])]
    table = [line for line in capsys.readouterr().out.splitlines() if "| ours, DPO |" in line]
    assert [line.split(" | ")[2:6:3] for line in table] == [["4.0", "2.25"], ["3.0", "2.50"]]


def test_table_gives_ratios_and_reasons():
    problem = {"mix": "balanced", "spread": 0.0}
    done = {"problem": problem, "pairs_per_s": 1.0, "tokens_per_s": 10.0}
    rows = [
        done | {"contender": "ours, DPO", "job_s": 5.0, "peak_bytes": 1 << 30, "losses": [0.6931, 0.5]},
        done | {"contender": "TRL DPO, live reference", "job_s": 20.0, "peak_bytes": 2 << 30, "losses": [0.6931, 0.51]},
        {"problem": problem, "contender": "TRL DPO, precomputed reference", "not_run": "out of memory"},
    ]
    lines = markdown(rows).splitlines()
    assert lines[2] == "| balanced 96/96 | ours, DPO | 5.0 | 1.00 | 10 | 4.00 | – | 1,024 | 50% |"
    assert "not run: out of memory" in lines[4]
    assert loss_difference(rows) == pytest.approx(0.01)
    rows[0]["losses"][1] = float("nan")
    assert math.isnan(loss_difference(rows))


def test_head_benchmark_compares_the_two_paths(tmp_path):
    """On the embedded model: the same pairs by either path, alternating, and a peak of memory for each."""
    options = ["--device", "cpu", "--pairs", "4", "--turn", "2", "--out", str(tmp_path)]
    result = command("benchmarks.jobs.head", options)
    assert result.returncode == 0, result.stderr
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-cpu-head.json"))
    (row,) = report["rows"]
    assert (row["pairs"], row["vocabulary"]) == (4, 1728)
    assert {path: len(turns) for path, turns in row["turns_s"].items()} == {"fused head": 2, "model's own logits": 2}
    assert row["extra_bytes"].keys() == row["turns_s"].keys()
    assert row["largest_difference"] < 1e-3
    assert "| fused head |" in result.stdout
