"""The pages: their links lead somewhere on GitHub and on the site, and the API reference has every module."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def site():
    """The hook that makes the site; it needs mkdocs only while the site is built."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / ".ci" / "docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(text):
    """The anchors that GitHub and mkdocs give to headings of plain words."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_between_files_lead_somewhere(site):
    pages = [*PAGES, *(ROOT / path for path in site.outside() if path.endswith(".md"))]
    found = {page: site.links(page) for page in pages}
    assert sum(map(len, found.values())) > 30
    broken = [(page.name, path) for page, paths in found.items() for path in paths if not (ROOT / path).is_file()]
    assert not broken


def test_links_to_headings_lead_to_one():
    for page in PAGES:
        for path, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
            target = page.parent / path if path else page
            assert anchor in anchors(target.read_text(encoding="utf-8")), (page.name, anchor)


def test_broken_link_is_seen(site, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "a.md"
    page.write_text('[b](b.md#there) ![c](../c.png "title") [d](https://d/e) [f](#g)\n```\n[not](one.md)\n```\n')
    assert site.links(page) == ["docs/b.md", "c.png"]


@pytest.mark.parametrize(
    ("page", "target", "moved"),
    [
        ("benchmarks.md", "study.md#b", "study.md#b"),
        ("benchmarks.md", "../benchmarks/results/d.json", "repository/benchmarks/results/d.json"),
        ("index.md", "docs/data.md", "data.md"),
        ("index.md", "CONTRIBUTING.md", "repository/CONTRIBUTING.md"),
        ("index.md", "https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
        ("repository/CONTRIBUTING.md", "docs/data.md#b", "../data.md#b"),
        ("repository/CONTRIBUTING.md", "README.md", "../index.md"),
    ],
)
def test_links_are_moved_with_the_files(site, page, target, moved):
    given = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert site.on_page_markdown(f"See [this]({target}).", given) == f"See [this]({moved})."


def test_navigation_lists_every_page(site):
    listed = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().split("nav:")[1])
    hidden = {"study_reading.md", "study_real_results_reading.md"}
    assert sorted(listed) == sorted({site.place(page.relative_to(ROOT).as_posix()) for page in PAGES} - hidden)


def test_reference_has_every_module(site):
    shown = re.findall(r"^::: (\S+)$", "\n".join(site.api_pages().values()), re.MULTILINE)
    assert sorted(shown) == sorted(site.modules())
    assert {"bdpo_pl", "bdpo_pl.losses.balanced_dpo", "bdpo_kernels.rows.torch"} <= set(shown)
    names = set(site.public_names(ROOT / "bdpo_pl" / "losses" / "base.py"))
    assert {"TIE", "PreferenceLoss", "PreferenceLoss.weights"} <= names
