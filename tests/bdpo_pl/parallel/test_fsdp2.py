"""One process = two of DDP, FSDP2, tensor or context parallelism: losses, weights, caches and resuming."""

import pytest
import sharded_ranks
import torch
from adapters import sft_adapter
from architectures import VISION_PARTS, tiny
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from sharded_jobs import spawn, train, with_intervals

# float32, 8 steps at a rate that moves weights of 0.02 by up to 0.016: orders of summation differ, nothing else does.
VISION = tuple(VISION_PARTS["Gemma 3 (vision)"])
WEIGHTS = {"rtol": 1e-4, "atol": 5e-6}
LOSSES = {"rel": 1e-5, "abs": 1e-5}
# Log-probabilities and drifts sum the rounding of a response's tokens: up to 1.2e-5 nats were seen.
SUMS = {"rel": 1e-5, "abs": 2e-5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with every result of two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    models = {
        "model": build_model(vocab_size=401),  # odd: the ranks hold 201 and 200 rows
        "llama": build_model("llama"),
        "mistral": build_model("mistral"),
        "tied": build_model("qwen2", tie_word_embeddings=True),
        "gpt2": build_model("gpt2"),
        "odd": build_model("llama", num_key_value_heads=1),
        "vision": tiny("Gemma 3 (vision)"),
        "experts": tiny("Mixtral"),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    sft_adapter(folder / "model", folder / "sft", modules_to_save=["lm_head"])
    write_jsonl(folder / "pairs.jsonl", preference_rows(40))
    spawn(sharded_ranks.everything, folder)
    return folder


@pytest.fixture(scope="module")
def one(runs):
    """Results of one process, by what distinguishes them."""
    found = {"": train(runs, "one"), "adapter": train(runs, "one-adapter", **sharded_ranks.from_adapter(runs))}
    found["free"] = train(runs, "one-free", **sharded_ranks.OPTIMIZED["fsdp2-free"])
    short = train(runs, "one-short", **sharded_ranks.SHORT)
    found |= dict.fromkeys(("checkpointing", "logits", "accumulating", "groups", "tp", "context"), short)
    for kind in ("lora", "pissa", "dora"):
        found[kind] = train(runs, f"one-{kind}", **sharded_ranks.RUNS[f"fsdp2-{kind}"])
    for kind in ("dpo", "ld"):
        found[kind] = train(runs, f"one-{kind}", **sharded_ranks.RUNS[f"context-{kind}"])
    for model in set(sharded_ranks.OTHER_MODELS.values()):
        found[model] = train(runs, f"one-{model}", model=model, **sharded_ranks.SHORT)
    return {name: with_intervals(result) for name, result in found.items()}


# Steps of Muon and Adafactor make the rounding of a gradient that is nearly 0 as large as a gradient: they are compared
# at given gradients (test_optimizers).
@pytest.mark.parametrize(
    "name", [*sharded_ranks.RUNS, *sharded_ranks.FROM_ADAPTER, *sharded_ranks.OTHER_MODELS, "fsdp2-free"]
)
def test_two_processes_equal_one(runs, one, name):
    equals_one(runs, one, name)


def test_four_processes_in_groups_that_share_rows_equal_one(runs, one):
    spawn(sharded_ranks.two_groups_of_two, runs, world_size=4)
    equals_one(runs, one, "context-groups")


def equals_one(runs, one, name):
    state, evaluations, held = torch.load(runs / f"{name}.pt", weights_only=True)
    kind = name.partition("-")[2] or name
    expected, expected_evaluations, _ = one[kind if kind in one else ""]
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, **WEIGHTS, msg=lambda m, key=key: f"{key}: {m}")
    assert evaluations.keys() == expected_evaluations.keys()
    for step, values in expected_evaluations.items():
        assert evaluations[step].keys() == values.keys()
        sums = {key for key in values if "/logp_" in key or "/drift_" in key}
        for keys, bounds in ((sums, SUMS), (values.keys() - sums, LOSSES)):
            found = {key: evaluations[step][key] for key in keys}
            assert found == pytest.approx({key: values[key] for key in keys}, **bounds)
    # And the runs went somewhere.
    first, last = min(evaluations), max(evaluations)
    assert evaluations[last]["held_out/loss"] < evaluations[first]["held_out/loss"] - 0.005
    if not name.startswith("ddp"):
        assert held < 0.53


@pytest.mark.parametrize("name", sharded_ranks.RESUMED)
def test_interrupted_and_resumed_on_two_ranks_equals_uninterrupted(runs, name):
    whole, evaluations, _ = torch.load(runs / f"{name}.pt", weights_only=True)
    resumed, resumed_evaluations, _ = torch.load(runs / f"{name}-resumed.pt", weights_only=True)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    last = max(evaluations)
    assert resumed_evaluations[last] == evaluations[last]


def test_checkpoint_says_nothing_of_the_strategy_that_wrote_it(runs, one):
    expected = one[""][0]
    path = str(runs / "fsdp2-steps" / "step=6.ckpt")
    whole, _, _ = train(runs, "one-from-fsdp2", ckpt_path=path)
    for state in (whole, torch.load(runs / "tp-from-fsdp2.pt", weights_only=True)[0]):
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, **WEIGHTS)


def test_checkpoint_of_a_split_model_is_a_plain_file_of_its_trained_weights(runs):
    for name, frozen in (("fsdp2", ()), ("tp", ()), ("fsdp2-lora", ()), ("fsdp2-vision", VISION)):
        checkpoint = torch.load(next((runs / f"{name}-steps").glob("*.ckpt")), weights_only=True)
        state, _, _ = torch.load(runs / f"{name}.pt", weights_only=True)
        trained = {f"policy.{key}" for key in state if not key.startswith(frozen)}
        assert checkpoint["state_dict"].keys() == trained
        assert frozen == () or len(trained) < len(state)


def test_checkpoint_of_a_split_model_holds_the_average_of_schedule_free(runs):
    saved = torch.load(runs / "fsdp2-free-steps" / "step=6.ckpt", weights_only=True)
    states = saved["optimizer_states"][0]["state"].values()
    found = sorted(float(value.double().sum()) for value in saved["state_dict"].values())
    wanted = sorted(float(((s["y"].double() - 0.1 * s["z"].double()) / 0.9).sum()) for s in states)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert found != pytest.approx(sorted(float(s["y"].double().sum()) for s in states), abs=1e-4)


def test_two_ranks_write_the_cache_that_one_writes(runs, one):
    """Byte for byte, whatever the strategy."""

    def files(name):
        root = runs / "cache" / name
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.safetensors")}

    expected = files("one")
    assert len(expected) == 5  # 32 and 8 pairs, 8 to a chunk
    for name in ("ddp", "fsdp2", "tp", "context", "fsdp2-lora"):
        assert files(name) == expected
