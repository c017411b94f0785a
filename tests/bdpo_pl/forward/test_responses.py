"""Response log-probabilities against log_softmax over every position of the model's own logits."""

import pytest
import torch
from makers import build_model, large, rows_alone
from torch import nn

from bdpo_pl.forward.responses import own_logits, response_logps

SEQUENCES = [([5, 6, 7, 8], [9, 10, 4]), ([5], [11, 12, 13, 14, 15, 4]), ([7, 7, 9], [4])]


def naive(model, sequences):
    values = []
    for context, response in sequences:
        ids = torch.tensor([context + response])
        logp = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)[0]
        at = torch.arange(len(context) - 1, ids.shape[1] - 1)
        values.append(logp[at, ids[0, at + 1]].sum())
    return torch.stack(values)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "mistral", "gemma2", "gpt2", "cohere", "granite"])
def test_padded_batch_equals_each_sequence_alone(architecture):
    extra = {"logits_scaling": 8.0} if architecture == "granite" else {}
    model = build_model(architecture, **extra).eval()
    batch = rows_alone(SEQUENCES)
    ours = response_logps(model, batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), naive(model, SEQUENCES), rtol=1e-5, atol=1e-4)


def test_gradients_equal_the_naive_ones():
    model = build_model().eval()
    weights = torch.tensor([1.0, -2.0, 0.5])
    (response_logps(model, rows_alone(SEQUENCES)) * weights).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (naive(model, SEQUENCES) * weights).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6)


def test_only_scored_positions_reach_the_head():
    model = build_model().eval()
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
    batch = rows_alone(SEQUENCES)
    hidden = []
    response_logps(model, batch, hidden.append)
    handle.remove()
    assert shapes == [(1, 10, 400)]
    assert hidden[0].shape == (3, 7, 32)
    # Nothing stays behind on the head.
    assert model(input_ids=batch.input_ids).logits.shape == (3, 7, 400)


class WithoutNamedHead(nn.Module):
    """A model that hides its head: its logits cover every position."""

    def __init__(self):
        super().__init__()
        self.inner = build_model().eval()

    def get_output_embeddings(self):
        return None

    def forward(self, **inputs):
        return self.inner(**inputs)


def test_model_without_a_named_head_falls_back_to_all_logits():
    model = WithoutNamedHead()
    ours = response_logps(model, rows_alone(SEQUENCES))
    torch.testing.assert_close(ours.double(), naive(model.inner, SEQUENCES), rtol=1e-5, atol=1e-4)


class CallsHeadTwice(WithoutNamedHead):
    """A model whose head also sees something else."""

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, **inputs):
        self.inner(**inputs)
        return self.inner(**inputs)


def test_model_that_uses_its_head_twice_is_refused():
    with pytest.raises(RuntimeError, match="just once"):
        response_logps(CallsHeadTwice(), rows_alone(SEQUENCES))


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2", "cohere", "granite"])
def test_without_gradients_no_logits_of_the_batch_are_held(architecture):
    extra = {"granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.3}}.get(architecture, {})
    model = large(build_model(architecture, **extra), 0.1).eval()
    rows = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: rows.append(out.shape[1]))
    longer = [(context, response * 30) for context, response in SEQUENCES]
    with torch.no_grad():
        values = [response_logps(model, rows_alone(longer)) for _ in range(2)]
    handle.remove()
    # Some tokens are compared with the model's own logits, once.
    assert rows == [64, 0]
    for ours in values:
        torch.testing.assert_close(ours.double(), naive(model, longer), rtol=1e-5, atol=2e-4)
    hidden = []
    with torch.no_grad():
        torch.testing.assert_close(response_logps(model, rows_alone(longer), hidden.append), values[0])
    assert hidden[0].shape[0] == 3


def test_own_logits_are_read_only_where_they_are_asked_for():
    model = large(build_model(), 0.1).eval()
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: rows.append(out.shape[1]))
    batch = rows_alone(SEQUENCES)
    with torch.no_grad():
        with own_logits(model):
            values = [response_logps(model, batch)]
        values += [response_logps(model, batch) for _ in range(2)]
        with own_logits(model):
            values.append(response_logps(model, batch))
    # All scored tokens; then those of the comparison, and none.
    assert rows == [len(batch.labels), min(64, len(batch.labels)), 0, len(batch.labels)]
    for ours in values:
        torch.testing.assert_close(ours.double(), naive(model, SEQUENCES), rtol=1e-5, atol=2e-4)


def test_a_model_that_changes_its_logits_keeps_them():
    model = large(build_model(), 0.1).eval()
    forward = type(model).forward

    class Shifted(type(model)):
        def forward(self, **inputs):
            output = forward(self, **inputs)
            output.logits = output.logits * 1.5
            return output

    model.__class__ = Shifted
    with torch.no_grad():
        values = [response_logps(model, rows_alone(SEQUENCES)) for _ in range(2)]
    for ours in values:
        torch.testing.assert_close(ours.double(), naive(model, SEQUENCES), rtol=1e-5, atol=2e-4)


def test_an_adapted_head_keeps_its_logits():
    model = build_model().eval()
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))
    with torch.no_grad():
        ours = response_logps(model, rows_alone(SEQUENCES))
    torch.testing.assert_close(ours.double(), naive(model, SEQUENCES), rtol=1e-5, atol=1e-4)
