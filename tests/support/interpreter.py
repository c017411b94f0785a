"""Triton's interpreter, without what it does again at each call.

A launch replaces the functions of `triton.language` by interpreted ones. The interpreter looks for them anew in every
launch, and at every call of a helper within it: half of the time of a small kernel. NumPy's type of a tensor it looks
up in a table that it makes anew for each operation.
"""

import inspect

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
