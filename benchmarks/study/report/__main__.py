"""The study's page: `python -m benchmarks.study.report RECORDS.jsonl [--out docs/study.md] [--no-figures]`.

The prose is in `page.md.j2`; tables, and sentences that follow from them by rule, are made from the records. A person's
conclusions are in a file beside the page (`docs/study_reading.md`), which the page includes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bdpo_pl.errors import InputError
from benchmarks import pages
from benchmarks.study.report import facts
from benchmarks.study.report.figures import draw_all
from benchmarks.study.report.laboratory import laboratory
from benchmarks.study.report.results import Results, load

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "study.md"


def page(results: Results, reading: str = "", figures: str = "study") -> str:
    """Return the whole page.

    Args:
        results: results of the study.
        reading: a person's interpretation, in Markdown; empty: none.
        figures: folder of the figures, relative to the page.
    """
    return pages.render(
        Path(__file__).with_name("page.md.j2"),
        name=results.name,
        reading=reading.strip(),
        figure=lambda name: facts.figure(name, figures, results),
        claims=facts.claims(results),
        methods=facts.methods(results),
        ablation=facts.ablation(results),
        imbalance=facts.imbalance(results),
        halves=facts.halves(results),
        curves=facts.curves(results),
        sensitivity=facts.sensitivity(results),
        confirmation=facts.confirmation(results),
        choices=facts.choices(results),
        **laboratory(results),
    )


def reading_of(path: Path) -> Path:
    """Return the file beside the page at `path` that contains a person's interpretation."""
    return path.with_name(f"{path.stem}_reading.md")


def read_reading(path: Path) -> str:
    """Return the person's interpretation for the page at `path`; empty if there is none."""
    reading = reading_of(path)
    return reading.read_text(encoding="utf-8") if reading.exists() else ""


def write(records: Path, out: Path, with_figures: bool = True) -> list[Path]:
    """Write the page and its figures.

    Args:
        records: records of the study.
        out: path of the page; its figures go to a folder of the same name beside it.
        with_figures: whether to draw them too, which needs matplotlib.

    Returns:
        Paths of the written files.
    """
    results = load(records, name_of(records))
    text = page(results, read_reading(out), out.stem)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    folder = out.with_suffix("")
    return [out, *(folder / name for name in draw_all(results, folder))] if with_figures else [out]


def name_of(records: Path) -> str:
    """Return the path from the root of the repository, so that the page does not depend on the root's location."""
    path = records.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else records.name


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="JSONL that `python -m benchmarks.study` has written")
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--no-figures", action="store_true", help="leave the figures as they are; needs no matplotlib")
    options = parser.parse_args()
    try:
        written = write(options.records, options.out, not options.no_figures)
    except InputError as error:
        raise SystemExit(str(error)) from None
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise SystemExit('figures need matplotlib: pip install -e ".[bench]", or give --no-figures') from None
    print("Written:", *written, sep="\n  ")


if __name__ == "__main__":
    main()
