"""Block-sparse attention and the timing of layouts: on a CPU as if it were a GPU, and on a GPU where there is one."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from block_attention import attend_by_blocks
from makers import build_model, large
from shared_rows import NO_MEMORY, model_named, pairs, table

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.forward import masks as attention
from bdpo_pl.forward import prefix_sharing as row_layout
from bdpo_pl.forward.masks import set_attention
from bdpo_pl.forward.prefix_sharing import choose_layout
from bdpo_pl.forward.reading import read
from bdpo_pl.forward.responses import response_logps


@pytest.fixture
def gpu(monkeypatch):
    """What a GPU would do, on the CPU; gives the time that each layout is to take."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setattr(row_layout, "_on_gpu", lambda model: True)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", attend_by_blocks)
    seconds = {RowLayout.ONE_ROW: 1.0, RowLayout.SHARED: 1.0}
    monkeypatch.setattr(row_layout, "_seconds", lambda _model, _table, layout, *_: (seconds[layout], 3))
    return seconds


def test_on_a_gpu_block_sparse_attention_is_tried_first(gpu):
    model = model_named("llama")
    documents = pair_documents(pairs())
    alone = response_logps(model, lay_out(documents, RowLayout.SPLIT, 0))
    assert choose_layout(model, table()) is RowLayout.ONE_ROW
    assert model.config._attn_implementation == "flex_attention"
    ours = response_logps(model, lay_out(documents, RowLayout.ONE_ROW, 0))
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)
    # What the user names is what is used.
    set_attention(model, "sdpa")
    assert choose_layout(model, table(), attention="sdpa") is RowLayout.SHARED
    assert model.config._attn_implementation == "sdpa"


def test_a_wrong_backward_pass_of_block_sparse_attention_is_noticed(gpu, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def no_gradient_of_values(module, query, key, value, *args, **kwargs):
        return attend_by_blocks(module, query, key, value.detach(), *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", no_gradient_of_values)
    messages = []
    monkeypatch.setattr(row_layout, "rank_zero_info", messages.append)
    model = model_named("llama")
    assert choose_layout(model, table()) is RowLayout.SHARED
    assert model.config._attn_implementation == "sdpa"
    assert "Block-sparse attention is not used: gradients differ" in messages[0]


@pytest.mark.parametrize(("dense", "layout"), [(0.5, RowLayout.SHARED), (0.9, RowLayout.ONE_ROW)])
def test_dense_masks_that_are_clearly_faster_are_taken(gpu, monkeypatch, dense, layout):
    gpu[RowLayout.SHARED] = dense
    messages = []
    monkeypatch.setattr(row_layout, "rank_zero_info", messages.append)
    assert choose_layout(model_named("llama"), table()) is layout
    assert [("dense masks are faster" in message) for message in messages] == [True] * (layout is RowLayout.SHARED)


def test_a_layout_can_be_timed():
    seconds, pairs = row_layout._seconds(model_named("llama"), table(), RowLayout.SHARED, 0, nullcontext)
    assert seconds > 0
    assert pairs == 3


@pytest.mark.parametrize(("room", "pairs"), [(5, 5), (4, 2), (1, 1), (0, 0)])
def test_fewer_pairs_are_timed_if_memory_runs_out(monkeypatch, room, pairs):
    """With gradient checkpointing a batch may fit that does not fit here, where it is off."""
    graphs, tried = [], []

    def read_if_it_fits(model, batch, documents, run):
        assert not [graph for graph in graphs if graph() is not None]
        tried.append(len(documents))
        if len(documents) > room:
            logps, _ = run()
            graphs.append(weakref.ref(logps))
            raise NO_MEMORY["gpu" if pairs % 2 else "cpu"]()
        return read(model, batch, documents, run)

    monkeypatch.setattr(row_layout, "read", read_if_it_fits)
    model = model_named("llama")
    model.train()
    seconds, timed = row_layout._seconds(model, table(n=5), RowLayout.SHARED, 0, nullcontext)
    assert timed == pairs
    assert (seconds is None) is (room == 0)
    assert tried == [5] * (room < 5) + [2] * (room < 2) + [1] * (room < 1) + [pairs] * 4 * (room > 0)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("attention", ["flex_attention", "sdpa"])
def test_block_sparse_attention_is_kept_if_there_is_no_memory_to_time_both(gpu, monkeypatch, attention):
    """Dense masks of fewer pairs are no comparison, however fast."""
    asked = []

    def seconds(model, table, layout, pad_id, context, most=16):
        asked.append(most)
        fits = 1 if model.config._attn_implementation == attention else 2
        return 1.0 / (1 + len(asked)), min(most, fits)

    monkeypatch.setattr(row_layout, "_seconds", seconds)
    assert choose_layout(model_named("llama"), table()) is (
        RowLayout.SHARED if attention == "flex_attention" else RowLayout.ONE_ROW
    )
    assert asked == [16, 1 if attention == "flex_attention" else 2]
    monkeypatch.setattr(row_layout, "_seconds", lambda *_: (None, 0))
    assert choose_layout(model_named("llama"), table()) is RowLayout.ONE_ROW


def test_choosing_compiled_attention_allows_for_its_compilations():
    import torch._dynamo

    set_attention(model_named("llama"), "flex_attention")
    assert torch._dynamo.config.recompile_limit >= 64


def test_block_sparse_attention_that_fails_leaves_dense_masks(gpu, monkeypatch):
    model = model_named("llama")

    def fails(*args):
        raise RuntimeError("no kernel for this head size")

    monkeypatch.setitem(attention._FORMS, "flex_attention", fails)
    messages = []
    monkeypatch.setattr(row_layout, "rank_zero_info", messages.append)
    assert choose_layout(model, table()) is RowLayout.SHARED
    assert model.config._attn_implementation == "sdpa"
    assert len(messages) == 1
    assert "no kernel for this head size" in messages[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_real_gpu_gradients_of_twenty_row_lengths_are_those_of_rows_alone(dtype):
    """Compiled once for dynamic shapes, and never run uncompiled."""
    model = large(build_model("llama", hidden_size=64, head_dim=32), 0.1).to("cuda", dtype).eval()
    set_attention(model, "flex_attention")
    for number in range(20):
        some = PairTable.from_pairs(pairs(seed=number, n=2 + number, longest=40 + 5 * number), [3, 8])
        assert choose_layout(model, some, attention="flex_attention") is not RowLayout.SPLIT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [512, 2_048, 8_192])
def test_on_a_real_gpu_both_layouts_are_timed(tokens, record_property):
    """Four pairs with short answers; `pytest --junitxml FILE` keeps the times."""
    model = build_model("llama", hidden_size=64, head_dim=32, max_position_embeddings=tokens)
    model = model.to("cuda", torch.bfloat16).eval()
    some = PairTable.from_pairs(
        [PreferencePair(*(torch.randint(5, 400, (n,)).tolist() for n in (tokens // 4 - 64, 32, 32))) for _ in range(4)],
        [3, 8],
    )
    for implementation, layout in (("sdpa", RowLayout.SHARED), ("flex_attention", RowLayout.ONE_ROW)):
        set_attention(model, implementation)
        seconds, pairs = row_layout._seconds(model, some, layout, 0, nullcontext)
        record_property(f"{implementation}, {tokens} tokens, ms", seconds * 1e3)
        assert 0 < seconds < 60
        assert pairs == 4
