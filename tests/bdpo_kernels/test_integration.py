"""The operators inside PyTorch's own machinery: torch.compile, opcheck, DTensor, CUDA graphs."""

import os
import tempfile

import pytest
import torch

from bdpo_kernels import linear_preference_loss, linear_sequence_logprob, sequence_logprob

IGNORED = -100


@pytest.fixture
def packed(device):
    """hidden (7, 4), weight (11, 4), labels, ids of 3 sequences."""
    labels = torch.tensor([3, 0, IGNORED, 10, 5, 5, 1], device=device)
    ids = torch.tensor([0, 0, 1, 1, 2, 0, 2], device=device)
    return torch.randn(7, 4, device=device), torch.randn(11, 4, device=device), labels, ids


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_compiled_sequence_logprob_has_one_graph_and_the_same_gradients(packed, form):
    hidden, weight, labels, ids = packed

    def compute(hidden, weight):
        logits = hidden @ weight.t()
        if form == "packed":
            return sequence_logprob(logits, labels, ids, 3).exp().sum()
        return sequence_logprob(logits[None, :6], labels[None, :6]).exp().sum()

    assert_compiles(compute, hidden, weight)


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_linear_sequence_logprob_has_one_graph_and_the_same_gradients(packed, bias):
    hidden, weight, labels, ids = packed
    b = torch.randn(11, device=hidden.device) if bias else None

    def compute(hidden, weight):
        return linear_sequence_logprob(hidden, weight, labels, ids, 3, bias=b, softcap=5.0).exp().sum()

    assert_compiles(compute, hidden, weight)


def assert_compiles(compute, *tensors):
    # aot_eager traces and partitions as inductor does, and needs no C compiler.
    results = []
    for function in (compute, torch.compile(compute, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled)


def test_exported_operators_compute_the_same(packed):
    hidden, weight, labels, ids = packed

    class Scores(torch.nn.Module):
        def forward(self, hidden, weight):
            whole = sequence_logprob(hidden @ weight.t(), labels, ids, 3)
            return whole, linear_sequence_logprob(hidden, weight, labels, ids, 3, lengths=[3, 1, 2])

    program = torch.export.export(Scores(), (hidden, weight))
    called = {node.target for node in program.graph.nodes}
    operators = torch.ops.bdpo_kernels
    assert {operators.sequence_logprob.default, operators.linear_sequence_logprob.default} <= called
    other = torch.randn_like(hidden)
    for exported, plain in zip(program.module()(other, weight), Scores()(other, weight), strict=True):
        assert torch.equal(exported, plain)


def test_number_of_sequences_may_be_a_dimension_of_an_exported_program(packed):
    """It is a symbol then, not an int."""
    hidden, weight, labels, ids = packed

    class Sums(torch.nn.Module):
        def forward(self, hidden, weight, labels, ids, sequences):
            S = sequences.shape[0]
            whole = sequence_logprob(hidden @ weight.t(), labels, ids, S)
            return whole, linear_sequence_logprob(hidden, weight, labels, ids, S)

    dynamic = (None, None, None, None, {0: torch.export.Dim("S", min=3)})
    arguments = (hidden, weight, labels, ids)
    program = torch.export.export(Sums(), (*arguments, torch.zeros(4)), dynamic_shapes=dynamic)
    for S in (3, 5):
        found, plain = (f(*arguments, torch.zeros(S)) for f in (program.module(), Sums()))
        assert [len(sums) for sums in found] == [S, S]
        assert all(map(torch.equal, found, plain))


def test_compiled_caller_of_the_preference_loss_breaks_its_graph_cleanly(packed):
    hidden, weight, labels, ids = packed

    @torch.compile(backend="aot_eager")
    def compute(hidden, weight):
        loss, *_ = linear_preference_loss(hidden * 2, weight, labels, ids, lambda c, r, i: r - c, num_pairs=2)
        return loss * 3

    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    compute(*leaves).backward()
    plain = [t.clone().requires_grad_() for t in (hidden, weight)]
    loss, *_ = linear_preference_loss(plain[0] * 2, plain[1], labels, ids, lambda c, r, i: r - c, num_pairs=2)
    (loss * 3).backward()
    for a, b in zip(leaves, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_opcheck(packed, backend):
    hidden, weight, labels, ids = packed
    ops = torch.ops.bdpo_kernels
    logits = (hidden @ weight.t()).requires_grad_()
    torch.library.opcheck(ops.sequence_logprob.default, (logits, labels, ids, 3, IGNORED, backend, True))
    torch.library.opcheck(
        ops.linear_sequence_logprob.default,
        (
            hidden.requires_grad_(), weight.requires_grad_(), None, labels, ids, 3, None, 1.0, IGNORED, torch.float32,
            True, backend, [44, 0, 0, 132, 176, 176], [3, 1, 2], True,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("which", ["hidden", "weight", "both"])
def test_gradients_have_the_strides_that_are_foretold(packed, backend, which):
    """Inductor asserts the strides of the fake implementation; a gradient like a transposed tensor has others."""
    hidden, weight, labels, ids = packed
    if which != "weight":
        hidden = hidden.t().contiguous().t()
    if which != "hidden":
        weight = weight.t().contiguous().t()
    options = (None, 1.0, IGNORED, torch.float32, True, backend, [44, 0, 0, 132, 176, 176])
    ops, lengths = torch.ops.bdpo_kernels, [3, 1, 2]
    for op, arguments in (
        (ops.linear_sequence_logprob, (labels, ids, 3, *options, lengths, True)),
        (
            ops.linear_sequence_logprob_backward,
            (labels, torch.ones(7, device=hidden.device), *options, lengths, [True] * 3),
        ),
    ):
        torch.library.opcheck(
            op.default, (hidden, weight, None, *arguments), test_utils=("test_schema", "test_faketensor")
        )
    logits = torch.randn(11, 7, device=hidden.device).t()
    _, stats = ops.sequence_logprob(logits, labels, ids, 3, IGNORED, backend, True)
    torch.library.opcheck(
        ops.sequence_logprob_backward.default,
        (logits, labels, torch.ones(7, device=hidden.device), stats, IGNORED, backend),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_sharded_weight_and_bias_are_gathered(packed):
    """DTensors, as FSDP2 holds parameters, on a mesh of one process."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, labels, ids = packed
    kind = hidden.device.type
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=dist.FileStore(os.path.join(folder, "store"), 1),
            rank=0,
            world_size=1,
        )
        try:
            mesh = dist.init_device_mesh(kind, (1,))
            tensors = weight, torch.randn(11, device=hidden.device)
            sharded = [distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in tensors]
            plain = [t.clone().requires_grad_() for t in tensors]
            for w, b in (sharded, plain):
                loss, *_ = linear_preference_loss(hidden, w, labels, ids, lambda c, r, i: r - c, num_pairs=2, bias=b)
                (loss + linear_sequence_logprob(hidden, w, labels, ids, 3, bias=b).sum()).backward()
            for part, whole in zip(sharded, plain, strict=True):
                torch.testing.assert_close(part.grad.full_tensor(), whole.grad)
        finally:
            dist.destroy_process_group()


@pytest.mark.gpu
def test_cuda_graph_replays_sequence_logprob(device):
    V = 32_000
    logits = torch.randn(64, V, device=device, dtype=torch.bfloat16)
    labels = torch.randint(V, (64,), device=device)
    ids = torch.arange(64, device=device) // 8

    def compute(x):
        return sequence_logprob(x, labels, ids, 8, check_labels=False)

    static = logits.clone()
    compute(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute(static)
    static.copy_(logits.flip(0))
    graph.replay()
    assert torch.equal(out, compute(logits.flip(0)))


@pytest.mark.gpu
@pytest.mark.parametrize("V", [32_000, 151_936, 262_144])
def test_large_vocabularies_on_the_gpu(device, V):
    """Offsets beyond 2³¹, and the mixed-precision products, against float32."""
    N, D = 8_400 if V > 200_000 else 2_048, 64
    hidden = torch.randn(N, D, device=device, dtype=torch.bfloat16)
    weight = torch.randn(V, D, device=device, dtype=torch.bfloat16) / 8
    labels = torch.randint(V, (N,), device=device)
    ids = torch.arange(N, device=device) % 8
    full = sequence_logprob(hidden @ weight.t(), labels, ids, 8)
    chunked = linear_sequence_logprob(hidden, weight, labels, ids, 8)
    torch.testing.assert_close(full, chunked, rtol=1e-4, atol=1e-2)
    rows = torch.arange(0, N, 97, device=device)
    exact = (hidden[rows].float() @ weight.float().t()).log_softmax(-1).gather(1, labels[rows, None]).squeeze(1)
    some = linear_sequence_logprob(
        hidden[rows], weight, labels[rows], torch.arange(len(rows), device=device), len(rows)
    )
    torch.testing.assert_close(some, exact, rtol=2e-2, atol=5e-2)
