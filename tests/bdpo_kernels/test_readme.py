"""The README of the kernels names tests that exist, one or more for each defect of other kernels."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_each_defect_has_tests_and_each_named_test_exists():
    text = README.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (T\d+) \|.*?\|(.*)\|$", text, re.MULTILINE))
    assert list(rows) == [f"T{number}" for number in range(1, 19)]
    there = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    for defect, tests in rows.items():
        names = re.findall(r"(?:test|in)_[a-z0-9_]{20,}", tests) or re.findall(r"test_\w+\.py", tests)
        assert names, defect
        for name in names:
            assert f"{name}(" in there or f"def {name}" in there or list(TESTS.rglob(name)) or f"_{name}(" in there, (
                name
            )
    for path in re.findall(r"`(tests/[\w/]+\.py)", text):
        assert (TESTS.parent / path).exists(), path
