"""Every command that a page, a configuration or a README names is there, with the options and files it is given."""

import re
import shlex
from pathlib import Path

import pytest

from bdpo_pl.cli import aliases, known

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").iterdir()),
    *(ROOT / folder / "README.md" for folder in ("kernels", "benchmarks", "examples")),
]  # fmt: skip
# Pages that also speak of options that are gone, or of other programs.
HISTORY = {"CHANGELOG.md"}
STARTS = ("python -m ", "bdpo ", "make ", "pytest ", "srun python ", "torchrun ", "--")
# Programs of others, and options of theirs.
FOREIGN = ("pytest", "pip")
FOREIGN_OPTIONS = {"chat-template"}  # vLLM


def commands(text):
    """Commands of code blocks, of comments and of inline code, each in one line."""
    joined = re.sub(r" \\\n[ #]*", " ", text)
    yield from (
        line.strip() for line in re.findall(r"^#?\s*((?:python -m|srun python|torchrun|bdpo|make) .*)$", joined, re.M)
    )
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        line = " ".join(code.split())
        if line.startswith(STARTS):
            yield line


def sources(module):
    """Text of a module and of its package's __main__; empty for one that is not ours."""
    path = ROOT / module.replace(".", "/")
    return "".join(p.read_text(encoding="utf-8") for p in (path.with_suffix(".py"), path / "__main__.py") if p.exists())


def complaint(line):
    """What is wrong with a command; None where nothing is."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        return None if re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M) else "no such target"
    missing = [
        w for w in words if re.fullmatch(r"(configs|tests|examples|docs)/[\w./]+", w) and not (ROOT / w).exists()
    ]
    if missing:
        return f"no file {missing}"
    if words[0] == "torchrun":
        # What stands before the module is torchrun's.
        words = words[words.index("-m") :]
    options = [word.partition("=")[0][2:].removesuffix("+") for word in words if re.match(r"--[a-z]", word)]
    options = [option for option in options if not option.endswith(".") and option not in FOREIGN_OPTIONS]
    if words[0].startswith("--"):
        found = [name for name in options if not any(takes(command, name) for command in ("fit", "evaluate"))]
        found = [name for name in found if f'"--{name}"' not in _ALL_SOURCES]
        return f"no option {found}" if found else None
    if words[0] == "bdpo":
        name = words[1].split("|")[0]
        module = f"bdpo_pl.{name}"
    else:
        module = words[words.index("-m") + 1] if "-m" in words else words[0]
    if module in FOREIGN:
        return None
    text = sources(module)
    if not text:
        return f"no module {module}"
    command = module.removeprefix("bdpo_pl.")
    if command in known.read():
        found = [name for name in options if not takes(command, name)]
    else:
        text += sources("bdpo_pl.cli.aligning") if command == "align" else ""
        found = [name for name in options if f'"--{name}"' not in text]
    return f"no option {found}" if found else None


def takes(command, name):
    """Whether a command has an option: one of its own, a short spelling, or one of a class that is chosen by name."""
    table = known.read()[command]
    short = {*aliases.SHORT, *aliases.CHOSEN, "use_peft"} if command != "evaluate" else {"judge.kind"}
    names = {*table["options"], *short, "help", "help_all", "print_config"}
    return name in names or name.startswith(tuple(f"{prefix}." for prefix in table["open"]))


_ALL_SOURCES = "".join(
    path.read_text(encoding="utf-8")
    for folder in ("benchmarks", "bdpo_pl/cli", "tests/soak")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_commands_of_the_pages_are_there(page):
    wrong = {line: complaint(line) for line in commands(page.read_text(encoding="utf-8"))}
    assert not {line: why for line, why in wrong.items() if why}


def test_many_commands_are_read():
    lines = [line for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]
    assert len(lines) > 200
    assert sum("bdpo_pl." in line for line in lines) > 20


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("make everything", "target"),
        ("python -m bdpo_pl.fits", "module"),
        ("python -m bdpo_pl.fit --data.trian a.jsonl", "data.trian"),
        ("python -m bdpo_pl.evaluate --judge.kind phrases --lr 1", "'lr'"),
        ("python -m bdpo_pl.fit --config configs/none.yaml", "configs/none.yaml"),
        ("python -m benchmarks.kernels --fast", "fast"),
        ("bdpo alin MODEL", "module"),
        ("--data.nothing", "data.nothing"),
    ],
)
def test_stale_command_is_seen(line, why):
    assert why in complaint(line)
