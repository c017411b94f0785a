"""Planned memory against what a step really allocates, tracked tensor by tensor."""

import pytest
import torch
from architectures import tiny_config
from makers import build_model
from torch.distributed._tools.mem_tracker import MemTracker
from training import adamw
from transformers import AutoConfig

from bdpo_pl.data.stripes import stripe_of
from bdpo_pl.forward.fused_loss import fused_preference_loss
from bdpo_pl.losses import DPOLoss, PairScores
from bdpo_pl.models.adapters import LoraOptions, add_adapters
from bdpo_pl.models.loading import ModelSource, enable_activation_checkpointing, hold_products_in, load_model
from bdpo_pl.parallel.from_files import mapped_model
from bdpo_pl.training import parameter_counts
from bdpo_pl.training.memory_plan import MemoryPlan, plan_memory, planned
from bdpo_pl.training.optim import parameter_groups
from bdpo_pl.training.parameter_counts import Devices, MetaModel, count_parameters
from bdpo_pl.training.planned_batches import worst_batch
from bdpo_pl.training.planned_reference import plan_host, plan_reference

TOLERANCE = 0.15
SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab_size": 800}
MIXTURE = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64,
    "first_k_dense_replace": 2, "head_dim": 16,
}  # fmt: skip
CASES = {
    "plain": ({}, {}, 4, 128),
    "wide": ({"num_hidden_layers": 8, "intermediate_size": 352}, {}, 8, 192),
    "weights count most": ({"hidden_size": 256, "intermediate_size": 704}, {}, 1, 32),
    "rows apart": ({}, {"shared": False}, 4, 128),
    "checkpointing": ({"num_hidden_layers": 8}, {"gradient_checkpointing": True}, 4, 256),
    "lora": ({}, {"lora": LoraOptions(r=4, alpha=8)}, 4, 128),
    "sgd": ({"hidden_size": 256, "intermediate_size": 704}, {"optimizer": torch.optim.SGD}, 1, 32),
    "llama": ({"architecture": "llama"}, {}, 4, 128),
    "mixture": ({"architecture": "glm4_moe", **MIXTURE}, {}, 4, 128),
}


def measured(model, batch, optimizer):
    """Bytes at the peak of the second step, by PyTorch's own tracker."""
    pairs = batch.num_sequences // 2
    tracker = MemTracker()
    track = tracker._track_module_params_and_buffers
    # Its hooks, which only sort gradients from the rest, cannot be put on frozen parameters.
    tracker._track_module_params_and_buffers = lambda module, install_grad_hooks=True: track(module, False)
    tracker.track_external(model, optimizer)

    def losses(chosen, rejected, index):
        zeros = torch.zeros_like(chosen)
        lengths = torch.ones(len(index), dtype=torch.int64)
        return DPOLoss()(chosen, rejected, PairScores(lengths, lengths, zeros, zeros)) / pairs

    with tracker:
        for step in range(2):
            if step:
                tracker.reset_mod_stats()
            loss, _ = fused_preference_loss(model, batch, losses)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("case", CASES)
def test_plan_is_within_15_percent_of_what_a_step_allocates(case):
    sizes, options, pairs, window = CASES[case]
    options = {"optimizer": adamw, **options}
    batch = worst_batch(pairs, window, options.pop("shared", True))
    model = build_model(**{**SIZES, **sizes}).train()
    model.config.use_cache = False
    if options.get("gradient_checkpointing"):
        enable_activation_checkpointing(model)
    if lora := options.get("lora"):
        add_adapters(model, lora)
    plan = plan_memory(ModelSource("tiny"), model.config, batch, torch.float32, devices=Devices(kind="cpu"), **options)
    real = measured(model, batch, options["optimizer"](parameter_groups(model)))
    assert plan.peak == pytest.approx(real, rel=TOLERANCE), plan


def test_counts_are_exact():
    model = build_model(**SIZES)
    numel = sum(p.numel() for p in model.parameters())
    batch = worst_batch(2, 32, True)

    def plan(**options):
        options = {"devices": Devices(kind="cpu"), **options}
        return plan_memory(ModelSource("tiny"), model.config, batch, torch.float32, adamw, **options)

    whole = plan()
    assert (whole.weights, whole.optimizer, whole.gradients) == (4 * numel, 8 * numel, 4 * numel)
    assert plan(devices=Devices(data=2, kind="cpu")).gradients == 8 * numel  # and DDP's buckets
    split = plan(devices=Devices(data=4, sharded=True, kind="cpu"))
    assert (split.weights, split.optimizer) == (numel, 2 * numel)
    lora = LoraOptions(r=4, alpha=8)
    adapters = sum(p.numel() for p in add_adapters(build_model(**SIZES), lora).parameters() if p.requires_grad)
    adapted = plan(lora=lora)
    assert (adapted.weights, adapted.optimizer) == (4 * (numel + adapters), 8 * adapters)
    qlora = LoraOptions(r=4, alpha=8, quantize="nf4")
    # As bitsandbytes does it: the layers' matrices, not the embeddings, the LM head, norms and biases.
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
    assert plan(lora=qlora).weights == round(4 * (numel - layers + adapters) + layers * (4 + 0.127) / 8)
    copies = plan(lora=qlora, half_products=torch.bfloat16).gathered
    assert copies == 2 * (numel - layers + adapters) < plan(lora=lora, half_products=torch.bfloat16).gathered


SHARES = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3}
DIFFER = {
    "dense layers before mixtures": ("DeepSeek-V3", {"first_k_dense_replace": 3}),
    "a mixture in every second layer": ("Jamba", {"expert_layer_period": 2, "num_experts": 8}),
    "keys of other layers": ("Gemma 4 (text)", SHARES),
}


@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)], ids=["whole", "lora"])
@pytest.mark.parametrize("case", DIFFER)
def test_each_layer_counts_where_layers_differ(case, lora):
    name, options = DIFFER[case]
    config = tiny_config(name, num_hidden_layers=6, **options)
    source = ModelSource("tiny")
    model = MetaModel(source, config, torch.float32, lora).built
    counted = count_parameters(source, config, torch.float32, lora, Devices())
    parameters = list(model.parameters())
    assert counted.all == sum(p.numel() for p in parameters)
    assert counted.trained == sum(p.numel() for p in parameters if p.requires_grad)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert (counted.block, counted.outside) == (max(layers), counted.all - sum(layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Qwen3-MoE", "DeepSeek-V3"])
def test_mixtures_and_latent_attention_have_a_plan_with_and_without_adapters(name, dtype):
    config, batch = tiny_config(name), worst_batch(2, 32, True)
    sizes = [
        plan_memory(ModelSource("tiny"), config, batch, dtype, adamw, Devices(kind="cpu"), lora=lora)
        for lora in (None, LoraOptions(r=4))
    ]
    assert all(plan.activations > plan.layer > 0 for plan in sizes)


@pytest.mark.parametrize("name", ["Jamba", "Falcon-H1"])
def test_models_with_a_state_are_planned_in_rows_of_their_own(job, tmp_path, name):
    tiny_config(name).save_pretrained(tmp_path / "model")
    plan = planned(*job(policy=str(tmp_path / "model")))
    assert plan.activations > plan.layer > 0


def test_modules_trained_whole_beside_adapters_keep_the_dtype_of_the_model():
    config, lora = build_model(**SIZES).config, LoraOptions(r=4, modules_to_save=["embed_tokens"])
    plan = plan_memory(
        ModelSource("tiny"), config, worst_batch(2, 32, True), torch.bfloat16, adamw, Devices(kind="cpu"), lora=lora
    )
    model = add_adapters(build_model(**SIZES).bfloat16(), lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32, torch.bfloat16}
    assert plan.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert plan.gradients == sum(p.numel() * p.element_size() for p in trained)
    assert plan.optimizer == 2 * plan.gradients


def test_a_group_of_two_holds_half_the_layers_and_of_the_vocabulary():
    """Against the parts that tensor parallelism really makes of the model."""
    config = build_model(**SIZES).config
    batch = worst_batch(2, 32, True)

    def plan(tensor):
        devices = Devices(tensor=tensor, sharded=True, kind="cpu")
        return plan_memory(ModelSource("tiny"), config, batch, torch.float32, adamw, devices)

    one, two = plan(1), plan(2)
    norms = 4 * (2 * SIZES["num_hidden_layers"] + 1) * SIZES["hidden_size"]
    assert two.weights == (one.weights - norms) // 2 + norms
    assert 0.4 * one.activations < two.activations < 0.8 * one.activations


def test_a_group_that_shares_rows_shares_activations_and_scored_tokens():
    config = build_model(**SIZES).config
    batch = worst_batch(2, 64, True)

    def plan(checkpointing, *share):
        devices = Devices(data=2, sharded=True, kind="cpu")
        rows = stripe_of(batch, *share) if share else batch
        return plan_memory(
            ModelSource("tiny"), config, rows, torch.float32, adamw, devices, gradient_checkpointing=checkpointing
        )

    for checkpointing in (False, True):
        whole, share = plan(checkpointing), plan(checkpointing, 1, 2)
        assert share.weights == whole.weights
        # Each layer's mask, in the dtype of its products, is of whole rows.
        R, T = batch.input_ids.shape
        masks = 4 * R * T * T * (1 if checkpointing else SIZES["num_hidden_layers"])
        assert share.activations - masks == pytest.approx((whole.activations - masks) / 2, rel=0.02)
        assert share.logits_chunk < whole.logits_chunk


def test_nothing_is_allocated(monkeypatch):
    """A 70B model's plan takes no 70B of anything."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    plan = plan_memory(
        ModelSource("llama-70b"), config, worst_batch(1, 2048, True), torch.float32, adamw,
        Devices(data=8, tensor=8, sharded=True), gradient_checkpointing=True, half_products=torch.bfloat16,
    )  # fmt: skip
    # 70.55e9 parameters by the model's own card.
    assert plan.weights == pytest.approx(4 * 70.55e9 / 64, rel=0.01)
    assert plan.optimizer == pytest.approx(8 * 70.55e9 / 64, rel=0.01)


def test_equal_models_are_built_once_and_others_are_not_taken_for_them(monkeypatch):
    built = []
    build = parameter_counts.model_class
    monkeypatch.setattr(
        parameter_counts, "model_class", lambda *given, **more: built.append(given) or build(*given, **more)
    )

    def plan(pairs=2, lora=None, changes=(), **sizes):
        config = build_model(**{**SIZES, "vocab_size": 801, **sizes}).config
        for name, value in changes:
            setattr(config, name, value)
        batch, devices = worst_batch(pairs, 32, True), Devices(kind="cpu")
        return plan_memory(ModelSource("tiny"), config, batch, torch.float32, adamw, devices, lora=lora)

    first = plan()
    assert len(built) == 3
    larger = plan(pairs=4)
    assert plan() == first
    assert len(built) == 3
    assert larger.weights == first.weights
    assert larger.activations > 1.9 * first.activations
    wider = plan(intermediate_size=200)
    assert wider.weights > first.weights
    assert wider.activations > first.activations
    ranks = [plan(lora=LoraOptions(r=r)).optimizer for r in (4, 8)]
    assert ranks[1] == 2 * ranks[0]
    assert len(built) == 10
    # What cannot be compared is built each time.
    strange = [("of_a_users_code", lambda: None)]
    assert plan(changes=strange) == plan(changes=strange) == first
    assert len(built) > 13


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_reference_is_planned_as_it_is_held(tied, products):
    model = build_model(tie_word_embeddings=tied)
    if products is not None:
        hold_products_in(model, products)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    plan = plan_reference(ModelSource("tiny"), model.config, torch.float32, Devices(kind="cpu"), products)
    assert plan == pytest.approx(held, rel=0.03)
    shared = plan_reference(ModelSource("tiny"), model.config, torch.float32, Devices(2, 1, True, "cpu"), products)
    whole = sum(p.numel() for p in model.parameters()) * (products or torch.float32).itemsize
    assert shared > whole / 2


def test_an_8b_reference_of_eight_devices_is_an_eighth_in_half_precision():
    """Where each rank held a whole one in float32: 32 GB."""
    config = AutoConfig.for_model(
        "llama", vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    plan = plan_reference(ModelSource("llama-8b"), config, torch.float32, Devices(8, 1, True), torch.bfloat16)
    gathered = 2 * (2 * 128_256 * 4096 + 2 * 218.1e6)
    assert plan == pytest.approx(2 * 8.03e9 / 8 + gathered, rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_a_machine_holds_one_reference_as_planned_and_with_the_same_bits(tmp_path, tied, stored, products):
    build_model(tie_word_embeddings=tied).to(stored).save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    found = mapped_model(source, torch.float32, products)
    plan = plan_host(source, torch.float32, products, 8)
    held = sum(p.numel() * p.element_size() for p in found.model.parameters())
    assert found.shared + found.copied == held
    norms = 4 * 5 * 32
    assert (plan.shared, plan.each) == pytest.approx((found.shared, found.copied), abs=norms)
    assert plan.total == plan.shared + 8 * plan.each
    loaded = load_model(source, torch.float32)
    if products is not None:
        hold_products_in(loaded, products)
    expected = dict(loaded.named_parameters())
    assert expected.keys() == dict(found.model.named_parameters()).keys()
    for name, parameter in found.model.named_parameters():
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(parameter, expected[name])
    ids = torch.arange(5, 40)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=products is not None):
        assert torch.equal(found.model(ids).logits, loaded.eval()(ids).logits)
    # Mapped privately: whatever is written to a weight, the file keeps its bytes.
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        found.model.lm_head.weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_table_shows_the_peak(capsys):
    from rich.console import Console

    Console(width=100).print(MemoryPlan(2**30, 0, 2**31, 2**30, 2**29, 2**28).table())
    assert "4.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainer.devices=2", "--trainer.strategy=fsdp2"],
        ["--trainer.devices=2", "--trainer.strategy=ddp"],
        [
            "--trainer.devices=2",
            "--trainer.strategy=bdpo_pl.parallel.fsdp2.ShardedStrategy",
            "--trainer.strategy.context_parallel_size=2",
        ],
        ["--model.lora.r=4"],
    ],
)
def test_dry_run_prints_the_plan_and_does_nothing(
    model_dir, preference_file, tmp_path_factory, monkeypatch, capsys, options
):
    from bdpo_pl.fit import main

    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("bdpo_pl.training.module.load_model", lambda *_: pytest.fail("weights were read"))
    main(
        [
            f"--model.policy={model_dir}",
            f"--data.train={preference_file}",
            "--data.held_out_fraction=0.2",
            "--trainer.accelerator=cpu",
            "--dry_run=true",
            *options,
        ]
    )
    printed = capsys.readouterr().out
    assert "Memory on each device" in printed
    assert "reference's weights, freed before the policy is loaded" in printed
    assert "peak" in printed
    assert ("shared by 2 processes" in printed) == ("--trainer.strategy=ddp" in options)
    assert not list(folder.iterdir())
