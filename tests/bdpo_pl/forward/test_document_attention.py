"""Attention by document: packed rows without padding give what rows of their own give, or are not used."""

import numpy as np
import pytest
import torch
from makers import build_model, large

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import Document, RowLayout, lay_out
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.forward import document_attention, prefix_sharing
from bdpo_pl.forward.document_attention import DOCUMENTS, attend
from bdpo_pl.forward.generation import generate_responses
from bdpo_pl.forward.masks import depends_on_length, set_attention
from bdpo_pl.forward.prefix_sharing import choose_layout, probe_documents
from bdpo_pl.forward.responses import response_logps


def ids(count, first=5):
    return [first + (7 * i + first) % 300 for i in range(count)]


# Three responses, one of a token, an own context of a token, and two sequences in exchanged order.
UNEVEN = [
    Document(ids(9), [(4, ids(5, 11)), (0, ids(1, 23)), (2, ids(7, 31))]),
    Document(ids(1, 40), [(1, ids(3, 50))]),
    Document(ids(4, 60), [(5, ids(6, 70)), (3, ids(2, 80))]),
]
PAIRS = [PreferencePair(ids(8, n), ids(4 + n, 20 + n), ids(9 - n, 60 + n)) for n in range(1, 5)]
TABLE = PairTable.from_pairs(PAIRS, [3, 8])


def llama(**options):
    return large(build_model("llama", **options)).double().eval()


def read(model, layout, implementation, documents=UNEVEN):
    set_attention(model, implementation)
    logps = response_logps(model, lay_out(documents, layout, 0))
    weights = torch.arange(1, len(logps) + 1) * (-1.0) ** torch.arange(len(logps))
    grads = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
    return logps.detach(), grads


@pytest.mark.parametrize("heads", [1, 2, 4], ids="{} key heads".format)
def test_values_and_gradients_are_those_of_rows_alone(heads):
    model = llama(num_key_value_heads=heads)
    expected, expected_grads = read(model, RowLayout.SPLIT, "sdpa")
    found, grads = read(model, RowLayout.PACKED, DOCUMENTS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5 * theirs.abs().max().item())


def test_a_packed_row_has_no_padding():
    batch = lay_out(UNEVEN, RowLayout.PACKED, 0)
    assert batch.input_ids.shape == (1, sum(document.num_tokens for document in UNEVEN))
    assert (batch.documents >= 0).all()


@pytest.mark.parametrize("layout", [RowLayout.SPLIT, RowLayout.SHARED, RowLayout.ONE_ROW])
def test_other_rows_are_read_as_by_sdpa(layout):
    model = llama()
    expected = read(model, layout, "sdpa")[0]
    assert torch.equal(read(model, layout, DOCUMENTS)[0], expected)


def swapped(plan):
    """The same spans, as if the first response began a token later."""
    return lambda spans: [(context + 1, [lengths[0] - 1, *lengths[1:]]) for context, lengths in plan(spans)]


def blind(m, n, dtype):
    """A mask that lets a response see what follows."""
    return torch.zeros(n, m + n, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "make"), [("_documents", lambda: swapped(document_attention._documents)), ("_behind", lambda: blind)]
)
def test_a_fault_is_noticed_and_dense_masks_are_taken(monkeypatch, name, make):
    monkeypatch.setattr(prefix_sharing, "BY_DOCUMENT", True)
    model = large(build_model("llama")).eval()
    assert choose_layout(model, TABLE) is RowLayout.PACKED
    set_attention(model, "sdpa")
    monkeypatch.setattr(document_attention, name, make())
    messages = []
    monkeypatch.setattr(prefix_sharing, "rank_zero_info", messages.append)
    assert choose_layout(model, TABLE) is RowLayout.SHARED
    assert model.config._attn_implementation == "sdpa"
    assert len(messages) == 1
    assert messages[0].startswith("Attention is not computed by document: ")


def test_spans_that_do_not_fill_the_row_and_what_is_not_supported_are_refused():
    states = torch.randn(1, 2, 6, 4)
    spans = torch.tensor([[0, 2, 2, 4], [0, 2, 4, 6]]).view(1, 1, 2, 4)
    assert attend(None, states, states, states, spans)[0].shape == (1, 6, 2, 4)
    for wrong in (spans[:, :, :1], spans + 1):
        with pytest.raises(ValueError, match="span"):
            attend(None, states, states, states, wrong)
    for kwargs in ({"softcap": 5.0}, {"s_aux": states}, {"sliding_window": 3}):
        with pytest.raises(ValueError, match="knows no dropout, softcap"):
            attend(None, states, states, states, spans, **kwargs)


def test_lengths_first_met_in_validation_can_be_trained_on():
    """Lightning validates in inference mode, whose tensors no backward pass takes."""
    document_attention._behind.cache_clear()
    states = torch.randn(1, 2, 7, 4, requires_grad=True)
    spans = torch.tensor([[0, 2, 2, 4], [0, 2, 4, 7]]).view(1, 1, 2, 4)
    with torch.inference_mode():
        attend(None, states, states, states, spans)
    attend(None, states, states, states, spans)[0].sum().backward()
    assert states.grad is not None


def test_a_model_that_reads_by_document_still_generates(model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    expected = generate_responses(model, tokenizer, ["what is it ?"], max_new_tokens=5)
    set_attention(model, DOCUMENTS)
    assert generate_responses(model, tokenizer, ["what is it ?"], max_new_tokens=5) == expected
    assert model.config._attn_implementation == DOCUMENTS


def test_nothing_of_it_is_in_an_exported_model(tmp_path):
    model = llama()
    set_attention(model, DOCUMENTS)
    model.save_pretrained(tmp_path)
    assert DOCUMENTS not in (tmp_path / "config.json").read_text()


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
LONG = {"qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, "llama": DYNAMIC}


@pytest.mark.parametrize("name", LONG)
def test_what_depends_on_length_is_tried_on_the_longest_pair(name):
    sizes = [40, 300, 200, 12]
    pairs = [PreferencePair(ids(size - 6), ids(3, 9), ids(3, 11)) for size in sizes]
    table = PairTable.from_pairs(pairs, [3, 8])
    windowed, plain = build_model(name, **LONG[name]), build_model(name)
    assert [d.num_tokens for d in probe_documents(table, windowed)] == [300, 12]
    assert [d.num_tokens for d in probe_documents(table, plain)] == [200, 12]
    assert (depends_on_length(windowed), depends_on_length(plain)) == (True, False)
    # Where all are long, the shortest alone.
    assert [d.num_tokens for d in probe_documents(table.select(np.array([1, 1])), plain)] == [300]


def test_documents_of_a_batch_are_those_of_its_spans():
    spans = lay_out(pair_documents(PAIRS), RowLayout.PACKED, 0).spans
    found = document_attention._documents(spans)
    # Also where each response is read as two sequences, as a loss of parts does.
    assert found == document_attention._documents(torch.cat([spans, spans]))
    assert found == [(len(p.prompt_ids), [len(p.chosen_ids), len(p.rejected_ids)]) for p in PAIRS]
