"""Signals and kills at random moments of the three commands: the right status, and a result as if nothing had been."""

import csv
import importlib
import json
import os
import signal
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from safetensors.torch import load_file

from bdpo_pl.training.checkpoints import is_whole

BATCH, SECONDS = 1, 400

_SIGNALS = {"SIGKILL": {-9}, "SIGTERM": {143, -15}, "SIGINT": {130, -2}}
_IGNORED = ("train/tokens_per_second",)


def draw(rng):
    return {
        "command": rng.choice(["fit", "fit", "diagnose", "evaluate"]),
        "signal": rng.choice(sorted(_SIGNALS)),
        "at": round(rng.uniform(0.0, 1.05), 3),
        "accumulate": rng.choice([1, 2]),
    }


@cache
def _inputs():
    folder = Path(tempfile.mkdtemp(prefix="soak-inputs-"))
    build_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows(32))
    write_jsonl(folder / "harmful.jsonl", [{"prompt": row["prompt"]} for row in preference_rows(12, seed=1)])
    return folder


def _options(case):
    inputs = _inputs()
    if case["command"] == "evaluate":
        return [
            f"m={inputs / 'model'}", f"--suites=h:harmful={inputs / 'harmful.jsonl'}", "--folder=out",
            "--generation.max_new_tokens=4", "--generation.batch_size=2",
        ]  # fmt: skip
    options = [
        f"--model.policy={inputs / 'model'}", f"--data.train={inputs / 'pairs.jsonl'}", "--data.held_out_fraction=0.2",
        "--data.batch_size=4", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--model.scoring.cache_dir=cache", "--model.scoring.chunk_pairs=4",
    ]  # fmt: skip
    if case["command"] == "diagnose":
        return [*options, "--diagnose.folder=out"]
    return [
        *options, "--model.optimizer=torch.optim.AdamW", "--model.optimizer.init_args.lr=2e-3",
        "--trainer.max_epochs=2", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=2",
        f"--safety.harmful={inputs / 'harmful.jsonl'}", "--safety.max_new_tokens=2",
        f"--trainer.accumulate_grad_batches={case['accumulate']}",
        "--trainer.logger.init_args.version=run",
    ]  # fmt: skip


def _start(command, options, folder):
    child = os.fork()
    if child == 0:
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 0
        try:
            importlib.import_module(f"bdpo_pl.{command}").main(options)
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 1
        os._exit(status)
    return child


def _status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _result(case, folder):
    """What the command is for, without what changes from run to run."""
    if case["command"] == "evaluate":
        lines = [json.loads(line) for line in (folder / "out" / "verdicts.jsonl").read_text().splitlines()]
        numbers = json.loads((folder / "out" / "evaluation.json").read_text())
        judged = sorted(line["judged"] for line in lines if "judged" in line)
        return [judged, numbers["models"]]
    if case["command"] == "diagnose":
        return [(folder / "out" / name).read_text() for name in ("diagnosis.json", "pairs.jsonl")]
    run = folder / "runs" / "run"
    with (run / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v and k not in _IGNORED} for row in csv.DictReader(file)]
    models = sorted(run.glob("model*"), key=lambda path: path.stat().st_mtime)
    return [rows, {name: value.tolist() for name, value in load_file(models[-1] / "model.safetensors").items()}]


def check(case, folder):
    torch.set_num_threads(1)
    options = _options(case)
    began = time.monotonic()
    if status := _status(_start(case["command"], options, folder / "whole")):
        return f"the uninterrupted run ended with {status}: {_log(folder / 'whole')}"
    seconds = time.monotonic() - began
    whole = _result(case, folder / "whole")
    stopped = folder / "stopped"
    child = _start(case["command"], options, stopped)
    time.sleep(seconds * case["at"])
    os.kill(child, getattr(signal, case["signal"]))
    status = _status(child)
    if status == 0:
        # It was over already.
        return None if _result(case, stopped) == whole else f"status 0 and another result: {_log(stopped)}"
    if status not in _SIGNALS[case["signal"]]:
        return f"{case['signal']} ended it with {status}: {_log(stopped)}"
    last = stopped / "runs" / "run" / "checkpoints" / "last.ckpt"
    more = [f"--ckpt_path={last}"] if is_whole(last) else []
    if status := _status(_start(case["command"], [*options, *more], stopped)):
        return f"after {case['signal']} the same command {more} ended with {status}: {_log(stopped)}"
    found = _result(case, stopped)
    if found[-1] != whole[-1]:
        return f"after {case['signal']} it went on {more} to another result: {_log(stopped)}"
    if found != whole:
        return f"after {case['signal']} it went on {more} and logged other rows: {found[0]} for {whole[0]}"
    return None


def _log(folder):
    return (folder / "log").read_text(errors="replace")[-2500:] if (folder / "log").exists() else "it said nothing"


def smaller(case):
    """A moment is not made smaller."""
    return iter(())
