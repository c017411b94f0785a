"""A miniature of the study: cells come out the same to the last digit, in any process, and finished ones are kept."""

import json
import logging

import numpy as np
import pytest
import torch

from bdpo_pl.errors import InputError
from benchmarks.study.run import plan
from benchmarks.study.run.cell import write_rows
from benchmarks.study.run.evaluate import FRAMED, evaluation
from benchmarks.study.run.imbalance import choose, describe, imbalances
from benchmarks.study.run.records import append, differences, read_records
from benchmarks.study.run.reference import make_reference, reference_folder
from benchmarks.study.run.runner import COMPARED, quiet_cell, run_cells
from benchmarks.study.run.settings import Setting
from benchmarks.study.world.texts import preference_pairs

STEPS = 6
SMALL = {"num_pairs": 48, "evaluate": "validation", "reference_steps": STEPS}


@pytest.fixture(scope="module", autouse=True)
def loggers_as_before():
    """A cell silences Lightning for its process, which here has other tests to run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    make_reference(folder, 0, STEPS)
    return folder


@pytest.fixture(scope="module")
def cell(folder):
    setting = plan.BDPO.setting("final", 0.1, learning_rate=1e-3, **SMALL)
    return setting, quiet_cell(setting, folder)


def test_a_cell_is_measured_in_full(cell):
    setting, record = cell
    metrics = record["metrics"]
    assert record["key"] == setting.key
    assert record["steps"] == 3
    framings = {name for name in evaluation("validation").prompts if name.startswith(FRAMED)}
    assert set(metrics["attack_success"]) == {"harmful", "framed"} | framings
    assert metrics["attack_success"]["framed"] == pytest.approx(
        np.mean([metrics["attack_success"][f] for f in framings])
    )
    for name, prompts in evaluation("validation").prompts.items():
        assert sum(metrics["kinds"][name].values()) == len(prompts)
    pairs = metrics["pairs"]
    assert pairs["gap/margin"] == pytest.approx(pairs["train_probe/margin"] - pairs["held_out/margin"])
    assert pairs["held_out/margin"] != 0
    assert record["imbalance"]["q5"] < record["imbalance"]["q50"] < record["imbalance"]["q95"]
    # It is what the file of records will hold.
    assert json.loads(json.dumps(record)) == record


def test_a_cell_is_the_same_in_another_process_and_is_not_run_again(cell, folder, tmp_path):
    """The process is spawned, so that it hashes by another seed."""
    setting, record = cell
    out = tmp_path / "records.jsonl"
    append(out, {"machine": "this one"})
    run_cells([setting], folder, out, workers=1, title="Test")
    written = read_records(out)
    assert set(written) == {setting.key}
    assert differences(record, written[setting.key], COMPARED) == []
    size = out.stat().st_size
    run_cells([setting], folder, out, workers=1, title="Test")
    assert out.stat().st_size == size
    out.write_text(json.dumps(record | {"texts": "others"}) + "\n")
    with pytest.raises(InputError, match="another world"):
        run_cells([setting], folder, out, workers=1, title="Test")
    seed = quiet_cell(setting.with_changes(seed=1), folder)
    assert any("pairs" in line for line in differences(record, seed, COMPARED))


def test_a_curve_measures_and_leaves_training_alone(cell, folder):
    setting, record = cell
    curve = quiet_cell(setting.with_changes(curve_points=3), folder)
    assert [point["step"] for point in curve["curve"]] == [1, 2, 3]
    assert curve["metrics"] == record["metrics"]
    assert curve["curve"][-1]["pairs"] == record["metrics"]["pairs"]
    assert curve["curve"][0]["pairs"] != record["metrics"]["pairs"]


@pytest.mark.parametrize("name", ["SafeDPO", "CPO"])
def test_other_methods_train(name, folder, monkeypatch):
    """Their answers are not asked for: what is measured of those is tested above."""
    monkeypatch.setattr("benchmarks.study.run.cell.evaluate", lambda *_: {})
    (method,) = (method for method in plan.METHODS if method.name == name)
    record = quiet_cell(method.setting("final", method.betas[0], **SMALL), folder)
    assert record["metrics"]["pairs"]["train_probe/margin"] > 0


def test_numbers_that_are_not_finite_end_a_cell_and_not_the_study(folder):
    record = quiet_cell(plan.DPO.setting("final", 0.1, learning_rate=1e30, **SMALL), folder)
    assert "not finite" in record["failed"] or "is nan" in record["failed"]
    assert "metrics" not in record


def test_halves_are_by_imbalance_within_each_kind(folder, tmp_path):
    rows = preference_pairs("train", 48, 0)
    write_rows(rows, tmp_path / "train.jsonl")
    found = imbalances(tmp_path / "train.jsonl", reference_folder(folder, 0, STEPS))
    assert found.shape == (48,)
    assert (found > 0).any()
    assert (found < 0).any()
    halves = {half: choose(rows, found, half, seed=0) for half in plan.HALVES}
    size = {row["prompt"]: abs(value) for row, value in zip(rows, found, strict=True)}
    for kind, number in {"harmful": 32, "everyday": 8, "look_alike": 8}.items():
        mine = {half: [size[r["prompt"]] for r in chosen if r["kind"] == kind] for half, chosen in halves.items()}
        assert {len(values) for values in mine.values()} == {number // 2}
        assert max(mine["balanced half"]) <= min(mine["imbalanced half"])
    assert halves["random half"] == choose(rows, found, "random half", seed=0)
    assert halves["random half"] != choose(rows, found, "random half", seed=1)


def test_imbalance_is_described():
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 0.8])
    found = describe(torch.stack([chosen, rejected]))
    assert found["mean"] == pytest.approx(0.55)
    assert found["mean_abs"] == pytest.approx(1.05)
    assert found["chosen_better"] == 0.75
    assert (found["strong_at_tau_0.25"], found["strong_at_tau_1"]) == (1.0, 0.75)


def test_a_line_cut_short_is_no_record(tmp_path):
    out = tmp_path / "records.jsonl"
    append(out, {"key": "a", "setting": {}})
    with out.open("a") as file:
        file.write('{"key": "b", "sett')
    assert set(read_records(out)) == {"a"}
    append(out, {"key": "c", "setting": {}})
    assert set(read_records(out)) == {"a", "c"}
    out.write_text('{"key": "b", "sett\n{"key": "c"}\n')
    with pytest.raises(InputError, match="line 1: no JSON"):
        read_records(out)


def test_differences_name_the_number():
    old = {"metrics": {"ability": {"all": 0.5}}, "seconds": 1.0}
    assert differences(old, {"metrics": {"ability": {"all": 0.5}}, "seconds": 2.0}, COMPARED) == []
    assert differences(old, {"metrics": {"ability": {"all": 0.6}}}, COMPARED) == ["metrics.ability.all: 0.5 → 0.6"]
    assert differences(old, {"failed": "nan"}, COMPARED) == ["failed: None → 'nan'", "metrics.ability.all: 0.5 → None"]


def test_settings_that_differ_have_other_keys():
    setting = Setting("final", "DPO", "DPOLoss", {"beta": 0.1})
    assert setting.key == Setting("final", "DPO", "DPOLoss", {"beta": 0.1}).key
    assert setting.key != setting.with_changes(arguments={"beta": 0.2}).key
