"""The study's report: a page in Markdown and its figures, from results and settings alone."""

import re
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
    """Write report.md, its figures, and a page for each other condition.

    They are the same bytes from the same runs, in whatever order these come.

    Args:
        results: results.jsonl or results.jsonl.gz.
        settings: the `report:` part of the study's settings, as `asked.Asked` has it.
        folder: to write into; made if it is not there.

    Returns:
        report.md.

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
    for name, text in pages(outcomes, asked, drawn).items():
        write_text(folder / name, text)
    return folder / REPORT


def pages(outcomes: Outcomes, asked: Asked, figures: Collection[str] = ()) -> dict[str, str]:
    """Return all pages by file name.

    Args:
        outcomes: all runs.
        asked: what to say.
        figures: names of those that lie beside the pages.
    """
    found = {REPORT: _report(outcomes, asked, figures)}
    for name in _others(outcomes, asked):
        found[_file(name)] = _condition(outcomes, asked, name, "#")
    return {name: "\n".join(part for part in parts if part) for name, parts in found.items()}


def _report(outcomes: Outcomes, asked: Asked, figures: Collection[str]) -> Iterator[str]:
    """Yield the report's parts, each with its last line's end."""
    yield from _head(outcomes, asked)
    yield from _questions(outcomes, asked, figures)
    base = asked.method(asked.baseline)
    yield "## All methods in all conditions\n"
    yield (
        f"Accuracy in %, the difference to {base} in points over seeds, and in brackets the common "
        "seeds.\n"
    )
    yield tables.overview(outcomes, asked)
    yield _picture(figures, "differences", f"accuracy above {base} by method in {asked.main}")
    links = [f"[{asked.condition(name)}]({_file(name)})" for name in _others(outcomes, asked)]
    if links:
        yield f"More of each condition: {', '.join(links)}; the main one is next.\n"
    if outcomes.methods(asked.main):
        yield from _condition(outcomes, asked, asked.main, "##")
    yield _picture(figures, "coefficients", "coefficients of right and wrong pairs")
    yield _picture(figures, "sources", "reference margin and saturation by number of sources")


def _others(outcomes: Outcomes, asked: Asked) -> list[str]:
    """Conditions with final runs, but the main one."""
    known = ordered(outcomes.conditions(), asked.conditions, asked.main)
    return [name for name in known if name != asked.main and outcomes.methods(name)]


def _file(condition: str) -> str:
    """The page about a condition."""
    return f"condition-{re.sub(r'[^a-zA-Z0-9._-]', '-', condition)}.md"


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
        "Matched: the same settings for all methods that can have them; tuned: each with its own, "
        "of as many trials.\n"
    )
    yield "## Headroom\n"
    yield (
        f"{asked.method(asked.ceiling)} above {asked.method(asked.baseline)}, points of accuracy "
        "over seeds (common seeds): what this training makes of labels without errors. Where it is "
        f"less than {100 * asked.headroom:g}, a better use of labels can show little in methods "
        "like these; others may have more to gain.\n"
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


def _condition(outcomes: Outcomes, asked: Asked, condition: str, level: str) -> Iterator[str]:
    """Everything about one condition; its heading is of a level, such as "##"."""
    enough = headroom(outcomes, asked, condition).enough
    mark = " (little headroom)" if enough is False else ""
    yield f"{level} {asked.condition(condition)}{mark}\n"
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
            yield f"{level}# {words}, {condition}\n"
            yield tables.differences(outcomes, asked, condition, columns)
    if known & set(tables.OTHERS):
        yield f"{level}# Other numbers, {condition}\n"
        yield tables.levels(outcomes, asked, condition, tables.OTHERS)
    for stage in stages:
        yield f"{level}# {_when('Why', stage)}, {condition}\n"
        yield (
            "Coefficient: how hard a pair is pushed, 1/2 where the policy is at its reference. "
            "Right pairs: their chosen response is truly the better one. Clip rate: the share of "
            "values of sources that the initial pivot's replaced. Right source: how often the "
            "source in the reference prefers the right response. Distance: mean absolute "
            "difference of a response's log-prob.\n"
        )
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
