"""What each of two ranks does in the tests of context parallelism: a model beside itself, read in parts and whole."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from block_attention import attend_by_blocks
from makers import build_model, large
from transformers import AttentionInterface

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out, parts_of
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.errors import InputError
from bdpo_pl.forward.context_parts import check_reading, logps_together
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.models.loading import enable_activation_checkpointing
from bdpo_pl.parallel.context_parallel import ContextGroup, share_attention, stop_sharing_attention

# Odd lengths, a response of one token, and a prompt of one: some ranks have no scored token of some sequences.
PAIRS = [
    PreferencePair(list(range(5, 30)), [9, 10, 11, 12, 4], [4]),
    PreferencePair([40], [41, 42, 4], [43, 44, 45, 46, 47, 48, 4]),
]
# One token is scored, so one of the ranks has none.
SHORT = [PreferencePair(list(range(5, 16)), [9], [4])]
# Queries : keys and values. With one key head, it goes to both ranks.
MODELS = {
    "llama": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2},
    "one key": {"num_key_value_heads": 1},
    "six to three": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
}
OTHERS = {
    "windows": ("mistral", {"sliding_window": 6}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "learned positions": ("gpt2", {}),
    "scaled logits": ("granite", {"logits_scaling": 3.0}),
    "experts": ("mixtral", {"num_local_experts": 4}),
}


def context(rank):
    return ContextGroup(dist.group.WORLD, rank, dist.get_world_size())


def models():
    for name, sizes in MODELS.items():
        yield name, build_model("llama", **sizes)
    for name, (architecture, sizes) in OTHERS.items():
        model = build_model(architecture, **sizes)
        if name == "experts":
            # The grouped product takes no float64.
            model.set_experts_implementation("eager")
        yield name, model


def parts_equal_the_whole(rank):
    """Log-probabilities and every parameter's gradient, in float64."""
    share_attention(group := context(rank))
    for name, model in models():
        model = large(model, 0.1).double().eval()
        model.set_attn_implementation("sdpa")
        for layout in (RowLayout.SHARED, RowLayout.SPLIT):
            for pairs in (PAIRS, SHORT):
                batch = lay_out(pair_documents(pairs), layout, 0)
                if pairs is PAIRS:
                    batch = parts_of(batch, torch.tensor([1, 2, 1, 2]))
                expected, gradients = read(model, lambda b=batch, m=model: response_logps(m, b))
                for fused in (False, True):
                    found, parts = read(model, lambda b=batch, m=model, f=fused: logps_together(m, b, group, fused=f))
                    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
                    for key, gradient in gradients.items():
                        # FSDP2 and DDP take this mean.
                        dist.all_reduce(parts[key])
                        torch.testing.assert_close(
                            parts[key] / dist.get_world_size(), gradient,
                            rtol=1e-6, atol=1e-7 * float(gradient.abs().max()),
                            msg=lambda m, n=name, k=key: f"{n}, {k}: {m}",
                        )  # fmt: skip
                with torch.no_grad():
                    found = logps_together(model, batch, group)
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    stop_sharing_attention()


def layers_see_half_of_the_positions(rank):
    """Also when activation checkpointing repeats them, and scores of a whole row are nobody's."""
    share_attention(group := context(rank))
    model = large(build_model("llama"), 0.1).train()
    enable_activation_checkpointing(model)
    batch = lay_out(pair_documents(PAIRS), RowLayout.SHARED, 0)
    R, T = batch.input_ids.shape
    seen, heads = [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(query, *args, **options):
        heads.append(tuple(query.shape[:3]))
        return plain(query, *args, **options)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        logps_together(model, batch, group, fused=True).sum().backward()
    half = -(-T // 2)
    # Two layers, and their MLPs again before the backward pass.
    assert seen == [(R, half)] * 6
    assert heads == [(R, model.config.num_attention_heads // 2, 2 * half)] * 4
    stop_sharing_attention()


def rows_read_alone_are_as_before(rank):
    model = large(build_model("llama"), 0.1).eval()
    batch = lay_out(pair_documents(PAIRS), RowLayout.SHARED, 0)
    prompt = torch.arange(5, 12).unsqueeze(0)
    found = []
    for share in (False, True, False):
        if share:
            share_attention(context(rank))
        with torch.no_grad():
            found.append((response_logps(model, batch), model.generate(prompt, max_new_tokens=5, do_sample=False)))
        stop_sharing_attention()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def block_masks_are_of_whole_rows(rank):
    plain = AttentionInterface()["flex_attention"]
    AttentionInterface.register("flex_attention", attend_by_blocks)
    share_attention(group := context(rank))
    for keys in (1, 2):
        model = large(build_model("llama", num_key_value_heads=keys), 0.1)
        model.set_attn_implementation("flex_attention")
        check_reading(model, pair_documents(PAIRS), RowLayout.ONE_ROW, group, name="it", autocast=nullcontext)
    stop_sharing_attention()
    assert AttentionInterface()["flex_attention"] is attend_by_blocks
    AttentionInterface.register("flex_attention", plain)


class Neighbours(torch.nn.Module):
    """An MLP that adds what its left neighbour has."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden):
        return self.mlp(hidden) + 0.1 * hidden.roll(1, dims=1)


def what_differs_is_refused(rank):
    share_attention(group := context(rank))
    documents = pair_documents(PAIRS)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    local = large(build_model("llama"), 0.1)
    local.model.layers[0].mlp = Neighbours(local.model.layers[0].mlp)
    own = large(build_model("llama"), 0.1)
    own.set_attn_implementation("eager")
    for model, reason in (
        (local, "log-probabilities differ from those of whole rows by"),
        (own, "heads of eager attention are not divided, only those of sdpa and flex_attention"),
        (build_model("llama", rope_parameters=dynamic), "angles of its rotary embedding depend on the length"),
        (build_model("mamba2", num_heads=4, head_dim=16), "carries a state from token to token"),
        (build_model("falcon", alibi=True), "its ALiBi biases depend on the number of the head"),
        # It calls its attention itself.
        (build_model("falcon"), "FalconForCausalLM fails on parts of rows"),
    ):
        with pytest.raises(InputError, match=rf"is 2, but the ranks cannot share the rows of it: .*{reason}.*; set it"):
            check_reading(model, documents, RowLayout.SHARED, group, name="it", autocast=nullcontext)
    stop_sharing_attention()


def read(model, run):
    model.zero_grad()
    logps = run()
    # A loss of sums over whole sequences that is linear in none of them.
    (torch.tanh(logps / 40) * torch.arange(1, len(logps) + 1)).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
