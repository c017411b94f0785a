"""The import order of the packages, ground floor first: a file imports from its own floor or from floors below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    "errors", "console", "files", "reviewing", "statistics", "comprehension", "losses", "data", "reporting",
    "refusals", "models", "parallel", "forward", "embedded", "scoring", "diagnosis", "evaluation", "training",
    "cli", "fit", "diagnose", "evaluate", "align", "review", "__main__", "module",
]  # fmt: skip


_LARGEST = 400
_LARGEST_OF = {"bdpo_pl.training.module": 350}
_MOST_ANY = 26
_STILL_LARGE: set[str] = set()
_STILL_ALIKE: set[tuple[str, str]] = set()


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    root = ROOT / "kernels" if package == "bdpo_kernels" else ROOT
    files = (root / package).rglob("*.py")
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(path: Path, known: set[str]) -> Iterator[str]:
    """Modules of this project that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known or node.module in known:
                    yield inner if inner in known else node.module


def graph(package: str) -> dict[str, set[str]]:
    found = modules(package)
    return {name: set(imports(path, set(found))) - {name} for name, path in found.items()}


def test_no_test_file_is_larger_than_a_module_may_be():
    sizes = {f.relative_to(ROOT): len(f.read_text().splitlines()) for f in (ROOT / "tests").rglob("*.py")}
    assert not {str(name): size for name, size in sizes.items() if size > _LARGEST}


def test_every_wing_stands_on_a_floor():
    wings = {name.split(".")[1] for name in modules("bdpo_pl") if "." in name}
    assert wings <= set(FLOORS), "give the new folder or file its place in FLOORS"


def test_nothing_imports_upwards():
    upward = [
        f"{name} -> {other}"
        for name, others in graph("bdpo_pl").items()
        for other in others
        if "." in name and "." in other and FLOORS.index(other.split(".")[1]) > FLOORS.index(name.split(".")[1])
    ]
    assert not upward


def test_no_circle():
    rest = graph("bdpo_pl")
    while free := [name for name, others in rest.items() if not others & rest.keys()]:
        for name in free:
            del rest[name]
    assert not rest, "these import each other"


def test_kernels_import_nothing_of_the_rest():
    named = [node for path in modules("bdpo_kernels").values() for node in ast.walk(ast.parse(path.read_text()))]
    roots = {node.module.split(".")[0] for node in named if isinstance(node, ast.ImportFrom) and node.module}
    assert not roots & {"bdpo_pl", "benchmarks", "lightning", "transformers"}


@pytest.mark.parametrize("package", ["bdpo_pl", "bdpo_kernels"])
def test_files_stay_small(package):
    sizes = {name: len(path.read_text().splitlines()) for name, path in modules(package).items()}
    assert {n for n, size in sizes.items() if size > _LARGEST_OF.get(n, _LARGEST)} <= _STILL_LARGE


def test_parameters_have_types():
    """`Any` lets a misspelled attribute pass; name what is read: see `TokenizerLike`, `CausalLM`, or take `object`."""
    untyped = [
        f"{name}:{node.lineno} {node.name}({argument.arg})"
        for package in ("bdpo_pl", "bdpo_kernels")
        for name, path in modules(package).items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for argument in ast.walk(node.args)
        if isinstance(argument, ast.arg) and argument.annotation is not None
        if ast.unparse(argument.annotation) in ("Any", "Any | None", "Optional[Any]")
    ]
    assert len(untyped) <= _MOST_ANY, untyped


def test_one_name_a_wing():
    """Two files of one name in a wing send a reader to the wrong one."""
    names = [tuple(name.split(".")[1:]) for name in modules("bdpo_pl")]
    seen: dict[tuple[str, str], list[str]] = {}
    for parts in names:
        if len(parts) > 1:
            seen.setdefault((parts[0], parts[-1]), []).append(".".join(parts))
    assert {key: where for key, where in seen.items() if len(where) > 1}.keys() <= _STILL_ALIKE
