"""The model that predicts the fused loss's time: its parts by hand, and that it never promises more than the rates."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from counting import Operators, products_of_a_gpu, recorded_launches

from bdpo_kernels import linear_preference_loss
from benchmarks.calculated.kernels import (
    H100,
    H200,
    PRESENT,
    QWEN2_7B,
    ROUNDED,
    STEPS,
    ideal_seconds,
    main,
    predict,
    product_seconds,
)

VIEWS = {
    "t",
    "view",
    "detach",
    "slice",
    "select",
    "unbind",
    "split",
    "alias",
    "unsqueeze",
    "transpose",
    "empty",
    "_unsafe_view",
}


def test_a_product_of_full_waves_takes_what_the_measured_rate_says():
    assert product_seconds(H100, 8192, 8192, 8192) == pytest.approx(2 * 8192**3 / 790e12, rel=1e-6)


def test_waves_that_are_not_full_cost_what_full_ones_do():
    """The second product at Qwen2-7B's head: n × 3,584 results are few tiles, so a last wave's gap shows."""

    def rate(n):
        return n / product_seconds(H100, n, 3584, 152_064)

    assert rate(566) < rate(512) < rate(1024) < rate(2048) < rate(3584)
    assert rate(4096) < rate(3584)


def test_a_small_product_is_bound_by_its_bytes():
    M, N, K = 16, 152_064, 64
    assert product_seconds(H100, M, N, K) >= 2 * (M * K + K * N + M * N) / 3.0e12


def test_parts_counted_by_hand():
    found = predict(H100, QWEN2_7B)
    V, D, N = 152_064, 3584, 4096
    # The logits are read twice and written once, two bytes each, at 92 % of the bandwidth.
    assert found.rows == pytest.approx(3 * N * V * 2 / 3.0e12 / 0.92)
    # Four bytes read and two written; two read and two written.
    assert found.casts == pytest.approx(V * D * 6 / 3.0e12)
    assert found.scaling == pytest.approx(V * D * 4 / 3.0e12)
    assert found.total == pytest.approx(sum(vars(found).values()))
    frozen = predict(H100, replace(QWEN2_7B, trains_head=False))
    assert (frozen.grad_weight, frozen.casts, frozen.scaling) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("gpu", [H100, H200], ids=lambda gpu: gpu.name)
def test_every_step_takes_longer_than_its_products_and_every_change_helps(gpu):
    shares = [ideal_seconds(gpu, step) / predict(gpu, step).total for step in STEPS.values()]
    assert all(0.7 < share < 1 for share in shares)
    in_order = [shares[0], *shares[2:-1]]
    assert in_order == sorted(in_order)
    # Logits in float32 are twice the bytes to write and to read once.
    assert 0.02 < shares[-2] - shares[-1] < 0.05


def test_what_is_predicted_for_a_7b_head():
    """The figures that docs/benchmarks.md and the kernels' README name."""
    shares = {step: ideal_seconds(H100, step) / predict(H100, step).total for step in (QWEN2_7B, PRESENT, ROUNDED)}
    assert [round(100 * share) for share in shares.values()] == [80, 92, 96]
    assert round(100 * ideal_seconds(H200, PRESENT) / predict(H200, PRESENT).total) == 95


def test_the_prediction_counts_what_the_code_does():
    """Chunks, blocks, launches and waits, counted on meta tensors of that size under launches that compute nothing."""
    pytest.importorskip("triton")
    hidden = torch.empty(4096, 3584, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(152_064, 3584, device="meta", dtype=torch.bfloat16, requires_grad=True)
    labels, ids = (torch.zeros(4096, dtype=torch.long, device="meta") for _ in range(2))
    with recorded_launches(run=False) as launches, products_of_a_gpu() as products, Operators() as operators:
        loss, *_ = linear_preference_loss(
            hidden, weight, labels, ids, lambda c, r, i: -F.logsigmoid(c - r), num_pairs=8, backend="triton",
            check_labels=False, lengths=[256] * 16,
        )  # fmt: skip
        loss.backward()
    rows = [args for name, args, _ in launches if name == "softmax_gradient"]
    assert [args[0].shape[0] for args in rows] == list(PRESENT.blocks)
    assert {(args[0].dtype, args[5].dtype) for args in rows} == {(torch.float32, torch.bfloat16)}
    assert products["hidden_product"] == products["add_weight_product"] == len(PRESENT.chunks)
    # A launch each at most: many operators are views. Meta tensors have no values, so nothing was waited for.
    assert len(launches) + sum(products.values()) <= PRESENT.launches
    made = [name for name, _ in operators.calls if name not in VIEWS]
    assert len(made) + len(launches) + sum(products.values()) <= PRESENT.launches


def test_what_is_printed_is_called_a_prediction(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["kernels"])
    main()
    printed = capsys.readouterr().out
    assert printed.startswith("PREDICTIONS, not measurements")
    assert "predicted, ms" in printed
