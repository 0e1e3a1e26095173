"""The study's report: a page in Markdown and its figures, from results and settings alone."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.aside import make_folder, write_text
from megatron_infifpo.study import tables
from megatron_infifpo.study.asked import Asked, ordered
from megatron_infifpo.study.comparisons import headroom
from megatron_infifpo.study.outcomes import Outcomes, read_outcomes

REPORT = "report.md"


def write_report(results: Path, settings: Mapping[str, Any], folder: Path) -> Path:
    """Write report.md and its figures; the same bytes from the same runs, in whatever order.

    Args:
        results: results.jsonl or results.jsonl.gz.
        settings: the `report:` part of the study's settings, as `asked.Asked` has it.
        folder: to write into; made if it is not there.

    Returns:
        The page.

    Raises:
        UserError: results or settings are not what they should be, or matplotlib is missing.
    """
    asked, outcomes = Asked.read(settings), read_outcomes(results)
    try:
        from megatron_infifpo.study import figures
    except ImportError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("matplotlib is missing: pip install megatron-infifpo[report]") from None
    drawn = figures.draw(outcomes, asked)
    make_folder(folder)
    for name, picture in drawn.items():
        write_text(folder / f"{name}.svg", picture)
    write_text(folder / REPORT, page(outcomes, asked, drawn))
    return folder / REPORT


def page(outcomes: Outcomes, asked: Asked, figures: Collection[str] = ()) -> str:
    """Return the page, with the figures of these names beside it."""
    return "\n".join(part for part in _parts(outcomes, asked, figures) if part)


def _parts(outcomes: Outcomes, asked: Asked, figures: Collection[str]) -> Iterator[str]:
    """Yield the page's parts, each with its last line's end."""
    yield from _head(outcomes, asked)
    yield from _questions(outcomes, asked, figures)
    base = asked.method(asked.baseline)
    yield "## All methods in all conditions\n"
    yield (
        f"Accuracy in %, the difference to {base} in points over seeds, and in brackets the common "
        "seeds; above with matched settings, below with tuned ones.\n"
    )
    yield tables.overview(outcomes, asked)
    yield _picture(figures, "differences", f"accuracy above {base} by method in {asked.main}")
    for condition in ordered(outcomes.conditions(), asked.conditions, asked.main):
        if outcomes.methods(condition):
            yield from _condition(outcomes, asked, condition)
            if condition == asked.main:
                yield _picture(figures, "coefficients", "coefficients of right and wrong pairs")
                yield _picture(
                    figures, "sources", "reference margin and saturation by number of sources"
                )


def _head(outcomes: Outcomes, asked: Asked) -> Iterator[str]:
    """What was run, and how to read it."""
    yield "# Report of the study\n"
    pairs = {row.pair for row in outcomes.final}
    sets = {group for group, _ in pairs}
    yield (
        f"Made by `infifpo study report` from {len(outcomes.final)} final runs on {len(pairs)} "
        f"seeds in {len(sets)} sets of sources, and {len(outcomes.rows) - len(outcomes.final)} "
        "runs on other seeds, which chose settings and are in no table but where it says so.\n"
    )
    yield (
        "All methods of a condition, set and seed share data, start and references, and are "
        "compared inside such a pair, on the seeds that both have (n). Intervals are 95 % t "
        "intervals. *Over seeds*: of these sets of sources, n - 1 degrees of freedom. *Over sets*: "
        "of other sources, too; each set's mean is one value, and there are as many degrees of "
        "freedom as sets less one, so it is wide. Accuracy and other shares are in %, their "
        "differences in points. "
        "Matched: all methods with the same settings; tuned: each with its own, chosen with the "
        "same budget.\n"
    )
    yield "## Headroom\n"
    yield (
        f"{asked.method(asked.ceiling)} above {asked.method(asked.baseline)}, points of accuracy "
        "over seeds (common seeds). A condition in which labels without errors bring less than "
        f"{100 * asked.headroom:g} leaves no room for a better use of labels.\n"
    )
    yield tables.room(outcomes, asked)


def _questions(outcomes: Outcomes, asked: Asked, figures: Collection[str]) -> Iterator[str]:
    """Contrasts, with what was known of them beforehand."""
    if asked.primary:
        yield "## Primary contrasts\n"
        yield (
            f"The {len(asked.primary)} that were named before any final run; p-values of the "
            "paired t test over seeds, corrected together by Holm's method.\n"
        )
        yield tables.primary(outcomes, asked)
        yield _picture(figures, "contrasts", "primary contrasts with intervals")
        yield (
            "What was known beforehand: the standard deviation of paired differences on other "
            "seeds, with the settings of the final runs; the seeds that find a point of accuracy "
            "with a power of 80 %, alone (5 %) and as the smallest of Holm's p-values "
            f"({5 / len(asked.primary):.3g} %); the difference that the planned seeds find so.\n"
        )
        yield tables.power(outcomes, asked)
    if asked.secondary:
        yield "## Secondary contrasts\n"
        yield (
            "Each p-value is of its test alone: not corrected, and of as many tests some are "
            "small by chance.\n"
        )
        yield tables.secondary(outcomes, asked)


def _condition(outcomes: Outcomes, asked: Asked, condition: str) -> Iterator[str]:
    """Everything about one condition."""
    enough = headroom(outcomes, asked, condition).enough
    mark = " (without headroom)" if enough is False else ""
    yield f"## {asked.condition(condition)}{mark}\n"
    yield tables.accuracy(outcomes, asked, condition)
    domains = {
        path: path.removeprefix("domains/") for path in outcomes.paths(condition, "domains/")
    }
    known = set(outcomes.paths(condition, ""))
    stages = tables.stages(outcomes, condition)
    other = {"slope": "transfer slope"} | {
        f"{stage}auc": _when("AUC of the coefficient", stage) for stage in stages
    }
    other = {path: words for path, words in other.items() if path in known}
    for words, columns in (("By domain", domains), ("Transfer, and AUC", other)):
        if columns:
            yield f"### {words}, {condition}\n"
            yield tables.differences(outcomes, asked, condition, columns)
    if known & set(tables.OTHERS):
        yield f"### Other numbers, {condition}\n"
        yield tables.levels(outcomes, asked, condition, tables.OTHERS)
    for stage in stages:
        yield f"### {_when('Why', stage)}, {condition}\n"
        columns = {stage + name: words for name, words in tables.WHY.items()}
        yield tables.levels(outcomes, asked, condition, columns)
        sources = {
            path: path.removeprefix(stage).replace("right_source/", "right: ").replace("/", ": ")
            for kind in ("share/", "right_source/")
            for path in outcomes.paths(condition, stage + kind)
        }
        if sources:
            yield "Share of the reference by source, and how often each source prefers the right.\n"
            yield tables.levels(outcomes, asked, condition, sources)


def _when(words: str, stage: str) -> str:
    when = stage.removeprefix("why/").removesuffix("/")
    return f"{words} ({when})" if when else words


def _picture(figures: Collection[str], name: str, words: str) -> str:
    return f"![{words}]({name}.svg)\n" if name in figures else ""
