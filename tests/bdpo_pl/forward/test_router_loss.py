"""The routers' auxiliary loss, against transformers' own, in training too."""

from types import SimpleNamespace

import pytest
import torch
from architectures import tiny
from makers import build_model, build_tokenizer, large
from training import fit
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.errors import InputError
from bdpo_pl.forward.fused_loss import fused_preference_loss
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.forward.router_loss import balancing_loss, check_router, routed

PAIRS = [
    PreferencePair(list(range(5, 30)), [9, 10, 11, 12, 4], [13, 4]),
    PreferencePair([40], [41, 42, 4], [43, 44, 45, 46, 47, 48, 4]),
]


def batch(layout=RowLayout.SPLIT):
    return lay_out(pair_documents(PAIRS), layout, 0)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "Qwen3-Next", "gpt-oss", "Jamba"])
def test_value_and_gradient_are_those_of_transformers(name):
    model = large(tiny(name), 0.1)
    rows = batch()
    output = model(
        input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_router_logits=True, use_cache=False
    )
    assert output.aux_loss > 0
    with routed(model) as decisions:
        response_logps(model, rows)
    ours = balancing_loss(decisions, rows)
    torch.testing.assert_close(ours, output.aux_loss)
    routers = [p for key, p in model.named_parameters() if key.endswith(("gate.weight", "router.weight"))]
    grads = [torch.autograd.grad(loss, routers, allow_unused=True) for loss in (ours, output.aux_loss)]
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads[0])
    for grad, expected in zip(*grads, strict=True):
        assert (grad is None) == (expected is None)
        if grad is not None:
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7)


def test_llama_4_chooses_by_its_logits():
    model = large(build_model("llama4_text", num_local_experts=4, num_experts_per_tok=2, head_dim=8), 0.1)
    rows = batch()
    scores = []
    for module in model.modules():
        if type(module).__name__ == "Llama4Router":
            module.register_forward_hook(lambda module, args, output: scores.append(output[0]))
    with routed(model) as decisions:
        response_logps(model, rows)
    assert len(decisions) == len(scores) == 2
    for (logits, chosen), weights in zip(decisions, scores, strict=True):
        assert logits.shape == (rows.input_ids.numel(), 4)
        assert torch.equal(torch.zeros_like(weights, dtype=torch.bool).scatter_(1, chosen, True), weights > 0)
    assert balancing_loss(decisions, rows).isfinite()


def test_autocast_rounds_no_sum_over_tokens():
    """In bfloat16 a sum of 3,001 tokens is off in the third digit, in float16 one beyond 65,504 is infinite."""
    rows = SimpleNamespace(attention_mask=torch.ones(1, 3001, dtype=torch.long))
    logits = torch.randn(3001, 8)
    decisions = [(logits, logits.topk(2).indices)]
    expected = balancing_loss(decisions, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(balancing_loss(decisions, rows), expected)


def test_shared_rows_count_a_prompt_once_and_no_padding():
    model = large(tiny("Mixtral"), 0.1)
    with routed(model) as decisions:
        fused_preference_loss(model, batch(RowLayout.ONE_ROW), lambda c, r, _: c - r)
    rows = batch(RowLayout.ONE_ROW)
    real = rows.attention_mask.flatten().bool()
    assert not real.all()
    expected = load_balancing_loss_func(tuple(logits[real] for logits, _ in decisions), 4, 2)
    torch.testing.assert_close(balancing_loss(decisions, rows), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_training_with_it_balances_the_routers(job, tmp_path):
    large(build_model("mixtral", num_local_experts=4), 0.2).save_pretrained(tmp_path / "m")
    build_tokenizer().save_pretrained(tmp_path / "m")

    def loss_after(coefficient):
        module = fit(job(str(coefficient), policy=str(tmp_path / "m"), router_aux_loss=coefficient))
        rows = batch()
        with routed(module.policy) as decisions, torch.no_grad():
            response_logps(module.policy, rows)
        return balancing_loss(decisions, rows).item()

    assert loss_after(1.0) < loss_after(0.0) - 0.005


def test_what_has_no_router_is_refused(job):
    with pytest.raises(InputError, match=r"router_aux_loss is 0\.1, but .* has no router"):
        fit(job(router_aux_loss=0.1))
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="must be a number of at least 0"):
            check_router(build_model("mixtral").config, value, "M")
    with pytest.raises(InputError, match="no router that is trained with an auxiliary loss"):
        check_router(tiny("DeepSeek-V3").config, 0.1, "M")
    for name in ("doge", "ernie4_5_vl_moe"):
        with pytest.raises(InputError, match="does not say which experts its routers choose"):
            check_router(AutoConfig.for_model(name), 0.1, "M")
