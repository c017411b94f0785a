"""Options that change how a step is computed, not what: precision, checkpointing, compilation, batching, clipping."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from training import fit, same, weights

from bdpo_pl.data.packing import RowLayout
from bdpo_pl.errors import InputError
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.loading import compile_layers
from bdpo_pl.training.watched import WatchedModule


def fused(params):
    return torch.optim.AdamW(params, lr=2e-3, weight_decay=0.1, fused=True)


@pytest.fixture
def final(job):
    """The module after two epochs under options, and its last validation; 40 pairs, 32 of them to train on."""

    def run(name, precision="32-true", **model):
        module = fit(job(name, trainer={"max_epochs": 2, "precision": precision}, **model))
        return module, module.evaluations[max(module.evaluations)]

    return run


_PLAIN: dict = {}


@pytest.fixture
def plain(final):
    """The last validation with no option: computed once, the numbers do not depend on the test."""
    if not _PLAIN:
        _PLAIN.update(final("plain")[1])
    return _PLAIN


@pytest.mark.parametrize(
    ("precision", "checkpointing", "compiled"),
    [
        ("32-true", True, "aot_eager"),
        ("bf16-mixed", False, "eager"),
        ("bf16-mixed", True, "aot_eager"),
        ("bf16-true", True, None),
    ],
)
def test_options_work_together(final, plain, precision, checkpointing, compiled):
    """Lightning alone would refuse the fused optimiser under bf16-mixed, where the gradient is clipped."""
    module, values = final("all", precision, optimizer=fused, gradient_checkpointing=checkpointing, compile=compiled)
    assert module.row_layout is RowLayout.SHARED
    exact = precision == "32-true"
    for name in ("held_out/loss", "held_out/margin", "train_probe/margin"):
        assert values[name] == pytest.approx(plain[name], abs=1e-3 if exact else 0.15)
    assert values["held_out/accuracy"] > 0.9


def test_inductor_gives_the_same_training(final, plain):
    compiled = final("compiled", compile="inductor")[1]
    assert compiled["held_out/loss"] == pytest.approx(plain["held_out/loss"], abs=1e-3)
    assert compiled["held_out/margin"] == pytest.approx(plain["held_out/margin"], abs=5e-3)


def test_unknown_backend_and_unknown_layers_are_refused(job):
    with pytest.raises(InputError, match=r"model\.compile: there is no backend 'fastest'; choose one of .*inductor"):
        fit(job(compile="fastest"))

    class Odd(torch.nn.Module):
        config = type("Config", (), {"get_text_config": lambda self: self, "num_hidden_layers": 2})()

    with pytest.raises(InputError, match="layers of Odd are not recognised"):
        compile_layers(Odd(), "inductor")


def test_batches_by_tokens_train_on_the_mean_over_pairs(job):
    """One step over all 32 pairs: in one batch, or in micro-batches of as many pairs as fit."""

    def step(name, accumulate=1, **data):
        # Plain gradient descent: Adam's first step would blow rounding up.
        module = fit(
            job(
                name,
                data=data,
                trainer={"accumulate_grad_batches": accumulate},
                optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
            )
        )
        assert module.global_step == 1
        return weights(module)

    whole = step("whole", max_tokens_per_batch=100_000)
    for other in (step("parts", 64, max_tokens_per_batch=150), step("by pairs", batch_size=32)):
        for name, value in whole.items():
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6, msg=name)


def test_run_by_tokens_resumes_in_the_middle_of_an_epoch(job, tmp_path):
    data = {"max_tokens_per_batch": 200}
    whole = fit(job("whole", data=data, trainer={"max_epochs": 2}))
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(job("part", data=data, trainer={"max_epochs": 2, "callbacks": [keep]}))
    steps_an_epoch = whole.global_step // 2
    assert steps_an_epoch > 6
    resumed = fit(
        job("resumed", data=data, trainer={"max_epochs": 2}), ckpt_path=str(tmp_path / "ckpt" / "step=6.ckpt")
    )
    assert same(weights(whole), weights(resumed))


def test_pair_that_no_batch_can_hold_is_refused_by_name(job):
    with pytest.raises(
        InputError, match=r"pairs\.jsonl, line \d+: the pair takes .* data\.max_tokens_per_batch = 30\)"
    ):
        fit(job(data={"max_tokens_per_batch": 30}))
    with pytest.raises(InputError, match=r"data\.max_tokens_per_batch must be at least 1"):
        job(data={"max_tokens_per_batch": 0})


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_lightnings_own(job, monkeypatch, algorithm):
    """Adam forgives a wrong scale; plain gradient descent does not."""

    def run(name, **options):
        return weights(
            fit(
                job(
                    name,
                    optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
                    trainer={"max_steps": 3, "num_sanity_val_steps": 0, **options},
                )
            )
        )

    options = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": algorithm}
    ours = run("ours", **options)
    unclipped = run("unclipped", gradient_clip_val=None)
    monkeypatch.delattr(WatchedModule, "configure_gradient_clipping")
    theirs = run("theirs", **options)
    assert not same(ours, unclipped)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


class Norms(Callback):
    """Keeps the norms that were logged, of steps that were taken."""

    def on_train_batch_end(self, trainer, module, *_):
        self.seen = [*getattr(self, "seen", []), float(trainer.callback_metrics["train/grad_norm"])]


@pytest.mark.parametrize(("algorithm", "clip"), [("norm", 0.02), ("value", 0.02), ("norm", None)])
def test_scaled_gradients_are_logged_and_clipped_as_they_are(job, algorithm, clip):
    """On a CPU Lightning takes 16-mixed for bf16-mixed, unless it comes as a plugin."""

    def run(name, **options):
        norms = Norms()
        fixed = {"max_steps": 3, "callbacks": [norms], "gradient_clip_val": clip, "num_sanity_val_steps": 0}
        module = fit(
            job(
                name,
                optimizer=lambda params: torch.optim.SGD(params, lr=1.0, fused=True),
                trainer={**fixed, "gradient_clip_algorithm": algorithm, **options},
            )
        )
        return weights(module), norms.seen

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    half, logged = run("half", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    exact, norms = run("exact")
    assert logged == pytest.approx(norms, rel=0.05)
    for name in exact:
        torch.testing.assert_close(half[name], exact[name], rtol=0.02, atol=2e-3)


def test_a_step_whose_scaled_gradients_overflow_is_skipped(job):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    norms = Norms()
    options = {"max_steps": 1, "callbacks": [norms], "num_sanity_val_steps": 0}
    trainer, module, data = job(trainer={**options, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]})
    before = {name: weight.clone() for name, weight in module.base_model(torch.float32, "cpu").named_parameters()}
    trainer.fit(module, data)
    assert same(before, weights(module))
    assert scaler.get_scale() == 2.0**39


def test_gradients_of_a_fused_optimiser_are_clipped_by_value(job):
    fit(job(optimizer=fused, trainer={"precision": "bf16-mixed", "max_steps": 1, "gradient_clip_algorithm": "value"}))


class Batches(Callback):
    """Keeps what identifies each batch, and the sum of its pairs' weights."""

    def __init__(self):
        self.sums, self.pairs = [], []

    def on_train_batch_start(self, trainer, module, batch, *_):
        self.sums.append(float(batch.pair_weight.sum()))
        self.pairs.append(batch.pair_index.tolist())


@pytest.mark.parametrize("limit", [{"limit_train_batches": 3}, {"overfit_batches": 3}])
def test_epochs_of_overfit_batches_have_the_same_pairs(job, limit):
    given = Batches()
    fixed = {"max_epochs": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0, "callbacks": [given]}
    fit(job(data={"batch_size": 2}, trainer=fixed | limit))
    assert len(given.pairs) == 6
    assert (given.pairs[:3] == given.pairs[3:]) is ("overfit_batches" in limit)


@pytest.mark.parametrize("limit", [{"limit_train_batches": 0.2}, {"overfit_batches": 3}])
def test_a_step_that_a_limit_cuts_is_a_mean_over_its_pairs(job, limit):
    """Of 16 batches 3 are used, two to a step, and Lightning divides each by two."""
    given = Batches()
    fixed = {"accumulate_grad_batches": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0, "callbacks": [given]}
    module = fit(job(data={"batch_size": 2}, trainer=fixed | limit))
    assert module.global_step == 2
    assert given.sums == pytest.approx([1.0, 1.0, 2.0])


def test_dropout_of_a_run_that_is_resumed_within_an_epoch_is_the_same(job, tmp_path):
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    lora, trainer = LoraOptions(r=4, dropout=0.5), {"max_steps": 4, "num_sanity_val_steps": 0}
    whole = fit(job("whole", lora=lora, trainer={**trainer, "callbacks": [keep]}))
    resumed = fit(job("resumed", lora=lora, trainer=trainer), ckpt_path=str(tmp_path / "ckpt" / "step=2.ckpt"))
    assert same(weights(whole), weights(resumed))
