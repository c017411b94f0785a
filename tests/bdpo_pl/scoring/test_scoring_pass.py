"""The scoring pass against single forward passes, and its cache against damage, strangers and interruptions."""

import contextlib
import json
import re
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import build_model
from safetensors.numpy import load_file, save_file

from bdpo_pl.comprehension import normalised_hsic
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.errors import InputError
from bdpo_pl.models.loading import hold_products_in
from bdpo_pl.scoring.cache import ScoreCache
from bdpo_pl.scoring.machine import Machine
from bdpo_pl.scoring.scoring_pass import ScoringOptions, score_pairs, score_table

NULL = [3, 8]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("bdpo_pl.scoring.cache._PAUSES_S", (0.0,))


@pytest.fixture(scope="module")
def model():
    return build_model().eval()


@pytest.fixture(scope="module")
def table():
    g = torch.Generator().manual_seed(0)

    def ids(low, high):
        return torch.randint(5, 400, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    return PairTable.from_pairs([PreferencePair(ids(1, 20), ids(1, 12), ids(1, 12)) for _ in range(11)], NULL)


def logp_alone(model, context, response):
    with torch.no_grad():
        logp = model(torch.tensor([context + response])).logits.double().log_softmax(-1)[0]
    at = torch.arange(len(context) - 1, len(context) + len(response) - 1)
    return logp[at, torch.tensor(response)].sum().item()


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_four_scorings_of_every_pair(model, table, batch_tokens):
    indices = [7, 0, 3]
    scores = score_pairs(model, table, indices, batch_tokens=batch_tokens)
    for at, i in enumerate(indices):
        pair = table[i]
        for side, response in enumerate((pair.chosen_ids, pair.rejected_ids)):
            assert scores.reference[side, at] == pytest.approx(logp_alone(model, pair.prompt_ids, response), abs=1e-4)
            assert scores.null[side, at] == pytest.approx(logp_alone(model, NULL, response), abs=1e-4)
    assert scores.hsic is None


def test_each_pair_is_scored_against_its_own_null_prompt(model, table):
    other = [5, 6, 7]
    scores = score_pairs(model, table.with_null_prompts([*[NULL] * 4, *[other] * 7]), [3, 4])
    for at, (i, null) in enumerate(((3, NULL), (4, other))):
        assert scores.null[0, at] == pytest.approx(logp_alone(model, null, table[i].chosen_ids), abs=1e-4)


def test_without_comprehension_there_are_no_null_scores(model, table):
    assert score_pairs(model, table, [0, 1], comprehension=False).null is None


def test_hsic_uses_the_hidden_states_of_prompt_and_response(model, table):
    scores = score_pairs(model, table, [4], hsic=True)
    pair = table[4]
    with torch.no_grad():
        hidden = model.model(torch.tensor([pair.prompt_ids + pair.rejected_ids])).last_hidden_state[0]
    cut = len(pair.prompt_ids)
    assert scores.hsic[1, 0] == pytest.approx(normalised_hsic(hidden[:cut], hidden[cut:]).item(), rel=1e-4)


def test_model_mode_is_left_as_it_was(table):
    model = build_model().train()
    score_pairs(model, table, [0])
    assert model.training


def test_scores_that_are_not_finite_name_the_pair(table):
    broken = build_model()
    with torch.no_grad():
        broken.lm_head.weight[table[2].chosen_ids[0]] = float("nan")
    with pytest.raises(InputError, match=r"pair 2.*not finite"):
        score_pairs(broken, table, [2])


class Counter:
    """Gives the model and counts how often it is asked."""

    def __init__(self, model, fail_after=None):
        self.model, self.calls, self.fail_after = model, 0, fail_after

    def __call__(self):
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise KeyboardInterrupt
        return self.model


def run(table, counter, root, key=None, machine=None):
    cache = ScoreCache(root, key or {"model": "a"}, len(table), 4)
    return score_table("train", table, counter, cache, ScoringOptions(), machine=machine), cache


def test_second_run_reads_the_cache_and_no_model(model, table, tmp_path):
    first, _ = run(table, Counter(model), tmp_path)
    counter = Counter(model)
    second, cache = run(table, counter, tmp_path)
    assert counter.calls == 0
    for name, values in first.columns().items():
        np.testing.assert_array_equal(values, second.columns()[name])
    # What is cached is what a pass over everything gives.
    np.testing.assert_allclose(first.reference, score_pairs(model, table, range(11)).reference, atol=1e-4)
    assert json.loads((cache.folder / "key.json").read_text())["model"] == "a"


def test_another_key_is_another_cache(model, table, tmp_path):
    run(table, Counter(model), tmp_path)
    counter = Counter(model)
    run(table, counter, tmp_path, key={"model": "b"})
    assert counter.calls == 3


def test_interrupted_run_goes_on_where_it_stopped(model, table, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(table, Counter(model, fail_after=2), tmp_path)
    counter = Counter(model)
    resumed, _ = run(table, counter, tmp_path)
    assert counter.calls == 1
    whole, _ = run(table, Counter(model), tmp_path / "fresh")
    np.testing.assert_array_equal(resumed.reference, whole.reference)
    assert not list(tmp_path.rglob("*.tmp"))


def chunk(cache, number=1):
    return cache.folder / f"chunk-{number:06d}.safetensors"


def truncate(path, cache):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path, cache):
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)


def empty(path, cache):
    path.write_bytes(b"")


def swap(path, cache):
    path.write_bytes(chunk(cache, 0).read_bytes())


def foreign(path, cache):
    other = ScoreCache(cache.folder.parent.parent, {"model": "other"}, cache.num_pairs, 4)
    scores = cache.load(1)
    other.save(1, scores)
    path.write_bytes(chunk(other).read_bytes())


def no_metadata(path, cache):
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [truncate, flip, empty, swap, foreign, no_metadata])
def test_damaged_and_foreign_chunks_are_refused_and_scored_again(model, table, tmp_path, damage):
    first, cache = run(table, Counter(model), tmp_path)
    damage(chunk(cache), cache)
    counter = Counter(model)
    with pytest.warns(UserWarning, match="chunk-000001.*scored again"):
        second, _ = run(table, counter, tmp_path)
    assert counter.calls == 1
    np.testing.assert_array_equal(first.null, second.null)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(table, Counter(model), tmp_path)


def test_chunks_that_this_machine_remembers_as_missing_are_found(model, table, tmp_path, monkeypatch):
    """A client of NFS answers from memory until it changes the folder; of four ranks the last one has no chunk."""
    expected, cache = run(table, Counter(model), tmp_path)
    missing = {chunk(cache, number) for number in range(cache.num_chunks)}
    exists, create = Path.exists, tempfile.NamedTemporaryFile
    monkeypatch.setattr(Path, "exists", lambda path: path not in missing and exists(path))
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **options: (missing.clear(), create(**options))[1])
    files = sorted(cache.folder.iterdir())
    found, _ = run(table, Counter(model, fail_after=0), tmp_path, machine=Machine(rank=3, world_size=4))
    np.testing.assert_array_equal(found.reference, expected.reference)
    assert sorted(cache.folder.iterdir()) == files


def test_two_ranks_give_the_cache_of_one(model, table, tmp_path):
    alone, cache = run(table, Counter(model), tmp_path / "one")
    # Rank 1 comes first and finds that rank 0's chunks never arrive.
    with pytest.raises(InputError, match="folder that all nodes share"):
        run(table, Counter(model), tmp_path / "two", machine=Machine(rank=1, world_size=2))
    shared, other = run(table, Counter(model), tmp_path / "two", machine=Machine())
    np.testing.assert_array_equal(alone.reference, shared.reference)
    for number in range(cache.num_chunks):
        assert chunk(cache, number).read_bytes() == chunk(other, number).read_bytes()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("pairs", [3, 6, 9])
def test_progress_of_several_ranks_ends_at_the_number_of_pairs(model, table, pairs, together, tmp_path, capsys):
    """Chunks of 4: one for two ranks, two of unlike size, or a turn of two and one of one; rank 1 writes nothing."""
    table = table.select(range(pairs))
    cache = ScoreCache(tmp_path, {}, pairs, 4)
    machine = Machine(rank=0, world_size=2, together=together)
    with contextlib.suppress(InputError):
        score_table("train", table, lambda: model, cache, ScoringOptions(batch_tokens=1), machine=machine)
    counted = [int(n) for n in re.findall(rf"(\d+) of {pairs} pairs", capsys.readouterr().out)]
    assert counted[-1:] == [pairs]
    assert max(counted) == pairs


def test_cache_folder_that_cannot_be_written_is_found_out_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written.*scoring\.cache_dir"):
        ScoreCache(tmp_path / "file", {}, 3, 4)


@pytest.mark.parametrize("tied", [False, True])
def test_products_held_in_half_give_the_scores_that_autocast_gives(table, tied):
    """To the last bit, in half the memory: autocast rounds the same weights at every product."""
    model = build_model(tie_word_embeddings=tied)
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    before = score_pairs(model, table, range(6), context=autocast)
    embedding = model.get_input_embeddings().weight
    hold_products_in(model, torch.bfloat16)
    assert embedding.dtype == torch.float32
    assert (model.lm_head.weight.dtype == torch.bfloat16) != tied
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    after = score_pairs(model, table, range(6), context=autocast)
    np.testing.assert_array_equal(before.reference, after.reference)
    np.testing.assert_array_equal(before.null, after.null)


def test_products_held_in_half_leave_the_bias_of_the_head(table):
    model = build_model("phi")
    with torch.no_grad():
        model.lm_head.bias.normal_()
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    before = score_pairs(model, table, range(6), context=autocast)
    hold_products_in(model, torch.bfloat16)
    assert {p.dtype for p in model.model.layers[0].mlp.parameters()} == {torch.bfloat16}
    after = score_pairs(model, table, range(6), context=autocast)
    np.testing.assert_array_equal(before.reference, after.reference)


def test_passes_beyond_those_needed_change_nothing(model, table):
    """As a rank runs that has less to score than another, where both are needed for each pass."""
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    expected = score_pairs(model, table, [0, 3], batch_tokens=64)
    needed = len(passes)
    shares = []
    more = score_pairs(model, table, [0, 3], batch_tokens=64, forwards=needed + 3, on_batch=shares.append)
    handle.remove()
    assert len(passes) == 2 * needed + 3
    assert sum(shares) == pytest.approx(1.0)
    np.testing.assert_array_equal(expected.reference, more.reference)


def test_scores_are_read_one_batch_late(model, table, monkeypatch):
    """So that a GPU computes a batch while Python reads the one before; the last is read at the end."""
    happened, tolist = [], torch.Tensor.tolist

    def read(tensor):
        # Positions are integers that never leave the host.
        if tensor.is_floating_point():
            happened.append("read")
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    handle = model.register_forward_pre_hook(lambda *_: happened.append("forward"))
    score_pairs(model, table, [0, 3, 7], batch_tokens=1, comprehension=False)
    handle.remove()
    assert happened == ["forward"] + ["forward", "read"] * 5 + ["read"]
