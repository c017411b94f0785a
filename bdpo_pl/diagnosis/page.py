"""The diagnosis as an HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bdpo_pl.data.held_out import called
from bdpo_pl.diagnosis.estimators import MEANINGS
from bdpo_pl.diagnosis.findings import find
from bdpo_pl.diagnosis.measures import Group, Measured
from bdpo_pl.diagnosis.results import TEXTS_WARNING, Diagnosis, Places, SplitDiagnosis
from bdpo_pl.reporting import Cell, Estimate, Line, Page, Section, Table, bar_chart, histogram, line_chart, scatter
from bdpo_pl.reporting.format import fixed, general, mean_text, percent, ratio, signed, whole
from bdpo_pl.statistics import Interval

_MOST_LISTED = 50
_MOST_CATEGORIES = 30
_HOW_TO_READ = (
    "Imbalance is the comprehension of the chosen response minus that of the rejected one. The B-DPO paper "
    "(arXiv:2603.22829) finds that the larger it is in the training pairs, the less safe the trained model.",
    "B-DPO gives the better comprehended response of a pair the smaller weight. Estimator, weights and scaling factor "
    "are this project's reconstruction: the paper's own formulas could not be read.",
    "Intervals are ± 1.96 standard errors of a mean, with every pair taken as independent, and left out for groups of "
    "fewer than 10 pairs.",
    "Pairs are compared as tokens, after chat template and truncation. The texts of the data are not in this file "
    "unless a warning at its head says so.",
)


def build_page(diagnosis: Diagnosis, measured: Mapping[str, Measured]) -> Page:
    """Build the report; `measured` holds the numbers of the plots, by split."""
    page = Page(
        "Diagnosis before training", "How this model rates these preference pairs.", diagnosis.facts
    )  # fmt: skip
    if diagnosis.shows_texts:
        page.warn(TEXTS_WARNING)
    train = diagnosis.splits["train"]
    unit = f" {diagnosis.unit}" if diagnosis.unit else ""
    page.headline(percent(train.overall.strong), "of the training pairs re-weighted strongly")
    if train.overall.spread is not None:
        page.headline(
            fixed(train.overall.spread, 2), f"spread of the imbalance{unit and ','}{unit}: what tau auto takes"
        )
    page.headline(whole(len(train.swapped)), "pairs contradicted, sides swapped")
    leaks = diagnosis.leaks
    page.headline("–" if leaks is None else whole(len(leaks.prompts)), "held-out pairs with a training prompt")
    page.findings(find(diagnosis))
    _overview(page.section("Overview"), diagnosis)
    _comprehension(page.section("Comprehension and imbalance"), diagnosis, measured)
    _weights(page.section("Balance weights"), diagnosis, measured)
    _categories(page.section("Categories"), train)
    _lengths(page.section("Length"), diagnosis, measured["train"])
    _extremes(page.section("Most imbalanced pairs"), diagnosis, train)
    _consistency(page.section("Duplicates, contradictions and leaks"), diagnosis)
    page.section("How to read this").items([MEANINGS[diagnosis.estimator].explained("response"), *_HOW_TO_READ])
    return page


def _overview(section: Section, diagnosis: Diagnosis) -> None:
    splits = diagnosis.splits
    rows: list[list[Cell]] = [["pairs", *(s.overall.pairs for s in splits.values())]]
    for label, tell in (
        ("comprehension of the chosen", lambda g: mean_text(g.chosen)),
        ("comprehension of the rejected", lambda g: mean_text(g.rejected)),
        ("imbalance, chosen − rejected", lambda g: mean_text(g.imbalance)),
        (
            "spread of the imbalance (1.4826 × median absolute deviation)",
            lambda g: "–" if g.spread is None else fixed(g.spread, 3),
        ),
        ("size of the imbalance", lambda g: fixed(g.size, 3)),
        ("re-weighted strongly", lambda g: percent(g.strong)),
        ("strength on the chosen (DPO: 1)", lambda g: fixed(g.strength_chosen, 2)),
        ("strength on the rejected (DPO: 1)", lambda g: fixed(g.strength_rejected, 2)),
        ("tokens in a response", lambda g: fixed(g.tokens, 1)),
    ):
        rows.append([label, *(tell(s.overall) for s in splits.values())])
    ratios = [s.weight_ratio for s in splits.values()]
    told_ratios = [" / ".join(ratio(r[key]) for key in ("median", "p95", "max")) for r in ratios]
    rows.insert(7, ["larger weight over smaller: median / 95 % / max", *told_ratios])
    caption = "Means over pairs, ± their 95 % intervals" + (
        f"; comprehension in {diagnosis.unit}" if diagnosis.unit else ""
    )
    section.table(Table(["", *(called(name) for name in splits)], rows, caption))
    loaded: list[list[Cell]] = []
    for report in diagnosis.loading:
        loaded.append([f"{called(report.name)}: rows read", report.read])
        loaded += [[f"{called(report.name)}: dropped, {reason}", len(p)] for reason, p in report.dropped.items()]
        loaded += [[f"{called(report.name)}: {what}", value] for what, value in report.notes.items()]
    section.table(Table(["", ""], loaded, "What loading kept and dropped"))


def _comprehension(section: Section, diagnosis: Diagnosis, measured: Mapping[str, Measured]) -> None:
    unit = f", {diagnosis.unit}" if diagnosis.unit else ""
    train = measured["train"]
    section.figure(
        histogram(
            "Comprehension of training responses",
            {"chosen": train.comprehension[0], "rejected": train.comprehension[1]},
            MEANINGS[diagnosis.estimator].label(),
            unit="responses",
            caption="The farther apart the two, the more unequally the model comprehends the sides it will be taught.",
        )
    )
    marks, beyond = {"balanced": 0.0}, ""
    if diagnosis.strong_imbalance is not None:
        beyond = " Beyond the outer lines a pair is re-weighted strongly."
        marks = {"strong": -diagnosis.strong_imbalance, **marks, "strong ": diagnosis.strong_imbalance}
    section.figure(
        histogram(
            "Imbalance of pairs",
            {called(name): m.imbalance for name, m in measured.items()},
            f"comprehension of the chosen − of the rejected{unit}",
            marks=marks,
            caption=f"Right of zero the chosen response is the better comprehended one.{beyond}",
        )
    )


def _weights(section: Section, diagnosis: Diagnosis, measured: Mapping[str, Measured]) -> None:
    if diagnosis.weights_of:
        section.text(
            f"The loss of this configuration applies no balance weights. These are those of {diagnosis.weights_of}."
        )
    if diagnosis.temperatures:
        rows: list[list[Cell]] = [
            [_tau(row.tau, diagnosis), ratio(row.median), ratio(row.p95), ratio(row.largest)]
            for row in diagnosis.temperatures
        ]
        section.text(
            "With τ at the spread of the imbalance (`auto`) the typical pair has weights of about 2 to 1. Far below it "
            "the smaller side of most pairs is hardly trained; far above it B-DPO is nearly DPO."
        )
        caption = "What τ makes of the training pairs: larger weight over smaller"
        section.table(Table(["τ", "median", "95 % within", "largest"], rows, caption))
    section.figure(
        histogram(
            "Balance weight of the chosen response",
            {called(name): m.weights[0] for name, m in measured.items()},
            "share of the pair's weight that the chosen response gets",
            marks={"balanced": 0.5},
            caption="The rejected response gets the rest. The smaller share goes to the better comprehended side; the "
            "scaling factor restores the magnitude of the gradient.",
        )
    )


def _tau(tau: float, diagnosis: Diagnosis) -> str:
    marks = [word for word, value in (("in use", diagnosis.tau), ("auto", diagnosis.suggested_tau)) if tau == value]
    return general(tau) + (f" ({', '.join(marks)})" if marks else "")


def _categories(section: Section, split: SplitDiagnosis) -> None:
    if not split.categories:
        section.text("The pairs carry no category: a `category` column would group them here.")
        return
    shown = split.categories[:_MOST_CATEGORIES]
    rest = len(split.categories) - len(shown)
    if rest:
        section.text(f"The {len(shown)} most imbalanced categories; {rest} more are in the JSON file.")
    section.figure(
        bar_chart(
            "Imbalance by category",
            [g.name for g in shown],
            {"imbalance": [estimate(g.imbalance) for g in shown]},
            "mean of chosen − rejected, with 95 % intervals",
            caption="In the order of |imbalance|: pairs of both signs can cancel in the mean.",
        )
    )
    section.table(group_table("category", shown, "Training pairs by category, the most imbalanced first"))


def _lengths(section: Section, diagnosis: Diagnosis, measured: Measured) -> None:
    split, measure = diagnosis.splits["train"], MEANINGS[diagnosis.estimator].label()
    bias = split.length_bias
    section.table(
        Table(
            ["training pairs", ""],
            [
                ["chosen response longer", percent(bias.chosen_longer)],
                ["rejected response longer", percent(bias.rejected_longer)],
                ["tokens in a chosen response, mean", fixed(bias.mean_chosen, 1)],
                ["tokens in a rejected response, mean", fixed(bias.mean_rejected, 1)],
                ["correlation of comprehension and length, chosen", signed(bias.correlation_chosen)],
                ["correlation of comprehension and length, rejected", signed(bias.correlation_rejected)],
                ["correlation of imbalance and difference in length", signed(bias.correlation_imbalance)],
            ],
            "Length bias; correlations are Spearman's",
        )
    )
    sides = dict(zip(("chosen", "rejected"), zip(measured.lengths, measured.comprehension, strict=True), strict=True))
    section.figure(scatter("Length against comprehension", sides, "tokens in the response", measure))
    if len(split.lengths) > 1:
        section.figure(
            line_chart(
                "Comprehension by length of a pair's responses",
                {
                    "chosen": _line(split.lengths, [g.chosen for g in split.lengths]),
                    "rejected": _line(split.lengths, [g.rejected for g in split.lengths]),
                },
                "mean tokens in a response",
                measure,
                caption="Means of groups of about equal size"
                + (", with 95 % intervals." if _have_intervals(split.lengths) else "; too few pairs for intervals."),
            )
        )
    section.table(group_table("tokens", split.lengths, "Training pairs by mean length of their responses"))


def _extremes(section: Section, diagnosis: Diagnosis, split: SplitDiagnosis) -> None:
    if not diagnosis.shows_texts:
        section.text("Texts are left out; --diagnose.show_texts true includes them.")
    for lines, caption in (
        (split.highest, "Chosen comprehended much better than rejected"),
        (split.lowest, "Rejected comprehended much better than chosen"),
    ):
        rows: list[list[Cell]] = [
            [
                _short(x.place, diagnosis),
                x.category or None,
                f"{x.prompt_tokens} / {x.chosen_tokens} / {x.rejected_tokens}",
                signed(x.comprehension_chosen, 3),
                signed(x.comprehension_rejected, 3),
                signed(x.imbalance, 3),
                f"{fixed(x.weight_chosen, 2)} / {fixed(x.weight_rejected, 2)}",
            ]
            for x in lines
        ]
        columns = ["pair", "category", "tokens: prompt / chosen / rejected", "c chosen", "c rejected", "imbalance",
                   "weights"]  # fmt: skip
        section.table(Table(columns, rows, caption, "llrrrrr"))
        for line in lines:
            if line.texts is not None:
                section.folded(f"Texts of {_short(line.place, diagnosis)}", line.texts)


def _consistency(section: Section, diagnosis: Diagnosis) -> None:
    splits, leaks = diagnosis.splits, diagnosis.leaks
    rows: list[list[Cell]] = []
    for label, count in (
        ("repeat an earlier pair", lambda s: len(s.duplicates)),
        ("contradict another pair, sides swapped", lambda s: len(s.swapped)),
        ("conflict with another pair of their prompt", lambda s: len(s.conflicting)),
        ("have the prompt of an earlier pair", lambda s: s.repeated_prompts),
        ("have the chosen response of an earlier pair", lambda s: s.repeated_chosen),
        ("have the rejected response of an earlier pair", lambda s: s.repeated_rejected),
    ):
        rows.append([label, *(count(split) for split in splits.values())])
    section.table(Table(["pairs that …", *(called(name) for name in splits)], rows, "Agreement of pairs"))
    for name, split in splits.items():
        _listed(section, diagnosis, split.swapped, "contradicted by", f"Swapped sides, {called(name)}")
        _listed(section, diagnosis, split.conflicting, "conflicts with", f"Conflicting, {called(name)}")
    if leaks is None:
        section.text("Nothing is held out, so there is nothing to compare with training.")
        return
    section.table(
        Table(
            ["held-out pairs whose …", ""],
            [
                ["prompt is in training", len(leaks.prompts)],
                ["prompt differs from one in training only in case, spacing and punctuation", len(leaks.near_prompts)],
                ["chosen response is in training", leaks.chosen],
            ],
            f"Leaks, of {whole(leaks.pairs)} held-out pairs",
        )
    )
    _listed(section, diagnosis, leaks.prompts, "in training", "Held-out prompts that are in training")
    _listed(section, diagnosis, leaks.near_prompts, "in training", "Held-out prompts that are nearly in training")


def _listed(section: Section, diagnosis: Diagnosis, places: Sequence[Places], other: str, caption: str) -> None:
    if places:
        more = f"; {_MOST_LISTED} of {whole(len(places))}, all in the JSON file" if len(places) > _MOST_LISTED else ""
        rows = [[_short(p.place, diagnosis), _short(p.other, diagnosis)] for p in places[:_MOST_LISTED]]
        section.table(Table(["pair", other], rows, caption + more, "ll"))


def _short(place: str, diagnosis: Diagnosis) -> str:
    """Return `place` without its source, which is named at the head of the page."""
    for report in diagnosis.loading:
        place = place.removeprefix(f"{report.source}, ").removeprefix(f"{report.source}/")
    return place


def group_table(kind: str, groups: Sequence[Group], caption: str) -> Table:
    """Return a table of groups of pairs, one per row."""
    rows: list[list[Cell]] = [
        [g.name, g.pairs, signed(g.chosen.value, 3), signed(g.rejected.value, 3), mean_text(g.imbalance),
         fixed(g.size, 3), percent(g.strong)]
        for g in groups
    ]  # fmt: skip
    return Table([kind, "pairs", "c chosen", "c rejected", "imbalance", "|imbalance|", "strong"], rows, caption)


def estimate(mean: Interval) -> Estimate:
    """Convert a mean to a bar's estimate."""
    return Estimate(mean.value, mean.low, mean.high) if mean.bounded else Estimate(mean.value)


def _have_intervals(groups: Sequence[Group]) -> bool:
    return all(g.chosen.bounded for g in groups)


def _line(groups: Sequence[Group], means: Sequence[Interval]) -> Line:
    x, y = [g.tokens for g in groups], [m.value for m in means]
    low, high = [m.low for m in means if m.bounded], [m.high for m in means if m.bounded]
    return Line(x, y, low, high) if len(low) == len(high) == len(y) else Line(x, y)
