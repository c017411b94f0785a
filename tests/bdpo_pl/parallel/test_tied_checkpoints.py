"""Checkpoints of two ranks hold a weight with two names once, as one device's do, and each goes on from the other's."""

import pytest
import tied_ranks
import torch
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from sharded_jobs import spawn
from tied_ranks import OPTIMIZERS, checkpoint, job, saved

NAMES = ("policy.model.embed_tokens.weight", "policy.lm_head.weight")
WEIGHTS = {"rtol": 1e-4, "atol": 5e-6}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs, and the weights at the end of those of one device."""
    folder = tmp_path_factory.mktemp("tied")
    build_model(vocab_size=401, tie_word_embeddings=True).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows(40))
    one = {kind: saved(folder, "one", 1, kind)[0] for kind in OPTIMIZERS}
    spawn(tied_ranks.runs, folder)
    return folder, one


@pytest.mark.parametrize(("name", "kind"), [("fsdp2", "adamw"), ("tp", "adamw"), ("fsdp2", "free")])
def test_checkpoint_of_two_ranks_is_as_large_as_that_of_one_device(runs, name, kind):
    one, two = checkpoint(runs[0], "one", kind), checkpoint(runs[0], name, kind)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (one, two)]
    for state in states:
        assert len({state[name].data_ptr() for name in NAMES}) == 1
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, **WEIGHTS)
    # The rest of a file is names and settings, whose lengths differ a little.
    embedding = states[0][NAMES[0]]
    assert abs(two.stat().st_size - one.stat().st_size) < embedding.nbytes / 4


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_device_goes_on_from_two_ranks_and_two_from_one(runs, kind):
    folder, one = runs
    alone, _, _ = job(folder, "one-from-fsdp2", 1, kind, ckpt_path=str(checkpoint(folder, "fsdp2", kind)))
    together, _, _ = torch.load(folder / f"fsdp2-from-one-{kind}.pt", weights_only=True)
    for state in (alone, together):
        assert state.keys() == one[kind].keys()
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
        for key, value in one[kind].items():
            torch.testing.assert_close(state[key], value, **WEIGHTS)
