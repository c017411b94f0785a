"""8-bit AdamW on parts of weights: steps, checkpoints and whole runs against those of one device."""

import pytest
import split_8bit_ranks
import torch
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from ranks import run_ranks
from sharded_jobs import spawn
from split_8bit_ranks import UNEVEN, Model, after, build, flat, ordered
from training import same

from bdpo_pl.errors import InputError
from bdpo_pl.training import split_8bit
from bdpo_pl.training.optimizer_state import state_bytes
from bdpo_pl.training.optimizers import AdamW8bit, is_hidden_matrix
from bdpo_pl.training.parameter_counts import Devices, count_parameters
from bdpo_pl.training.split_8bit import keeps_blocks

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Checkpoints of one device, of two ranks, and of three that go on from each."""
    folder = tmp_path_factory.mktemp("split")
    torch.save(after(3), folder / "at 3 of 1.pt")
    torch.save(after(5), folder / "at 5 of 1.pt")
    run_ranks(split_8bit_ranks.runs, folder, folder)
    # Again, now that there is a checkpoint of their own.
    (folder / "rendezvous-runs").unlink(missing_ok=True)
    run_ranks(split_8bit_ranks.runs, folder, folder)
    (folder / "rendezvous-runs").unlink(missing_ok=True)
    run_ranks(split_8bit_ranks.runs, folder, folder, world_size=3)
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def named(checkpoint):
    """Weight and state by name; the state is in the order of groups, the weights in that of the model."""
    weights, state = checkpoint
    model, optimizer = build()
    by_name = dict(zip((name for name, _ in model.named_parameters()), weights, strict=True))
    names = [name for _, name in ordered(model, optimizer)]
    return {name: (by_name[name], flat(state["state"][i])) for i, name in enumerate(names)}


def differing(one, other):
    """Names of the weights that differ, or whose state does."""
    one, other = named(one), named(other)
    assert one.keys() == other.keys()
    return {
        name
        for name, (weight, state) in one.items()
        if not torch.equal(weight, other[name][0])
        or state.keys() != other[name][1].keys()
        or any(not torch.equal(torch.as_tensor(v), torch.as_tensor(other[name][1][k])) for k, v in state.items())
    }


def test_steps_and_checkpoints_of_two_ranks_are_those_of_one_device_to_the_last_bit(found):
    for step in ("at 3", "at 5"):
        assert differing(found[f"{step} of 2"], found[f"{step} of 1"]) == {UNEVEN}
    kinds = {name: state["state1"].dtype for name, (_, state) in named(found["at 3 of 1"]).items()}
    eighths = {"even.weight", "stacked", "rest.weight", "crooked.weight", "row.weight", "long"}
    assert {name for name, kind in kinds.items() if kind == torch.uint8} == eighths


def test_parts_that_keep_no_blocks_take_the_steps_of_32_bits(found):
    model = Model()
    optimizer = AdamW8bit(list(model.parameters()), lr=1e-2, weight_decay=0.1)
    optimizer.mng.override_config([model.crooked.weight], "optim_bits", 32)
    split_8bit_ranks.steps(range(5), model, optimizer)
    weight, state = named(found["at 5 of 2"])[UNEVEN]
    assert torch.equal(weight, model.crooked.weight)
    assert torch.equal(state["state1"], optimizer.state[model.crooked.weight]["state1"])


def test_a_resume_on_as_many_ranks_is_exact(found):
    assert not differing(after(5, start=found["at 3 of 1"], first=3), found["at 5 of 1"])
    assert not differing(found["from 2 of 2"], found["at 5 of 2"])


def test_one_device_goes_on_from_the_checkpoint_of_two_ranks_exactly(found):
    assert not differing(after(5, start=found["at 3 of 2"], first=3), found["at 5 of 2"])


def test_two_ranks_go_on_from_the_checkpoint_of_one_device(found):
    assert differing(found["from 1 of 2"], found["at 5 of 1"]) == {UNEVEN}
    weight, _ = named(found["from 1 of 2"])[UNEVEN]
    # Two steps in 32 bits instead of 8, at a rate of 0.01.
    torch.testing.assert_close(weight, named(found["at 5 of 1"])[UNEVEN][0], rtol=0, atol=2e-3)


def test_three_ranks_whose_parts_are_others_go_on_from_either(found):
    """What is in 8 bits in the checkpoint, and cannot be on three ranks, has the same numbers in 32 (`check_parts`)."""
    wanted = named(found["at 5 of 1"])
    for source in ("from 1 of 3", "from 2 of 3"):
        for name, (weight, _) in named(found[source]).items():
            torch.testing.assert_close(weight, wanted[name][0], rtol=0, atol=2e-3)
    assert named(found["from 1 of 3"])["even.weight"][1]["state1"].dtype == torch.uint8
    assert named(found["from 1 of 3"])["rest.weight"][1]["state1"].dtype == torch.float32


def test_blocks_of_another_size_are_refused():
    with pytest.raises(InputError, match="not in blocks of 256 numbers; with FSDP2 take a version"):
        split_8bit._check_blocks(torch.empty(4096), {"absmax1": torch.empty(2), "absmax2": torch.empty(2)})


def test_whole_runs_of_two_ranks_are_near_those_of_one_and_resumed_exactly(tmp_path):
    build_model(vocab_size=401, hidden_size=64, intermediate_size=176).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(40))
    alone = split_8bit_ranks.job(tmp_path, "one", 1, callbacks=[split_8bit_ranks.checkpoint_at(tmp_path, "one", 2)])
    spawn(split_8bit_ranks.trained, tmp_path)
    results = {
        name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("fsdp2", "from-fsdp2", "from-one")
    }
    last = max(alone[1])
    assert last == 4
    assert alone[1][last]["train_probe/margin"] > 0.05
    assert same(results["from-fsdp2"][0], results["fsdp2"][0])
    path = str(tmp_path / "fsdp2-steps" / "step=2.ckpt")
    back = split_8bit_ranks.job(tmp_path, "one-back", 1, cache="one", ckpt_path=path)
    for evaluations in (*(result[1] for result in results.values()), back[1]):
        # Rounding of a gradient may change a code, and that a step by some percent.
        for name in ("held_out/loss", "train_probe/loss", "held_out/margin"):
            assert evaluations[last][name] == pytest.approx(alone[1][last][name], rel=1e-3, abs=1e-3)
    state = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    assert {values["state1"].dtype for values in state.values()} == {torch.uint8, torch.float32}


def test_the_plan_counts_what_is_in_32_bits():
    """SmolLM2's keys are of 192 rows of 576 numbers: on 2 ranks parts keep blocks, on 5 they do not."""
    shape = torch.empty(192, 576, device="meta")
    assert [n for n in range(1, 9) if not keeps_blocks(shape, n)] == [5]
    model = build_model(hidden_size=64, intermediate_size=176)
    held = {n: [keeps_blocks(p, n) for p in model.parameters() if is_hidden_matrix(p)] for n in (2, 5)}
    assert all(held[2])
    assert not all(held[5])
    counts = {n: _counts(model, n) for n in (1, 2, 5)}
    assert counts[1].trained_uneven == counts[2].trained_uneven == 0
    assert counts[5].trained_uneven == sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name and not keeps_blocks(p, 5)
    )
    bits = [state_bytes(AdamW8bit, 1000, 10, torch.float32, uneven) for uneven in (0, 1000)]
    assert bits == pytest.approx([1000 * 2.03125 + 80, 1010 * 8])
    assert state_bytes(torch.optim.AdamW, 1000, 10, torch.float32, 1000) == 1010 * 8


def _counts(model, ranks):
    from bdpo_pl.models.loading import ModelSource

    devices = Devices(ranks, 1, ranks > 1, "cpu")
    return count_parameters(ModelSource("it"), model.config, torch.float32, None, devices)
