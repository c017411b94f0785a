"""The last layer's MLP at scored positions only, against the whole layer."""

import pytest
import torch
from makers import build_model, large, rows_alone

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.forward.fused_loss import fused_preference_loss
from bdpo_pl.forward.last_layer import scored_positions_only
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.models.architectures import decoder_layers

PAIRS = [PreferencePair([5, 6, 7, 8, 9], [9, 10, 4], [11, 4]), PreferencePair([12, 13, 14], [15, 4], [16, 17, 18, 4])]


def batch(layout=RowLayout.SHARED):
    return lay_out(pair_documents(PAIRS), layout, 0)


def mlp_positions(model, run):
    """How many positions each layer's MLP is given."""
    seen = []
    handles = [
        next(m for m in layer.mlp.modules() if type(m).__name__ in ("Linear", "Conv1D")).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].shape[:-1].numel())
        )
        for layer in decoder_layers(model)
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "mistral", "gemma2", "gpt2", "cohere", "olmo2"])
@pytest.mark.parametrize("layout", [RowLayout.SHARED, RowLayout.SPLIT])
def test_log_probabilities_and_gradients_are_those_of_the_whole_layer(architecture, layout):
    model = large(build_model(architecture)).eval()
    weights = torch.tensor([1.0, -0.5, 2.0, 0.25])

    def run(whole):
        logps = response_logps(model, batch(layout), whole=whole)
        return logps.detach(), torch.autograd.grad((logps * weights).sum(), list(model.parameters()))

    (ours, our_grads), (expected, grads) = run(False), run(True)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    # Places: rows of 10 and of 9 padded to 10, or four rows padded to 8; of them 3 + 1 and 2 + 3 predict something,
    # the prompt's last twice.
    places = 20 if layout is RowLayout.SHARED else 32
    scored = 9 if layout is RowLayout.SHARED else 11
    assert mlp_positions(model, lambda: response_logps(model, batch(layout))) == [places, scored]
    assert mlp_positions(model, lambda: response_logps(model, batch(layout), whole=True)) == [places, places]


def test_the_fused_loss_leaves_the_rest_out_too():
    model = build_model().eval()
    seen = mlp_positions(model, lambda: fused_preference_loss(model, batch(), lambda c, r, i: c - r))
    assert seen == [20, 9]


def test_hidden_states_that_someone_reads_are_all_computed():
    model = build_model().eval()
    hidden = []
    response_logps(model, batch(), hidden.append)
    assert (hidden[0][batch().documents >= 0] != 0).any(dim=-1).all()
    assert mlp_positions(model, lambda: response_logps(model, batch(), hidden.append)) == [20, 20]


@pytest.mark.parametrize("reason", ["checkpointing", "compiled", "mixture of experts"])
def test_left_alone_where_hooks_would_do_harm(reason):
    model = build_model("mixtral" if reason == "mixture of experts" else "qwen2").eval()
    if reason == "checkpointing":
        model.gradient_checkpointing_enable()
    if reason == "compiled":
        decoder_layers(model)[-1].compile(backend="eager")
    with scored_positions_only(model, batch()):
        assert not any(module._forward_pre_hooks for module in model.modules())


class RunsItsLastLayerTwice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build_model().eval()
        self.config = self.inner.config

    def forward(self, ids):
        self.inner(ids)
        return self.inner(ids)


def test_layer_that_runs_twice_is_refused():
    model = RunsItsLastLayerTwice()
    one = rows_alone([([5, 6], [7])])
    with scored_positions_only(model, one), pytest.raises(RuntimeError, match="runs its last layer more than once"):
        model(one.input_ids)
