"""Compile every Triton kernel for GPUs that are not here, and report what is wrong with the machine code, as JSON.

    python tests/bdpo_kernels/compiled/compile_all.py                   # the cases of the tests
    python tests/bdpo_kernels/compiled/compile_all.py --full --print    # all configurations; some minutes a target

Needs triton with its bundled tools and a shell without TRITON_INTERPRET; no CUDA, driver or GPU. Another release of
Triton is used by putting its folder first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import offline
import planted
import torch._dynamo  # noqa: F401  (the package imports it, which takes most of a second)
import triton
from triton.runtime.cache import triton_key

TESTED = ("sm_80", "sm_90", "sm_100", "gfx942")
Job = tuple[str, Any]
Records = list[dict[str, Any]]


def _check(target_name: str, cases: Iterable[Any], changed: offline.Changed = lambda kwargs: kwargs) -> Records:
    """Compile `cases` for one target; one record a launch of a kernel that no case before it has launched."""
    # Here, not above: it imports the package, which may be a copy with a fault.
    from account import inspect

    target, records, seen = offline.TARGETS[target_name], [], {}

    def record(made: list[Any]) -> None:
        # Held, so that no other kernel takes an identity that was seen.
        new = [one for one in made if id(one) not in seen]
        seen.update((id(one), one) for one in made)
        if not new:
            return
        found = [inspect(one, case, target) for one in new]
        code, faults = found[0]
        if 1 < len(found) != len({each.digest for each, _ in found}):
            faults.append(f"{len(found)} autotuned configurations, {len({each.digest for each, _ in found})} codes")
        records.append({"target": target_name, "case": case.name, "faults": faults} | vars(code))

    for case in cases:
        try:
            with offline.compiling_for(target, record, changed):
                case.call()
        except Exception as error:
            # The message comes after the lines of source that it is about.
            text = f"does not compile: {type(error).__name__}: {str(error.__cause__ or error).strip()[-300:]}"
            records.append({"target": target_name, "case": case.name, "kernel": "?", "faults": [text]})
    return records


def _usual(job: tuple[str, str]) -> Records:
    target, name = job
    import cases

    cases.allow_cpu_tensors()
    chosen = cases.every_case() if name == "full" else getattr(cases, name.upper())
    return [record | {"group": name} for record in _check(target, chosen)]


def _planted(job: tuple[str, str]) -> Records:
    """Import the package from a copy with a fault. In a process of its own: it must not have been imported before."""
    target, fault = job
    package = Path(__file__).parents[3] / "kernels" / "bdpo_kernels"
    with tempfile.TemporaryDirectory() as folder:
        if fault in planted.IN_THE_SOURCE:
            sys.path.insert(0, str(planted.plant(package, fault, Path(folder))))
        import cases

        cases.allow_cpu_tensors()
        changed = {"blocks_of_eight": planted.blocks_of_eight}.get(fault, lambda kwargs: kwargs)
        return [record | {"group": fault} for record in _check(target, [cases.Case()], changed)]


def _launchable() -> list[str]:
    """Return the names of the package's kernels: jitted functions that are not helpers of others."""
    from bdpo_kernels import backends

    backends.load("triton")
    modules = [module for name, module in sys.modules.items() if name.startswith("bdpo_kernels.")]
    names = {
        name for module in modules for name, value in vars(module).items() if isinstance(value, triton.JITFunction)
    }
    return sorted(name for name in names if not name.startswith("_"))


def _run(job: Job) -> Any:
    kind, what = job
    if kind == "launchable":
        return _launchable()
    return (_planted if kind == "planted" else _usual)(what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TESTED), choices=offline.TARGETS)
    parser.add_argument("--more", action="store_true", help="for sm_90 also other operations, float64, sizes of chunks")
    parser.add_argument("--planted", action="store_true", help="also compile the kernels with faults planted in them")
    parser.add_argument("--full", action="store_true", help="all combinations of what a caller may pass")
    parser.add_argument("--print", action="store_true", help="print a line a kernel in place of JSON")
    options = parser.parse_args()
    group = "full" if options.full else "usual"
    jobs: list[Job] = [("usual", (target, group)) for target in options.targets]
    jobs += [("usual", ("sm_90", group)) for group in ("more", "float64", "chunks") if options.more]
    if options.planted:
        faults = ("none", "blocks_of_eight", *planted.IN_THE_SOURCE)
        jobs += [("planted", ("sm_90", fault)) for fault in faults]
    # A process a job, forked from this one: torch and triton are imported once, the package in each. The hash of all of
    # Triton's files, by which its cache knows it, is kept too.
    triton_key()
    with get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        kernels, *found = pool.map(_run, [("launchable", None), *jobs], chunksize=1)
    records = [record for part in found for record in part]
    if options.print:
        for r in records:
            print({name: value for name, value in r.items() if name not in ("signature", "digest")})
    else:
        print(json.dumps({"triton": triton.__version__, "kernels": kernels, "records": records}))


if __name__ == "__main__":
    main()
