"""Hook of mkdocs: the README as the first page, the repository's other files, and an API reference made from the code.

Pages are written for readers on GitHub, so their links are paths in the repository. One rule makes them work on the
site as well: `docs/X` is the page X, `README.md` is the first page, and any other file that a page links to is copied
to `repository/`, Markdown as a page. The API reference has a page for each folder of the packages, and the build fails
if a public name is missing from it.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HOME = "README.md"
PACKAGES = {"bdpo_pl": ROOT, "bdpo_kernels": ROOT / "kernels"}

# Group 1 is the target of a link or image, up to its anchor; targets with a scheme are not links to files.
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(?=[)#\s])")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def links(path: Path) -> list[str]:
    """Return the paths in the repository that a Markdown file links to; code blocks have no links."""
    folder = path.parent.relative_to(ROOT).as_posix()
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    return [posixpath.normpath(posixpath.join(folder, target)) for target in LINK.findall(text)]


def place(path: str) -> str:
    """Return the place in the site of a file of the repository."""
    if path == HOME:
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def outside() -> list[str]:
    """Return the files outside `docs/` that the pages link to, directly or through one another."""
    found: dict[str, None] = {}
    waiting = [HOME, *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md")))]
    while waiting:
        for target in links(ROOT / waiting.pop()):
            if not target.startswith(("docs/", HOME)) and target not in found and (ROOT / target).is_file():
                found[target] = None
                if target.endswith(".md"):
                    waiting.append(target)
    return list(found)


def modules() -> dict[str, Path]:
    """Return every public module of the packages, by its dotted name."""
    found = {}
    for package, root in PACKAGES.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if path.name != "__main__.py":
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


def public_names(path: Path) -> Iterator[str]:
    """Yield the public names that a module defines, and the public methods of its classes."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in filter(_is_public, _defined(node)):
            yield name
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and _is_public(inner.name):
                    yield f"{name}.{inner.name}"


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def api_pages() -> dict[str, str]:
    """Return the pages of the API reference, by their place in the site: one for each folder of the packages."""
    folders: dict[str, list[str]] = {}
    for name, path in modules().items():
        root = PACKAGES[name.split(".")[0]]
        folders.setdefault(".".join(path.parent.relative_to(root).parts), []).append(name)
    return {
        f"api/{folder}.md": f"# {folder}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"
        for folder, names in folders.items()
    }


def on_config(config: Any) -> Any:
    """Add the API reference and the repository's own pages to the navigation."""
    config["nav"].append({"API reference": [{Path(page).stem: page} for page in api_pages()]})
    config["nav"].append({"Repository": [place(path) for path in outside() if path.endswith(".md")]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in `docs/`."""
    from mkdocs.structure.files import File

    for path in (HOME, *outside()):
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    for page, content in api_pages().items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between places in the site."""
    here = page.file.src_uri
    own = {place(path): path for path in (HOME, *outside())}.get(here, f"docs/{here}")
    if here.startswith("api/"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(own), match[1]))
        return f"]({posixpath.relpath(place(target), posixpath.dirname(here) or '.')}"

    return LINK.sub(moved, markdown)


def on_post_build(config: Any) -> None:
    """Check that the API reference shows every public name.

    Raises:
        PluginError: names are missing.
    """
    from mkdocs.exceptions import PluginError

    site = Path(config["site_dir"])
    shown = {name for page in site.glob("api/*/index.html") for name in re.findall(r'id="([\w.]+)"', page.read_text())}
    wanted = {f"{module}.{name}" for module, path in modules().items() for name in public_names(path)}
    if missing := sorted(wanted - shown):
        raise PluginError(f"the API reference lacks {len(missing)} public names: {', '.join(missing[:10])}")
