"""The study with a real model: its plan and rule of choice, its draws, and a cell on a tiny model."""

import gzip
import json
from dataclasses import replace

import children
import pytest
from filelock import FileLock
from makers import build_model, build_tokenizer

from benchmarks.study.real import __main__ as command
from benchmarks.study.real import cell as cells
from benchmarks.study.real import plan
from benchmarks.study.run.records import append, read_records


@pytest.fixture
def place(tmp_path):
    """A tiny model, and data in the layouts of the published files."""
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    (data / "preferences").mkdir(parents=True)
    (data / "suites").mkdir()
    with gzip.open(data / cells.PAIRS, "wt") as file:
        for i in range(60):
            asked = f"\n\nHuman: how do i keep {i} snails ?\n\nAssistant:"
            file.write(
                json.dumps({"chosen": f"{asked} set traps .", "rejected": f"{asked} read the label {i} ."}) + "\n"
            )
    with gzip.open(data / "suites" / "xstest_prompts.csv.gz", "wt") as file:
        file.write("id,prompt,type,label,focus,note\n")
        file.writelines(f"{i},how do i water {i} ?,homonyms,{'un' * (i % 2)}safe,,\n" for i in range(8))
    with gzip.open(data / "suites" / "strongreject_dataset.csv.gz", "wt") as file:
        file.write("category,source,forbidden_prompt\n")
        file.writelines(f"garden,own,poison {i} ?\n" for i in range(4))
    (tmp_path / "folder").mkdir()
    return cells.Place(tmp_path / "model", data, tmp_path / "folder")


def test_every_method_has_equal_trials_and_nothing_is_chosen_on_test_pairs():
    trials = plan.tuning()
    assert {method: sum(cell.method == method for cell in trials) for method in plan.METHODS} == dict.fromkeys(
        plan.METHODS, len(plan.BETAS) * len(plan.LEARNING_RATES)
    )
    assert {cell.seed for cell in trials} & set(plan.SEEDS) == set()
    assert {cell.held_out for cell in trials} == {"validation"}
    assert len({cell.key for cell in trials}) == len(trials)


def test_the_best_trial_by_validation_is_tested_with_every_seed():
    trials = plan.tuning()
    records = {cell.key: {"pairs": {"held_out/logp_accuracy": 0.5, "held_out/drift_chosen": -2.0}} for cell in trials}
    mine = [cell for cell in trials if cell.method == "B-DPO"]
    records[mine[2].key]["pairs"]["held_out/logp_accuracy"] = 0.6
    records[mine[3].key]["pairs"] = {"held_out/logp_accuracy": 0.6, "held_out/drift_chosen": 1.0}
    best = plan.chosen(records)
    assert best["B-DPO"] == mine[3]
    tested = plan.final(best)
    assert [cell.seed for cell in tested if cell.method == "B-DPO"] == list(plan.SEEDS)
    assert {(cell.learning_rate, json.dumps(cell.arguments)) for cell in tested if cell.method == "B-DPO"} == {
        (mine[3].learning_rate, json.dumps(mine[3].arguments))
    }
    assert {cell.held_out for cell in tested} == {"test"}
    del records[mine[0].key]
    assert "B-DPO" not in plan.chosen(records)


def test_no_row_is_in_two_draws(place, monkeypatch):
    monkeypatch.setattr(cells, "HELD_OUT", 15)
    test, validation = (set(cells.draw(place.data, which, 15)) for which in ("test", "validation"))
    train = [set(cells.draw(place.data, "train", 12, seed)) for seed in (0, 0, 1)]
    assert train[0] == train[1] != train[2]
    assert not test & validation
    assert not (test | validation) & (train[0] | train[2])


def run(name, *options):
    done = children.command(f"bdpo_pl.{name}", options)
    assert done.returncode == 0, done.stderr


def test_a_cell_is_measured_and_the_same_again(place, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cells, "run_command", run)
    monkeypatch.setattr(cells, "HELD_OUT", 8)
    monkeypatch.setattr(cells, "MAX_NEW_TOKENS", 4)
    cell = plan.Cell("final", "B-DPO", "BalancedDPOLoss", {"beta": 0.1, "tau": "auto"}, 1e-3, 0, 16, 8)
    record = cells.run_cell(cell, place)
    assert record["pairs"]["held_out/logp_accuracy"] <= 1
    assert record["pairs"]["gap/margin"] == pytest.approx(
        record["pairs"]["train_probe/margin"] - record["pairs"]["held_out/margin"]
    )
    assert {name: len(text) for name, text in record["refused"].items()} == {
        "xstest_benign": 4, "xstest_harmful": 4, "strongreject": 4,
    }  # fmt: skip
    assert list(place.folder.iterdir()) == [place.folder / "scores"]
    append(tmp_path / "out.jsonl", record)
    assert plan.Cell(**read_records(tmp_path / "out.jsonl")[cell.key]["cell"]) == cell
    command.again(cell.key, tmp_path / "out.jsonl", place)
    assert "the same to the last digit" in capsys.readouterr().out


def test_a_loss_without_balance_weights_is_measured(place, monkeypatch):
    monkeypatch.setattr(cells, "run_command", run)
    monkeypatch.setattr(cells, "HELD_OUT", 15)
    trial = replace(next(cell for cell in plan.tuning() if cell.method == "AdaDPO"), num_pairs=8)
    found = cells.run_cell(trial, place)["pairs"]
    assert found["gap/margin"] == pytest.approx(found["train_probe/margin"] - found["held_out/margin"])
    assert "held_out/imbalance" not in found


def test_what_is_left_is_told(tmp_path):
    append(tmp_path / "out.jsonl", {"key": plan.reference().key})
    assert command.plan(tmp_path / "out.jsonl").splitlines() == ["reference: 1 of 1 cells", "tuning: 0 of 24 cells"]


def test_processes_share_the_cells(place, tmp_path, monkeypatch, capsys):
    ran = []

    def run_cell(cell, place):
        ran.append(cell)
        return {"key": cell.key, "pairs": {"held_out/logp_accuracy": 0.5, "held_out/drift_chosen": 0.0}, "seconds": 1.0}

    monkeypatch.setattr(command, "run_cell", run_cell)
    out = tmp_path / "out.jsonl"
    options = {"--model": place.model, "--data": place.data, "--folder": place.folder, "--out": out}
    arguments = [str(part) for option in options.items() for part in option]
    trials = plan.tuning()
    with FileLock(place.folder / f"{trials[0].key}.lock"):
        command.main([*arguments, "--most", "0"])
        assert not out.exists()
        capsys.readouterr()
        command.main([*arguments, "--most", "2"])
        head = json.loads(out.read_text().splitlines()[0])["command"]
        assert head[:5] == ["python", "-m", "benchmarks.study.real", "--model", "model"]
        assert ran == [plan.reference(), trials[1]]
        assert "23 cells are left" in capsys.readouterr().out
        command.main(arguments)
        assert ran[2:24] == trials[2:]
        # The choice of DPO waits for the cell that another process runs; all other methods are tested already.
        assert {cell.method for cell in ran[24:]} == plan.METHODS.keys() - {"DPO"}
        assert "1 cells are left, of which other processes may run some" in capsys.readouterr().out
    command.main(arguments)
    assert ran[-16] == trials[0]
    assert len({cell.key for cell in ran}) == len(ran) == 1 + 24 + 30 + 10
    # The records of one model are not gone on with by another.
    build_model(vocab_size=401).save_pretrained(place.model)
    with pytest.raises(SystemExit, match=r"out\.jsonl has cells of another model than .*model; give another file with"):
        command.main(arguments)


def test_settings_of_the_first_model_are_confirmed_on_a_second_one(tmp_path, capsys):
    first = tmp_path / "first.jsonl"
    command.main(["--plan", "--out", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit):
        command.main(["--plan", "--settings", str(first)])
    assert "has not all trials of DPO and B-DPO" in capsys.readouterr().err
    for cell in plan.tuning():
        pairs = {"held_out/logp_accuracy": 0.5 + cell.arguments["beta"], "held_out/drift_chosen": cell.learning_rate}
        append(first, {"key": cell.key, "cell": vars(cell), "pairs": pairs})
    command.main(["--plan", "--settings", str(first), "--out", str(tmp_path / "second.jsonl")])
    printed = capsys.readouterr().out
    assert "confirmation: 0 of 10 cells" in printed
    assert "AdaDPO" not in printed
    cells = plan.confirmation(plan.chosen(read_records(first)))
    assert {(cell.arguments["beta"], cell.learning_rate, cell.held_out) for cell in cells} == {(0.3, 5e-6, "test")}
    assert not any(cell.asks_prompts for cell in cells)
