"""The examples run as they are. Those of the kernels have their tests with the kernels."""

import json
import runpy
from pathlib import Path

import pytest
import yaml
from children import command
from makers import build_model, build_tokenizer, preference_rows, write_jsonl

from bdpo_pl.fit import main as fit

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_fit_in_python_learns(monkeypatch, tmp_path, fewer_pairs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))
    result = runpy.run_path(str(EXAMPLES / "fit_in_python.py"))["main"](max_steps=4)
    assert result["held_out/loss"] < 0.693


def test_sweep_runs_each_combination_once_and_compares_them(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))
    build_model().save_pretrained("model")
    build_tokenizer().save_pretrained("model")
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(16))
    sweep = runpy.run_path(str(EXAMPLES / "sweep.py"))["main"]
    ran = []

    def run(arguments):
        ran.append(arguments)
        fit(arguments)

    options = [
        "--vary=beta=0.05,0.3", "--into=sweep", "--", "--model.policy=model", "--data.train=pairs.jsonl",
        "--data.held_out_fraction=0.25", "--loss_type=dpo",
        "--max_steps=2", "--trainer.val_check_interval=1", "--data.train_probe=false",
        "--use_cpu", "--lr=1e-4", "--export=false", "--trainer.enable_progress_bar=false", "--batch_size=2",
    ]  # fmt: skip
    page = sweep(options, run)
    assert [arguments[-2:] for arguments in ran] == [
        ["--beta=0.05", "--output_dir=sweep/beta_0.05"],
        ["--beta=0.3", "--output_dir=sweep/beta_0.3"],
    ]
    text = page.read_text()
    for part in ("beta 0.05", "beta 0.3", "held-out accuracy", "Held-out margin", "beta_0.3/version_0/report.html"):
        assert part in text
    assert "safety" not in text
    sweep(options, run)
    assert len(ran) == 2
    with pytest.raises(SystemExit, match=r"sweep/beta_0\.05 holds a run with other options.*give this sweep another"):
        sweep([*options, "--data.limit=8"], run)
    (tmp_path / "sweep" / "beta_0.05" / "options.json").unlink()
    with pytest.raises(SystemExit, match="holds a run with unknown options"):
        sweep(options, run)
    assert len(ran) == 2
    with pytest.raises(SystemExit, match="write NAME=VALUE,VALUE"):
        sweep(["--vary=beta"], run)


def test_a_second_demo_evaluates_its_own_run(monkeypatch, tmp_path):
    demo = runpy.run_path(str(EXAMPLES / "demo_real.py"))["main"]
    monkeypatch.setattr("sys.argv", ["demo_real.py", "--hub", "--folder", str(tmp_path)])
    evaluated = []

    def run(module, *options):
        if module == "fit":
            version = options[options.index("--trainer.logger.init_args.version") + 1]
            (tmp_path / version / "model").mkdir(parents=True)
        else:
            evaluated.append(options[1])

    monkeypatch.setitem(demo.__globals__, "run", run)
    demo()
    demo()
    assert evaluated == [f"after={tmp_path / 'run' / 'model'}", f"after={tmp_path / 'run-2' / 'model'}"]


def test_own_loss_by_hand_and_from_the_command_line(monkeypatch, capsys):
    losses = runpy.run_path(str(EXAMPLES / "own_loss.py"))["main"]()
    assert losses.tolist() == [1.0, 0.0]  # (1 − 0.1·0)², and 1 − 0.1·20 is below 0
    capsys.readouterr()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit) as ended:
        fit(["--model.loss", "own_loss.SquaredHingeLoss", "--model.loss.margin", "2", "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["loss"]
    assert printed == {"class_path": "own_loss.SquaredHingeLoss", "init_args": {"beta": 0.1, "margin": 2.0}}


def test_cells_of_the_tour_run_in_order(tmp_path, monkeypatch):
    """In a process of its own, as the kernel of a notebook is."""
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    script = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    fewer = f"import pathlib, fewer_pairs\nfewer_pairs.take(pathlib.Path({str(tmp_path / 'pairs')!r}))\n\n"
    (tmp_path / "tour.py").write_text(fewer + script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    done = command("tour", [], timeout=600, TOUR_FOLDER=str(tmp_path), TOUR_STEPS="4", TOUR_PROMPTS="4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.parent.name for path in tmp_path.rglob("report.html")} >= {"diagnosis", "evaluation"}
    assert (tmp_path / "version_0" / "model" / "model.safetensors").exists()
