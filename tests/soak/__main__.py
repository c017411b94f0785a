"""Random cases until the time is over; what fails is made smaller and printed with its seed.

`python -m tests.soak --minutes N [--seed S] [--only KIND …] [--ledger FOLDER]`; `--only KIND --case JSON` tries one
case again, `--total FOLDER` adds up what the runs of a ledger have counted. The kinds of cases share the time, and
those that have reached their goal over all runs of the ledger leave it to the others. Each batch of cases runs in a
process of its own, forked from this one, which has imported everything. No part of `make test`.
"""

import argparse
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PL_GLOBAL_SEED", "0")

import torch

from tests.soak import architectures, options, rows, stops
from tests.soak.ledger import Ledger, total
from tests.soak.process import in_a_process, running

KINDS = {"rows": rows, "options": options, "architectures": architectures, "stops": stops}
_MOST_TRIES = 40


def smallest(kind, case):
    """A case that fails still, with nothing left to take away from it that leaves a fault."""
    tries = 0
    found = True
    while found and tries < _MOST_TRIES:
        found = False
        for candidate in kind.smaller(case):
            tries += 1
            if in_a_process(kind, [candidate])[0] is not None:
                case, found = candidate, True
                break
            if tries >= _MOST_TRIES:
                break
    return case


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", choices=KINDS, default=None, nargs="+")
    parser.add_argument("--case", default=None)
    parser.add_argument("--ledger", type=Path, default=None)
    parser.add_argument("--total", type=Path, default=None)
    chosen = parser.parse_args()
    if chosen.total is not None:
        print(total(chosen.total))
        return 0
    torch.set_num_threads(1)
    kinds = {name: kind for name, kind in KINDS.items() if chosen.only is None or name in chosen.only}
    for kind in kinds.values():
        kind.prepare()
    if chosen.case is not None:
        said, _, counts = in_a_process(kinds[chosen.only[0]], [json.loads(chosen.case)])
        print(said or "nothing wrong", dict(counts))
        return 1 if said else 0
    seed = random.randrange(10**6) if chosen.seed is None else chosen.seed
    print(f"seed {seed}", flush=True)
    ledger = Ledger(chosen.ledger, seed)
    spent = Counter()
    number = 0
    while ledger.seconds < 60 * chosen.minutes:
        behind = [name for name, kind in kinds.items() if ledger.is_behind(name, kind.GOAL)]
        name = min(behind or kinds, key=lambda name: spent[name])
        kind = kinds[name]
        began = running[0]
        cases = [kind.draw(random.Random(f"{seed}:{name}:{number + i}")) for i in range(kind.BATCH)]
        said, position, counts = in_a_process(kind, cases)
        spent[name] += running[0] - began
        ledger.add(name, counts)
        if said is not None and ledger.is_new(name, said):
            print(f"\n{name}, seed {seed}, case {number + position}:\n{said.strip()[-3000:]}", flush=True)
            case = smallest(kind, cases[position])
            print(f"--only {name} --case '{json.dumps(case)}'", flush=True)
            ledger.found(name, number + position, said, case)
        number += kind.BATCH
    ledger.write()
    print(ledger)
    return 1 if ledger.findings else 0


if __name__ == "__main__":
    sys.exit(main())
