"""Figures of the study's report, as SVG: the same bytes from the same numbers."""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from megatron_infifpo.study.asked import SETTINGS, Asked, ordered  # noqa: E402
from megatron_infifpo.study.comparisons import (  # noqa: E402
    Comparison,
    contrast,
    to_other,
)
from megatron_infifpo.study.outcomes import Outcomes  # noqa: E402
from megatron_infifpo.study.statistics import Interval, t_interval  # noqa: E402
from megatron_infifpo.study.tables import is_share, stages  # noqa: E402

WIDTH = 9.0  # inches, as figures of other reports
Line = tuple[str, Sequence[Comparison | None]]  # what it is of, one comparison for each colour


def draw(outcomes: Outcomes, asked: Asked) -> dict[str, str]:
    """Draw all figures that there are numbers for, by name; the user's matplotlibrc has no say."""
    # Without a salt the names of clipping paths in an SVG are random numbers.
    with plt.style.context("default"), matplotlib.rc_context({"svg.hashsalt": "infifpo study"}):
        drawn = {
            "differences": differences(outcomes, asked),
            "contrasts": contrasts(outcomes, asked),
            "sources": by_sources(outcomes, asked),
            "coefficients": coefficients(outcomes, asked),
        }
    return {name: picture for name, picture in drawn.items() if picture is not None}


def svg(figure: Figure) -> str:
    """Render a figure and close it."""
    stream = io.StringIO()
    figure.tight_layout()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return stream.getvalue()


def differences(outcomes: Outcomes, asked: Asked) -> str | None:
    """Draw every method's accuracy above the baseline's in the main condition."""
    methods = ordered(outcomes.methods(asked.main), asked.methods, asked.baseline)
    lines: list[Line] = []
    for method in methods:
        found = [
            to_other(outcomes, asked.main, (method, asked.baseline), settings, "accuracy")
            for settings in SETTINGS
        ]
        if method != asked.baseline and any(each.seeds for each in found):
            lines.append((asked.method(method), found))
    if not lines:
        return None
    figure, axis = plt.subplots(figsize=(WIDTH, _height(len(lines))))
    _forest(axis, lines, SETTINGS, 100.0)
    axis.set_xlabel(f"points of accuracy above {asked.method(asked.baseline)}")
    return svg(figure)


def contrasts(outcomes: Outcomes, asked: Asked) -> str | None:
    """Draw the primary contrasts, a panel for those in points and one for each other outcome."""
    panels: dict[str, list[Line]] = {}
    for question in asked.primary:
        found = contrast(outcomes, question)
        what = "points" if is_share(question.outcome) else question.outcome
        if found.seeds:
            panels.setdefault(what, []).append((question.name, [found]))
    if not panels:
        return None
    sizes = [len(lines) for lines in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(WIDTH, sum(map(_height, sizes))),
        squeeze=False,
        height_ratios=[_height(size) for size in sizes],
    )
    for axis, (what, lines) in zip(axes[:, 0], panels.items(), strict=True):
        _forest(axis, lines, [""], 100.0 if what == "points" else 1.0)
        axis.set_xlabel(what)
    return svg(figure)


def by_sources(outcomes: Outcomes, asked: Asked) -> str | None:
    """Draw the reference's margin and the loss's saturation over the number of sources."""
    panels = []
    for stage in stages(outcomes, asked.main):
        for name, words in (
            ("margin", "reference margin, nats"),
            ("saturation", "share of pairs below 0.1"),
        ):
            lines = {
                f"{line}, {settings}": _by_number(outcomes, asked, methods, settings, stage + name)
                for line, methods in asked.sources.items()
                for settings in SETTINGS
            }
            lines = {label: points for label, points in lines.items() if points}
            panels += [(_title(words, stage), lines)] if lines else []
    if not panels:
        return None
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
        for label, points in lines.items():
            numbers, found = [*points], [*points.values()]
            axis.errorbar(
                numbers,
                [each.mean for each in found],
                yerr=[each.half for each in found],
                label=label,
                linewidth=1.3,
                marker=".",
                capsize=2,
            )
        axis.set_xticks(sorted({number for points in lines.values() for number in points}))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("sources")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return svg(figure)


def coefficients(outcomes: Outcomes, asked: Asked) -> str | None:
    """Draw how hard each method pushes right and wrong pairs in the main condition."""
    panels = []
    for stage in stages(outcomes, asked.main):
        lines = {}
        for method in ordered(outcomes.methods(asked.main), asked.methods, asked.baseline):
            sides = [_sides(outcomes, asked.main, method, each, stage) for each in SETTINGS]
            if any(sides):
                lines[asked.method(method)] = sides
        panels += [(_title("coefficient of a pair", stage), lines)] if lines else []
    if not panels:
        return None
    height = max(_height(len(lines)) for _, lines in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, height), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels, strict=True):
        for column, settings in enumerate(SETTINGS):
            known = [
                (place + 0.3 * column - 0.15, sides[column])
                for place, sides in enumerate(lines.values())
                if sides[column]
            ]
            places = [place for place, _ in known]
            for kind, name in enumerate(("right pairs", "wrong pairs")):
                found = [sides[kind] for _, sides in known]
                colour = f"C{2 * column + kind}"
                _bars(axis, found, places, f"{name}, {settings}", colour)
            for place, (right, wrong) in known:
                axis.plot([right.mean, wrong.mean], [place, place], color="0.8", zorder=0)
        _names(axis, [*lines])
        axis.set_title(title, fontsize=10, loc="right")
        below = -0.5 / height  # of the axis, which is about as high as the figure
        axis.legend(fontsize=7, ncols=2, loc="upper right", bbox_to_anchor=(1.0, below))
    return svg(figure)


def _sides(
    outcomes: Outcomes, condition: str, method: str, settings: str, stage: str
) -> list[Interval]:
    """The coefficients on right and on wrong pairs; empty where one of them is missing."""
    paths = (f"{stage}coefficient_right", f"{stage}coefficient_wrong")
    found = [t_interval(outcomes.values(condition, method, settings, p).values()) for p in paths]
    known = [each for each in found if each is not None]
    return known if len(known) == len(paths) else []


def _forest(axis: Axes, lines: Sequence[Line], names: Sequence[str], scale: float) -> None:
    """Draw intervals over seeds, and below thin ones over sets, which may run out of the frame."""
    step = 0.8 / (len(names) + 1)
    ends = []
    for column, name in enumerate(names):
        shift = (column - (len(names) - 1) / 2) * step
        known = [
            (place + shift, each)
            for place, (_, found) in enumerate(lines)
            if (each := found[column]) is not None and each.seeds is not None
        ]
        seeds = [_times(each.seeds, scale) for _, each in known if each.seeds]
        _bars(axis, seeds, [place for place, _ in known], name, f"C{column}")
        for place, each in known:
            if each.sets:
                low, high = scale * each.sets.low, scale * each.sets.high
                axis.plot([low, high], [place + step / 4] * 2, color=f"C{column}", linewidth=0.6)
        ends += [end for each in seeds for end in (each.low, each.high)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.15 * (high - low) or 1.0
    axis.set_xlim(low - room, high + room)
    axis.axvline(0, color="0.4", linewidth=0.8)
    _names(axis, [label for label, _ in lines])
    if len(names) > 1:
        axis.legend(fontsize=7)


def _bars(
    axis: Axes, found: Sequence[Interval], places: Sequence[float], name: str, colour: str
) -> None:
    """Draw means with their intervals, one above the other."""
    axis.errorbar(
        [each.mean for each in found],
        places,
        xerr=[each.half for each in found],
        label=name,
        color=colour,
        fmt="o",
        markersize=4,
        linewidth=1.8,
        capsize=2.5,
    )


def _names(axis: Axes, labels: Sequence[str]) -> None:
    """Put names on the left, the first on top."""
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(alpha=0.3, axis="x")


def _by_number(
    outcomes: Outcomes, asked: Asked, methods: Mapping[int, str], settings: str, path: str
) -> dict[int, Interval]:
    """A number with its interval by the number of sources."""
    found = {
        number: t_interval(outcomes.values(asked.main, method, settings, path).values())
        for number, method in sorted(methods.items())
    }
    return {number: each for number, each in found.items() if each is not None}


def _times(found: Interval, scale: float) -> Interval:
    return found._replace(mean=scale * found.mean, half=scale * found.half)


def _title(words: str, stage: str) -> str:
    when = stage.removeprefix("why/").removesuffix("/")
    return f"{words}, at the {when}" if when else words


def _height(lines: int) -> float:
    return 0.9 + 0.28 * lines
