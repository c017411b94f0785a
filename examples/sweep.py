"""Several runs of fit that differ in a few options, and one page that compares them.

    python examples/sweep.py --vary beta=0.05,0.1,0.3 --vary tau=0.25,0.5 --into runs/sweep -- \
        --model.policy MODEL --data.train pairs.jsonl

What follows `--` are options of fit. Each combination is a run in a folder of its own, whose `options.json` has its
options. One that is finished is not run again, so a sweep that was stopped is given the same command; with other
options, it is refused. For a search that chooses the next values by the last results, call `fit` in the objective of a
library such as Optuna, and read the last row of its `metrics.csv`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bdpo_pl.reporting import Line, Page, Table, line_chart
from bdpo_pl.training.run_report import read_curves

COLUMNS = {
    "held-out accuracy": "held_out/accuracy",
    "margin": "held_out/margin",
    "margin gap": "gap/margin",
    "drift of the chosen, nats": "held_out/drift_chosen",
    "harmful refused": "safety/refusal_harmful",
    "benign refused": "safety/over_refusal",
}

OPTIONS = "options.json"


def combinations(given: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield every combination of the values in `NAME=VALUE,VALUE` texts."""
    named = [text.partition("=") for text in given]
    for name, _, values in named:
        if not values:
            raise SystemExit(f"--vary {name}: write NAME=VALUE,VALUE")
    for values in itertools.product(*(values.split(",") for _, _, values in named)):
        yield {name: value for (name, _, _), value in zip(named, values, strict=True)}


def fit(options: Sequence[str]) -> None:
    """Run fit in a process of its own, which all devices may have."""
    # The options are those that the user gave this script.
    subprocess.run([sys.executable, "-m", "bdpo_pl.fit", *options], check=True)  # noqa: S603


def is_finished(folder: Path, options: list[str]) -> bool:
    """Return true if `folder` holds a finished run with these options; exit if it holds one with others."""
    if not any(folder.glob("version_*/summary.json")):
        return False
    kept = folder / OPTIONS
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) == options:
        return True
    what = f"other options, those in {kept}" if kept.exists() else f"unknown options: there is no {kept}"
    raise SystemExit(f"{folder} holds a run with {what}; give this sweep another --into, or remove that folder")


def newest(folder: Path) -> Path:
    """Return the folder of the newest run below `folder`."""
    return max(folder.glob("version_*/metrics.csv"), key=lambda file: file.stat().st_mtime).parent


def compare(into: Path, runs: Mapping[str, tuple[dict[str, str], Path]]) -> Path:
    """Write a page that has a row and a line for each run, and return it."""
    page = Page("Sweep", f"{len(runs)} runs", {"folder": str(into)})
    page.section("How to choose").text(
        "By what the runs do on held-out pairs and prompts, not by their loss: losses of different β are in different "
        "units. With few held-out pairs, differences of a few points between runs are chance."
    )
    folders = {label: newest(folder) for label, (_, folder) in runs.items()}
    curves = {label: read_curves(folder / "metrics.csv") for label, folder in folders.items()}
    found = {label: {name: values[-1] for name, (_, values) in curve.items()} for label, curve in curves.items()}
    there = {title: name for title, name in COLUMNS.items() if any(name in values for values in found.values())}
    names = list(next(iter(runs.values()))[0])
    rows = [
        [*values.values(), *(f"{found[label][name]:.3f}" if name in found[label] else "" for name in there.values())]
        for label, (values, _) in runs.items()
    ]
    page.section("Results").table(Table([*names, *there], rows, "At the end of each run"))
    section = page.section("Curves", "By optimiser step.")
    for title, name in (("Held-out margin", "held_out/margin"), ("Margin gap, training − held-out", "gap/margin")):
        lines = {label: Line(*curve[name]) for label, curve in curves.items() if len(curve.get(name, ((),))[0]) > 1}
        if lines:
            section.figure(line_chart(title, lines, "optimiser step", "implicit reward, chosen − rejected"))
    section.links({str((folder / "report.html").relative_to(into)): label for label, folder in folders.items()})
    return page.write(into / "sweep.html")


def main(args: Sequence[str] | None = None, run: Callable[[list[str]], object] = fit) -> Path:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", action="append", required=True, metavar="NAME=VALUE,VALUE")
    parser.add_argument("--into", type=Path, default=Path("runs/sweep"))
    parser.add_argument("options", nargs="*", help="options of fit, after --")
    given = parser.parse_args(args)
    runs = {}
    for values in combinations(given.vary):
        label = ", ".join(f"{name} {value}" for name, value in values.items())
        folder = given.into / label.replace(", ", "-").replace(" ", "_").replace("/", "_")
        options = [*given.options, *(f"--{name}={value}" for name, value in values.items())]
        if not is_finished(folder, options):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / OPTIONS).write_text(json.dumps(options, ensure_ascii=False), encoding="utf-8")
            run([*options, f"--output_dir={folder}"])
        runs[label] = (values, folder)
    written = compare(given.into, runs)
    print(f"The runs side by side: {written}")
    return written


if __name__ == "__main__":
    main()
