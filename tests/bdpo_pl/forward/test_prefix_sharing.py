"""Prefix sharing: rows that hold several sequences give what rows of their own give, or are not used."""

import dataclasses
import weakref

import pytest
import torch
from shared_rows import EXACT, INEXACT, NO_MEMORY, model_named, pairs, table
from training import fit

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import Document, RowLayout, lay_out
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.errors import InputError, MachineError
from bdpo_pl.forward import agreement
from bdpo_pl.forward import masks as attention
from bdpo_pl.forward import prefix_sharing as row_layout
from bdpo_pl.forward.masks import model_inputs, set_attention
from bdpo_pl.forward.prefix_sharing import choose_layout
from bdpo_pl.forward.reading import read
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.scoring.scoring_pass import score_pairs


@pytest.mark.parametrize("layout", [RowLayout.SHARED, RowLayout.ONE_ROW])
@pytest.mark.parametrize("name", EXACT)
def test_log_probabilities_and_gradients_are_those_of_two_rows(name, layout):
    model = model_named(name)
    documents = pair_documents(pairs())
    weights = torch.tensor([1.0, -0.5, 0.25, -2.0, 0.75, 1.5])

    def run(layout):
        logps = response_logps(model, lay_out(documents, layout, 0))
        grads = torch.autograd.grad((logps * weights).sum(), list(model.parameters()), allow_unused=True)
        return logps.detach(), [g for g in grads if g is not None]

    (alone, alone_grads), (shared, shared_grads) = run(RowLayout.SPLIT), run(layout)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-4)
    assert len(shared_grads) == len(alone_grads) > 0
    for ours, expected in zip(shared_grads, alone_grads, strict=True):
        # float32 rounding, of sums over some hundred positions.
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-5 * expected.abs().max().item())
    assert choose_layout(model, table()) is RowLayout.SHARED


def test_windows_are_those_of_positions_not_of_places_in_the_row():
    """The window would reach over the chosen response if it were counted in the row."""
    model = model_named("mistral")
    document = [Document(list(range(5, 12)), [(0, list(range(20, 40))), (1, [50, 51, 52, 53])])]
    shared = lay_out(document, RowLayout.SHARED, 0)
    alone = response_logps(model, lay_out(document, RowLayout.SPLIT, 0))
    torch.testing.assert_close(response_logps(model, shared), alone, rtol=1e-5, atol=1e-4)
    # And it is really there: without it the numbers are others.
    model.config.sliding_window = None
    assert (response_logps(model, shared) - alone).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_eager_attention_is_told_the_same(name):
    model = model_named(name)
    batch = lay_out(pair_documents(pairs()), RowLayout.SHARED, 0)
    expected = response_logps(model, batch)
    set_attention(model, "eager")
    torch.testing.assert_close(response_logps(model, batch), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_block_masks_hide_what_dense_masks_hide(name):
    """Of compiled attention a CPU runs only the forward; its masks are compared place by place."""
    from torch.nn.attention.flex_attention import create_mask

    model = model_named(name)
    model.config._attn_implementation = "sdpa"
    batch = lay_out(pair_documents(pairs(n=5, longest=60)), RowLayout.ONE_ROW, 0)
    dense = model_inputs(model, batch)["attention_mask"]
    model.config._attn_implementation = "flex_attention"
    blocks = model_inputs(model, batch)["attention_mask"]
    if not isinstance(dense, dict):
        dense, blocks = {"full_attention": dense}, {"full_attention": blocks}
    assert dense.keys() == blocks.keys()
    T = batch.input_ids.shape[1]
    for kind, mask in dense.items():
        again = create_mask(blocks[kind].mask_mod, 1, None, T, T, "cpu")
        assert torch.equal(mask, again)
        # Blocks that hold nothing to see are left out.
        listed = blocks[kind].to_dense()[0, 0].bool()
        seen = mask[0, 0].view(T // 128, 128, T // 128, 128).any(dim=3).any(dim=1)
        assert torch.equal(listed, seen)


@pytest.mark.parametrize("name", INEXACT)
def test_what_cannot_branch_is_found_out_and_said(name, monkeypatch):
    model = model_named(name)
    messages = []
    monkeypatch.setattr("bdpo_pl.forward.prefix_sharing.rank_zero_info", messages.append)
    assert choose_layout(model, table()) is RowLayout.SPLIT
    assert len(messages) == 1
    assert messages[0].startswith("Prompts are not shared")
    with pytest.raises(InputError, match=rf"prefix_sharing is always, but M cannot .*({INEXACT[name][2]})"):
        choose_layout(model, table(), "always", name="M")
    assert choose_layout(model, table(), "never") is RowLayout.SPLIT


def blind(sees):
    """A mask that forgets to hide one response from another."""
    return lambda row, query, key: sees(row, query, key) | (query >= key)


class Planted:
    """Puts a fault into shared rows alone; rows of their own are as they should be."""

    def __init__(self, monkeypatch):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.shared = False
        self.attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        self.functions, self.monkeypatch = ALL_ATTENTION_FUNCTIONS, monkeypatch
        monkeypatch.setattr(row_layout, "lay_out", self.lay_out)

    def lay_out(self, documents, layout, pad_id):
        batch = lay_out(documents, layout, pad_id)
        self.shared = batch.shared
        return batch

    def attention(self, faulty):
        def attend(module, query, key, value, mask, **kwargs):
            if self.shared:
                query, key, value, mask = faulty(query, key, value, mask)
            return self.attend(module, query, key, value, mask, **kwargs)

        self.monkeypatch.setitem(self.functions._global_mapping, "sdpa", attend)


def leak(planted):
    sees = attention._sees
    planted.monkeypatch.setattr(attention, "_sees", lambda *args: blind(sees(*args)))


def wrong_positions(planted):
    def doubled(documents, layout, pad_id):
        batch = planted.lay_out(documents, layout, pad_id)
        return dataclasses.replace(batch, position_ids=batch.position_ids * 2) if batch.shared else batch

    planted.monkeypatch.setattr(row_layout, "lay_out", doubled)


def ignored_mask(planted):
    planted.attention(lambda query, key, value, mask: (query, key, value, None))


def no_gradient_behind_the_last_turn(planted):
    """Right values, and a prompt that learns nothing from what follows it."""

    def cut(query, key, value, mask):
        first = key.shape[2] // 2
        halves = [torch.cat([t[:, :, :first].detach(), t[:, :, first:]], dim=2) for t in (key, value)]
        return query, *halves, mask

    planted.attention(cut)


FAULTS = {
    leak: "a response is seen by another",
    ignored_mask: "a response is seen by another",
    wrong_positions: "log-probabilities differ from those of responses alone",
    no_gradient_behind_the_last_turn: "gradients differ from those of responses alone",
}


@pytest.mark.parametrize("length", [3, 200], ids=["short", "long"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_noticed(monkeypatch, fault, length):
    model = model_named("qwen2")
    pair = PreferencePair(list(range(5, 5 + length)), [7, 8] * (length // 2 + 1), [9, 10, 11] * (length // 3))
    one = PairTable.from_pairs([pair], [3, 8])
    assert choose_layout(model, one, "always", attention="sdpa") is RowLayout.SHARED
    fault(Planted(monkeypatch))
    with pytest.raises(InputError, match=FAULTS[fault]):
        choose_layout(model, one, "always", attention="sdpa")


def test_the_trial_leaves_no_gradient_behind():
    model = model_named("qwen2")
    choose_layout(model, table())
    assert all(parameter.grad is None for parameter in model.parameters())
    # And a frozen model is tried as well.
    assert choose_layout(model.requires_grad_(False), table(), "always") is RowLayout.SHARED


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_without_room_for_a_backward_pass_gradients_are_those_of_the_shortest_pair(monkeypatch, error, frozen):
    """Scoring needs no such pass, and training may have room for it with gradient checkpointing, which is off here."""
    graphs, tried = [], []

    def no_room(model, batch, documents, run):
        assert not [graph for graph in graphs if graph() is not None]
        tried.append(len(documents))
        if len(documents) > 1:
            logps, _ = run()
            graphs.append(weakref.ref(logps))
            raise error()
        return read(model, batch, documents, run)

    monkeypatch.setattr(row_layout, "read", no_room)
    model = model_named("mistral").requires_grad_(not frozen)
    assert choose_layout(model, table(), "always", attention="sdpa") is RowLayout.SHARED
    assert tried == [2, 1, 1]
    # Values are those of the longest pair too.
    ignored_mask(Planted(monkeypatch))
    with pytest.raises(InputError, match="a response is seen by another"):
        choose_layout(model, table(), "always", attention="sdpa")
    assert tried == [2, 1, 1, 2]


def test_without_memory_for_any_trial_the_option_that_leaves_it_out_is_named(monkeypatch):
    def no_room(*args, **options):
        raise NO_MEMORY["gpu"]()

    monkeypatch.setattr(row_layout, "response_logps", no_room)
    longest = table().num_tokens(shared=True).max()
    with pytest.raises(MachineError, match=rf"a pair of {longest} tokens: CUDA.* set model\.prefix_sharing to never"):
        choose_layout(model_named("mistral"), table())
    assert choose_layout(model_named("mistral"), table(), "never") is RowLayout.SPLIT


def test_padding_gets_no_gradient():
    """Places that see nothing but padding: finite, and exactly zero."""
    model = model_named("llama")
    batch = lay_out(pair_documents(pairs()), RowLayout.ONE_ROW, 0)
    found = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: found.append(out.requires_grad_()))
    (grad,) = torch.autograd.grad(response_logps(model, batch).sum(), found)
    handle.remove()
    assert (batch.documents < 0).sum() > 10
    assert (grad[batch.documents < 0] == 0).all()
    assert torch.isfinite(grad).all()


def test_attention_that_takes_no_mask_is_named():
    model = model_named("qwen2")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash_attention_2 attention takes no mask"):
        choose_layout(model, table(), "always")
    with pytest.raises(ValueError, match="flash_attention_2 attention takes none"):
        model_inputs(model, lay_out(pair_documents(pairs()), RowLayout.SHARED, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_shares_too(dtype):
    assert choose_layout(model_named("llama").to(dtype), table()) is RowLayout.SHARED
    assert choose_layout(model_named("llama").to(dtype), table(), attention="sdpa") is RowLayout.SHARED


@pytest.mark.parametrize("layout", [RowLayout.SHARED, RowLayout.ONE_ROW])
@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
def test_scores_are_those_of_rows_of_their_own(layout, batch_tokens):
    model, data = model_named("qwen2"), table(n=7)
    indices = [6, 0, 3, 2]
    alone = score_pairs(model, data, indices, hsic=True)
    shared = score_pairs(model, data, indices, layout=layout, batch_tokens=batch_tokens, hsic=True)
    for name, values in alone.columns().items():
        torch.testing.assert_close(torch.tensor(shared.columns()[name]), torch.tensor(values), rtol=1e-4, atol=1e-4)


def test_shared_scoring_reads_every_prompt_once():
    model, data = model_named("qwen2"), table(n=7)
    places = []
    handle = model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: places.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    score_pairs(model, data, range(7), layout=RowLayout.SHARED, batch_tokens=50)
    handle.remove()
    tokens = data.num_tokens(shared=True).sum() + (2 + data.chosen_lengths + data.rejected_lengths).sum()
    assert tokens <= sum(places) < 1.35 * tokens


def test_training_on_shared_rows_is_training_on_two(job):
    shared, split = fit(job("shared")), fit(job("split", prefix_sharing="never"))
    assert shared.row_layout is RowLayout.SHARED
    assert split.row_layout is RowLayout.SPLIT
    for (name, a), b in zip(shared.policy.named_parameters(), split.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    assert shared.evaluations[8] == pytest.approx(split.evaluations[8], abs=2e-3)


def test_ranks_that_train_parts_of_a_model_do_not_try_less(monkeypatch):
    """One of them may lack memory alone; the others would wait for it in another pass."""
    model = model_named("qwen2")
    assert agreement.may_try_less(model)
    monkeypatch.setattr(agreement, "DTensor", torch.nn.Parameter)
    assert not agreement.may_try_less(model)
    assert agreement.may_try_less(model.requires_grad_(False))
