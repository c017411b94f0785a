"""The results' page: `python -m benchmarks.study.real.report RECORDS.jsonl [--confirmation FILE] [--imbalance FILE …]`.

The question, the cells and the rule of the answer were registered in `docs/study_real.md`. Here they are applied: every
number and every sentence that depends on one is made from the records. A person's conclusions are in a file beside the
page (`docs/study_real_results_reading.md`), which the page includes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bdpo_pl.errors import InputError
from benchmarks import pages
from benchmarks.study.real import results as real
from benchmarks.study.real import rules
from benchmarks.study.real.plan import CONFIRMED, HALVES, METHODS, SEEDS
from benchmarks.study.report.__main__ import ROOT, name_of, read_reading
from benchmarks.study.report.figures import COLOURS, INK, Figures, draw_all, label_rows, methods_figure, panels
from benchmarks.study.report.results import Results
from benchmarks.study.report.statistics import Interval
from benchmarks.study.report.tables import MISSING, contrast, difference_text, differences, means, number, table
from benchmarks.study.run.imbalance import STRONG_RATIO, TAUS

PAGE = ROOT / "docs" / "study_real_results.md"
_SETS = {"hh": "HH-RLHF", "refusals": "refusal against compliance"}
_DIGITS = {"pmi": 2, "pmi_sum": 1, "ifd": 3, "hsic": 3}


def page(
    results: Results,
    imbalance: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    reading: str = "",
    figures: str = "study_real_results",
    second: Results | None = None,
) -> str:
    """Return the whole page.

    Args:
        results: results of the study.
        imbalance: results of `python -m benchmarks.study.real.imbalance` by file; none: no such section.
        reading: a person's interpretation, in Markdown; empty: none.
        figures: folder of the figures, relative to the page.
        second: results of the confirmation on a second model; None: no such section.
    """
    measured = _rows(imbalance)
    drawn = {name: said for name, (said, has, _) in _figures(measured).items() if has(results)}
    methods = results.methods("final", list(METHODS))
    groups = [*(["reference"] if results.pick("final", "reference") else []), *methods]
    others = [method for method in methods if method not in (real.BDPO, real.DPO)]
    return pages.render(
        Path(__file__).with_name("results.md.j2"),
        name=results.name,
        command=_command(results, imbalance, second),
        reading=reading.strip(),
        progress=real.progress(results),
        answer=rules.answer(results),
        temperature=rules.default_temperature(results),
        primary=primary(results),
        methods=means(results, [real.group(name) for name in groups], real.OUTCOMES) if methods else "",
        exploration=differences(results, [real.against(real.BDPO, name) for name in others], real.OUTCOMES).text
        if others
        else "",
        margins=means(results, [real.group(name) for name in methods], real.MARGINS) if methods else "",
        margin_differences=differences(
            results, [real.against(real.BDPO, name) for name in methods if name != real.BDPO], real.MARGINS
        ).text
        if others
        else "",
        limits=rules.bounds(results).values(),
        halves=halves(results),
        confirmation=None if second is None else confirmation(second),
        trials=trials(results),
        figures={name: f"![{said}]({figures}/{name})" for name, said in drawn.items()},
        hours=sum(cell["seconds"] for cell in results.cells) / 3600,
        machines=sorted({head["machine"]["device"] for head in results.heads}),
        versions=sorted({version for head in results.heads for version in _versions(head)}),
        imbalance=imbalance_table(measured) if measured else "",
        agreement=agreement_table(measured),
        temperatures=temperature_table(measured),
        categories=category_table(measured),
        imbalance_commands=[" ".join(one["command"]) for one in imbalance.values()],
    )


def _command(results: Results, imbalance: Mapping[str, Any], second: Results | None) -> str:
    """Return the command that makes the page, with all of its files."""
    parts = [f"python -m benchmarks.study.real.report {results.name}"]
    if second is not None:
        parts.append(f"--confirmation {second.name}")
    if imbalance:
        parts.append(" ".join(["--imbalance", *imbalance]))
    return " \\\n    ".join(parts)


def _rows(imbalance: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for one in imbalance.values() for row in one["rows"]]


def primary(results: Results) -> str:
    """Return the table of the four registered differences, B-DPO − DPO."""
    found = rules.answer(results)
    rows = []
    for measure in real.OUTCOMES:
        one, p = found.found[measure.name], found.adjusted[measure.name]
        unit = "points" if measure.percent else "nats"
        rows.append(
            [
                f"{measure.head}, {unit}" if measure.percent else measure.head,
                difference_text(one, measure.digits, p),
                MISSING if math.isnan(p) else f"{p:.3f}",
                _half_width(one, measure.digits),
            ]
        )
    head = ["B-DPO − DPO", "difference [95 % interval]", "p after Holm", "half width"]
    return table(head, rows)


def _half_width(found: Interval, digits: int) -> str:
    return MISSING if math.isnan(found.half) else number(found.half, digits)


def halves(results: Results) -> dict[str, Any] | None:
    """Return tables of DPO on the two halves, and how alike these are; None if no such cell is finished."""
    found = results.pick("halves")
    if not found:
        return None
    balanced, imbalanced = (real.half(name) for name in HALVES)
    compared = differences(results, [contrast(imbalanced, balanced)], real.PAIR_OUTCOMES)
    verdict, gap = rules.observation(results)
    return {
        "means": means(results, [balanced, imbalanced], real.PAIR_OUTCOMES),
        "differences": compared.text,
        "verdict": verdict,
        "half_width": _half_width(gap, 2),
        "alike": {name: number(value, 2) for name, value in found[0]["halves"].items()},
    }


def confirmation(second: Results) -> dict[str, Any]:
    """Return tables of DPO and B-DPO on a second model, and whether they confirm the first one's answer."""
    groups = [real.confirmed(method) for method in CONFIRMED]
    compared = contrast(real.confirmed(real.BDPO), real.confirmed(real.DPO))
    measures = (*real.PAIR_OUTCOMES, real.MARGINS[-1])
    verdict, gap = rules.confirmation(second)
    differing = differences(second, [compared], measures).text
    return {
        "name": second.name,
        "seeds": (gap.count, len(SEEDS)),
        "means": means(second, groups, measures),
        # Of a few seeds none is called significant.
        "differences": differing.replace("**", "") if verdict == "not finished" else differing,
        "verdict": verdict,
        "hours": sum(cell["seconds"] for cell in second.cells) / 3600,
    }


def trials(results: Results) -> str:
    """Return the table of the trials: what each measured on the validation pairs, the chosen ones bold."""
    rows = []
    for cell, record, is_chosen in real.trials(results):
        row = [cell.method, f"{cell.arguments['beta']:g}", f"{cell.learning_rate:g}"]
        if record is None:
            rows.append([*row, *[MISSING] * 4])
            continue
        pairs = record["pairs"]
        row += [
            f"{100 * pairs['held_out/logp_accuracy']:.1f}",
            *(number(pairs[name], 2) for name in ("held_out/drift_chosen", "held_out/margin", "gap/margin")),
        ]
        rows.append([f"**{word}**" for word in row] if is_chosen else row)
    head = ["method", "β", "learning rate", "ranked right, %", "drift of the chosen, nats", "margin, nats", "gap, nats"]
    return table(head, rows)


def imbalance_table(rows: list[dict[str, Any]]) -> str:
    """Return a row for each model, set of pairs and estimator."""
    lines = []
    for row in rows:
        if "estimator" not in row:
            continue
        bias = row["length_bias"]["correlation_imbalance"]
        digits = _DIGITS[row["estimator"]]
        lines.append(
            [
                f"{row['model']}, {_SETS[row['set']]}",
                str(row["pairs"]),
                f"`{row['estimator']}`" + (f" ({row['unit']})" if row["unit"] else ""),
                *(number(row[side]["value"], digits) for side in ("chosen", "rejected")),
                _with_interval(row["imbalance"], digits),
                number(row["size"], digits),
                number(row["spread"], digits),
                MISSING if bias is None else number(bias, 2, sign=True),
            ]
        )
    head = [
        "model, pairs", "n", "estimator", "chosen", "rejected", "imbalance", "mean size", "spread (τ auto)",
        "with length",
    ]  # fmt: skip
    return table(head, lines)


def _with_interval(found: dict[str, float | None], digits: int) -> str:
    low, high = found["low"], found["high"]
    text = number(found["value"] or 0.0, digits, sign=True)
    # Few pairs have no interval.
    return text if low is None or high is None else f"{text} [{number(low, digits)}, {number(high, digits)}]"


def category_table(rows: list[dict[str, Any]]) -> str:
    """Return a row for each category of each model's and set's pairs, by `pmi`; empty if there are no categories."""
    lines = [
        [
            f"{row['model']}, {_SETS[row['set']]}",
            f"`{group['name']}`",
            str(group["pairs"]),
            *(number(group[side]["value"], 2) for side in ("chosen", "rejected")),
            _with_interval(group["imbalance"], 2),
            number(group["size"], 2),
            # A single pair has no spread.
            MISSING if group["spread"] is None else number(group["spread"], 2),
        ]
        for row in _by_pmi(rows)
        for group in sorted(row["categories"], key=lambda group: group["name"])
    ]
    head = ["model, pairs", "category", "n", "chosen", "rejected", "imbalance", "mean size", "spread"]
    return table(head, lines) if lines else ""


def _by_pmi(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("estimator") == "pmi"]


def agreement_table(rows: list[dict[str, Any]]) -> str:
    """Return for each pair of estimators how far they agree, a column for each model and set."""
    compared = [row for row in rows if "agreement" in row]
    if not compared:
        return ""
    lines = []
    for i, one in enumerate(compared[0]["agreement"]):
        cells = []
        for row in compared:
            found = row["agreement"][i]
            rank = MISSING if found["spearman"] is None else number(found["spearman"], 2)
            cells.append(f"{rank}; {100 * found['same_sign']:.0f} %")
        lines.append([" and ".join(f"`{name}`" for name in one["estimators"]), *cells])
    return table(["estimators", *(f"{row['model']}, {_SETS[row['set']]}" for row in compared)], lines)


def temperature_table(rows: list[dict[str, Any]]) -> str:
    """Return what several τ make of the imbalance by `pmi`: ratio of the larger weight to the smaller."""
    lines = [
        (f"{row['model']}, {_SETS[row['set']]}", *(f"{one[name]:.2g}" for name in ("tau", "median", "p95", "largest")))
        for row in _by_pmi(rows)
        for one in row["temperatures"]
    ]
    # The suggested τ and the one of `auto` are often the same to these digits.
    lines = list(dict.fromkeys(lines))
    return table(["model, pairs", "τ", "median", "95 %", "largest"], lines)


def sizes(row: Mapping[str, Any]) -> list[float]:
    """Return median, 95 % and largest |imbalance| of a row's pairs: a weight ratio is e to |imbalance| / τ."""
    one = row["temperatures"][0]
    return [one["tau"] * math.log(one[name]) for name in ("median", "p95", "largest")]


def imbalance_figure(rows: list[dict[str, Any]]) -> Any:
    """Plot the imbalance by `pmi`: its mean with the interval, and quantiles of its size."""
    shown = _by_pmi(rows)
    figure, axes = panels(1, 2, 3.7, 0.9 + 0.32 * len(shown))
    means, quantiles = axes[0]
    for at, row in enumerate(shown):
        mean, low, high = (row["imbalance"][name] for name in ("value", "low", "high"))
        if low is not None:
            means.plot([low, high], [at, at], color=INK, linewidth=1.5)
        means.plot([mean], [at], "o", color=INK, markersize=4)
        median, p95, largest = sizes(row)
        quantiles.plot([0, p95], [at, at], color=INK, linewidth=1)
        quantiles.plot([0, median], [at, at], color=COLOURS[real.BDPO], linewidth=7, solid_capstyle="butt")
        quantiles.plot([largest], [at], "o", color=INK, markersize=3)
    means.axvline(0, color=INK, linestyle=":", linewidth=0.8)
    quantiles.axvline(TAUS[0] * math.log(STRONG_RATIO), color=INK, linestyle="--", linewidth=0.8)
    means.set_xlabel("chosen − rejected, nats per token", fontsize=8)
    quantiles.set_xlabel("|chosen − rejected|, nats per token", fontsize=8)
    label_rows(means, [f"{row['model']},\n{_SETS[row['set']]}" for row in shown], len(shown))
    label_rows(quantiles, None, len(shown))
    return figure


def _figures(rows: list[dict[str, Any]]) -> Figures:
    """Return the page's figures; `rows` are the measured imbalances."""
    return {
        "methods.svg": (
            "Every method's mean with its 95 % interval, its seeds as faint dots; a dotted line: before training",
            lambda results: bool(results.methods("final", [])),
            partial(methods_figure, measures=real.OUTCOMES, order=tuple(METHODS)),
        ),
        "imbalance.svg": (
            "Imbalance of the pairs by `pmi`. Left: its mean with a 95 % interval. Right: its size; median (bar), 95 % "
            f"(line) and largest (dot); beyond the dashed line a pair is strongly re-weighted at τ {TAUS[0]:g}",
            lambda results: bool(_by_pmi(rows)),
            lambda results: imbalance_figure(rows),
        ),
    }


def _versions(head: dict[str, Any]) -> list[str]:
    versions = head["machine"]["versions"]
    return [f"{name} {versions[name]}" for name in ("torch", "transformers", "lightning") if name in versions]


def write(
    records: Path,
    out: Path,
    imbalance: Sequence[Path] = (),
    with_figures: bool = True,
    second: Path | None = None,
) -> list[Path]:
    """Write the page and its figures; return the paths of the written files.

    Args:
        records: records of the study.
        out: path of the page; its figures go to a folder of the same name beside it.
        imbalance: files that `python -m benchmarks.study.real.imbalance` has written, if they are to be shown.
        with_figures: whether to draw the figures too, which needs matplotlib.
        second: records of the confirmation on a second model, if they are to be shown.
    """
    results = real.load_real(records, name_of(records))
    measured = {name_of(file): json.loads(file.read_text(encoding="utf-8")) for file in imbalance}
    out.parent.mkdir(parents=True, exist_ok=True)
    confirming = None if second is None else real.load_real(second, name_of(second))
    out.write_text(page(results, measured, read_reading(out), out.stem, confirming), encoding="utf-8")
    if not with_figures:
        return [out]
    folder = out.with_suffix("")
    return [out, *(folder / name for name in draw_all(results, folder, _figures(_rows(measured))))]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="JSONL that `python -m benchmarks.study.real` has written")
    parser.add_argument(
        "--imbalance", type=Path, nargs="+", default=[], help="files that `benchmarks.study.real.imbalance` has written"
    )
    parser.add_argument("--confirmation", type=Path, help="records of a second model, by `--settings RECORDS`")
    parser.add_argument("--out", type=Path, default=PAGE, help="path of the page")
    parser.add_argument("--no-figures", action="store_true", help="leave the figures as they are; needs no matplotlib")
    options = parser.parse_args(arguments)
    try:
        written = write(options.records, options.out, options.imbalance, not options.no_figures, options.confirmation)
    except InputError as error:
        raise SystemExit(str(error)) from None
    print("Written:", *written, sep="\n  ")


if __name__ == "__main__":
    main()
