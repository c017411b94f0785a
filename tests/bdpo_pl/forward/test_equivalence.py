"""How far two computations may differ: by rounding, and no further."""

import pytest
import torch

from bdpo_pl.forward.equivalence import evaluating, gradient_error, rounding_of_logps


@pytest.mark.parametrize(("dtype", "nats"), [(torch.float32, 1e-3), (torch.bfloat16, 5.0), (torch.float64, 1e-11)])
def test_what_rounding_explains_of_a_long_response(dtype, nats):
    bound = rounding_of_logps(torch.tensor([-300.0, -3.0]), torch.tensor([300, 3]), dtype)
    assert bound[0] < nats
    # Errors of tokens do not all have one sign.
    assert bound[1] == pytest.approx(bound[0].item() / 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_rounding_is_within_the_bound(dtype):
    """Of logits and their log-softmax in `dtype`, against float64."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, dtype=torch.float64), torch.randn(1000, 64, dtype=torch.float64)
    exact = (hidden @ weight.T).log_softmax(-1)
    rough = (hidden.to(dtype) @ weight.T.to(dtype)).float().log_softmax(-1)
    labels = exact.argmax(-1, keepdim=True)
    expected, found = (values.gather(1, labels).sum().float() for values in (exact, rough))
    assert 0 < (found - expected).abs() < rounding_of_logps(expected[None], torch.tensor([300]), dtype)


def test_a_fault_in_a_small_part_is_seen_beside_a_large_one():
    large, small = torch.full((100, 8), 1.0), torch.full((2, 8), 0.1)
    assert gradient_error([large, small], [large, small]) == 0
    assert gradient_error([large, torch.zeros_like(small)], [large, small]) > 0.2
    assert not gradient_error([large * torch.nan, small], [large, small]) <= 1


def test_each_module_is_given_back_its_mode():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()).train()
    model[1].eval()

    def fail():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]
