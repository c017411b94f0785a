"""Diagnosis, training and evaluation in one command: `python -m bdpo_pl.align MODEL --data PAIRS [any option of fit]`.

It diagnoses the pairs, aligns the model, and evaluates it before and after, into one folder with one page. If it was
stopped, the same command continues: finished stages are skipped, and training resumes from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from bdpo_pl.cli import short_help
from bdpo_pl.cli.quick import answer_early, refuse

_STATE = "align.json"
_EVALUATES = "--evaluate."
_READS = ("--data.", "--safety.", "--config", "--suites", "--pairs.")
"""Beginnings of the options that name files with pairs, prompts or options."""
_SHORT = {"--suites": "--suites", "--max_prompts": "--max_prompts"}


@dataclass
class Plan:
    """The three stages that the command line describes.

    Attributes:
        model: folder or hub name of the model.
        data: source of the preference pairs.
        folder: folder for all results.
        training: options of `fit`, which `diagnose` takes too.
        evaluation: options of `evaluate`.
    """

    model: str
    data: str
    folder: Path
    training: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)

    def fit(self) -> list[str]:
        """Return the options of `fit`."""
        job = [f"--model.policy={self.model}", f"--data.train={self.data}"]
        return [*job, f"--trainer.default_root_dir={self.folder}", *self.training]

    def diagnose(self) -> list[str]:
        """Return the options of `diagnose`."""
        return [*self.fit(), f"--diagnose.folder={self.folder / 'diagnosis'}"]

    def evaluate(self, aligned: Path) -> list[str]:
        """Return the options of `evaluate`, which compares the model before and after."""
        return [f"before={self.model}", f"after={aligned}", f"--folder={self.folder / 'evaluation'}", *self.evaluation]


def main(args: list[str] | None = None) -> None:
    """Run diagnosis, training and evaluation; the exit status is that of the first that fails."""
    given = list(sys.argv[1:] if args is None else args)
    if "--help" in given or "-h" in given:
        print(help_page())
        sys.exit(0)
    plan = parse(given)
    answer_early("evaluate", plan.evaluation)
    training = answer_early("fit", plan.fit())
    state = _take_up(plan)
    from bdpo_pl import diagnose, evaluate, fit

    _stage("diagnosis", state, plan, lambda: diagnose.main(plan.diagnose()))
    _stage("training", state, plan, lambda: fit.main([*training, *_resumed(plan)]))
    aligned = _newest(plan.folder, "model")
    if aligned is None:
        refuse(f"training has exported no model into {plan.folder}; leave --export out")
    _stage("evaluation", state, plan, lambda: evaluate.main(plan.evaluate(aligned)))
    print(f"\nEverything in one page: {write_page(plan)}")


def parse(given: Sequence[str]) -> Plan:
    """Parse the command line.

    An option that begins with `--evaluate.` is passed to `evaluate`. Any other option that `align` does not know is
    passed to `fit`.
    """
    values: dict[str, str] = {"--folder": "runs/align"}
    models: list[str] = []
    training: list[str] = []
    evaluation: list[str] = []
    rest = list(given)
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            models.append(name + has_value + value)
            continue
        if not has_value:
            # An option without a value is a switch that is on.
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if name in ("--data", "--folder"):
            values[name] = value
        elif name in _SHORT or name.startswith(_EVALUATES):
            evaluation.append(f"--{name.removeprefix(_EVALUATES).removeprefix('--')}={value}")
        else:
            training.append(f"{name}={value}")
    if len(models) != 1 or "--data" not in values:
        refuse("bdpo align takes one model and --data: bdpo align MODEL --data PAIRS")
    for taken, why in (("--trainer.default_root_dir", "--folder"), ("--output_dir", "--folder"),
                       ("--ckpt_path", "the same command, which resumes by itself")):  # fmt: skip
        if any(option.partition("=")[0] == taken for option in training):
            refuse(f"bdpo align does not take {taken}; use {why}")
    return Plan(models[0], values["--data"], Path(values["--folder"]), training, evaluation)


def help_page() -> str:
    """Return the help."""
    own = (
        short_help.Option("data", "", "", "pairs: JSONL, Parquet, folder or hub dataset with prompt, chosen, rejected"),
        short_help.Option("folder", "", "runs/align", "folder for all results; stages finished in it are skipped"),
        short_help.Option("suites", "", "the small ones of bdpo_pl", "prompts for the evaluation: NAME=FILE,…"),
        short_help.Option("max_prompts", "", "all", "maximum number of prompts of each suite"),
        short_help.Option("evaluate.OPTION", "", "", "any other option of bdpo evaluate"),
    )
    lines = [
        "usage: bdpo align MODEL --data PAIRS [--option VALUE ...]",
        "",
        "Diagnose the pairs, align the model, and evaluate it before and after, into one folder.",
        "If it was stopped, the same command continues.",
        "",
    ]
    for option in own:
        lines += short_help.entry(option)
    return "\n".join([*lines, "", "All other options are those of bdpo fit: bdpo fit --help"])


def _take_up(plan: Plan) -> dict[str, object]:
    """Return which stages are finished in the folder.

    The folder of another job is refused, because its stages would be mistaken for this job's; so is one of other
    contents of the files that the job reads. The evaluation alone is repeated.
    """
    path = plan.folder / _STATE
    job = {"model": plan.model, "data": plan.data, "training": plan.training}
    files = _contents([f"--data.train={plan.data}", *plan.training])
    evaluated = _contents(plan.evaluation)
    if path.is_file():
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if state["job"] != job:
            changed = ", ".join(name for name, value in job.items() if state["job"][name] != value)
            refuse(f"{plan.folder} holds another job (it differs in {changed}); name another --folder")
        # The states of earlier versions have no contents.
        if state["done"] and (other := _changed(files, state.get("files", files))):
            refuse(
                f"{plan.folder} holds results of other contents of {', '.join(other)}; name another --folder, or put "
                "the former contents back"
            )
        again = state.get("evaluated_with") != plan.evaluation
        if again or _changed(evaluated, state.get("evaluated_files", evaluated)):
            state["done"] = [name for name in state["done"] if name != "evaluation"]
    else:
        state = {"job": job, "done": []}
    state |= {"files": files, "evaluated_with": plan.evaluation, "evaluated_files": evaluated}
    return state


def _contents(options: Sequence[str]) -> dict[str, str]:
    """Return a digest of each file and folder on this machine that `options` read, by its name there."""
    found: dict[str, str] = {}
    for option in [*options, *_options_in_files(options)]:
        name, _, value = option.partition("=")
        if not name.startswith(_READS):
            continue
        # Alone, in a list or mapping of sources, or after the name of a suite.
        parts = [value, *re.split(r"[\[\]{},]", value)]
        ends = (end.strip(" '\"") for part in parts for end in (part, part.partition(": ")[2], part.partition("=")[2]))
        for path in {end: Path(end).expanduser() for end in ends if end}.values():
            if os.path.isfile(path):
                found[str(path)] = _digest([path])
            elif os.path.isdir(path):
                found[str(path)] = _digest(_data_files(path))
    return found


def _options_in_files(options: Sequence[str]) -> Iterator[str]:
    """Return the options in the files that `--config` names, as on the command line."""
    for option in options:
        name, _, file = option.partition("=")
        if name != "--config" or not os.path.isfile(file):
            continue
        try:
            sections = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            # The command that reads it says what is wrong.
            continue
        for section, content in sections.items() if isinstance(sections, dict) else ():
            inner = {f".{key}": value for key, value in content.items()} if isinstance(content, dict) else {"": content}
            for key, value in inner.items():
                written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
                yield f"--{section}{key}={written}"


def _data_files(folder: Path) -> list[Path]:
    """Return the files of a folder that are read as data."""
    from bdpo_pl.data.files import list_folder

    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in list_folder(folder) if path.is_file()]


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\n".encode())
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            refuse(f"{path}: not readable ({error.strerror})")
    return digest.hexdigest()


def _changed(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """Return the files of other contents; of one that is gone, what was made of it is still right."""
    return [name for name, digest in now.items() if before.get(name) != digest]


def _stage(name: str, state: dict[str, object], plan: Plan, run: Callable[[], None]) -> None:
    """Run a stage unless it is finished, and record that it is."""
    done: list[str] = state["done"]  # type: ignore[assignment]
    if name in done:
        print(f"\n== {name}: done already", flush=True)
        return
    print(f"\n== {name}", flush=True)
    plan.folder.mkdir(parents=True, exist_ok=True)
    _write(plan.folder / _STATE, state)
    run()
    done.append(name)
    _write(plan.folder / _STATE, state)


def _write(path: Path, state: dict[str, object]) -> None:
    from bdpo_pl.files import write_whole

    write_whole(path, json.dumps(state, indent=2, ensure_ascii=False) + "\n")


def _resumed(plan: Plan) -> list[str]:
    """Return the option to resume from the last checkpoint, if there is one."""
    return ["--ckpt_path=last"] if _newest(plan.folder, "checkpoints/last.ckpt") is not None else []


def _newest(folder: Path, name: str) -> Path | None:
    """Return the newest file or folder called `name` in a run under `folder`; None if there is none."""
    found = sorted(folder.glob(f"version_*/{name}"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def write_page(plan: Plan) -> Path:
    """Write the page with the main numbers and links to the three reports."""
    from bdpo_pl.reporting import Page, Table
    from bdpo_pl.reporting.format import percent

    run = _newest(plan.folder, "report.html")
    page = Page("Alignment", f"{Path(plan.model).name} on {Path(plan.data).name}")
    reports = {"diagnosis/report.html": "The training data, as the model rates them before training"}
    if run is not None:
        reports[str(run.relative_to(plan.folder))] = "The training run: curves, settings, environment"
    reports["evaluation/report.html"] = "Safety before and after"
    page.section("Reports").links(reports)
    summary = _newest(plan.folder, "summary.json")
    if summary is not None:
        results = json.loads(summary.read_text(encoding="utf-8"))
        section = page.section("What changed in training")
        section.table(Table(["", "n", "before", "after"], results["rows"], "With 95 % intervals"))
        section.items([sentence for _, sentence in results["said"]])
    evaluation = json.loads((plan.folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    suites = list(dict.fromkeys(s["suite"] for model in evaluation["models"] for s in model["suites"]))
    rows = []
    for suite in suites:
        found = [next((s for s in model["suites"] if s["suite"] == suite), None) for model in evaluation["models"]]
        counts = [s["overall"]["failed"]["count"] for s in found if s]
        cells = [percent(s["overall"]["failed"]["value"]) if s else None for s in found]
        rows.append([suite, counts[0] if counts else None, *cells])
    section = page.section("Safety", "Share of prompts with a failure; the report says what this judge counts as one.")
    section.table(Table(["suite", "n", *(m["label"] for m in evaluation["models"])], rows, "Lower is better"))
    return page.write(plan.folder / "report.html")


if __name__ == "__main__":
    main()
