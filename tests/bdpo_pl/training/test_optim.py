"""Parameter groups and schedules."""

import pytest
import torch
from architectures import tiny
from lightning.pytorch.strategies import SingleDeviceStrategy
from makers import build_model

from bdpo_pl.parallel.fsdp2 import ShardedStrategy
from bdpo_pl.training.optim import in_todays_groups, lr_lambda, parameter_groups, warn_of_lost_updates
from bdpo_pl.training.optimizers import is_hidden_matrix


def test_norms_and_biases_never_decay():
    model = build_model()
    model.lm_head.weight.requires_grad_(False)
    matrices, vectors = parameter_groups(model)
    assert vectors["weight_decay"] == 0.0
    assert "weight_decay" not in matrices
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in vectors["params"])
    assert not any("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in matrices["params"])
    trainable = sum(p.requires_grad for p in model.parameters())
    assert len(matrices["params"]) + len(vectors["params"]) == trainable


def test_biases_of_experts_are_vectors_and_no_matrices():
    """In gpt-oss one parameter holds those of all experts."""
    model = tiny("gpt-oss")
    vectors = parameter_groups(model)[1]["params"]
    biases = {name: p for name, p in model.named_parameters() if name.endswith("_proj_bias")}
    assert {p.ndim for p in biases.values()} == {2}
    assert {id(p) for p in biases.values()} <= {id(p) for p in vectors}
    assert not [name for name, p in biases.items() if is_hidden_matrix(p)]


@pytest.mark.parametrize("kind", [SingleDeviceStrategy, ShardedStrategy])
def test_a_state_of_earlier_groups_finds_its_weights(kind):
    model = tiny("gpt-oss")
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    earlier, now = torch.optim.AdamW(groups), torch.optim.AdamW(parameter_groups(model))
    for number, p in enumerate(parameters):
        p.grad = torch.full_like(p, float(number))
    earlier.step()
    strategy = kind()
    strategy.optimizers = [now]
    # Lightning calls it after the module has adapted the checkpoint.
    assert strategy.lightning_restore_optimizer
    strategy.load_optimizer_state_dict({"optimizer_states": [in_todays_groups(earlier.state_dict(), model)]})
    assert all(torch.equal(now.state[p]["exp_avg"], earlier.state[p]["exp_avg"]) for p in parameters)
    # One of today's stays as it is.
    saved = now.state_dict()
    assert in_todays_groups(saved, model)["param_groups"] == saved["param_groups"]


@pytest.mark.parametrize(("beside", "rate", "warned"), [(False, 2e-5, False), (True, 2e-5, True), (True, 1e-4, False)])
def test_half_weights_beside_adapters_are_warned_of_at_rates_of_adapters(recwarn, beside, rate, warned):
    half = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    parameters = [half, *([torch.nn.Parameter(torch.zeros(2, 2))] if beside else [])]
    warn_of_lost_updates(torch.optim.SGD(parameters, lr=rate))
    assert any("bfloat16 weights by less" in str(warning.message) for warning in recwarn) == warned


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.8535534, 0.5, 0.1464466, 0]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    factor = lr_lambda(schedule, warmup_steps=2, total_steps=6)
    assert [factor(step) for step in range(7)] == pytest.approx(expected, abs=1e-7)
    assert factor(100) == pytest.approx(expected[-1], abs=1e-7)
