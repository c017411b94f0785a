"""Several held-out sets by name: from the option to metrics, tables, reports, the cache and a resume."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import preference_rows, write_jsonl
from training import fit

from bdpo_pl.cli.job import FitCLI, parse_options
from bdpo_pl.data.held_out import held_out_sources
from bdpo_pl.data.loading import LoadOptions
from bdpo_pl.data.mixture import DataSource
from bdpo_pl.diagnose import main as diagnose
from bdpo_pl.errors import InputError
from bdpo_pl.fit import main
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.identity import describe_run
from bdpo_pl.training.summary import summary_rows

ROWS = preference_rows(40)
READ = {"max_length": 128}


@pytest.fixture
def files(tmp_path):
    """Training pairs, and two held-out sets of 6 and 10; a training prompt stands in the second."""
    parts = {"pairs": ROWS[:24], "near": ROWS[24:30], "far": [*ROWS[30:39], ROWS[0]]}
    return {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in parts.items()}


def read(files, model_dir, **data):
    module = PreferenceDataModule(files["pairs"], **READ, **data)
    return module, module.read(ModelSource(str(model_dir)))


def test_each_set_is_a_split_of_its_own_and_the_first_is_the_monitored_one(files, model_dir, capsys):
    data, splits = read(files, model_dir, held_out={"near": files["near"], "far": files["far"]})
    assert list(splits.tables) == ["train", "held_out", "held_out/far", "train_probe"]
    assert splits.held_out_pairs == {"near": 6, "far": 10}
    assert splits.monitored == "near"
    assert len(splits.tables["train_probe"]) == 6
    shown = capsys.readouterr().out
    assert "held_out (near)" in shown
    assert "held_out (far)" in shown
    leaks = [report.notes.get("prompts that are also in train (a leak)") for report in data.reports]
    assert leaks == [None, None, "1"]
    # One set without a name is what it always was.
    _, alone = read(files, model_dir, held_out=files["near"])
    assert list(alone.tables) == ["train", "held_out", "train_probe"]
    assert alone.held_out_pairs == {"": 6}
    for name in ("train", "held_out", "train_probe"):
        assert alone.tables[name].content_digest() == splits.tables[name].content_digest()


@pytest.mark.parametrize("with_it", ["pairs", "far"])
def test_a_column_that_one_source_has_is_none_that_no_source_has(with_it, files, model_dir):
    rows = [{**row, "context": "a b"} for row in ROWS[:6]]
    write_jsonl(Path(files[with_it]), rows)
    sets = {"near": files["near"], "far": files["far"]}
    _, splits = read(files, model_dir, held_out=sets, load=LoadOptions(ignore=["context"]))
    assert len(splits.tables[{"pairs": "train", "far": "held_out/far"}[with_it]]) == 6
    with pytest.raises(InputError, match=r"'contxt', and no row of .*pairs\.jsonl, .*far\.jsonl has it; did you"):
        read(files, model_dir, held_out=sets, load=LoadOptions(ignore=["context", "contxt"]))


def test_nothing_of_the_embedded_set_is_held_out_if_that_is_asked_for(files):
    assert PreferenceDataModule().held_out_sources
    assert not PreferenceDataModule(held_out_fraction=0.0).held_out_sources
    assert PreferenceDataModule(held_out=files["near"], held_out_fraction=0.0).held_out_source == files["near"]


def test_weight_and_limit_draw_a_part_of_a_set(files, model_dir):
    sets = {"near": DataSource(files["near"], limit=4), "far": DataSource(files["far"], weight=0.5)}
    data, splits = read(files, model_dir, held_out=sets)
    assert splits.held_out_pairs == {"near": 4, "far": 5}
    assert [report.kept for report in data.reports] == [24, 4, 5]
    assert data.reports[1].notes["left out by the limit of the source"] == "2"
    assert data.reports[2].notes["left out by the weight of the source"] == "5"
    said, lengths = "prompt tokens: median / 95 % / max", splits.tables["held_out/far"].prompt_lengths
    assert (
        data.reports[2].notes[said] == f"{np.median(lengths):.0f} / {np.percentile(lengths, 95):.0f} / {lengths.max()}"
    )
    _, again = read(files, model_dir, held_out=sets)
    assert again.tables["held_out/far"].places == splits.tables["held_out/far"].places
    # A limit on a source of training pairs.
    few = PreferenceDataModule([DataSource(files["pairs"], limit=5)], held_out_fraction=0.0, **READ)
    assert len(few.read(ModelSource(str(model_dir))).tables["train"]) == 5
    assert "at most 5 pairs" in few.train_source


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "no set is named"),
        ({"a.b": "x.jsonl"}, r"a set is named 'a\.b'"),
        ({"a/b": "x.jsonl"}, "letters, digits"),
        ({"": "x.jsonl"}, "a set is named ''"),
        ({"a": DataSource("x.jsonl", weight=2.0)}, "the weight of a is 2; .* at most 1"),
        (DataSource("x.jsonl", weight=2.0), r"the weight of x\.jsonl is 2; .* at most 1"),
        ("{sorce: x.jsonl}", r"not understood: \{sorce: x\.jsonl\}; write '\{source: a\.jsonl, limit: 500\}' for"),
        ("[{source: x.jsonl}]", "each has source, weight, split, revision, subset, limit and nothing else"),
        ({"source": "x.jsonl", "limit": "5"}, "for one set"),
    ],
)
def test_sets_that_cannot_be_are_refused_by_name(given, named):
    with pytest.raises(InputError, match=named):
        held_out_sources(given)


@pytest.mark.parametrize("options", [{"limit": 5}, {}])
def test_a_single_set_has_options_of_its_own(options, files):
    """They were taken for sets called `source` and `limit`."""
    given = json.dumps({"source": files["far"], **options})
    cli = parse_options(FitCLI, [f"--data.train={files['pairs']}", f"--data.held_out={given}"], None)
    assert cli.datamodule.held_out_sources == {"": DataSource(files["far"], **options)}


def test_a_limit_below_one_is_refused():
    with pytest.raises(InputError, match=r"the limit of x\.jsonl must be at least 1 pair, got 0"):
        DataSource("x.jsonl", limit=0)


def test_metrics_of_a_set_are_those_that_it_has_alone(files, job):
    sets = {"near": files["near"], "far": files["far"]}
    together = fit(job("both", data={"held_out": sets}))
    alone = fit(job("far", data={"held_out": files["far"], "train_probe": False}))
    for step in (0, max(together.evaluations)):
        both, far = together.evaluations[step], alone.evaluations[step]
        assert {name for name in both if name.startswith("held_out/far/")} == {
            name.replace("held_out/", "held_out/far/") for name in far
        }
        for name, value in far.items():
            assert both[name.replace("held_out/", "held_out/far/")] == pytest.approx(value, rel=1e-5, abs=1e-6)
        assert both["held_out/near/loss"] == both["held_out/loss"]
        assert both["gap/margin"] == pytest.approx(both["train_probe/margin"] - both["held_out/near/margin"])
    assert both["held_out/far/loss"] != both["held_out/near/loss"]
    traits = describe_run(together.trainer, together, together.trainer.datamodule)
    assert traits["held-out data"].shown.startswith("6 pairs")
    assert traits["held-out data, far"].shown.startswith("10 pairs")


def test_the_command_line_names_monitors_and_reports_each_set(files, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))
    options = [
        f"--model.policy={model_dir}",
        f"--data.train={files['pairs']}",
        f"--data.held_out={{near: {files['near']}, far: {{source: {files['far']}, limit: 8}}}}",
        "--trainer.accelerator=cpu",
    ]
    diagnose(options)
    found = json.loads((tmp_path / "runs/diagnosis/diagnosis.json").read_text())
    assert {name: split["overall"]["pairs"] for name, split in found["splits"].items()} == {
        "train": 24, "held_out": 6, "held_out/far": 8,
    }  # fmt: skip
    assert found["leaks"]["pairs"] == 14
    printed = capsys.readouterr().out
    assert "held-out (far)" in printed
    # What diagnose has scored, fit does not score again.
    monkeypatch.setattr("bdpo_pl.scoring.scoring_pass.score_pairs", lambda *_, **__: pytest.fail("scored again"))
    with pytest.raises(SystemExit):
        main([*options, "--checkpoint.monitor=held_out/fra/loss"])
    assert "did you mean held_out/far/loss" in capsys.readouterr().err
    main([*options, "--checkpoint.monitor=held_out/far/loss", "--trainer.enable_progress_bar=false",
          "--trainer.max_epochs=2", "--model.optimizer.lr=2e-3"])  # fmt: skip
    folder = tmp_path / "runs/version_0"
    with (folder / "metrics.csv").open() as file:
        names = set(csv.DictReader(file).fieldnames)
    assert {"held_out/loss", "held_out/near/loss", "held_out/far/loss", "held_out/far/accuracy"} <= names
    rows = {row[0]: row for row in json.loads((folder / "summary.json").read_text())["rows"]}
    assert rows["held-out (near) preference accuracy"][1:3] == ["6", "by definition"]
    assert rows["far: preference accuracy"][1:3] == ["8", "by definition"]
    assert "| near 6, far 8 |" in (folder / "model/README.md").read_text()
    assert "held-out, far" in (folder / "report.html").read_text()
    last = folder / "checkpoints" / "last.ckpt"
    monitored = [
        state["best_model_score"].item()
        for name, state in torch.load(last, weights_only=True)["callbacks"].items()
        if "held_out/far/loss" in name
    ]
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["held_out/far/loss"]) for row in csv.DictReader(file) if row["held_out/far/loss"]]
    assert monitored == [pytest.approx(min(losses[1:]), abs=1e-6)]


def test_rows_of_further_sets_carry_their_own_numbers():
    values = {f"held_out{name}/{metric}": 0.5 for name in ("", "/a", "/b") for metric in ("accuracy", "margin")}
    rows = summary_rows({0: {}, 3: values}, 3, {}, {}, pairs=4, sets={"a": 4, "b": 100})
    cells = {row[0]: row[1:] for row in rows}
    assert cells["held-out (a) preference accuracy"] == ["4", "–", "50.0% [15.0, 85.0]"]
    assert cells["b: preference accuracy"] == ["100", "–", "50.0% [40.4, 59.6]"]
    assert not any(label.startswith("a:") for label in cells)
