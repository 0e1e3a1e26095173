"""The settings of a study: one YAML file says what is compared, where, and how often."""

import itertools
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.yaml_files import read_yaml
from megatron_infifpo.study.asked import Asked
from megatron_infifpo.study.models import KINDS
from megatron_infifpo.study.world import JUDGES

MATCHED, TUNED = "matched", "tuned"
FINAL, TUNING = "final", "tuning"
BEST = "best"
CONTROLS, DATA = ("shuffled", "uniform", "truth"), ("preference", "own", "lists")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Where methods are compared.

    Attributes:
        name: of the condition.
        words: what it is, for the report.
        judge: who makes the pairs, of `world.JUDGES`.
        pivot: which of the models is trained.
        sources: which ones may be its reference.
        on_policy: responses are the policy's own, else those of models before SFT.
        methods: names of the methods that are compared there.
        seeds, first_seed: how many seeds are reported, and from which on.
        also, also_seeds: the same of methods that are compared after all others.
        tuned: methods that are tuned there, too.
    """

    name: str
    words: str
    judge: str = "noise25"
    pivot: str = "pivot"
    sources: tuple[str, ...]
    on_policy: bool = False
    methods: tuple[str, ...]
    also: tuple[str, ...] = ()
    also_seeds: int = 0
    seeds: int
    first_seed: int = 0
    tuned: tuple[str, ...] = ()

    def reported(self, count: int) -> range:
        """Return the first so many of its reported seeds."""
        return range(self.first_seed, self.first_seed + count)


@dataclass(frozen=True, kw_only=True)
class StudyMethod:
    """What is compared.

    Attributes:
        name: of the method in results.
        words: its name in the report.
        flags: of `infifpo train`, with the matched settings.
        grid: flags to values that are tried where it is tuned, all with all.
        sources: what its reference has; None: all of the condition's; "best": of these the one
            that the judge finds right most often.
        control: what is put in the place of the sources, of `CONTROLS`; None: nothing.
        data: of `DATA`: pairs, pairs with the pivot's own best response, or lists.
        targets: flags of `infifpo fuse-targets`, for methods of tokens; None: others.
        merged: its runs, one a source, are merged.
    """

    name: str
    words: str
    flags: tuple[str, ...] = ()
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    sources: tuple[str, ...] | None = None
    control: str | None = None
    data: str = "preference"
    targets: tuple[str, ...] | None = None
    merged: bool = False

    def variants(self) -> list[dict[str, float]]:
        """The settings that are tried."""
        values = itertools.product(*self.grid.values())
        return [dict(zip(self.grid, each, strict=True)) for each in values]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A study.

    Attributes:
        sets: how many times the models are drawn anew; seed s has the models of set s % sets.
        tuning_seeds: seeds on which settings are chosen, and which are not reported; they have
            models of their own, and prompts of their own for the choice.
        prompts: how many of each part; of the held-out ones log_odds are scored, too.
        pretraining, sft, training: steps, epochs, batch and lr of each.
        conditions, methods: by name.
        explained: seeds below this have a policy's log-probs of its training pairs explained.
        report: of `study.report`.
    """

    sets: int
    tuning_seeds: tuple[int, ...]
    prompts: Mapping[str, int]
    pretraining: Mapping[str, Any]
    sft: Mapping[str, Any]
    training: Mapping[str, Any]
    conditions: Mapping[str, Condition]
    methods: Mapping[str, StudyMethod]
    explained: int
    report: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            UserError: it cannot be read, or names what is not there.
        """
        try:
            found = read_yaml(path)
            given = {n: v for n, v in found.items() if n not in ("conditions", "methods")}
            methods = {n: _method(n, v) for n, v in found["methods"].items()}
            conditions = {n: _condition(n, v) for n, v in found["conditions"].items()}
            given["tuning_seeds"] = tuple(given["tuning_seeds"])
            made = cls(**given, conditions=conditions, methods=methods)
        except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is not the settings of a study: {error!r}; see examples/study/study.yaml"
            ) from None
        made._check(path)
        return made

    @property
    def of_stages(self) -> dict[str, Any]:
        """What all runs of a folder must share."""
        names = ("sets", "tuning_seeds", "prompts", "pretraining", "sft", "training")
        found = {name: getattr(self, name) for name in names}
        return found | {"models": {name: asdict(kind) for name, kind in KINDS.items()}}

    @property
    def told(self) -> dict[str, Any]:
        """What a report is told, see `report`: names in words, and the planned seeds."""
        words = {
            "conditions": {name: each.words for name, each in self.conditions.items()},
            "methods": {name: each.words for name, each in self.methods.items()},
        }
        return {**self.report, **words}

    def _check(self, path: Path) -> None:
        reported = {seed for each in self.conditions.values() for seed in each.reported(each.seeds)}
        if both := reported & set(self.tuning_seeds):
            raise UserError(f"{path}: tuning_seeds has {min(both)}, which is reported")
        for condition in self.conditions.values():
            names = (*condition.methods, *condition.also, *condition.tuned)
            _known(path, "method", names, self.methods)
            _known(path, "model", (condition.pivot, *condition.sources), KINDS)
            _known(path, "judge", [condition.judge], JUDGES)
        for method in self.methods.values():
            _known(path, "model", method.sources or (), (*KINDS, BEST))
            _known(path, "control", [method.control] if method.control else (), CONTROLS)
            _known(path, "data", [method.data], DATA)
        asked = Asked.read(self.told)  # before hours are spent on it
        for contrast in (*asked.primary, *asked.secondary):
            _known(path, "method", (contrast.a, contrast.b), self.methods)
            _known(path, "condition", [contrast.condition], self.conditions)


def _known(path: Path, what: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{path}: {what} {name!r}, expected one of {', '.join(known)}")


def _condition(name: str, given: Mapping[str, Any]) -> Condition:
    lists = {n: tuple(given.get(n, ())) for n in ("sources", "methods", "also", "tuned")}
    return Condition(name=name, **{**given, **lists})


def _method(name: str, given: Mapping[str, Any]) -> StudyMethod:
    read = {**given, "flags": tuple(shlex.split(given.get("flags", "")))}
    read["grid"] = {n: tuple(values) for n, values in given.get("grid", {}).items()}
    if given.get("sources") is not None:
        named = given["sources"]
        read["sources"] = (named,) if isinstance(named, str) else tuple(named)
    if given.get("targets") is not None:
        read["targets"] = tuple(shlex.split(given["targets"]))
    return StudyMethod(name=name, **read)
