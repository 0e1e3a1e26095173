"""sources.yaml: the log-prob datasets of the initial pivot and of the sources.

initial: logprobs/pivot
sources:
  - name: qwen2.5-14b
    logprobs: logprobs/qwen
  - name: qwen2.5-coder-14b
    logprobs: logprobs/coder
    domains: [code]
    score: {model: models/qwen-coder, tensor-model-parallel-size: 8}
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_infifpo.cli import UserError


@dataclass(frozen=True, slots=True)
class Source:
    """One source model.

    Attributes:
        name: unique, for metrics and reports.
        logprobs: prefix of its log-prob dataset.
        domains: the domains that it takes part in; None means all.
        score: flags of tools/score_source.py that recipes score it with; training ignores them.
    """

    name: str
    logprobs: str
    domains: tuple[str, ...] | None = None
    score: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourcesConfig:
    """The content of a sources.yaml.

    Attributes:
        initial: prefix of the initial pivot's log-prob dataset.
        sources: the M sources, in order.
        path: the file, for errors.
    """

    initial: str
    sources: tuple[Source, ...] = ()
    path: str = "sources.yaml"


def read_sources(path: str | Path, *, domains: Sequence[str] | None = None) -> SourcesConfig:
    """Read a sources.yaml; prefixes in it are relative to the file.

    Args:
        path: the file.
        domains: the known domains, to check the sources' against, if given.

    Raises:
        UserError: not a readable file, an unknown or missing key, a wrong type, a name twice, or
            an unknown domain.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}), expected a sources.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
    initial = _prefix(content["initial"], f"{path}: initial", path)
    config = SourcesConfig(initial, sources, str(path))
    if domains is not None:
        check_domains(config, domains)
    return config


def check_domains(config: SourcesConfig, known: Sequence[str]) -> None:
    """Check that every source's domains exist.

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


def _source(item: Any, where: str, path: Path) -> Source:
    _check_keys(item, where, required=("name", "logprobs"), optional=("domains", "score"))
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
    scalar = str | int | float
    if not isinstance(score, dict) or not all(isinstance(v, scalar) for v in score.values()):
        raise UserError(f"{where}: score is {score!r}, expected flags of tools/score_source.py")
    flags = {str(key): str(value) for key, value in score.items()}
    return Source(name, _prefix(item["logprobs"], f"{where}: logprobs", path), domains, flags)


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
