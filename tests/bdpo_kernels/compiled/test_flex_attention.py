"""FlexAttention with this project's masks compiles for GPUs that are not here, forward and backward, and fits them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
LAYERS = ("Llama 3 8B", "Qwen2 0.5B", "Phi 3 mini", "Gemma 2 9B")
# Registers that did not fit, in bytes of a thread: PyTorch's templates, not ours, and they spill in the backward. Held
# on Hopper alone, where they were chosen; elsewhere they spill more.
SPILLED = {"forward": 64, "backward": 2_048}


def _compiled(cache, target, layers):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "TRITON_CACHE_DIR": str(cache)}
    script = str(Path(__file__).with_name("compile_flex.py"))
    command = [sys.executable, script, "--targets", target, "--layers", *layers]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def _check(records, layers):
    done = {(r["layer"], r["direction"]) for r in records if r.get("products")}
    assert done == {(layer, direction) for layer in layers for direction in ("forward", "backward")}
    for record in records:
        assert "fault" not in record, record
        assert record["shared"] <= record["limit"], record
        assert record["target"] != "sm_90" or record["spilled"] <= SPILLED[record["direction"]], record


def test_a_layer_with_grouped_heads_compiles_both_ways(tmp_path):
    _check(_compiled(tmp_path, "sm_90", LAYERS[:1]), LAYERS[:1])


@pytest.mark.skipif("BDPO_COMPILE_ALL" not in os.environ, reason="minutes of compilation: set BDPO_COMPILE_ALL=1")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_head_sizes_64_to_256_grouped_capped_and_windowed_compile_both_ways(tmp_path, target):
    _check(_compiled(tmp_path, target, LAYERS), LAYERS)


@pytest.mark.skipif("BDPO_COMPILE_ALL" not in os.environ, reason="minutes of compilation: set BDPO_COMPILE_ALL=1")
@pytest.mark.xfail(reason="PyTorch's backward for head size 256 asks for 114,688 bytes where sm_120 has 101,376")
def test_heads_of_256_fit_a_consumer_gpu(tmp_path):
    _check(_compiled(tmp_path, "sm_120", LAYERS[3:]), LAYERS[3:])
