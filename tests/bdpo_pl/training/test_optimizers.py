"""Optimisers with less state than AdamW: their steps against formulas in float64, their state, and exact resumes."""

import importlib.util

import optimizer_ranks
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from makers import build_model
from ranks import run_ranks
from training import fit, same, weights

from bdpo_pl.errors import InputError
from bdpo_pl.models.adapters import LoraOptions, attach_adapters
from bdpo_pl.parallel.fsdp2 import ShardedStrategy
from bdpo_pl.training.adafactor import Adafactor
from bdpo_pl.training.optim import check_optimizer, parameter_groups
from bdpo_pl.training.optimizer_state import state_bytes
from bdpo_pl.training.optimizers import AdamW8bit, Muon, PagedAdamW8bit, is_hidden_matrix
from bdpo_pl.training.schedule_free import ScheduleFreeAdamW, at_average, averaged_weights

BITS = pytest.param(
    AdamW8bit,
    marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
)
KINDS = [Muon, Adafactor, ScheduleFreeAdamW, BITS]


def run(kind, start, gradients, **options):
    """The matrix after a step for each gradient, computed by the optimiser in float32."""
    parameter = torch.nn.Parameter(start.float().clone())
    optimizer = kind([{"params": [parameter]}], **options)
    for gradient in gradients:
        parameter.grad = gradient.float()
        optimizer.step()
    return parameter.detach().double(), optimizer


@pytest.fixture
def matrix():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(12, 8), [draw(12, 8) for _ in range(3)]


def test_muon_steps_along_an_orthogonal_matrix_of_adams_size(matrix):
    start, gradients = matrix
    lr = 0.01
    moved, _ = run(Muon, start, gradients[:1], lr=lr, weight_decay=0.5)
    step = (start * (1 - lr * 0.5) - moved) / (lr * 0.2 * 12**0.5)
    # Newton and Schulz's five iterations in bfloat16 leave the singular values near 1.
    left, values, right = torch.linalg.svd(step, full_matrices=False)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # In the directions of the first mean, which is that of the gradient.
    wanted = torch.linalg.svd(gradients[0], full_matrices=False)
    assert torch.allclose(left @ right, wanted[0] @ wanted[2], atol=0.05)


def test_factors_of_adapters_with_an_axis_of_tokens_go_to_adamw_too():
    model = build_model(tie_word_embeddings=False)
    attach_adapters(model, LoraOptions(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]))
    parameter_groups(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tokens = {name for name, p in trained.items() if model.config.vocab_size in p.shape}
    assert {name for name, p in trained.items() if not is_hidden_matrix(p)} == tokens
    assert sorted(name.split(".lora_")[1].split(".")[0] for name in tokens) == ["B", "embedding_A"]


def test_muon_gives_tables_and_vectors_to_adamw():
    model = build_model()
    muon = Muon(parameter_groups(model), lr=1e-3, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups[:1] for p in group["params"]}
    assert hidden == {n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n}
    reference = build_model()
    reference.load_state_dict(model.state_dict())
    adamw = torch.optim.AdamW(parameter_groups(reference), lr=1e-3, weight_decay=0.1)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        one.grad = torch.ones_like(one)
        other.grad = torch.ones_like(other)
    muon.step()
    adamw.step()
    for name, parameter in model.named_parameters():
        equal = torch.allclose(parameter, dict(reference.named_parameters())[name], rtol=0, atol=1e-7)
        assert equal == (name not in hidden), name


def test_adafactor_by_hand(matrix):
    start, gradients = matrix
    lr, rows, columns, wanted = 0.01, 0.0, 0.0, start.clone()
    for k, g in enumerate(gradients, start=1):
        keep = 1 - k**-0.8
        square = g**2 + 1e-30
        rows = keep * rows + (1 - keep) * square.mean(1)
        columns = keep * columns + (1 - keep) * square.mean(0)
        update = g / torch.sqrt(torch.outer(rows, columns) / rows.mean())
        update /= max(1.0, update.square().mean().sqrt())
        wanted = wanted - lr * 0.1 * wanted - lr * update
    moved, optimizer = run(Adafactor, start, gradients, lr=lr, weight_decay=0.1)
    assert torch.allclose(moved, wanted, rtol=0, atol=1e-6)
    assert sum(t.numel() for t in next(iter(optimizer.state.values())).values() if torch.is_tensor(t)) < 12 + 8 + 2


def test_schedule_free_by_the_papers_three_points(matrix):
    start, gradients = matrix
    beta, beta2, eps, decay = 0.9, 0.99, 1e-8, 0.1
    rates = [0.005, 0.01, 0.01]
    z, x, v, total = start.clone(), start.clone(), torch.zeros_like(start), 0.0
    for k, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        y = (1 - beta) * z + beta * x
        v = beta2 * v + (1 - beta2) * g**2
        z = z - lr * (g / (torch.sqrt(v / (1 - beta2**k)) + eps) + decay * y)
        total += lr**2
        x = (1 - lr**2 / total) * x + lr**2 / total * z
    parameter = torch.nn.Parameter(start.float().clone())
    optimizer = ScheduleFreeAdamW([parameter], lr=rates[0], betas=(beta, beta2), eps=eps, weight_decay=decay)
    for g, lr in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = g.float()
        optimizer.step()
    trained = parameter.detach().clone()
    assert torch.allclose(trained.double(), (1 - beta) * z + beta * x, rtol=0, atol=1e-6)
    saved = averaged_weights([optimizer])[id(parameter)]
    with at_average([optimizer], torch.nn.ParameterList([parameter])):
        assert torch.allclose(parameter.detach().double(), x, rtol=0, atol=1e-5)
        assert torch.equal(parameter, saved)
        with pytest.raises(RuntimeError, match="go_on"):
            optimizer.step()
    assert torch.equal(parameter, trained)


@pytest.mark.skipif(importlib.util.find_spec("schedulefree") is None, reason="schedulefree is not installed")
def test_schedule_free_steps_as_the_authors_do(matrix):
    from schedulefree import AdamWScheduleFree

    start, gradients = matrix
    ours, _ = run(ScheduleFreeAdamW, start, gradients, lr=0.01, weight_decay=0.1)
    parameter = torch.nn.Parameter(start.float().clone())
    theirs = AdamWScheduleFree([parameter], lr=0.01, weight_decay=0.1)
    theirs.train()
    for gradient in gradients:
        parameter.grad = gradient.float()
        theirs.step()
    assert torch.allclose(ours, parameter.detach().double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_planned_state_is_what_there_is(kind):
    model = build_model(hidden_size=128, intermediate_size=256, vocab_size=800)
    optimizer = kind(parameter_groups(model))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [
        v for values in optimizer.state.values() for k, v in values.items() if torch.is_tensor(v) and "qmap" not in k
    ]
    hidden = sum(p.numel() for p in model.parameters() if is_hidden_matrix(p))
    others = sum(p.numel() for p in model.parameters()) - hidden
    planned = state_bytes(kind, hidden, others, torch.float32)
    held_bytes = sum(t.numel() * t.element_size() for t in held)
    if kind is ScheduleFreeAdamW:
        # With the copy of the weights that it keeps while it validates.
        held_bytes += 4 * (hidden + others)
    # Sums of rows and columns, which the plan leaves out, are a percent of so small a model.
    assert abs(planned - held_bytes) < 0.02 * 8 * (hidden + others)
    assert planned < 8 * (hidden + others) or kind is ScheduleFreeAdamW


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_in_the_same_weights(kind, job, tmp_path):
    def make(params):
        return kind(params, lr=2e-3, weight_decay=0.1)

    def build(name, **trainer):
        saver = ModelCheckpoint(tmp_path / name, save_top_k=-1, every_n_train_steps=3, filename="{step}")
        options = {"max_epochs": 2, "callbacks": [saver], **trainer}
        return job(name, trainer=options, optimizer=make, lr_schedule="constant")

    whole = fit(build("whole"))
    resumed = fit(build("resumed"), tmp_path / "whole" / "step=9.ckpt")
    assert resumed.global_step == whole.global_step
    assert same(weights(whole), weights(resumed))
    start = weights(fit(build("start", max_steps=0)))
    assert not same(weights(whole), start)


def test_schedule_free_validates_saves_and_exports_the_average(job, tmp_path):
    seen = {}

    class Watch(ModelCheckpoint):
        def on_validation_end(self, trainer, module):
            seen[trainer.global_step] = weights(module)
            super().on_validation_end(trainer, module)

    saver = Watch(tmp_path / "at", save_top_k=-1, filename="{step}", save_weights_only=True)
    amid = ModelCheckpoint(tmp_path / "amid", save_top_k=-1, every_n_train_steps=5, filename="{step}")
    module = fit(
        job(
            trainer={"callbacks": [saver, amid], "max_epochs": 1},
            optimizer=lambda params: ScheduleFreeAdamW(params, lr=1e-2),
            lr_schedule="constant",
        )
    )
    last = module.global_step
    ends = weights(module)
    assert same(seen[last], ends)
    optimizer = module.trainer.optimizers[0]
    assert optimizer.is_averaged
    for p in module.policy.parameters():
        state = optimizer.state[p]
        trained = optimizer._kept[p]
        x = (trained.double() - 0.1 * state["z"].double()) / 0.9
        assert torch.allclose(p.double(), x, rtol=0, atol=1e-5)
    for folder, step in ((tmp_path / "at", last), (tmp_path / "amid", 5)):
        saved = torch.load(folder / f"step={step}.ckpt", weights_only=True)
        found = {name.removeprefix("policy."): value for name, value in saved["state_dict"].items()}
        if step == last:
            assert same(found, ends)
        else:
            states = saved["optimizer_states"][0]["state"]
            points = [value["y"].double() for value in states.values()], [v["z"].double() for v in states.values()]
            shapes = {tuple(v.shape) for v in found.values()}
            wanted = [(y - 0.1 * z) / 0.9 for y, z in zip(*points, strict=True)]
            assert {tuple(v.shape) for v in wanted} == shapes
            sums = sorted(float(v.double().sum()) for v in found.values())
            assert sums == pytest.approx(sorted(float(v.sum()) for v in wanted), abs=1e-3)


def test_steps_on_parts_of_weights_are_those_on_whole_ones(tmp_path):
    """Checkpoints too, in both directions."""
    run_ranks(optimizer_ranks.every_optimizer, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (ShardedStrategy(), None),
        (ShardedStrategy(tensor_parallel_size=2), "set tensor_parallel_size to 1: take AdamW"),
        (ShardedStrategy(save_distributed_checkpoint=True), "turn that off: take AdamW"),
        (ModelParallelStrategy(), "splits them in another way: take AdamW"),
    ],
)
def test_an_optimiser_is_refused_where_it_does_not_know_the_parts_of_weights(kind, strategy, said):
    check_optimizer(kind, "constant", SingleDeviceStrategy())
    check_optimizer(kind, "constant", DDPStrategy())
    check_optimizer(torch.optim.AdamW, "constant", strategy)
    if said is None:
        check_optimizer(kind, "constant", strategy)
        return
    with pytest.raises(InputError, match=said):
        check_optimizer(kind, "constant", strategy)


@pytest.mark.parametrize(
    ("kind", "strategy", "said"),
    [
        (AdamW8bit, ShardedStrategy(cpu_offload=True), "not been tried on the host: turn cpu_offload off: take AdamW"),
        (
            PagedAdamW8bit,
            ShardedStrategy(),
            "is PagedAdamW8bit, whose moves .* have not been tried with parts of weights, unlike AdamW8bit",
        ),
    ],
)
def test_8_bits_are_refused_where_state_is_on_the_host(kind, strategy, said):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(InputError, match=said):
        check_optimizer(kind, "constant", strategy)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Muon])
def test_an_optimiser_that_refuses_groups_or_vectors_is_refused_before_anything_is_scored(kind):
    with pytest.raises(InputError, match=r"model\.optimizer: "):
        check_optimizer(kind, "constant", None)
    # Adapters are matrices of one group.
    check_optimizer(kind, "constant", None, whole=False)


def test_schedule_free_with_a_falling_rate_is_refused():
    with pytest.raises(InputError, match="set it to constant"):
        check_optimizer(ScheduleFreeAdamW, "cosine", None)


def test_8_bits_without_the_package_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(2, 2))])
