"""What comments and docstrings of the package name in backticks is there."""

import re

import pytest

from support.launcher import ROOT
from support.names import FILES, MODULES, module_of, names_in, said_and_used

NAME = re.compile(r"`(\w+)((?:\.\w+)*)(?:\(\))?`")
# Ends of files' names, and the group of entry points.
ELSEWHERE = (".py", ".json", ".yaml", ".executors")
# Fields of users' files, which the docs have.
FIELDS = {
    word
    for page in ("scoring.md", "file-formats.md")
    for word in re.findall(r"`(\w+)`", (ROOT / "docs" / page).read_text(encoding="utf-8"))
}


@pytest.fixture(scope="module")
def known() -> set[str]:
    """All words of the package's code, and of its files' names."""
    words = {word for path in FILES for kind, word in said_and_used(path) if kind == "used"}
    return words | FIELDS | {part for module in MODULES for part in module.split(".")}


def is_there(name: str) -> bool:
    """Whether `plan.plan_step` or `rows.plan.plan_step` is in a module so named, or is one."""
    first, _, last = name.rpartition(".")
    for module in MODULES:
        if f".{module}".endswith(f".{name}"):
            return True
        if f".{module}".endswith(f".{first}") and last in names_in(module):
            return True
    return False


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_names(path, known):
    modules = {part for module in MODULES for part in module.split(".")}
    said = " ".join(text for kind, text in said_and_used(path) if kind == "said")
    for first, rest in NAME.findall(said):
        if "_" in first and first.islower():
            assert first in known, f"`{first}{rest}`"
        if first in modules and rest and rest not in ELSEWHERE:
            assert is_there(first + rest), f"`{first}{rest}`"
