"""Tables of the study's report, in Markdown."""

from collections.abc import Iterable, Sequence

from megatron_infifpo.study.asked import SETTINGS, Asked, Contrast, ordered
from megatron_infifpo.study.comparisons import Comparison, contrast, headroom, plan, to_other
from megatron_infifpo.study.outcomes import Outcomes
from megatron_infifpo.study.statistics import Interval, holm, mean, t_interval

NONE = "-"
# Numbers in percent and their differences in points; all others are as they are.
SHARES = ("accuracy", "preference", "neither", "domains/")
# What the table of reasons calls numbers of `why.explain`.
WHY = {
    "coefficient_right": "coefficient on right pairs",
    "coefficient_wrong": "coefficient on wrong pairs",
    "auc": "AUC",
    "saturation": "share below 0.1",
    "full": "share above 0.9",
    "margin": "reference margin",
    "clip_rate": "clip rate",
    "right_source": "right source",
    "right_source_wrong": "right source, wrong pairs",
    "kl_initial": "distance to the pivot, nats",
    "kl_sources": "to the sources",
    "drift": "change of log-prob, nats",
    "length": "tokens",
}
OTHERS = {
    "accuracy_formed": "right of well-formed, %",
    "accuracy_misjudged": "right where the biased judge is wrong, %",
    "preference": "prefers the right answer, %",
    "log_odds": "log-odds",
    "neither": "neither answer, %",
    "length": "characters",
    "kl_initial": "distance to the start, nats",
    "seconds": "seconds",
}


def is_share(outcome: str) -> bool:
    """Whether a number is a share of prompts, said in percent."""
    return outcome.startswith(SHARES)


def primary(outcomes: Outcomes, asked: Asked) -> str:
    """The contrasts that were named beforehand, corrected together."""
    found = [contrast(outcomes, question) for question in asked.primary]
    corrected = holm([each.seeds.p if each.seeds else None for each in found])
    heads = [*_QUESTION, "p", "Holm's p"]
    rows = [
        [*_question(question, each, asked), _p(each.seeds and each.seeds.p), _p(p)]
        for question, each, p in zip(asked.primary, found, corrected, strict=True)
    ]
    return markdown(heads, rows)


def secondary(outcomes: Outcomes, asked: Asked) -> str:
    """All other contrasts that were asked, each on its own."""
    rows = []
    for question in asked.secondary:
        found = contrast(outcomes, question)
        rows.append([*_question(question, found, asked), _p(found.seeds and found.seeds.p)])
    return markdown([*_QUESTION, "p, not corrected"], rows)


_QUESTION = (
    "contrast", "methods", "where", "outcome", "n", "difference, over seeds", "over sets",
)  # fmt: skip


def _question(question: Contrast, found: Comparison, asked: Asked) -> list[str]:
    return [
        question.name,
        f"{asked.method(question.a)} - {asked.method(question.b)}",
        f"{question.condition}, {question.settings}",
        question.outcome,
        _n(found),
        _difference(found.seeds, question.outcome)
        if found.seeds
        else "fewer than 2 common seeds: no numbers",
        _difference(found.sets, question.outcome),
    ]


def power(outcomes: Outcomes, asked: Asked) -> str:
    """What was known of the primary contrasts before their runs."""
    heads = ["contrast", "SD on other seeds", "its freedom", "seeds for a point, 5 %"]
    heads += ["at Holm's first level", "planned", "they find, 5 %", "at Holm's first level"]
    rows = []
    for question in asked.primary:
        found = plan(outcomes, asked, question, is_share(question.outcome))
        seeds = found.seeds or (None, None)
        effects = found.effect or (None, None)
        rows.append(
            [
                question.name,
                _number(found.sd, question.outcome),
                str(found.freedom) if found.freedom else NONE,
                *(NONE if each is None else str(each) for each in seeds),
                str(found.n),
                *(_number(each, question.outcome) for each in effects),
            ]
        )
    return markdown(heads, rows)


def room(outcomes: Outcomes, asked: Asked) -> str:
    """What labels without errors would give, by condition."""
    heads = ["condition", *(f"{settings}" for settings in SETTINGS), "other seeds", "headroom"]
    rows = []
    for name in ordered(outcomes.conditions(), asked.conditions, asked.main):
        found = headroom(outcomes, asked, name)
        rows.append([asked.condition(name)])
        for each in (*found.final.values(), found.pilots):
            rows[-1].append(f"{_difference(each.seeds, 'accuracy')} ({_n(each)})")
        rows[-1].append({True: "yes", False: "**little**", None: NONE}[found.enough])
    return markdown(heads, rows)


def overview(outcomes: Outcomes, asked: Asked) -> str:
    """Accuracy and difference to the baseline of all methods in all conditions, a line each."""
    conditions = ordered(outcomes.conditions(), asked.conditions, asked.main)
    conditions = [name for name in conditions if outcomes.methods(name)]
    methods = {method for name in conditions for method in outcomes.methods(name)}
    rows = []
    for method in ordered(methods, asked.methods, asked.baseline):
        rows.append([asked.method(method)])
        for name in conditions:
            lines = []
            for settings in outcomes.settings(name):
                if outcomes.runs(name, method, settings):
                    level, difference, _, n = _against(
                        outcomes, asked, name, method, settings, "accuracy"
                    )
                    mark = "tuned " if settings == "tuned" else ""
                    lines.append(f"{mark}{level}; {difference} ({n})")
            rows[-1].append("<br>".join(lines) or NONE)
    return markdown(["method", *conditions], rows)


def accuracy(outcomes: Outcomes, asked: Asked, condition: str) -> str:
    """Accuracy of all methods in a condition, matched and tuned side by side."""
    heads = ["method"]
    for settings in outcomes.settings(condition):
        to = f"to {asked.method(asked.baseline)}"
        heads += [f"{settings}, %", f"{to}, over seeds", "over sets", "n"]
    rows = []
    for method in _methods(outcomes, asked, condition):
        cells = [
            _against(outcomes, asked, condition, method, settings, "accuracy")
            for settings in outcomes.settings(condition)
        ]
        rows.append([asked.method(method), *(cell for each in cells for cell in each)])
    return markdown(heads, rows)


def differences(outcomes: Outcomes, asked: Asked, condition: str, columns: dict[str, str]) -> str:
    """Numbers of all methods in a condition, each with its difference to the baseline.

    Args:
        outcomes: all runs.
        asked: the baseline.
        condition: where.
        columns: paths of numbers, with words.
    """
    heads = ["method", "settings"]
    for words in columns.values():
        heads += [words, f"to {asked.method(asked.baseline)}", "n"]
    rows = []
    for method, settings in _with_settings(outcomes, asked, condition):
        rows.append([asked.method(method), settings])
        for path in columns:
            level, seeds, _, n = _against(outcomes, asked, condition, method, settings, path)
            rows[-1] += [level, seeds, n]
    return markdown(heads, rows)


def levels(outcomes: Outcomes, asked: Asked, condition: str, columns: dict[str, str]) -> str:
    """Numbers of all methods in a condition, each with its own interval over seeds.

    Methods without any of them have no row, and numbers that none has no column.
    """
    rows, known = [], set(outcomes.paths(condition, ""))
    used = {path: words for path, words in columns.items() if path in known}
    for method, settings in _with_settings(outcomes, asked, condition):
        found = [[*outcomes.values(condition, method, settings, path).values()] for path in used]
        if n := max(map(len, found), default=0):
            cells = [_level(values, path) for values, path in zip(found, used, strict=True)]
            rows.append([asked.method(method), settings, *cells, str(n)])
    return markdown(["method", "settings", *used.values(), "n"], rows)


def stages(outcomes: Outcomes, condition: str) -> list[str]:
    """Where a condition's reasons lie: `why/`, or `why/start/` and the like; each has a length."""
    paths = outcomes.paths(condition, "why/")
    ends = [path.removesuffix("length") for path in paths if path.endswith("/length")]
    return sorted(ends, key=lambda path: (path != "why/start/", path))


def _methods(outcomes: Outcomes, asked: Asked, condition: str) -> list[str]:
    return ordered(outcomes.methods(condition), asked.methods, asked.baseline)


def _with_settings(outcomes: Outcomes, asked: Asked, condition: str) -> Iterable[tuple[str, str]]:
    """Methods of a condition with the settings that they have runs of."""
    for method in _methods(outcomes, asked, condition):
        for settings in outcomes.settings(condition):
            if outcomes.runs(condition, method, settings):
                yield method, settings


def _against(
    outcomes: Outcomes, asked: Asked, condition: str, method: str, settings: str, path: str
) -> tuple[str, str, str, str]:
    """A number's mean, its difference to the baseline over seeds and over sets, common seeds."""
    values = list(outcomes.values(condition, method, settings, path).values())
    level = _number(mean(values) if values else None, path)
    if method == asked.baseline:
        return level, NONE, NONE, str(len(values))
    found = to_other(outcomes, condition, (method, asked.baseline), settings, path)
    return level, _difference(found.seeds, path), _difference(found.sets, path), _n(found)


def _n(found: Comparison) -> str:
    """Common seeds, and of how many where one of the two lacks some."""
    return str(found.n) if found.n == found.of else f"{found.n} of {found.of}"


def _scaled(value: float, outcome: str) -> tuple[float, int]:
    """A number as it is said, and its decimals."""
    return (100 * value, 2) if is_share(outcome) else (value, 3)


def _number(value: float | None, outcome: str) -> str:
    if value is None:
        return NONE
    said, digits = _scaled(value, outcome)
    return f"{said:.{digits}f}"


def _difference(found: Interval | None, outcome: str) -> str:
    if found is None:
        return NONE
    said, digits = _scaled(found.mean, outcome)
    # Adding 0.0 turns what is rounded to -0.0 into 0.0.
    return f"{round(said, digits) + 0.0:+.{digits}f} ± {_number(found.half, outcome)}"


def _level(values: Sequence[float], outcome: str) -> str:
    found = t_interval(values)
    if found is None:
        return _number(values[0] if values else None, outcome)
    return f"{_number(found.mean, outcome)} ± {_number(found.half, outcome)}"


def _p(p: float | None) -> str:
    if p is None:
        return NONE
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar inside a cell does not end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )
