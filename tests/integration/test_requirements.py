"""The pinned environment of clusters: part of that of tests, complete, and without test tools."""

import ast
import importlib.metadata
import re
import runpy
import sys

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from support.launcher import ROOT

EXTRAS = ("parquet", "report")
# What a machine's GPUs and driver decide: installed first, see docs/clusters.md.
OF_THE_MACHINE = ("torch", "triton", "nvidia-", "cuda-", "transformer-engine", "apex")

# Peers of benchmarks, which say that they are missing; and an engine of its own environment.
GUARDED = {"datasets", "liger_kernel", "trl", "vllm"}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {plain(name): pin for name, pin in (line.split("==") for line in lines if line)}


@pytest.fixture
def required(monkeypatch) -> tuple[list[str], dict[str, list[str]]]:
    """Requirements and extras, as setup.py hands them to setuptools."""
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: given.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    return given["install_requires"], given["extras_require"]


def closure(requirements: list[str]) -> set[str]:
    """Names of all that these requirements bring, by what is installed here; PyTorch's not."""
    found: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        key = plain(requirement.name), frozenset(requirement.extras)
        if key in found or key[0].startswith(OF_THE_MACHINE):
            continue
        found.add(key)
        for text in importlib.metadata.requires(requirement.name) or []:
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                todo.append(needed)
    return {name for name, _ in found}


def test_pins_of_clusters():
    cluster, tests = pins("requirements-cluster.txt"), pins("requirements.txt")
    assert {name: tests.get(name) for name in cluster} == cluster
    assert not [name for name in cluster if name.startswith(OF_THE_MACHINE)]


def test_clusters_have_what_they_need_and_no_more(required):
    requirements, extras = required
    needed = closure(requirements + [text for extra in EXTRAS for text in extras[extra]])
    assert needed == set(pins("requirements-cluster.txt"))
    # accelerate is Megatron's, too.
    tools = {plain(Requirement(text).name) for text in extras["test"]} - needed
    assert {"pytest", "ruff", "mypy", "hypothesis", "trl"} <= tools


@pytest.mark.parametrize("name, oldest", [("torch", "2.12"), ("transformer-engine", "2.14")])
def test_oldest_versions(required, name, oldest):
    requirements, extras = required
    found = [Requirement(text) for text in requirements + extras["te"]]
    assert [r.specifier for r in found if plain(r.name) == name] == [SpecifierSet(f">={oldest}")]


def imported_modules() -> set[str]:
    """What the package imports of others, at the top of a file or inside functions."""
    found = set()
    for path in (ROOT / "megatron_infifpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"megatron_infifpo"}


def test_what_is_imported_is_declared(required):
    requirements, extras = required
    texts = requirements + [text for name in extras if name != "test" for text in extras[name]]
    declared = {plain(Requirement(text).name) for text in texts}
    owners = importlib.metadata.packages_distributions()
    for module in imported_modules() - GUARDED:
        names = {plain(name) for name in owners.get(module, [module])}
        assert names & declared, f"{module} is in no list of setup.py"
