"""Signals and kills at random moments of the three commands: the right status, and a result as if nothing had been."""

import importlib
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import torch
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from safetensors.torch import load_file
from training import rows

from bdpo_pl.cli import aligning, diagnosing, evaluating  # noqa: F401 - imported before any process is forked
from bdpo_pl.training.checkpoints import is_whole

BATCH, SECONDS = 1, 120
GOAL = {"kills": 50, "signals": 50}

_SIGNALS = {"SIGKILL": {-9}, "SIGTERM": {143, -15}, "SIGINT": {130, -2}}
_TICKS = os.sysconf("SC_CLK_TCK")
_INPUTS = []


def draw(rng):
    return {
        "command": rng.choice(["fit", "fit", "diagnose", "evaluate"]),
        # Most are stopped again as they go on.
        "stops": [
            [rng.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"]), round(rng.uniform(0.0, 1.02), 4)]
            for _ in range(rng.choice([1, 2, 3, 4]))
        ],
        "accumulate": rng.choice([1, 2]),
    }


def prepare():
    """Write what the commands read, and keep what they come to when nothing stops them."""
    folder = Path(tempfile.mkdtemp(prefix="soak-inputs-"))
    _INPUTS.append(folder)
    build_model(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1).save_pretrained(
        folder / "model"
    )
    build_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows(20))
    write_jsonl(folder / "harmful.jsonl", [{"prompt": row["prompt"]} for row in preference_rows(6, seed=1)])


def _options(case):
    inputs = _INPUTS[0]
    if case["command"] == "evaluate":
        return [
            f"m={inputs / 'model'}", f"--suites=h:harmful={inputs / 'harmful.jsonl'}", "--folder=out",
            "--generation.max_new_tokens=3", "--generation.batch_size=2",
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
        f"--safety.harmful={inputs / 'harmful.jsonl'}", "--safety.max_new_tokens=2", "--safety.max_prompts=2",
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
        except KeyboardInterrupt:
            # Before the command has begun, as Python itself ends then.
            status = 130
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 1
        os._exit(status)
    return child


def _spent(child):
    """Seconds of the processor that a process has used, or None once it has ended."""
    try:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / _TICKS


def _stop(child, number, seconds):
    """Send the process a signal once it has used so much of the processor; its status, and whether it was reached."""
    reached = False
    while (spent := _spent(child)) is not None:
        if spent >= seconds:
            os.kill(child, number)
            reached = True
            break
        time.sleep(0.05)
    return _status(child), reached


def _status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _result(case, folder):
    """What the command is for, without what changes from run to run."""
    if case["command"] == "evaluate":
        lines = [json.loads(line) for line in (folder / "out" / "verdicts.jsonl").read_text().splitlines()]
        numbers = json.loads((folder / "out" / "evaluation.json").read_text())
        judged = sorted(line["judged"] for line in lines if "judged" in line)
        return {"judged": judged, "models": numbers["models"]}
    if case["command"] == "diagnose":
        return {name: (folder / "out" / name).read_text() for name in ("diagnosis.json", "pairs.jsonl")}
    run = folder / "runs" / "run"
    models = sorted(run.glob("model*"), key=lambda path: path.stat().st_mtime)
    weights = load_file(models[-1] / "model.safetensors")
    return {"rows": rows(run / "metrics.csv"), "weights": {name: value.tolist() for name, value in weights.items()}}


def _difference(found, whole):
    """The first difference in a few words, or None."""
    if found == whole:
        return None
    if isinstance(found, dict) and isinstance(whole, dict):
        if found.keys() != whole.keys():
            return f"{sorted(found.keys() - whole.keys())} more, {sorted(whole.keys() - found.keys())} less"
        return next(f"{name}: {said}" for name in whole if (said := _difference(found[name], whole[name])))
    if isinstance(found, list) and isinstance(whole, list):
        for i, (one, other) in enumerate(zip(found, whole, strict=False)):
            if said := _difference(one, other):
                return f"{i}: {said} ({len(found)} for {len(whole)})"
        return f"{len(found)} for {len(whole)}: {str((found + whole)[-1])[:300]}"
    return f"{str(found)[:200]} for {str(whole)[:200]}"


def _whole(case):
    """The result of the run that nothing stops, and its seconds of the processor; kept for the cases to come."""
    kept = _INPUTS[0] / f"{case['command']}-{case['accumulate']}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    folder = Path(tempfile.mkdtemp(prefix="soak-whole-"))
    before = os.times()
    if status := _status(_start(case["command"], _options(case), folder)):
        return {"failed": f"the uninterrupted run ended with {status}: {_log(folder)}"}
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    kept.write_text(json.dumps({"seconds": seconds, "result": _result(case, folder)}))
    return json.loads(kept.read_text())


def check(case, folder, counts):
    torch.set_num_threads(1)
    whole = _whole(case)
    if "failed" in whole:
        return whole["failed"]
    command, options, stopped = case["command"], _options(case), folder / "stopped"
    last = stopped / "runs" / "run" / "checkpoints" / "last.ckpt"
    for name, at in case["stops"]:
        more = [f"--ckpt_path={last}"] if is_whole(last) else []
        child = _start(command, [*options, *more], stopped)
        status, reached = _stop(child, getattr(signal, name), whole["seconds"] * at)
        if status == 0:
            # It was over already, or the signal came as it ended.
            counts["over before the stop"] += 1
            break
        if not reached or status not in _SIGNALS[name]:
            return f"{name}, which it {'met' if reached else 'did not meet'}, ended it with {status}: {_log(stopped)}"
        counts[f"{name} {command}"] += 1
        counts["kills" if name == "SIGKILL" else "signals"] += 1
    else:
        more = [f"--ckpt_path={last}"] if is_whole(last) else []
        if status := _status(_start(command, [*options, *more], stopped)):
            return f"after {case['stops']} the same command {more} ended with {status}: {_log(stopped)}"
    if said := _difference(json.loads(json.dumps(_result(case, stopped))), whole["result"]):
        return f"after {case['stops']} another result. {_log(stopped)[-900:]}\n{said}"
    counts["ended exactly as uninterrupted"] += 1
    return None


def _log(folder):
    return (folder / "log").read_text(errors="replace")[-2500:] if (folder / "log").exists() else "it said nothing"


def smaller(case):
    """Fewer stops; a moment is not made smaller."""
    if len(case["stops"]) > 1:
        for i in range(len(case["stops"])):
            yield {**case, "stops": case["stops"][:i] + case["stops"][i + 1 :]}
