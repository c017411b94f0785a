"""The model that predicts the fused loss's time: its parts by hand, and that it never promises more than the rates."""

from dataclasses import replace

import pytest

from benchmarks.calculated.kernels import H100, H200, QWEN2_7B, STEPS, ideal_seconds, main, predict, product_seconds


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
    in_order = [shares[0], *shares[2:]]
    assert in_order == sorted(in_order)


def test_what_is_printed_is_called_a_prediction(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["kernels"])
    main()
    printed = capsys.readouterr().out
    assert printed.startswith("PREDICTIONS, not measurements")
    assert "predicted, ms" in printed
