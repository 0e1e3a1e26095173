"""sources.yaml: the log-prob datasets of the initial pivot and of the sources.

initial: logprobs/pivot
sources:
  - name: qwen2.5-14b
    logprobs: logprobs/qwen
  - name: qwen2.5-coder-14b
    logprobs: logprobs/coder
    domains: [code]
    score: {model: models/qwen-coder, tensor-model-parallel-size: 8}

`score` has flags: `true` is a flag alone, a list several values, a mapping one value in JSON, as in
`chat-template-options: {enable_thinking: false}`. For a weighted fusion every model may have a
`weight`, the initial pivot as `initial: {logprobs: logprobs/pivot, weight: 0.3}`. For weights of
pairs a source may have an `accuracy`, `0.83` or by domain `{math: 0.93, code: 0.7}`.
"""

import difflib
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.yaml_files import read_yaml

INITIAL = "initial"
"""What the initial pivot is called beside the sources' names."""

# What recipes say of a source themselves, and where from.
_GIVEN = {
    "name": "the source's name",
    "domains": "the source's domains",
    "input": "the run's preference records",
    "output": "the source's logprobs",
}


@dataclass(frozen=True, slots=True)
class Source:
    """One source model.

    Attributes:
        name: unique, for metrics and reports.
        logprobs: prefix of its log-prob dataset.
        domains: the domains that it takes part in; None means all.
        score: flags of infifpo score that recipes score it with, without their dashes:
            a text, a number, a bool, a list or a mapping each; training ignores them.
        weight: its share in a weighted fusion, which normalises them.
        accuracy: verified share of its answers that are right, in [0, 1], by domain; one number for
            all domains, None where unknown.
    """

    name: str
    logprobs: str
    domains: tuple[str, ...] | None = None
    score: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    accuracy: float | dict[str, float] | None = None

    def accuracy_in(self, domain: str) -> float:
        """Return its accuracy in a domain that it takes part in; NaN where unknown or outside."""
        if self.domains is not None and domain not in self.domains:
            return math.nan
        known = self.accuracy
        found = known.get(domain) if isinstance(known, dict) else known
        return math.nan if found is None else found


@dataclass(frozen=True, slots=True)
class SourcesConfig:
    """The content of a sources.yaml.

    Attributes:
        initial: prefix of the initial pivot's log-prob dataset.
        sources: the M sources, in order.
        path: the file, for errors.
        initial_weight: as a source's.
    """

    initial: str
    sources: tuple[Source, ...] = ()
    path: str = "sources.yaml"
    initial_weight: float = 1.0

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the sources, and of the initial pivot as the last one."""
        return (*(source.weight for source in self.sources), self.initial_weight)


def read_sources(path: str | Path) -> SourcesConfig:
    """Read a sources.yaml; prefixes in it are relative to the file.

    Args:
        path: the file.

    Raises:
        UserError: not a readable file, an unknown or missing key, a wrong type, a name twice, or
            weights of some models alone.
    """
    path = Path(path)
    try:
        content = read_yaml(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}), expected a sources.yaml") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML ({reason})") from None
    _check_keys(content, str(path), required=("initial",), optional=("sources",))
    listed = content.get("sources") or []
    if not isinstance(listed, list):
        raise UserError(f"{path}: sources is {listed!r}, expected a list of name and logprobs")
    sources = tuple(_source(item, f"{path}: sources[{i}]", path) for i, item in enumerate(listed))
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: the name {name!r} is used twice, expected unique names")
    first, where = content["initial"], f"{path}: initial"
    if not isinstance(first, dict):
        first = {"logprobs": first}
    _check_keys(first, where, required=("logprobs",), optional=("weight",))
    items = {"initial": first} | {
        source.name: item for source, item in zip(sources, listed, strict=True)
    }
    without = [name for name, item in items.items() if item.get("weight") is None]
    if without and len(without) < len(items):
        raise UserError(
            f"{path}: there are weights, but not of {', '.join(without)}; expected a weight of "
            "every source and of the initial pivot (initial: {logprobs: PREFIX, weight: NUMBER}), "
            "or none"
        )
    config = SourcesConfig(
        _prefix(first["logprobs"], where, path), sources, str(path), _weight(first, where)
    )
    if not sum(config.weights):
        raise UserError(f"{path}: all weights are 0, expected one above")
    return config


def check_domains(config: SourcesConfig, known: Sequence[str]) -> None:
    """Check that every domain that a source names exists.

    Raises:
        UserError: names the unknown domain, the known ones and the likely intention.
    """
    for source in config.sources:
        for domain in source.domains or ():
            if domain not in known:
                close = difflib.get_close_matches(domain, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UserError(
                    f"{config.path}: source {source.name!r} names the domain {domain!r}, expected "
                    f"one of {', '.join(sorted(known))}{hint}"
                )


def check_accuracy(source: Source, domains: Collection[str], path: str) -> None:
    """Check that no accuracy of a source has a misspelt domain.

    An accuracy in a domain that no record has is no error: data may be a part of all there is. But
    it is, where its name is nearly that of a domain that the source has records and no accuracy of.

    Args:
        source: the source.
        domains: of the records that it takes part in.
        path: the sources.yaml, for the error.

    Raises:
        UserError: names the domain that is probably meant.
    """
    if not isinstance(source.accuracy, dict):
        return
    lacking = [domain for domain in domains if domain not in source.accuracy]
    for domain in source.accuracy:
        if domain not in domains and (close := difflib.get_close_matches(domain, lacking, n=1)):
            raise UserError(
                f"{path}: source {source.name!r} has an accuracy in {domain!r}, which no record "
                f"has, and none in {close[0]!r}; did you mean {close[0]!r}? Expected accuracies in "
                "both otherwise"
            )


def _source(item: Any, where: str, path: Path) -> Source:
    optional = ("domains", "score", "weight", "accuracy")
    _check_keys(item, where, required=("name", "logprobs"), optional=optional)
    name, domains, score = item["name"], item.get("domains"), item.get("score") or {}
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: name is {name!r}, expected a word")
    if domains is not None:
        texts = isinstance(domains, list) and all(isinstance(d, str) for d in domains)
        if not texts or not domains:
            raise UserError(
                f"{where}: domains is {domains!r}, expected a list of names; leave it out for all"
            )
        domains = tuple(domains)
    flags = _flags(score, f"{where}: score")
    prefix = _prefix(item["logprobs"], f"{where}: logprobs", path)
    accuracy = _accuracy(item.get("accuracy"), f"{where}: accuracy")
    return Source(name, prefix, domains, flags, _weight(item, where), accuracy)


def _weight(item: dict[str, Any], where: str) -> float:
    """Return a model's weight, which is 1 where nothing is said."""
    value = item.get("weight")
    if value is None:
        return 1.0
    if not _is_number(value) or not 0 <= value < math.inf:
        raise UserError(f"{where}: weight is {value!r}, expected a number of at least 0")
    return float(value)


def _accuracy(value: Any, where: str) -> float | dict[str, float] | None:
    """Return a source's accuracy, one or by domain, or None."""
    if value is None:
        return None
    for domain, one in value.items() if isinstance(value, dict) else [("", value)]:
        if not isinstance(domain, str):
            raise UserError(f"{where} has the domain {domain!r}, expected a text: put it in quotes")
        if not _is_number(one) or not 0 <= one <= 1:
            of = f" of {domain}" if domain else ""
            raise UserError(
                f"{where}{of} is {one!r}, expected a number from 0 to 1, or one for each domain as "
                "in {math: 0.93, code: 0.7}"
            )
    return dict(value) if isinstance(value, dict) else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flags(score: Any, where: str) -> dict[str, Any]:
    """Check the flags that a source is scored with."""
    if not isinstance(score, dict):
        raise UserError(f"{where} is {score!r}, expected flags of infifpo score")
    for flag, value in score.items():
        if not isinstance(flag, str) or not re.fullmatch(r"[a-z][a-z0-9-]*", flag):
            raise UserError(
                f"{where} has the key {flag!r}, expected a flag of infifpo score without "
                "its dashes, such as tensor-model-parallel-size"
            )
        if flag in _GIVEN:
            raise UserError(
                f"{where} has {flag}, which every run gives itself: {_GIVEN[flag]}; leave it out"
            )
        one = isinstance(value, str | int | float)
        several = isinstance(value, list) and value and all(_is_word(v) for v in value)
        if not (one or several or isinstance(value, dict)):
            raise UserError(
                f"{where}: {flag} is {value!r}, expected a text, a number, true or false, a list "
                "of those, or a mapping (a date: in quotes)"
            )
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: {flag} is {value!r}, which JSON cannot hold ({error}): put dates in "
                "quotes, and give finite numbers"
            ) from None
    return dict(score)


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _prefix(value: Any, where: str, path: Path) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} is {value!r}, expected the prefix of a log-prob dataset")
    return str(path.parent / value)


def _check_keys(
    content: Any, where: str, *, required: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    known = (*required, *optional)
    if not isinstance(content, dict):
        raise UserError(f"{where} is {content!r}, expected the keys {', '.join(known)}")
    for key in content:
        if key not in known:
            raise UserError(f"{where} has the unknown key {key!r}, expected {', '.join(known)}")
    for key in required:
        if content.get(key) is None:
            raise UserError(f"{where} lacks the key {key!r}, expected {', '.join(known)}")
