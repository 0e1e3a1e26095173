"""What a report is asked to say: the `report:` part of the study's settings."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Self

from megatron_infifpo.errors import UserError

SETTINGS = ("matched", "tuned")


@dataclass(frozen=True)
class Contrast:
    """A question: is a above b?

    Attributes:
        name: said in tables and figures.
        a: the method that is hoped to be above.
        b: the other one.
        condition: where.
        outcome: path of a number in a run's row: accuracy, slope, why/auc, domains/sums.
        settings: "matched" or "tuned".
    """

    name: str
    a: str
    b: str
    condition: str
    outcome: str = "accuracy"
    settings: str = "matched"


@dataclass(frozen=True)
class Asked:
    """What a report says, and in which order.

    Attributes:
        main: the main condition.
        baseline: the method that others are compared with.
        ceiling: the same on pairs that are filtered by truth: what labels without errors give.
        headroom: the least difference of the ceiling to the baseline that leaves room to differ.
        seeds: of a contrast, as planned; None takes as many as the main condition has.
        conditions: names with words, in order; others come after these, by name.
        methods: the same for methods.
        primary: named before any final run; corrected together.
        secondary: all others that are asked, not corrected.
        sources: lines of a figure: for each the method by its number of sources.
    """

    main: str
    baseline: str
    ceiling: str
    headroom: float = 0.01
    seeds: int | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)
    primary: tuple[Contrast, ...] = ()
    secondary: tuple[Contrast, ...] = ()
    sources: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """Read it from settings.

        Raises:
            UserError: a name is unknown, missing, or given twice, or a value has another type.
        """
        values = dict(_known(cls, given, "report"))
        for kind in ("primary", "secondary"):
            each = values.get(kind) or []
            if not isinstance(each, list):
                raise UserError(f"report: {kind} is {each!r}, expected a list of contrasts")
            values[kind] = tuple(_contrast(at, f"report: {kind}") for at in each)
            names = [contrast.name for contrast in values[kind]]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise UserError(f"report: {kind} has two contrasts named {twice[0]}, expected one")
        for kind in ("conditions", "methods", "sources"):
            values[kind] = values.get(kind) or {}
            if not isinstance(values[kind], Mapping):
                raise UserError(f"report: {kind} is {values[kind]!r}, expected names with values")
        for name, line in values["sources"].items():
            if not isinstance(line, Mapping) or not all(isinstance(n, int) for n in line):
                raise UserError(
                    f"report: sources: {name} is {line!r}, expected methods by number of sources, "
                    "such as {1: infifpo-1, 2: infifpo-2}"
                )
        return cls(**values)

    def method(self, name: str) -> str:
        """Words for a method."""
        return self.methods.get(name, name)

    def condition(self, name: str) -> str:
        """A condition's name with its words."""
        return f"{name}: {self.conditions[name]}" if name in self.conditions else name


def ordered(found: set[str], known: Mapping[str, str], first: str) -> list[str]:
    """Order names: the first, then as the settings have them, then by name."""
    places = {name: place for place, name in enumerate((first, *known))}
    return sorted(found, key=lambda name: (places.get(name, len(places)), name))


def _known(cls: type, given: Any, where: str) -> Mapping[str, Any]:
    """Return what was given, if it has a class's fields only, and all that have no default.

    Raises:
        UserError: it has not.
    """
    names = [each.name for each in fields(cls)]
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is {given!r}, expected names with values: {', '.join(names)}")
    unknown = sorted(set(map(str, given)) - set(names))
    if unknown:
        raise UserError(f"{where} has {unknown[0]}, expected some of {', '.join(names)}")
    for each in fields(cls):
        if each.name not in given and each.default is each.default_factory is MISSING:
            raise UserError(f"{where} has no {each.name}, expected one")
        if each.type is str and not isinstance(given.get(each.name, ""), str):
            raise UserError(f"{where}: {each.name} is {given[each.name]!r}, expected a text")
    return given


def _contrast(given: Any, where: str) -> Contrast:
    values = _known(Contrast, given, where)
    contrast = Contrast(**values)
    if contrast.settings not in SETTINGS:
        raise UserError(
            f"{where}: {contrast.name} has settings {contrast.settings}, expected one of "
            f"{', '.join(SETTINGS)}"
        )
    return contrast
