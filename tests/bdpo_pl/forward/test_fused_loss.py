"""Training with LM head and loss in one operation, against training on the model's own logits."""

import importlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from counting import Operators
from makers import build_model, large, rows_alone
from shared_rows import NO_MEMORY, table
from torch import nn
from training import fit, same, weights

import bdpo_kernels
from bdpo_kernels import linear_preference_loss
from bdpo_pl.data.packing import RowLayout
from bdpo_pl.errors import InputError, MachineError
from bdpo_pl.forward.fused_loss import fused_preference_loss, why_not_fused
from bdpo_pl.forward.reading import read
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.losses import DPOLoss
from bdpo_pl.training.reader import PolicyReader

ARCHITECTURES = {
    "qwen2": {},
    "gpt2": {},
    "gemma2": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}


def batch():
    """Two pairs of different lengths."""
    sequences = [([5, 6, 7], [8, 9, 4]), ([10, 11], [12, 4]), ([5, 6, 7], [13, 4]), ([10, 11], [14, 15, 16, 17, 4])]
    return rows_alone(sequences)


def loss_of_pairs(chosen, rejected, index):
    return (1.0 + index) * -nn.functional.logsigmoid(0.5 * chosen - 0.4 * rejected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(architecture):
    model = large(build_model(architecture, **ARCHITECTURES[architecture])).eval()
    assert why_not_fused(model, batch()) is None
    logps = response_logps(model, batch()).view(2, -1)
    expected = loss_of_pairs(*logps, torch.arange(2)).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(expected, parameters)
    loss, ours = fused_preference_loss(model, batch(), loss_of_pairs)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, logps.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, grad, other in zip(names, torch.autograd.grad(loss, parameters), grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("frozen", [False, True])
def test_rejected_responses_that_are_known_first_have_no_gradient(frozen):
    """The loss reads their mean, as KTO does, of both pairs, whatever is computed at a time."""
    model = large(build_model("gemma2")).eval()
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    logps = response_logps(model, batch()).view(2, -1)
    expected = loss_of_pairs(logps[0], logps[1].detach().mean(), torch.arange(2)).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(expected, parameters)
    seen = []

    def with_mean(chosen, rejected, index):
        assert not rejected.any()
        return loss_of_pairs(chosen, seen[0].mean(), index)

    loss, ours = fused_preference_loss(model, batch(), with_mean, seen.append)
    torch.testing.assert_close(ours, logps.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[1], seen[0])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    for grad, other in zip(torch.autograd.grad(loss, parameters), grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5)


WAITS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "is_nonzero", "equal"}


@pytest.mark.parametrize("pass_", ["training", "scoring", "rejected"])
def test_no_device_is_waited_for_at_the_head(monkeypatch, pass_):
    """The collate function has counted the tokens of each response: nobody reads a number from the device."""
    function = "linear_preference_loss" if pass_ == "training" else "linear_sequence_logprob"
    module = f"bdpo_pl.forward.{'responses' if pass_ == 'scoring' else 'fused_loss'}"
    called = importlib.import_module(f"bdpo_kernels.{function}")
    # On a CPU the lengths are checked, because it costs nothing there.
    monkeypatch.setattr(called, "check_length_values", lambda *args: None)
    waits, reads = [], []
    for name in ("tolist", "item", "nonzero"):
        whole = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, n=name, whole=whole: reads.append(n) or whole(t))
    operation = getattr(bdpo_kernels, function)

    def watched(*args, **kwargs):
        before = len(reads)
        with Operators() as operators:
            result = operation(*args, **kwargs)
        waits.append((len(reads) - before, WAITS & set(operators.names())))
        return result

    monkeypatch.setattr(f"{module}.{function}", watched)
    model = large(build_model()).eval()
    if pass_ != "scoring":
        on_rejected = (lambda logps: None) if pass_ == "rejected" else None
        fused_preference_loss(model, batch(), loss_of_pairs, on_rejected)[0].backward()
    else:
        with torch.no_grad():
            response_logps(model, batch())
    assert waits
    assert all(found == (0, set()) for found in waits)


def doubled(kind):
    """A class of models whose logits are twice those of their LM heads."""

    class Doubled(kind):
        def forward(self, **inputs):
            output = kind.forward(self, **inputs)
            output.logits = output.logits * 2
            return output

    return Doubled


def test_unknown_change_of_the_logits_is_noticed():
    model = large(build_model()).train()
    model.__class__ = doubled(type(model))
    assert "not those of its LM head alone" in why_not_fused(model, batch())
    assert model.training


def test_without_room_for_a_backward_pass_gradients_are_those_of_the_shortest_pair(monkeypatch):
    """Training may have room for it: it holds no logits, nor, with gradient checkpointing, all activations."""
    graphs, tried = [], []

    def no_room(model, batch, documents, run, **options):
        assert not [graph for graph in graphs if graph() is not None]
        tried.append(len(documents))
        if len(documents) > 2:
            logps, _ = run()
            graphs.append(weakref.ref(logps))
            raise NO_MEMORY["gpu"]()
        return read(model, batch, documents, run, **options)

    monkeypatch.setattr("bdpo_pl.forward.fused_loss.read", no_room)
    model, splits = large(build_model()), SimpleNamespace(tables={"train": table()}, pad_id=0)
    policy = PolicyReader("fused", "M")
    policy.choose_head(model, DPOLoss(), splits, RowLayout.SHARED)
    assert policy._fused
    assert tried == [4, 2, 2]
    with pytest.raises(MachineError, match=r"rows of 7 tokens: CUDA.* set model\.lm_head to logits"):
        why_not_fused(model, batch())
    # Values are those of all pairs.
    model.__class__ = doubled(type(model))
    with pytest.raises(InputError, match="not those of its LM head alone"):
        PolicyReader("fused", "M").choose_head(model, DPOLoss(), splits, RowLayout.SHARED)
    assert tried == [4, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("lost", "message"), [("hidden", "gradients of its hidden states"), ("weight", "of its LM head")]
)
def test_a_wrong_gradient_is_noticed(monkeypatch, lost, message):
    def halved(hidden, weight, *args, **kwargs):
        half = {"hidden": hidden, "weight": weight}[lost] * 0.5
        whole = half + half.detach()
        arguments = (whole, weight) if lost == "hidden" else (hidden, whole)
        return linear_preference_loss(*arguments, *args, **kwargs)

    model = large(build_model()).eval()
    monkeypatch.setattr("bdpo_pl.forward.fused_loss.linear_preference_loss", halved)
    assert message in why_not_fused(model, batch())
    # What is not trained needs no gradient.
    if lost == "weight":
        assert why_not_fused(model.requires_grad_(False), batch()) is None


def test_head_that_is_more_than_a_matrix_is_left_alone():
    model = build_model()
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))
    assert "its LM head is a Sequential" in why_not_fused(model, batch())


def test_float16_is_left_to_the_gradient_scaler():
    model = build_model()
    with torch.autocast("cpu", dtype=torch.float16):
        assert "float16 gradients vanish" in why_not_fused(model, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert why_not_fused(model, batch()) is None


def test_fused_training_equals_training_on_logits(job):
    fused, plain = fit(job("fused", lm_head="fused")), fit(job("plain", lm_head="logits"))
    for name, value in weights(fused).items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=1e-4, atol=1e-5)
    assert fused.evaluations[8] == pytest.approx(plain.evaluations[8], abs=1e-3)


def test_fusing_what_cannot_be_fused_is_an_error_and_auto_falls_back(job, monkeypatch):
    monkeypatch.setattr("bdpo_pl.forward.fused_loss.why_not_fused", lambda *_: "its LM head is odd")
    with pytest.raises(InputError, match=r"lm_head is fused, but .* cannot be: its LM head is odd"):
        fit(job("fused", lm_head="fused"))
    assert same(weights(fit(job("auto"))), weights(fit(job("logits", lm_head="logits"))))
