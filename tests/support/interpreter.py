"""Triton's interpreter, without what it does again at each call.

A launch replaces the functions of `triton.language` by interpreted ones. The interpreter looks for them anew in every
launch, and at every call of a helper within it: half of the time of a small kernel. NumPy's type of a tensor it looks
up in a table that it makes anew for each operation. The shape of each tensor it wraps and unwraps anew, it broadcasts
tensors that have one shape, and of each sum and product of integers it computes whether they overflow, of which nothing
comes without its debug mode.
"""

import inspect
from dataclasses import replace

import triton.language as tl
from triton.runtime import interpreter


def interprets():
    """Return whether Triton was imported for its interpreter: then its own functions are interpreted, as ours are.

    On a machine with a GPU it was not, and a process cannot change that.
    """
    return isinstance(tl.zeros, interpreter.InterpretedFunction)


def look_up_once():
    """Let a launch replace each module's functions once, by names that are known; what is computed is the same."""
    patch_builtin, patch_lang, numpy_type = (
        getattr(interpreter, name) for name in ("_patch_builtin", "_patch_lang", "_get_np_dtype")
    )
    if patch_lang.__module__ == __name__:
        return
    places = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    names = {id(place): [n for n, value in inspect.getmembers(place) if tl.core.is_builtin(value)] for place in places}
    languages, done, types = {}, set(), {}

    def by_name(package, builder, scope):
        if id(package) not in names:
            patch_builtin(package, builder, scope)
            return
        for name in names[id(package)]:
            value = getattr(package, name)
            if tl.core.is_builtin(value):
                interpreter._patch_attr(package, name, value, builder, scope)

    def once(function):
        if function not in languages:
            found = function.__globals__.values()
            languages[function] = {id(value) for value in found if value is tl or value is tl.core}
        if languages[function] <= done:
            return interpreter._LangPatchScope()
        scope = patch_lang(function)
        if not done:
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        done.update(languages[function])
        return scope

    def type_of(kind):
        name = (kind.element_ty if isinstance(kind, tl.block_type) else kind).name
        if name not in types:
            types[name] = numpy_type(kind)
        return types[name]

    interpreter._patch_builtin, interpreter._patch_lang, interpreter._get_np_dtype = by_name, once, type_of
    _keep_shapes()
    semantic = interpreter.interpreter_semantic
    semantic.builder.options = replace(semantic.builder.options, sanitize_overflow=False)
    broadcast = semantic.broadcast_impl_value

    def broadcast_unless_alike(left, right):
        if left.type.is_block() and right.type.is_block() and left.type.shape.values == right.type.shape.values:
            return left, right
        return broadcast(left, right)

    semantic.broadcast_impl_value = broadcast_unless_alike


def _keep_shapes():
    """Let tensors and types of blocks of one shape share what is derived from it."""
    make_block = tl.block_type.__init__
    blocks, shapes = {}, {}

    def block(self, element_ty, shape):
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if (sizes, element_ty.name) not in blocks:
            make_block(self, element_ty, shape)
            blocks[sizes, element_ty.name] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[sizes, element_ty.name]

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in shapes:
            make_tensor(self, handle, type)
            shapes[sizes] = self.shape, self.numel
        self.shape, self.numel = shapes[sizes]

    make_tensor = tl.tensor.__init__
    tl.block_type.__init__, tl.tensor.__init__ = block, tensor
