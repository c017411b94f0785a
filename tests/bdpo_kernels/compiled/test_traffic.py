"""How often the kernels read and write logits, counted element by element in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from bdpo_kernels import linear_preference_loss, linear_sequence_logprob, sequence_logprob

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")

N, V, D = 12, 700, 8


@pytest.fixture
def moved(monkeypatch):
    """Return the number of elements of rows that kernels have loaded and stored since the test began.

    Rows are in bfloat16, but for the LM head's logits, in float32. Single numbers do not count, nor do the sums of
    log-probabilities, whose N elements are float32 too.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    counted = {"loads": 0, "stores": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def elements(pointers, mask):
        kind = pointers.get_element_ty()
        is_half = kind == triton.language.bfloat16 and pointers.data.size > 1
        is_row = is_half or (kind == triton.language.float32 and pointers.data.ndim == 2)
        return int(mask.data.sum()) if is_row else 0

    def counting_load(self, ptrs, mask, *rest):
        counted["loads"] += elements(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):
        counted["stores"] += elements(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    return counted


def _head():
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.bfloat16, requires_grad=True)
    return hidden, weight, torch.randint(V, (N,)), torch.arange(N) // 3


def test_log_probabilities_read_each_logit_once_and_write_none(moved):
    logits = torch.randn(N, V, dtype=torch.bfloat16)
    sequence_logprob(logits, torch.zeros(N, dtype=torch.long), torch.arange(N) // 3, 4, backend="triton")
    assert moved == {"loads": N * V, "stores": 0}


def test_ignored_rows_are_not_read(moved):
    labels = torch.tensor([-100, 1] * (N // 2))
    sequence_logprob(torch.randn(N, V).bfloat16(), labels, torch.arange(N) // 3, 4, backend="triton")
    assert moved == {"loads": N // 2 * V, "stores": 0}


def test_the_backward_reads_each_logit_once_and_writes_its_gradient_once(moved):
    logits = torch.randn(N, V, dtype=torch.bfloat16, requires_grad=True)
    sums = sequence_logprob(logits, torch.zeros(N, dtype=torch.long), torch.arange(N) // 3, 4, backend="triton")
    moved.update(loads=0)
    sums.sum().backward()
    assert moved == {"loads": N * V, "stores": N * V}


def test_the_fused_loss_passes_over_its_logits_at_most_three_times(moved):
    hidden, weight, labels, ids = _head()
    loss, _, _ = linear_preference_loss(
        hidden, weight, labels, ids, lambda c, r, _: -F.logsigmoid(c - r), num_pairs=2, backend="triton"
    )
    loss.backward()
    assert moved["loads"] <= 2 * N * V
    assert moved["stores"] == N * V


def test_scoring_reads_each_logit_once_and_writes_none(moved):
    hidden, weight, labels, ids = _head()
    with torch.no_grad():
        linear_sequence_logprob(hidden, weight, labels, ids, 4, backend="triton")
    assert moved == {"loads": N * V, "stores": 0}
