"""A GPU that is pretended: tensors with its device and shapes, but without memory or numbers.

PyTorch's backend in Python gives autograd, FSDP2 and device meshes a device called `gpu`, its FakeTensorMode propagates
shapes and devices through every operation, and refuses one on tensors of two devices. What is proven with it is where
each tensor is; not a number, nor the order of what runs at the same time.
"""

from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from bdpo_pl.parallel.state import DATA, TENSOR
from bdpo_pl.parallel.weight_files import WeightFiles
from bdpo_pl.training import meta_attention


class _Module(_DummyBackendModule):
    """What `torch.cuda` is for a GPU: streams and events of the CPU, which do nothing."""

    def set_device(self, _):
        pass

    def __getattr__(self, name):
        return getattr(torch.cpu, name)


class _Mode(FakeTensorMode):
    """Shapes and devices alone; whoever reads a number from a tensor is told 1, or true."""

    avoid_device_init = True
    """Known numbers are not computed with on a device that there is not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        return super().__torch_dispatch__(function, types, args, kwargs)


@contextmanager
def pretended(world_size):
    """Be rank 0 of `world_size` ranks with such a GPU each, whose collectives send nothing; yields mesh and device.

    A process keeps the device, so this is for processes of their own.
    """
    _setup_privateuseone_for_python_backend("gpu", _Module())
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    mesh = init_device_mesh("gpu", (world_size, 1), mesh_dim_names=(DATA, TENSOR))
    # Parts of a mesh are made from its numbers, which tensors in the mode do not have.
    assert [mesh[name].size() for name in (DATA, TENSOR)] == [world_size, 1]
    read = WeightFiles.read

    def read_shapes(*args):
        with unset_fake_temporarily():
            found = read(*args)
        return torch.empty(found.shape, dtype=found.dtype)

    WeightFiles.read = read_shapes
    try:
        with _Mode(allow_non_fake_inputs=True):
            yield mesh, torch.device("gpu", 0)
    finally:
        dist.destroy_process_group()


class Peak(TorchDispatchMode):
    """Bytes of memory by type of device: of all tensors that operations have made and that still exist.

    Attributes:
        now: after the last operation.
        most: at the peak since `reset`.
    """

    def __init__(self):
        super().__init__()
        self.now, self.most, self._found = {}, {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        known = len(self._found)
        for tensor in tree_leaves((args, output)):
            if isinstance(tensor, torch.Tensor):
                tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
                storage = tensor.untyped_storage()
                self._found.setdefault(storage._cdata, (StorageWeakRef(storage), tensor.device.type))
        # Memory grows where there is more of it to be found: to look through all of it takes most of the time.
        if len(self._found) > known:
            self.count()
        return output

    def count(self):
        self.now = {}
        for key, (reference, kind) in list(self._found.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._found[key]
            else:
                self.now[kind] = self.now.get(kind, 0) + storage.nbytes()
        for kind, size in self.now.items():
            self.most[kind] = max(self.most.get(kind, 0), size)

    def reset(self):
        self.count()
        self.most = dict(self.now)


class _Attention(meta_attention._Attention):
    """Attention that saves what the fused kernels of a GPU save."""

    @staticmethod
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def fused_attention():
    """A context in which SDPA is a fused kernel; of a pretended GPU it has none, and would hold T × T weights."""

    def attention(query, key, value, attn_mask=None, *_, **__):
        return _Attention.apply(query, key, value, attn_mask)

    return mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention)
