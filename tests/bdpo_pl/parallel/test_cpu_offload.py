"""Weights, gradients and optimiser state on the host, as far as that can be tested without a GPU.

Where each tensor is, is tested with a pretended GPU (`pretend_gpu`): it has shapes and devices, but no numbers. Numbers
are tested with CPU processes, for which the refusal is turned off: FSDP2 goes the way of offloaded weights then, but
its copies from the host to the device are of a CPU to itself. What a real GPU does at the same time, and how long it
takes, is tested nowhere.
"""

import offload_ranks
import pytest
import torch
from children import start
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from sharded_jobs import spawn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from bdpo_pl.errors import InputError
from bdpo_pl.parallel.cpu_offload import backend_for, check_cpu_offload, offload_policy
from bdpo_pl.parallel.fsdp2 import ShardedStrategy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_model(num_hidden_layers=1).save_pretrained(folder)  # the pretended GPU takes its time
    return folder


@pytest.mark.parametrize("world_size", [2, 1])
def test_host_holds_weights_gradients_and_state_and_the_gpu_multiplies(folder, world_size):
    start(offload_ranks.placed, (folder, world_size), 1)


def test_numbers_are_those_without_it_and_a_resumed_run_ends_in_the_same_bits(tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(40))
    spawn(offload_ranks.runs_on_cpus, tmp_path)
    for kind in ("", "-lora"):
        plain, offloaded, resumed = (
            torch.load(tmp_path / f"{name}.pt", weights_only=True)
            for name in (f"fsdp2{kind}", f"offload{kind}", f"offload{kind}-resumed")
        )
        for other in (offloaded, resumed):
            assert all(torch.equal(plain[0][name], other[0][name]) for name in plain[0])
            assert other[1][max(other[1])] == plain[1][max(plain[1])]
        first, last = min(plain[1]), max(plain[1])
        assert plain[1][last]["held_out/loss"] < plain[1][first]["held_out/loss"] - 0.005

    def scores(name):
        root = tmp_path / "cache" / name
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.safetensors")}

    assert scores("offload") == scores("fsdp2")
    assert len(scores("fsdp2")) == 5


def test_module_around_it_is_moved(folder):
    start(offload_ranks.a_module_around_it_is_moved, (folder,), 1)


def test_weights_are_pinned_for_a_gpu():
    assert offload_policy(True, torch.device("cuda")) == CPUOffloadPolicy(pin_memory=True)
    assert type(offload_policy(False, torch.device("cuda"))) is OffloadPolicy


def test_groups_have_operations_on_host_tensors():
    assert backend_for(None, "cuda") == "cpu:gloo,cuda:nccl"
    assert backend_for("cpu:gloo,cuda:nccl", "cuda") == "cpu:gloo,cuda:nccl"
    with pytest.raises(InputError, match=r"process_group_backend is nccl.*set it to cpu:gloo,cuda:nccl, or leave it"):
        backend_for("nccl", "cuda")


def test_what_it_does_not_work_with_is_refused():
    with pytest.raises(InputError, match=r"where they are anyway.*leave it out, or set trainer\.accelerator to gpu"):
        check_cpu_offload("cpu", "32-true")
    with pytest.raises(InputError, match=r"set trainer\.precision to bf16-mixed"):
        check_cpu_offload("cuda", "16-mixed")
    check_cpu_offload("cuda", "bf16-mixed")
    with pytest.raises(InputError, match="tensor_parallel_size is 2; set it to 1, or leave cpu_offload out"):
        ShardedStrategy(tensor_parallel_size=2, cpu_offload=True)
