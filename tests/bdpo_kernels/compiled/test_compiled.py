"""Every Triton kernel compiles for the GPUs it is meant for, on a machine that has none, and its machine code is sound.

The kernels are compiled in a process of its own: the interpreter, in which the other tests run them, is chosen when
Triton is imported. What a user's Triton makes of them is tested where it is at hand: see `_other_triton`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
ROOT = Path(__file__).parents[3]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
PLANTED = {
    "blocks_of_eight": "bytes spilled",
    "numpy_in_a_kernel": "does not compile",
    "variable_changes_type": "does not compile",
    "row_starts_one_late": "by 16-byte accesses",
    "reads_twice": "loads of the row",
}


def _compiled(cache, *arguments, triton=None):
    """Run the compile harness; return its report."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(triton)] if triton else []
    env |= {"PYTHONPATH": os.pathsep.join([*path, str(ROOT / "kernels")]), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(FOLDER / "compile_all.py"), *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def _faults(records, known=()):
    return [
        f"{record['target']} {record['kernel']} {record['case']}: {fault}"
        for record in records
        for fault in record["faults"]
        if not any(text in fault for text in known)
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return _compiled(tmp_path_factory.mktemp("triton"), "--more", "--planted")


def _group(report, group, target=None):
    return [r for r in report["records"] if r["group"] == group and target in (None, r["target"])]


AUTOTUNED = "autotuned configurations"


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills_and_read_logits_once_16_bytes_at_a_time(report, target):
    records = _group(report, "usual", target) + _group(report, "more", target)
    assert not _faults(records)


def test_every_kernel_of_the_package_was_compiled(report):
    assert {record["kernel"] for record in _group(report, "usual")} == set(report["kernels"])


def test_float64_logits_meet_no_float32_argument(report):
    records = _group(report, "float64")
    assert records
    assert not _faults(records)


def test_no_two_autotuned_configurations_are_one_code(report):
    assert not [fault for fault in _faults(report["records"]) if AUTOTUNED in fault]


def test_chunks_of_every_size_share_their_binaries(report):
    """A binary for each size of the last chunk would cost a run's first steps a compilation each."""
    records = _group(report, "chunks")
    binaries = [(record["target"], record["kernel"]) for record in records]
    codes = {(record["target"], record["kernel"], record["digest"]) for record in records}
    assert len(binaries) == len(codes)


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(report, fault):
    found = _faults(_group(report, fault))
    assert any(PLANTED[fault] in text for text in found), found


def test_the_copy_without_a_fault_passes(report):
    records = _group(report, "none")
    assert records
    assert not _faults(records)


def _other_triton(version):
    """Return the folder of another release of Triton; skip where it is not at hand."""
    folder = Path(os.environ.get("BDPO_TRITON_RELEASES", ROOT / ".cache" / "triton")) / version
    if not (folder / "triton").is_dir():
        pytest.skip(f"needs `pip install --no-deps --target {folder} triton=={version}`")
    return folder


@pytest.mark.parametrize(("version", "torch"), [("3.6.0", "2.11"), ("3.7.1", "2.13")])
def test_the_triton_that_torch_brings_for_cuda_compiles_them_too(tmp_path, version, torch):
    report = _compiled(tmp_path, "--targets", "sm_90", triton=_other_triton(version))
    assert report["triton"] == version
    assert not _faults(report["records"])
