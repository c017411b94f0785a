"""Random cases until the time is over; what fails is made smaller and printed with its seed.

`python -m tests.soak --minutes N [--seed S] [--only KIND]`; `--only KIND --case JSON` tries one case again. Each batch
of cases runs in a process of its own, forked from this one, which has imported everything. No part of `make test`.
"""

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PL_GLOBAL_SEED", "0")

import torch

from tests.soak import architectures, options, rows, stops

KINDS = {"rows": rows, "options": options, "architectures": architectures, "stops": stops}
_MOST_TRIES = 40
_PATIENCE = 10


def in_a_process(kind, cases, seconds):
    """(what was wrong, its position), or None; a process that takes too long is ended, and that is a fault.

    `seconds` a case are of the processor, since a busy machine is no fault; of the clock it may take ten times as long.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        said = None
        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        folder = Path(tempfile.mkdtemp(prefix="soak-"))
        position = -1
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds * len(cases)) + 1,) * 2)
        try:
            os.chdir(folder)
            while said is None and (position := position + 1) < len(cases):
                said = kind.check(cases[position], folder)
        except BaseException:
            said = traceback.format_exc()
        shutil.rmtree(folder, ignore_errors=True)
        with os.fdopen(writer, "w") as pipe:
            json.dump([said, position], pipe)
        os._exit(0)
    os.close(writer)
    text = b""
    end = time.monotonic() + _PATIENCE * seconds * len(cases)
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            return f"no answer within {_PATIENCE * seconds} s a case", 0
        part = os.read(reader, 65536)
        if not part:
            break
        text += part
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    if not text:
        return f"the process ended with status {status} and said nothing", 0
    said, position = json.loads(text)
    return (said, position) if said else None


def smallest(kind, case):
    """A case that fails still, with nothing left to take away from it that leaves a fault."""
    tries = 0
    found = True
    while found and tries < _MOST_TRIES:
        found = False
        for candidate in kind.smaller(case):
            tries += 1
            if in_a_process(kind, [candidate], kind.SECONDS):
                case, found = candidate, True
                break
            if tries >= _MOST_TRIES:
                break
    return case


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", choices=KINDS, default=None)
    parser.add_argument("--case", default=None)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.case is not None:
        failed = in_a_process(KINDS[chosen.only], [json.loads(chosen.case)], KINDS[chosen.only].SECONDS)
        print(failed[0] if failed else "nothing wrong")
        return 1 if failed else 0
    seed = random.randrange(10**6) if chosen.seed is None else chosen.seed
    print(f"seed {seed}", flush=True)
    kinds = {name: kind for name, kind in KINDS.items() if chosen.only in (None, name)}
    done, failures, spent = Counter(), [], Counter()
    start = time.monotonic()
    used = sum(os.times()[:4])
    number = 0
    while time.monotonic() - start < 60 * chosen.minutes:
        # Each kind has the same share of the time.
        name = min(kinds, key=lambda name: spent[name])
        kind = kinds[name]
        began = time.monotonic()
        cases = [kind.draw(random.Random(f"{seed}:{name}:{number + i}")) for i in range(kind.BATCH)]
        failed = in_a_process(kind, cases, kind.SECONDS)
        done[name] += kind.BATCH if failed is None else failed[1] + 1
        spent[name] += time.monotonic() - began
        if failed is not None:
            said, position = failed
            print(f"\n{name}, seed {seed}, case {number + position}:\n{said.strip()[-3000:]}", flush=True)
            case = smallest(kind, cases[position])
            print(f"--only {name} --case '{json.dumps(case)}'", flush=True)
            failures.append((name, number + position))
        number += kind.BATCH
    minutes, used = (time.monotonic() - start) / 60, (sum(os.times()[:4]) - used) / 60
    print(f"\n{minutes:.1f} minutes ({used:.1f} of the processor), seed {seed}: {dict(done)}, {len(failures)} failed")
    for name, position in failures:
        print(f"  {name}, case {position}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
