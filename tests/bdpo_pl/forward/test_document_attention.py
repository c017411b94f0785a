"""Attention of one document at a time: what padded rows give, without padding, and only where it pays."""

import pytest
import torch
from makers import build_model, build_tokenizer, large

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.errors import InputError
from bdpo_pl.forward import document_attention, prefix_sharing
from bdpo_pl.forward.document_attention import DOCUMENTS, DocumentMasks
from bdpo_pl.forward.generation import generate
from bdpo_pl.forward.masks import model_inputs, set_attention
from bdpo_pl.forward.prefix_sharing import choose_layout
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.models.loading import compile_layers
from bdpo_pl.parallel import context_parallel
from bdpo_pl.scoring.scoring_pass import score_pairs

PAIRS = [
    PreferencePair(list(range(5, 30)), [9, 10, 11, 12, 4], [13, 4]),
    PreferencePair([40], [41, 42, 4], [43, 44, 45, 46, 47, 48, 4]),
    PreferencePair(list(range(50, 57)), [60] * 9, [61, 62, 63]),
]
TABLE = PairTable.from_pairs(PAIRS, [3, 8])
# All but GPT-2 have fewer heads of keys than of queries; one has windows that are shorter than a document.
MODELS = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
}


@pytest.fixture(params=MODELS)
def model(request):
    architecture, options = MODELS[request.param]
    return large(build_model(architecture, **options)).eval()


@pytest.fixture
def pays(monkeypatch):
    """The tests' models are small; this makes them large enough."""
    monkeypatch.setattr(prefix_sharing, "_PAYS", 0.0)


def read(model, layout):
    """Return log-probabilities and the gradients of all weights; the attention is that which `layout` needs."""
    set_attention(model, DOCUMENTS if layout is RowLayout.UNPADDED else "sdpa")
    model.zero_grad()
    logps = response_logps(model, lay_out(pair_documents(PAIRS), layout, 0))
    (logps * torch.tensor([1.0, -0.5, 0.25, -2.0, 0.75, 1.5])).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, expected):
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-4)
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # float32 rounding, of sums over some hundred positions.
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-3, atol=2e-5 * gradient.abs().max().item())


def test_log_probabilities_and_gradients_are_those_of_responses_alone(model):
    assert_equal(read(model, RowLayout.UNPADDED), read(model, RowLayout.SPLIT))


def test_the_same_under_gradient_checkpointing(model):
    expected = read(model, RowLayout.SPLIT)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(read(model, RowLayout.UNPADDED), expected)


def test_the_same_with_compiled_layers():
    model = build_model("llama").eval()
    expected = read(model, RowLayout.SPLIT)
    compile_layers(model, "eager")
    assert_equal(read(model, RowLayout.UNPADDED), expected)


def test_scores_are_those_of_padded_rows(model):
    expected = score_pairs(model, TABLE, range(len(PAIRS)), hsic=True, first=True, batch_tokens=64)
    set_attention(model, DOCUMENTS)
    ours = score_pairs(
        model, TABLE, range(len(PAIRS)), layout=RowLayout.UNPADDED, hsic=True, first=True, batch_tokens=64
    )
    for name in ("reference", "null", "hsic", "first"):
        torch.testing.assert_close(
            torch.tensor(getattr(ours, name)), torch.tensor(getattr(expected, name)), rtol=1e-4, atol=1e-4
        )


def test_no_position_is_padding_and_no_mask_is_longer_than_a_document():
    model = build_model("llama")
    set_attention(model, DOCUMENTS)
    documents = pair_documents(PAIRS)
    batch = lay_out(documents, RowLayout.UNPADDED, 0)
    sizes = [document.num_tokens for document in documents]
    assert batch.input_ids.shape == (1, sum(sizes))
    assert batch.attention_mask.all()
    masks = model_inputs(model, batch)["attention_mask"]
    assert [(start, end) for start, end, _ in masks.documents] == [(0, 32), (32, 43), (43, 62)]
    assert [mask.shape[-1] for _, _, mask in masks.documents] == sizes
    # A token of the second response sees the context and its own response.
    assert masks.documents[1][2][0, 0].int().tolist()[4] == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_it_is_chosen_where_documents_and_layers_are_large(model, pays, monkeypatch):
    assert choose_layout(model, TABLE) is RowLayout.UNPADDED
    assert model.config._attn_implementation == DOCUMENTS
    set_attention(model, "sdpa")
    # What the user names is what is used.
    assert choose_layout(model, TABLE, attention="sdpa") is RowLayout.SHARED
    assert choose_layout(model, TABLE, "never") is RowLayout.SPLIT
    assert model.config._attn_implementation == "sdpa"
    # 24 operations a position and square of the hidden size, of which there are 32; 35.3 tokens a pair.
    tokens = TABLE.num_tokens(shared=True).mean()
    for operations, layout in ((24 * 32**2 * tokens, RowLayout.UNPADDED), (24 * 32**2 * tokens + 1, RowLayout.SHARED)):
        monkeypatch.setattr(prefix_sharing, "_PAYS", operations)
        set_attention(model, "sdpa")
        assert choose_layout(model, TABLE) is layout


def test_a_second_choice_begins_with_plain_attention(pays, monkeypatch):
    model = build_model("llama")
    assert choose_layout(model, TABLE) is RowLayout.UNPADDED
    assert choose_layout(model, TABLE) is RowLayout.UNPADDED
    monkeypatch.setattr(prefix_sharing, "_PAYS", float("inf"))
    assert choose_layout(model, TABLE) is RowLayout.SHARED
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("layout", [RowLayout.SHARED, RowLayout.ONE_ROW])
def test_rows_with_padding_are_refused(layout):
    model = build_model("llama")
    set_attention(model, DOCUMENTS)
    with pytest.raises(ValueError, match="a single row without padding"):
        model_inputs(model, lay_out(pair_documents(PAIRS), layout, 0))


def test_it_is_left_out_where_ranks_share_rows(pays, monkeypatch):
    from transformers import AttentionInterface

    model = build_model("llama")
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        "sdpa",
        context_parallel.SharedAttention(AttentionInterface()["sdpa"], context_parallel.ContextGroup(None, 0, 2)),
    )
    assert choose_layout(model, TABLE) is RowLayout.SHARED


@pytest.mark.parametrize("architecture", ["gemma2", "eager"])
def test_it_is_left_out_for_other_attention(pays, architecture):
    model = build_model("gemma2" if architecture == "gemma2" else "llama")
    set_attention(model, "eager")
    assert choose_layout(model, TABLE) is RowLayout.SHARED
    assert model.config._attn_implementation == "eager"


def test_a_fault_is_noticed_and_rows_are_padded(pays, monkeypatch):
    """A neighbour is seen: the masks of the documents are those of the row."""
    from transformers import AttentionInterface

    def whole_row(module, query, key, value, mask=None, **options):
        if isinstance(mask, DocumentMasks):
            T = query.shape[2]
            mask = DocumentMasks.of([(0, T, torch.ones(1, 1, T, T, dtype=torch.bool).tril())])
        return document_attention.attend(module, query, key, value, mask, **options)

    document_attention.register()
    monkeypatch.setitem(AttentionInterface._global_mapping, DOCUMENTS, whole_row)
    messages = []
    monkeypatch.setattr(prefix_sharing, "rank_zero_info", messages.append)
    model = large(build_model("llama")).eval()
    assert choose_layout(model, TABLE) is RowLayout.SHARED
    assert model.config._attn_implementation == "sdpa"
    assert messages[0].startswith("Documents are not read one at a time, rows are padded: a response is seen by")


def test_a_layer_with_a_cap_is_refused():
    model = build_model("llama")
    set_attention(model, DOCUMENTS)
    masks = model_inputs(model, lay_out(pair_documents(PAIRS), RowLayout.UNPADDED, 0))["attention_mask"]
    states = torch.zeros(1, 4, 62, 8)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match=f"takes no {name}"):
            document_attention.attend(model, states, states, states, masks, **{name: torch.ones(4)})


def test_a_response_is_generated_with_attention_that_has_a_cache(model, pays):
    prompts = [[5, 6, 7], [9, 10]]
    expected = generate(model, build_tokenizer(), prompts, max_new_tokens=4)
    assert choose_layout(model, TABLE) is RowLayout.UNPADDED
    assert generate(model, build_tokenizer(), prompts, max_new_tokens=4) == expected
    assert model.config._attn_implementation == DOCUMENTS


def test_always_names_what_speaks_against_shared_prompts(pays):
    model = build_model("mamba", state_size=8)
    with pytest.raises(InputError, match="carries a state"):
        choose_layout(model, TABLE, "always", name="M")
