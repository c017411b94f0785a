"""Faults planted in a copy of the kernels, which the harness must find.

Each is a change to the syntax tree of every kernel, so it does not depend on what the kernels look like today.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _jitted(tree: ast.Module) -> list[ast.FunctionDef]:
    """Return the kernels of a module and the functions that they call."""
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [node for node in found if any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list)]


def _statements(text: str) -> list[ast.stmt]:
    return ast.parse(text).body


def numpy_in_a_kernel(kernel: ast.FunctionDef) -> None:
    """Call NumPy: it runs in the interpreter and does not compile."""
    kernel.body[1:1] = _statements("_extra = numpy.exp(tl.program_id(0) * 1.0)")


def variable_changes_type(kernel: ast.FunctionDef) -> None:
    """Let a loop turn an integer into a float: it runs in the interpreter and does not compile."""

    class Loops(ast.NodeTransformer):
        def visit_For(self, node: ast.For) -> list[ast.stmt]:
            node.body += _statements("_carried = _carried + 0.5")
            return [*_statements("_carried = 0"), node]

    Loops().visit(kernel)


def row_starts_one_late(kernel: ast.FunctionDef) -> None:
    """Address the logits one element late: no access is aligned."""
    first = kernel.args.args[0].arg

    class Addresses(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.parse(f"({first} + 1)", mode="eval").body if node.id == first else node

    kernel.body = [Addresses().visit(statement) for statement in kernel.body]


def reads_twice(kernel: ast.FunctionDef) -> None:
    """Load the row a second time, past the first-level cache."""

    class Loads(ast.NodeTransformer):
        def visit_Assign(self, node: ast.Assign) -> list[ast.stmt] | ast.Assign:
            loads = [call for call in ast.walk(node.value) if isinstance(call, ast.Call)]
            loads = [call for call in loads if ast.unparse(call.func) == "tl.load"]
            target = ast.unparse(node.targets[0])
            if len(loads) != 1 or not ast.unparse(node.value).endswith(".to(ACC)"):
                return node
            again = ast.Call(loads[0].func, loads[0].args, [*loads[0].keywords])
            again.keywords.append(ast.keyword("cache_modifier", ast.Constant(".cg")))
            more = f"{target} = tl.maximum({target}, {ast.unparse(again)}.to(ACC))"
            return [node, *_statements(more)]

    Loads().visit(kernel)


def blocks_of_eight(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Launch with blocks eight times as large: their registers spill."""
    sizes = [name for name, value in kwargs.items() if isinstance(value, int) and not isinstance(value, bool)]
    largest = max((name for name in sizes if name.isupper()), key=lambda name: kwargs[name])
    return kwargs | {largest: 8 * kwargs[largest]}


IN_THE_SOURCE: dict[str, Callable[[ast.FunctionDef], None]] = {
    "numpy_in_a_kernel": numpy_in_a_kernel,
    "variable_changes_type": variable_changes_type,
    "row_starts_one_late": row_starts_one_late,
    "reads_twice": reads_twice,
}


def plant(package: Path, fault: str, folder: Path) -> Path:
    """Copy `package` into `folder` with `fault` in each of its kernels; return the folder to import it from."""
    copy = folder / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if functions := _jitted(tree):
            for function in functions:
                # A row's address is taken in the kernels, which alone know where rows begin.
                if fault != "row_starts_one_late" or not function.name.startswith("_"):
                    IN_THE_SOURCE[fault](function)
            after_future = next(i for i, node in enumerate(tree.body) if isinstance(node, ast.Import))
            tree.body[after_future:after_future] = _statements("import numpy")
            path.write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")
    return folder
