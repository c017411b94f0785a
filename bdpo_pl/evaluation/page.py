"""HTML report of an evaluation. Prompts and answers are redacted unless the user requested them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bdpo_pl.evaluation.judges.agreement import Agreement
from bdpo_pl.evaluation.measures.rates import Rate, SuiteResult
from bdpo_pl.evaluation.next_round import Failure
from bdpo_pl.evaluation.oddities import CUT, MANY
from bdpo_pl.evaluation.results import Evaluation, ModelResult
from bdpo_pl.evaluation.suites.suite import Kind
from bdpo_pl.evaluation.terminal import SPLITS, rows
from bdpo_pl.evaluation.verdict_log import WARNING
from bdpo_pl.reporting import Estimate, Finding, Line, Page, Section, Table, bar_chart, heat_map, line_chart
from bdpo_pl.reporting.format import fixed, number, percent, points, rate, signed, whole, with_ends
from bdpo_pl.statistics import SIGNIFICANT, Interval

_KINDS: tuple[Kind, ...] = ("harmful", "benign")
_MOST_CATEGORIES = 30
_LEAST_PROMPTS = 5
_LABEL_LETTERS = 30
_MOST_FAILURES = 50
_SHOWN_FAILURES = 50
_HOW_TO_READ = (
    "Attack success: share of harmful prompts whose answer is unsafe, by a judge of harm. Not refused: share of "
    "harmful prompts whose answer does not refuse, by a judge that recognises only refusals; such an answer may still "
    "be harmless, irrelevant or no answer at all. Over-refusal: share of benign prompts refused.",
    "Blank answers neither refuse nor help. They are counted separately from the rates, as are answers that were cut "
    "at the limit of tokens, echo the request, repeat themselves or are in another language: no judge is reliable on "
    "them.",
    "Intervals of rates are Wilson's, for 95 %; framings of the same request count as one request. They measure the "
    "chance in the choice of prompts, not the judge's errors.",
    "Changes are paired by prompt, so the difference of two models is known more precisely than either rate. Their "
    "intervals are by bootstrap over requests, and include 0 if the exact p-value of the change alone is 0.05 or more. "
    "The p-values shown are corrected for the number of changes (Holm); intervals are not. A change is called better "
    "or worse only if the corrected p-value is below 0.05 and the interval excludes 0.",
    "Youden's J is (1 − mean attack success, or share not refused) − mean over-refusal: 1 is perfect; a model that "
    "refuses everything, or nothing, has 0.",
    "Margins compare a model's log-probabilities of chosen and rejected responses with those of the first model. A gap "
    "is the training pairs' margin minus that of other pairs; it measures memorisation.",
)


def build_page(evaluation: Evaluation) -> Page:
    """Build the report."""
    page = Page("Safety evaluation", _subtitle(evaluation), evaluation.facts)
    if evaluation.shows_texts:
        page.warn(WARNING)
    last = evaluation.models[-1]
    for kind in _KINDS:
        found = [result for result in last.suites if result.kind == kind]
        if found:
            failed = sum(result.overall.failed.value for result in found) / len(found)
            over = f"mean of {len(found)} suites" if len(found) > 1 else found[0].suite
            judge = evaluation.judge_of(kind)
            n = sum(result.count for result in found)
            page.headline(percent(failed), f"{found[0].counted}, {last.label}, {over}, n = {whole(n)}; judge: {judge}")
    page.findings(list(findings(evaluation)))
    _comparison(page.section("Comparison"), evaluation)
    for kind in _KINDS:
        _suites(page, evaluation, kind)
    _changes(page, evaluation)
    _categories(page.section("Categories"), evaluation)
    _budgets(page, evaluation)
    _overfitting(page, evaluation)
    _failures(page.section("Failures"), evaluation)
    _asked(page.section("Suites, attacks and judge"), evaluation)
    page.section("How to read this").items(_HOW_TO_READ)
    return page


def findings(evaluation: Evaluation) -> Iterator[Finding]:
    """Yield the findings that call for action, worst first."""
    first, last = evaluation.models[0], evaluation.models[-1]
    for model in evaluation.models[1:]:
        for suite, change in model.changes.items():
            if change.low > 0 and _is_significant(model, suite):
                yield Finding("problem", f"{model.label} does worse than {first.label} on {suite}.", points(change))
    for model in evaluation.models:
        yield from _odd_answers(model, evaluation.tells_harm)
    if alike := evaluation.all_alike():
        named = ", ".join(f"{suite} ({count})" for suite, count in alike.items())
        whose = "every model" if len(evaluation.models) > 1 else first.label
        yield Finding(
            "notice",
            f"All outcomes of {whose} are the same on {named}.",
            "Such a suite shows no differences between models, and limits the rate only to its interval.",
        )
    for note in evaluation.notes:
        yield Finding("notice", note)
    if last.weakest:
        named = ", ".join(f"{w.category} ({percent(w.rate, 0)} of {w.prompts}, {w.suite})" for w in last.weakest)
        yield Finding("notice", f"Weakest categories of {last.label}.", named)
    for model in evaluation.models[1:]:
        better = [s for s, change in model.changes.items() if change.high < 0 and _is_significant(model, s)]
        if better:
            yield Finding("fine", f"{model.label} does better than {first.label} on {', '.join(better)}.")


def _is_significant(model: ModelResult, suite: str) -> bool:
    """Return true if a change is significant after Holm's correction."""
    return model.p_values[suite] < SIGNIFICANT


def _odd_answers(model: ModelResult, tells_harm: bool) -> Iterator[Finding]:
    """Warn of each kind of odd answers whose share is large."""
    many = {oddity: n for oddity, n in model.oddities.items() if n > MANY * model.answers}
    cut = many.pop(CUT, 0)
    if many:
        named = ", ".join(f"{oddity}: {whole(n)}" for oddity, n in many.items())
        yield Finding(
            "problem",
            f"{model.label}: many of {whole(model.answers)} answers are not real answers ({named}).",
            "Its rates and its Youden's J are not reliable; is it the right model, with its chat template?",
        )
    if cut:
        yield Finding(
            "problem" if tells_harm else "notice",
            f"{model.label}: {whole(cut)} of {whole(model.answers)} answers were cut at the limit of tokens.",
            "A judge of harm may miss what the model would have added; raise generation.max_new_tokens."
            if tells_harm
            else "Refusals show early, so a judge of refusals misses little; raise generation.max_new_tokens if the "
            "model begins with long preambles.",
        )


def _subtitle(evaluation: Evaluation) -> str:
    names = [model.label for model in evaluation.models]
    return names[0] if len(names) == 1 else f"{', '.join(names[1:])} against {names[0]}"


def _comparison(section: Section, evaluation: Evaluation) -> None:
    changed = len(evaluation.models) == 2
    columns = ["", *(model.label for model in evaluation.models), *(["change, points"] if changed else [])]
    body = [[name, *cells, *([change] if changed else [])] for name, cells, change in rows(evaluation)]
    section.table(Table(columns, body, f"Every measure, with 95 % intervals. {evaluation.judge_note()}"))


def _suites(page: Page, evaluation: Evaluation, kind: Kind) -> None:
    names = list(
        dict.fromkeys(result.suite for model in evaluation.models for result in model.suites if result.kind == kind)
    )
    if not names:
        return
    results = [result for model in evaluation.models for result in model.suites if result.kind == kind]
    title = results[0].counted.capitalize()
    section = page.section(title)
    caption = f"n: {', '.join(_numbers(evaluation, name) for name in names)}. {evaluation.judge_note()}"
    series = {
        model.label: [_estimate(model.suite(name)) for name in names] for model in evaluation.models
    }  # fmt: skip
    axis = "share of prompts; lower is better"
    section.figure(bar_chart(title, names, series, axis, percent=True, limits=(0, 1), caption=caption))


def _numbers(evaluation: Evaluation, suite: str) -> str:
    """Return the number of prompts of a suite, for each model if a budget of time made the numbers differ."""
    found = {m.label: result.count for m in evaluation.models if (result := m.suite(suite)) is not None}
    if len(set(found.values())) == 1:
        return f"{suite} {whole(next(iter(found.values())))}"
    return f"{suite} {', '.join(f'{whole(count)} ({label})' for label, count in found.items())}"


def _changes(page: Page, evaluation: Evaluation) -> None:
    compared = [model for model in evaluation.models[1:] if model.changes]
    if not compared:
        return
    section = page.section(f"Change against {evaluation.models[0].label}")
    names = list(dict.fromkeys(name for model in compared for name in model.changes))
    body = [
        [name, *(_change(m, name) if name in m.changes else None for m in compared)] for name in names
    ]  # fmt: skip
    caption = (
        "Percentage points, paired by prompt; below zero is better; p after Holm's correction. "
        f"{evaluation.judge_note()}"
    )
    section.table(Table(["", *(model.label for model in compared)], body, caption))


def _change(model: ModelResult, suite: str) -> str:
    p = model.p_values.get(suite)
    return points(model.changes[suite]) + ("" if p is None else f", p = {fixed(p, 3)}" if p >= 0.001 else ", p < 0.001")


def _counted(name: str, counts: Sequence[int]) -> str:
    """Format a category with its numbers of prompts, which a long name must not push out of the drawing.

    Models have different numbers if a budget of time stopped an attack.
    """
    number = f" ({', '.join(map(str, counts if len(set(counts)) > 1 else counts[:1]))})"
    room = _LABEL_LETTERS - len(number)
    return (name if len(name) <= room else name[: room - 1] + "…") + number


def _categories(section: Section, evaluation: Evaluation) -> None:
    last = evaluation.models[-1]
    some = False
    for result in last.suites:
        if not result.categories:
            continue
        some = True
        enough = [rate for rate in result.categories if rate.failed.count >= _LEAST_PROMPTS]
        few = [rate for rate in result.categories if rate.failed.count < _LEAST_PROMPTS]
        if few:
            section.text(
                f"{result.suite}: {len(few)} categories of fewer than {_LEAST_PROMPTS} prompts "
                f"({sum(rate.failed.count for rate in few)} prompts in all) are only in the JSON: these are too few."
            )
        shown = enough[:_MOST_CATEGORIES]
        if not shown:
            continue
        before = [model.suite(result.suite) for model in evaluation.models]
        series = {
            model.label: [_category(found, rate.name) for rate in shown]
            for model, found in zip(evaluation.models, before, strict=True)
        }
        more = len(enough) - len(shown)
        title = f"{result.suite}: {result.counted} by category, worst of {last.label} first"
        labels = [
            _counted(rate.name, [c.failed.count for found in before if (c := _rate_of(found, rate.name)) is not None])
            for rate in shown
        ]
        caption = f"{f'{more} more categories are in the JSON. ' if more else ''}{evaluation.judge_note()}"
        what = "share of prompts; lower is better"
        if len(evaluation.models) > 1:
            section.figure(heat_map(title, labels, series, what, caption=caption))
        else:
            section.figure(bar_chart(title, labels, series, what, percent=True, limits=(0, 1), caption=caption))
    if not some:
        section.text("The prompts have no categories, or only one.")


def _budgets(page: Page, evaluation: Evaluation) -> None:
    """Plot the success of each attack by number of requests, according to the judge during the attack."""
    names = list(dict.fromkeys(name for model in evaluation.models for name in model.curves))
    if not names:
        return
    section = page.section("Success by budget")
    for name in names:
        curves = {model.label: model.curves[name] for model in evaluation.models if name in model.curves}
        n = ", ".join(f"{label} {whole(curve.count)}" for label, curve in curves.items())
        section.figure(
            line_chart(
                f"{name}: success by number of requests",
                {label: Line(c.requests, c.success, c.low, c.high) for label, c in curves.items()},
                "requests to the model for one attacked request",
                "share of attacked requests",
                percent=True,
                caption=f"As judged during the attack, with Wilson's 95 % intervals; n: {n}. {evaluation.judge_note()}",
            )
        )


def _overfitting(page: Page, evaluation: Evaluation) -> None:
    found = [(model, model.overfitting) for model in evaluation.models if model.overfitting is not None]
    if not found:
        return
    section = page.section("Overfitting")
    splits = list(found[0][1].splits)
    series = {
        model.label: [_drawn(o.splits[split].margin) for split in splits] for model, o in found
    }  # fmt: skip
    names = [f"{SPLITS[split]} pairs" for split in splits]
    section.figure(bar_chart("Margin over the first model", names, series, "nats; higher is better"))
    body = [
        [
            f"{model.label}, {SPLITS[split]}",
            number(margins.margin),
            rate(margins.accuracy),
            signed(margins.drift_chosen),
            signed(margins.drift_rejected),
        ]
        for model, o in found
        for split, margins in o.splits.items()
    ]
    columns = ["", "margin", "accuracy", "drift of chosen", "drift of rejected"]
    section.table(Table(columns, body, "Against the first model, in nats"))
    gaps = [
        [f"{model.label}, {SPLITS[split]}", number(gap), points(o.accuracy_gaps[split])]
        for model, o in found
        for split, gap in o.margin_gaps.items()
    ]
    if gaps:
        columns = ["", "margin gap, nats", "accuracy gap, points"]
        section.table(Table(columns, gaps, "Gaps: training pairs − these pairs"))


def _failures(section: Section, evaluation: Evaluation) -> None:
    failures = evaluation.failures
    if not failures:
        section.text("There were no failures.")
        return
    last = evaluation.models[-1].label
    failures = sorted(failures, key=lambda failure: failure.model != last)
    listed = failures[:_MOST_FAILURES]
    body = [[f.model, f.suite.name, f.prompt.category or None, f.prompt.attack or None, _place(f)] for f in listed]
    more = f"; {len(listed)} of {whole(len(failures))}, all are in the JSON" if len(failures) > len(listed) else ""
    section.table(Table(["model", "suite", "category", "attack", "place"], body, f"Prompts{more}", align="lllll"))
    if not evaluation.shows_texts:
        section.text("Texts of prompts and answers are left out; show_texts puts some into the report.")
        return
    for failure in failures[:_SHOWN_FAILURES]:
        title = f"{failure.model}, {failure.suite.name}, {failure.prompt.place}"
        section.folded(title, {"prompt": failure.prompt.text, "response": failure.response})


def _asked(section: Section, evaluation: Evaluation) -> None:
    body = [
        [s.name, s.kind, s.prompts, s.source, "; ".join(f"{n} {why}" for why, n in s.dropped.items()) or None]
        for s in evaluation.suites
    ]
    section.table(Table(["suite", "kind", "prompts", "source", "left out"], body, "Suites", align="llrll"))
    for model in evaluation.models:
        if model.attacks:
            section.table(Table(["attack", "cost"], list(model.attacks.items()), f"Attacks on {model.label}", "ll"))
    section.table(Table(["", ""], list(evaluation.judge_facts().items()), "The judge, and its limits", "ll"))
    if evaluation.agreement is not None:
        _agreement(section, evaluation.agreement)


def _agreement(section: Section, agreement: Agreement) -> None:
    accuracy = with_ends(percent, agreement.accuracy, *agreement.accuracy_interval)
    kappa = "undefined" if agreement.kappa is None else fixed(agreement.kappa, 2)
    if agreement.kappa is not None and agreement.kappa_interval is not None:
        kappa = with_ends(lambda value: fixed(value, 2), agreement.kappa, *agreement.kappa_interval)
    section.text(
        f"On {agreement.count} {agreement.source}, asked whether each is {agreement.question}, the judge agrees "
        f"with the label in {accuracy}; Cohen's kappa is {kappa}. Of "
        f"{agreement.hits + agreement.misses} that are, it finds {agreement.hits}; it wrongly adds "
        f"{agreement.false_alarms} others."
    )
    body = [[case or "other", f"{right} of {count}"] for case, (right, count) in agreement.by_case.items()]
    if len(body) > 1:
        section.table(Table(["kind of answer", "agrees"], body, "The judge by kind of answer"))


def _place(failure: Failure) -> str:
    """Return file and line only; the table of suites shows the folder."""
    return failure.prompt.place.rpartition("/")[2]


def _category(result: SuiteResult | None, name: str) -> Estimate | None:
    found = _rate_of(result, name)
    return None if found is None else _drawn(found.failed)


def _rate_of(result: SuiteResult | None, name: str) -> Rate | None:
    return None if result is None else next((rate for rate in result.categories if rate.name == name), None)


def _estimate(result: SuiteResult | None) -> Estimate | None:
    return None if result is None else _drawn(result.overall.failed)


def _drawn(interval: Interval) -> Estimate:
    return Estimate(interval.value, *((interval.low, interval.high) if interval.bounded else ()))
