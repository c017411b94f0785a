"""Every architecture of docs/models.md, as a tiny random twin: what is said of it there, and exact log-probabilities.

Plain transformers is the oracle: each response alone in a row, log-softmax over all positions.
"""

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, SPLIT, VISION_PARTS, pages_table, tiny
from makers import large
from torch.nn import functional as F

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.forward import prefix_sharing, responses
from bdpo_pl.forward.document_attention import DOCUMENTS
from bdpo_pl.forward.fused_loss import fused_preference_loss, why_not_fused
from bdpo_pl.forward.masks import set_attention
from bdpo_pl.forward.prefix_sharing import choose_layout
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.models.reach import freeze_unreached, unreached

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
PAIRS = [
    PreferencePair(list(range(5, 30)), [9, 10, 11, 12, 4], [13, 4]),
    PreferencePair([40], [41, 42, 4], [43, 44, 45, 46, 47, 48, 4]),
]
TABLE = PairTable.from_pairs(PAIRS, [3, 8])


def alone(model):
    """log π of each response by plain transformers, in float64 from its logits on; chosen first."""
    values = []
    for response in ("chosen_ids", "rejected_ids"):
        for pair in PAIRS:
            ids = torch.tensor([pair.prompt_ids + getattr(pair, response)])
            mask = torch.ones_like(ids)
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            at = torch.arange(len(pair.prompt_ids) - 1, ids.shape[1] - 1)
            values.append(logits[0].double().log_softmax(-1)[at, ids[0, at + 1]].sum())
    return torch.stack(values).view(2, -1)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def named(request):
    return request.param, large(tiny(request.param), 0.1).eval()


def test_log_probabilities_are_those_of_plain_transformers_and_the_first_loss_is_ln_2(named, monkeypatch):
    name, model = named
    messages = []
    monkeypatch.setattr(prefix_sharing, "rank_zero_info", messages.append)
    layout = choose_layout(model, TABLE)
    assert (layout is RowLayout.SPLIT) == (name in SPLIT), messages
    expected = alone(model)
    documents = pair_documents(PAIRS)
    layouts = [RowLayout.SPLIT, *([] if name in SPLIT else [RowLayout.SHARED, RowLayout.ONE_ROW])]
    for each in layouts:
        ours = response_logps(model, lay_out(documents, each, 0)).view(2, -1)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=2e-5)
        with torch.no_grad():
            ours = response_logps(model, lay_out(documents, each, 0)).view(2, -1)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=2e-5)
    assert responses._plain[model]
    batch = lay_out(documents, layout, 0)
    assert why_not_fused(model, batch) is None
    with torch.no_grad():
        reference = response_logps(model, batch).view(2, -1)

    def dpo(chosen, rejected, index):
        return -F.logsigmoid(0.1 * (chosen - reference[0, index] - rejected + reference[1, index]))

    loss, _ = fused_preference_loss(model.train(), batch, dpo)
    model.eval()
    assert loss.item() / len(PAIRS) == pytest.approx(0.6931472, abs=1e-6)


def test_documents_read_one_at_a_time_give_the_same_or_are_padded(named, monkeypatch):
    name, model = named
    monkeypatch.setattr(prefix_sharing, "_PAYS", 0.0)
    before = model.config._attn_implementation
    layout = choose_layout(model, TABLE)
    used = model.config._attn_implementation
    try:
        assert (layout is RowLayout.UNPADDED) == (used == DOCUMENTS) == (name not in SPLIT and before == "sdpa")
        batch = lay_out(pair_documents(PAIRS), layout, 0)
        assert layout is not RowLayout.UNPADDED or (batch.documents >= 0).all()
        ours = response_logps(model, batch).view(2, -1)
        torch.testing.assert_close(ours.double(), alone(model), rtol=1e-5, atol=2e-5)
    finally:
        set_attention(model, before)


def test_what_text_never_reaches_is_frozen_and_nothing_else(named):
    name, model = named
    found = {".".join(parameter.split(".")[:2]) for parameter in unreached(model)}
    assert found == VISION_PARTS.get(name, set())
    frozen = freeze_unreached(model)
    response_logps(model, lay_out(pair_documents(PAIRS), RowLayout.SPLIT, 0)).sum().backward()
    without = {parameter for parameter, p in model.named_parameters() if p.requires_grad and p.grad is None}
    model.zero_grad()
    # Of a mixture's experts some are not asked for.
    assert not {parameter for parameter in without if "experts." not in parameter}
    assert all(any(parameter.startswith(part) for part in VISION_PARTS[name]) for parameter in frozen)


def test_the_page_says_what_is_tested():
    assert pages_table() in PAGE.read_text(), f"the table of {PAGE} should be\n{pages_table()}"
