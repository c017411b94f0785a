"""FLOPs against PyTorch's own counter, the share of padding against the rows, and the peaks of devices."""

import csv
from types import SimpleNamespace

import pytest
import torch
from architectures import tiny
from makers import build_model
from torch.utils.flop_counter import FlopCounterMode

import bdpo_pl.training.flops as flops
from bdpo_pl.data.batches import PairDataset
from bdpo_pl.data.packing import RowLayout
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.models.adapters import LoraOptions, add_adapters
from bdpo_pl.training.flops import peak_flops, training_flops
from bdpo_pl.training.parameter_counts import num_weights
from bdpo_pl.training.throughput import Throughput

aten = torch.ops.aten
PAIRS = [PreferencePair([5, 6, 7], [8, 9], [10] * 4), PreferencePair([5] * 6, [8] * 5, [10])]


def batch_of(pairs, layout=RowLayout.SPLIT):
    table = PairTable.from_pairs(pairs, [0])
    return PairDataset(table, 0, layout).collate([(i, 0.5) for i in range(len(pairs))])


def needed(model, batch):
    counted = training_flops(model)
    return counted.total(batch.num_tokens, counted.counts(batch))


def measured(model, batch):
    """FLOPs that PyTorch counts in products with weights, and in products of attention, forward and backward."""
    model.set_attn_implementation("eager")
    model.train()
    with FlopCounterMode(display=False) as counter:
        response_logps(model, batch.sequences, whole=True).sum().backward()
    found = counter.get_flop_counts()["Global"]
    attention = found.pop(aten.bmm)
    assert set(found) <= {aten.mm, aten.addmm}
    return sum(found.values()), attention


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
def test_flops_are_those_that_pytorch_counts(architecture):
    # One pair with responses of one length, so that there is no padding.
    model = build_model(architecture)
    batch = batch_of([PreferencePair([5, 6, 7], [8, 9, 10], [11, 12, 13])])
    R, T = batch.sequences.input_ids.shape
    weights, attention = measured(model, batch)
    # PyTorch computes the products that the causal mask hides, too.
    assert needed(model, batch) == weights + attention * (T + 1) / (2 * T)
    assert (R, T) == (2, 6)


def test_flops_of_adapters_lack_the_gradients_of_frozen_weights():
    model = build_model()
    add_adapters(model, LoraOptions(r=2))
    batch = batch_of([PreferencePair([5, 6, 7], [8, 9, 10], [11, 12, 13])])
    weights, attention = measured(model, batch)
    tokens, size, heads, shared = batch.num_tokens, 32, 4, 2
    # No gradient is needed below the first adapters: that of the first layer's input, through q, k and v.
    first = 2 * tokens * size * (size + 2 * size * shared // heads) + 2 * tokens * size * 3 * 2
    assert needed(model, batch) - (weights + attention * 7 / 12) == pytest.approx(first)


def test_padding_needs_no_flops_and_a_shared_prompt_counts_once():
    model = build_model()
    alone = sum(needed(model, batch_of([pair])) for pair in PAIRS)
    assert needed(model, batch_of(PAIRS)) == alone
    shared = batch_of(PAIRS, RowLayout.SHARED)
    body = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    )
    # Of 3 and 6 tokens of the prompts: products with weights, and attention of token t to t tokens.
    seen = sum(range(1, 4)) + sum(range(1, 7))
    assert alone - needed(model, shared) == 6 * body * 9 + 12 * 32 * 2 * seen


def test_windows_limit_what_a_token_sees():
    batch = batch_of([PreferencePair([5] * 30, [8] * 10, [9])])
    narrow, wide = (training_flops(build_model("gemma2", sliding_window=w)) for w in (16, 512))
    assert [a.kind for a in narrow.attention] == ["full_attention", "sliding_attention"]
    assert wide.counts(batch).tolist() == [11, *[sum(range(1, 41)) + sum(range(1, 32))] * 2]
    windowed = sum(min(t, 16) for t in range(1, 41)) + sum(min(t, 16) for t in range(1, 32))
    assert narrow.counts(batch).tolist()[2] == windowed


def test_each_layer_counts_heads_of_its_own_size():
    """As in Gemma 4, whose configuration does not tell one size for all layers."""
    model = tiny("Gemma 4 (text)")
    sizes = [layer.self_attn.head_dim for layer in model.model.layers]
    assert sizes == [8, 16]
    widths = {"sliding_attention": 4 * 2 * 8, "full_attention": 4 * 2 * 16}
    assert {layers.kind: layers.width for layers in training_flops(model).attention} == widths


def test_a_model_whose_sizes_cannot_be_read_has_no_flops_and_a_warning(monkeypatch, recwarn):
    def refuse(config):
        raise RuntimeError("each layer has its own")

    monkeypatch.setattr(flops, "layer_types", refuse)
    assert training_flops(build_model()) is None
    assert any("RuntimeError: each layer has its own" in str(warning.message) for warning in recwarn)


def test_only_the_experts_of_a_token_count():
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    model = build_model("qwen3_moe", **sizes)
    all_experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    others = sum(
        p.numel() for n, p in model.named_parameters()
        if p.ndim == 2 and not any(part in n for part in (".experts.", "embed_tokens", "lm_head"))
    )  # fmt: skip
    assert all_experts > others > 0
    assert training_flops(model).body == others + all_experts // 4
    model.config.num_experts = 0
    assert training_flops(model) is None


def test_a_window_has_its_rates_and_its_padding():
    now = [0.0]
    window = Throughput(lambda: now[0])
    batch = batch_of(PAIRS)
    window.flops = training_flops(build_model())
    window.start()
    window.add(batch, True)
    window.add(batch, False)
    now[0] = 2.0
    window.pause()
    now[0] = 7.0
    window.resume()
    window.add(batch, True)
    now[0] = 9.0
    values = window.read(lambda tensor, reduce_op: tensor, torch.device("cpu"), 1)
    # Rows of 5, 11, 7 and 7 tokens, each of 11 positions.
    assert values["train/padding_share"] == pytest.approx(1 - 30 / 44)
    assert values["train/tokens_per_second"] == 60 / 4
    assert values["train/tflops"] == pytest.approx(2 * needed(build_model(), batch) / 4 / 1e12)
    assert "train/mfu" not in values
    window.peak = 1e9
    window.add(batch, True)
    now[0] = 10.0
    # On two devices that read one batch together.
    found = window.read(lambda tensor, reduce_op: tensor, torch.device("cpu"), 2)["train/mfu"]
    assert found == pytest.approx(needed(build_model(), batch) / 2 / 1e9)


def test_what_a_run_logs(job, tmp_path):
    trainer, module, data = job("run")
    trainer.fit(module, data)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 4
    assert all(0 < float(row["train/padding_share"]) < 1 and float(row["train/tflops"]) > 0 for row in rows)
    assert all(float(row["train/peak_memory_gb"]) > 0.05 for row in rows)
    # Nobody knows the peak of a CPU.
    assert "train/mfu" not in rows[0]


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12), ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.float16, 756e12), ("NVIDIA H100 NVL", torch.bfloat16, 835.5e12),
        ("NVIDIA H200", torch.bfloat16, 989.4e12), ("NVIDIA H200", torch.float32, None),
        ("Tesla T4", torch.float16, 65e12), ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, None), ("NVIDIA A40", torch.bfloat16, None),
        ("AMD Instinct MI300X", torch.bfloat16, None),
    ],
)  # fmt: skip
def test_peaks_are_dense_ones_or_unknown(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), dtype) == peak
    assert peak_flops(torch.device("cpu"), dtype) is None


def test_quantised_weights_count_as_they_were():
    packed = torch.zeros(16, 1, dtype=torch.uint8)
    packed.quant_state = SimpleNamespace(shape=torch.Size([8, 4]))
    assert num_weights(packed) == 32
