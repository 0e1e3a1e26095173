"""Differences between methods on common seeds, and what was known of them beforehand."""

from dataclasses import dataclass

from megatron_infifpo.study.asked import SETTINGS, Asked, Contrast
from megatron_infifpo.study.outcomes import Outcomes, numbers
from megatron_infifpo.study.statistics import (
    Interval,
    Pair,
    detectable,
    mean,
    over_sets,
    paired,
    pooled_sd,
    seeds_needed,
    t_interval,
)

POINT = 0.01  # of accuracy
ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """a - b on the seeds that both have.

    Attributes:
        seeds: over seeds; None for fewer than two common ones.
        sets: over sets of sources; None for fewer than three.
        n: common seeds.
        of: seeds of the method that has more.
    """

    seeds: Interval | None
    sets: Interval | None
    n: int
    of: int


def compare(a: dict[Pair, float], b: dict[Pair, float]) -> Comparison:
    """Compare two methods by (set, seed)."""
    differences = paired(a, b)
    return Comparison(
        t_interval(differences.values()),
        over_sets(differences) if len(differences) > 1 else None,
        len(differences),
        max(len(a), len(b)),
    )


def contrast(outcomes: Outcomes, question: Contrast) -> Comparison:
    """Answer a question from final runs."""
    return to_other(
        outcomes,
        question.condition,
        (question.a, question.b),
        question.settings,
        question.outcome,
    )


def to_other(
    outcomes: Outcomes, condition: str, methods: tuple[str, str], settings: str, outcome: str
) -> Comparison:
    """Compare a method with another one: (a, b)."""
    a, b = (outcomes.values(condition, method, settings, outcome) for method in methods)
    return compare(a, b)


@dataclass(frozen=True)
class Planned:
    """What could be known of a contrast beforehand, from runs on seeds that are not reported.

    Attributes:
        sd: of paired differences inside a condition and set of variants; None without such runs.
        freedom: degrees of freedom of `sd`.
        seeds: needed for one point at 80 % power, at 5 % and at Holm's first level; None where
            the outcome is not in points.
        effect: what the planned seeds find at 80 % power, at the same two levels.
        n: planned seeds.
    """

    sd: float | None
    freedom: int
    seeds: tuple[int, int] | None
    effect: tuple[float, float] | None
    n: int


def plan(outcomes: Outcomes, asked: Asked, question: Contrast, points: bool) -> Planned:
    """Say how many seeds a contrast needs, and what the planned ones can find.

    The standard deviation is that of pilots with the variants that the final runs have; where there
    are none yet, with all variants that both methods have. With two seeds a condition it says
    little, so that all conditions in which both methods have pilots are pooled, each around its own
    mean.

    Args:
        outcomes: all runs.
        asked: how many seeds were planned.
        question: the contrast.
        points: its outcome is a share, for which "a point" has a meaning.
    """
    conditions = sorted(outcomes.conditions())
    groups = [each for name in conditions for each in _pilot_differences(outcomes, name, question)]
    n = asked.seeds or contrast(outcomes, question).n
    found = pooled_sd(groups)
    if found is None or n < 2:
        return Planned(found and found[0], found[1] if found else 0, None, None, n)
    sd, freedom = found
    first, strict = ALPHA, ALPHA / max(len(asked.primary), 1)
    return Planned(
        sd,
        freedom,
        (seeds_needed(POINT, sd, alpha=first), seeds_needed(POINT, sd, alpha=strict))
        if points
        else None,
        (detectable(sd, n, alpha=first), detectable(sd, n, alpha=strict)),
        n,
    )


def _pilot_differences(outcomes: Outcomes, condition: str, question: Contrast) -> list[list[float]]:
    """Paired differences of pilots in one condition: groups that may have different means."""
    methods = (question.a, question.b)
    pilots = [outcomes.pilots(condition, method) for method in methods]
    chosen = [
        {row.variant for row in outcomes.runs(condition, method, question.settings)}
        for method in methods
    ]
    if all(chosen):
        groups = [
            [
                [row for variant in sorted(variants) for row in rows.get(variant, [])]
                for rows, variants in zip(pilots, chosen, strict=True)
            ]
        ]
    else:
        common = sorted(pilots[0].keys() & pilots[1].keys())
        groups = [[rows[variant] for rows in pilots] for variant in common]
    sides = [[numbers(rows, question.outcome) for rows in group] for group in groups]
    return [list(paired(a, b).values()) for a, b in sides]


@dataclass(frozen=True)
class Headroom:
    """What labels without errors would give above all labels, in one condition.

    Attributes:
        final: on final seeds, by settings.
        pilots: on the others, the mean over the variants that both methods have.
        enough: the largest of these is not below what was asked; None where nothing was run.
    """

    final: dict[str, Comparison]
    pilots: Comparison
    enough: bool | None


def headroom(outcomes: Outcomes, asked: Asked, condition: str) -> Headroom:
    """Compare the ceiling with the baseline."""
    methods = (asked.ceiling, asked.baseline)
    final = {
        settings: to_other(outcomes, condition, methods, settings, "accuracy")
        for settings in SETTINGS
    }
    pilots = compare(*_over_variants(outcomes, condition, methods))
    # Final seeds decide where there are some: pilots are few.
    known = [each.seeds.mean for each in final.values() if each.seeds is not None]
    known = known or [each.mean for each in (pilots.seeds,) if each is not None]
    return Headroom(final, pilots, max(known) >= asked.headroom if known else None)


def _over_variants(
    outcomes: Outcomes, condition: str, methods: tuple[str, str]
) -> list[dict[Pair, float]]:
    """Mean accuracy of pilots by (set, seed) over the variants that all methods have there."""
    found = [
        {variant: numbers(rows, "accuracy") for variant, rows in pilots.items()}
        for pilots in (outcomes.pilots(condition, method) for method in methods)
    ]
    common: dict[Pair, list[str]] = {}
    for variant in sorted(set.intersection(*(set(each) for each in found))):
        for pair in set.intersection(*(set(each[variant]) for each in found)):
            common.setdefault(pair, []).append(variant)
    return [
        {pair: mean(each[v][pair] for v in variants) for pair, variants in common.items()}
        for each in found
    ]
