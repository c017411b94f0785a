"""Activations on the host. A CPU's are moved too here: that saves nothing, but shows what is moved, and comes back.

Whether a GPU has more memory left is tested by a test that needs one; how long its copies take is tested nowhere.
"""

import dataclasses
import gc
from contextlib import nullcontext

import pytest
import torch
from makers import build_model
from torch import nn
from training import fit, same, weights

from bdpo_pl.errors import InputError
from bdpo_pl.forward.fused_loss import fused_preference_loss
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.losses import DPOLoss, PairScores
from bdpo_pl.models import activation_offloading
from bdpo_pl.models.activation_offloading import OffloadedActivations, check_activation_offloading
from bdpo_pl.models.adapters import LoraOptions, add_adapters
from bdpo_pl.models.loading import enable_activation_checkpointing
from bdpo_pl.training.planned_batches import worst_batch

CPU = torch.device("cpu")


def filled(pairs, window):
    """A batch of `pairs` pairs that fill the window, of random tokens."""
    worst = worst_batch(pairs, window, True)
    ids, labels = (
        torch.randint(5, 400, old.shape, generator=torch.Generator().manual_seed(seed))
        for seed, old in enumerate((worst.input_ids, worst.labels))
    )
    return dataclasses.replace(worst, input_ids=ids, labels=labels)


BATCH = filled(2, 64)
R, T, D, LAYERS = 2, 96, 32, 2


@pytest.fixture
def moved(monkeypatch):
    """Memory of every size is moved; the list of what was, as (storage, shape, dtype)."""
    found = []
    made = activation_offloading._Moved.__init__

    def watch(self, tensor):
        found.append((tensor.untyped_storage()._cdata, tuple(tensor.shape), tensor.dtype))
        made(self, tensor)

    monkeypatch.setattr(activation_offloading._Moved, "__init__", watch)
    monkeypatch.setattr(activation_offloading, "MIN_BYTES", 1)
    return found


def losses(chosen, rejected, index):
    zeros = torch.zeros_like(chosen)
    lengths = torch.ones(len(index), dtype=torch.int64, device=chosen.device)
    return DPOLoss()(chosen, rejected, PairScores(lengths, lengths, zeros, zeros))


def step(offloads, checkpointing=False, half=False, fused=True, lora=False, device=CPU, batch=BATCH, **sizes):
    """Loss and gradients of a step of a new model."""
    model = build_model(**sizes).train().to(device)
    model.config.use_cache = False
    if checkpointing:
        enable_activation_checkpointing(model)
    if lora:
        add_adapters(model, LoraOptions(r=4))
    if offloads:
        OffloadedActivations(model, device)
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
        if fused:
            loss, _ = fused_preference_loss(model, batch, losses)
        else:
            chosen, rejected = response_logps(model, batch).view(2, -1)
            loss = losses(chosen, rejected, torch.arange(2)).sum()
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_and_gradients_are_the_same_bits(moved, checkpointing, half, fused, lora):
    options = {"checkpointing": checkpointing, "half": half, "fused": fused, "lora": lora}
    loss, gradients = step(True, **options)
    count = len(moved)
    expected, wanted = step(False, **options)
    assert count == len(moved) > 0
    assert torch.equal(loss, expected)
    assert all(torch.equal(one, other) for one, other in zip(gradients, wanted, strict=True))
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients)


def test_parameters_and_what_the_head_saves_stay(moved):
    model = build_model().train()
    held = {p.untyped_storage()._cdata for p in model.parameters()}
    OffloadedActivations(model, CPU)
    loss, _ = fused_preference_loss(model, BATCH, losses)
    count = len(moved)
    loss.backward()
    assert not {storage for storage, _, _ in moved} & held
    # Neither tokens times vocabulary, nor the gradient of the head's weight, nor anything in the backward pass.
    assert not [shape for _, shape, _ in moved if 400 in shape]
    assert len(moved) == count


def test_memory_is_moved_once_however_often_it_is_saved(moved):
    step(True)
    storages = [storage for storage, _, _ in moved]
    assert len(set(storages)) == len(storages)
    # Queries, keys and values of a layer have one input: in either layer it is one of the (R · T, D) tensors.
    assert [shape for _, shape, _ in moved].count((R * T, D)) <= 2 * LAYERS


def test_with_checkpointing_the_inputs_of_the_layers_are_moved(moved):
    step(True, checkpointing=True)
    shapes = [shape for _, shape, dtype in moved if dtype == torch.float32]
    # And what the last norm saves: its input, the inverse of its size, and the input in float32.
    assert sorted(shapes) == [(R, T, 1), *[(R, T, D)] * (LAYERS + 2)]


def test_small_memory_stays(moved, monkeypatch):
    monkeypatch.setattr(activation_offloading, "MIN_BYTES", 4 * R * T * D)
    step(True)
    assert moved
    assert all(torch.Size(shape).numel() * dtype.itemsize >= 4 * R * T * D for _, shape, dtype in moved)


def test_memory_stays_back_until_its_last_tensor_is_back(moved):
    from bdpo_pl.models.activation_offloading import _Moved

    tensor = torch.arange(6.0)
    found = _Moved(tensor)
    found.parts = 3
    first, second = found.back(), found.back()
    assert first is second
    assert first.view(torch.float32).tolist() == tensor.tolist()
    found.back()
    assert found._back is None
    # A second backward pass through a graph that was kept gets a copy of its own.
    assert found.back().view(torch.float32).tolist() == tensor.tolist()


def test_memory_that_was_written_to_is_moved_again(moved):
    offloaded = OffloadedActivations(build_model(), CPU)
    x = torch.linspace(0.1, 1.0, 10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(offloaded._pack, activation_offloading._unpack):
        a = x * 1.0
        y = a.sin()
        a.mul_(2.0)
        z = a.cos()
    (y.sum() + z.sum()).backward()
    torch.testing.assert_close(x.grad, x.detach().cos() - 2 * (2 * x.detach()).sin())


def test_a_forward_pass_that_fails_leaves_no_hooks(moved):
    model = build_model().train()
    OffloadedActivations(model, CPU)
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 10**6))
    before = len(moved)
    (torch.ones(3, requires_grad=True) ** 2).sum().backward()
    assert len(moved) == before


def test_nothing_is_moved_without_gradients(moved):
    model = build_model().eval()
    OffloadedActivations(model, CPU)
    with torch.no_grad():
        model(torch.arange(9)[None])
    assert not moved


def test_run_ends_in_the_same_bits(job, moved, monkeypatch):
    plain = weights(fit(job(trainer={"max_steps": 3})))
    monkeypatch.setattr("bdpo_pl.training.start_checks.check_activation_offloading", lambda *_: None)
    offloaded = weights(fit(job("other", trainer={"max_steps": 3}, activation_offloading=True)))
    assert moved
    assert same(plain, offloaded)


def test_what_would_do_nothing_is_refused(job):
    trainer, module, data = job(activation_offloading=True)
    with pytest.raises(InputError, match=r"where they are anyway.*leave it out, or set trainer\.accelerator to gpu"):
        trainer.fit(module, data)
    with pytest.raises(InputError, match=r"leave out model\.compile, or model\.activation_offloading"):
        check_activation_offloading("cuda", True)
    check_activation_offloading("cuda", False)


def test_model_whose_layers_are_not_known_is_refused():
    model = build_model()
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(InputError, match=r"are not recognised; leave it out, or set model\.gradient_checkpointing to"):
        OffloadedActivations(model, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gpu_needs_less_memory_for_the_same_gradients(checkpointing):
    """The input of a layer has 6 MiB, the gradients of its weights 1.5, so the peak is where the backward pass begins.

    The first step is not counted: libraries allocate memory in it that they keep.
    """
    gpu = torch.device("cuda")
    batch = filled(16, 256)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
    layer_input = batch.input_ids.numel() * 256 * 4
    assert layer_input > activation_offloading.MIN_BYTES
    found = []
    for offloads in (False, False, True):
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, gradients = step(offloads, checkpointing, device=gpu, batch=batch, **sizes)
        peak = torch.cuda.max_memory_allocated() - before
        found.append((peak, [loss.cpu(), *(gradient.cpu() for gradient in gradients)]))
        del loss, gradients
    _, (most, expected), (less, values) = found
    # Of eight inputs one is there at a time, and then the gradients of seven layers, or fewer.
    assert less < most - 2 * layer_input
    # Kernels of a GPU may sum in another order each time.
    for value, wanted in zip(values, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
