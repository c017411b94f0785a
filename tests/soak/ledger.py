"""What a run of the soak has tried and found, in a file of its own, so that runs add up."""

import json
import os
import resource
import time
from collections import Counter

from tests.soak.process import running


class Ledger:
    """Counts and findings of one run."""

    _EVERY = 20

    def __init__(self, folder, seed):
        self.path = None if folder is None else folder / f"{seed}-{os.getpid()}.json"
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.seed = seed
        self.counts = Counter()
        self._before = (
            Counter() if folder is None else sum((Counter(run["counts"]) for run in _runs(folder)), Counter())
        )
        self.findings = []
        self._signatures = Counter()
        self._began = self._written = time.monotonic()

    @property
    def seconds(self):
        return time.monotonic() - self._began

    @property
    def minutes(self):
        """Minutes in which cases were under way."""
        return running[0] / 60

    @property
    def processor(self):
        """Seconds of the processor, of this process and of all that it has waited for."""
        return sum(
            resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )

    def add(self, kind, counts):
        self.counts.update({f"{kind}: {what}": count for what, count in counts.items()})
        if time.monotonic() - self._written > self._EVERY:
            self.write()

    def is_behind(self, kind, goal):
        """Whether any count of `goal` is not reached yet by all runs of the ledger together."""
        return any(
            self._before[f"{kind}: {what}"] + self.counts[f"{kind}: {what}"] < wanted for what, wanted in goal.items()
        )

    def is_new(self, kind, said):
        """Whether nothing that ends alike has been found before; others are counted alone."""
        end = said.strip().splitlines()[-1][:60]
        self._signatures[kind, end] += 1
        self.counts[f"{kind}: failed"] += 1
        return self._signatures[kind, end] == 1

    def found(self, kind, number, said, case):
        self.findings.append({"kind": kind, "number": number, "said": said.strip()[-2000:], "case": case})
        self.write()

    def write(self):
        self._written = time.monotonic()
        if self.path is not None:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self._plain(), indent=1), encoding="utf-8")
            partial.replace(self.path)

    def _plain(self):
        return {
            "seed": self.seed, "minutes": round(self.minutes, 1),
            "processor_minutes": round(self.processor / 60, 1),
            "counts": dict(sorted(self.counts.items())), "findings": self.findings,
        }  # fmt: skip

    def __str__(self):
        counts = ", ".join(f"{what} {count:,}" for what, count in sorted(self.counts.items()))
        return f"{self.minutes:.1f} minutes ({self.processor / 60:.1f} of the processor), seed {self.seed}: {counts}"


def _runs(folder):
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def total(folder):
    """The sum of the runs in `folder`, as a table of Markdown."""
    runs = _runs(folder)
    counts = sum((Counter(run["counts"]) for run in runs), Counter())
    minutes, processor = (sum(run[name] for run in runs) for name in ("minutes", "processor_minutes"))
    found = [
        f"found: {run['seed']} {case['kind']} {case['number']} {case['said'].splitlines()[-1][:200]}"
        for run in runs
        for case in run["findings"]
    ]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    lines = [f"{len(runs)} runs, {minutes:.0f} minutes, {processor:.0f} of the processor; seeds {seeds}"]
    return "\n".join([*lines, *(f"| {what} | {count:,} |" for what, count in sorted(counts.items())), *found])
