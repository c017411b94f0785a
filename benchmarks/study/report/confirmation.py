# ruff: noqa: E501 - lines of a page, which wraps them itself
"""The page's section on the main question asked again, of pairs and references that no choice has seen."""

from __future__ import annotations

from benchmarks.study.report.results import ABILITY, FRAMED_ATTACKS, GAP, OVER_REFUSAL, REFUSAL, Results
from benchmarks.study.report.sections import NOT_RUN, joined
from benchmarks.study.report.tables import Contrast, Group, differences, means
from benchmarks.study.run.plan import BDPO, CONFIRMED, world_name

MEASURES = (FRAMED_ATTACKS, OVER_REFUSAL, ABILITY, GAP)
AGAINST = tuple(name for name in CONFIRMED if name != BDPO.name)


def confirmation(results: Results) -> str:
    """Means and differences, all of them one family."""
    lines = ["## Asked again"]
    worlds = worlds_of(results)
    if not worlds:
        return joined([*lines, NOT_RUN])
    lines.append(
        "What stands above was seen one part after another, and the grid was widened on the way. So the main question was put "
        "once more, to pairs of seeds that nothing else uses and to two more references, each with frequencies, examples and "
        "weights of its own. Settings are those chosen above; what is compared was written down, and committed, before the "
        "first of these cells had run."
    )
    groups = [Group(f"{name}: {method}", "confirmation", method, name) for name in worlds for method in CONFIRMED]
    lines.append(means(results, groups, (REFUSAL, *MEASURES)))
    found = differences(results, contrasts(results), MEASURES)
    return joined([*lines, "Differences in points (gap in nats), paired by seed:", found.text, found.said])


def worlds_of(results: Results) -> list[str]:
    """Names of the references it was asked of, in their order."""
    worlds = sorted({cell["setting"]["world"] for cell in results.pick("confirmation")})
    return [world_name(world) for world in worlds]


def contrasts(results: Results) -> list[Contrast]:
    """B-DPO against each of the others, with each reference."""
    return [
        Contrast(
            f"{world}: {BDPO.name} − {other}",
            Group(BDPO.name, "confirmation", BDPO.name, world),
            Group(other, "confirmation", other, world),
        )
        for world in worlds_of(results)
        for other in AGAINST
    ]
