"""How files lie: short ones, of short functions; tests as the package does, none needs another."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FILES = [path.relative_to(TESTS) for path in sorted(TESTS.rglob("*.py"))]
PACKAGE = TESTS.parent / "megatron_infifpo"
SOURCES = sorted(
    path.relative_to(TESTS.parent)
    for folder in (PACKAGE, TESTS.parent / "tools", TESTS)
    for path in folder.rglob("*.py")
)
# As CONTRIBUTING.md says.
MOST_LINES = {"megatron_infifpo": 300, "tools": 300, "tests": 400}
MOST_OF_A_FUNCTION = 60
# Beside the folders that mirror the package.
OTHERS = {"distributed", "frozen", "fuzz", "golden", "gpu", "integration", "slurm", "support"}


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_lengths(path):
    text = (TESTS.parent / path).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES[path.parts[0]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MOST_OF_A_FUNCTION, node.name


@pytest.mark.parametrize("path", FILES, ids=str)
def test_needs_no_other_test(path):
    modules = {name.rpartition(".")[2] for name in imported(TESTS / path)}
    others = {other.stem for other in FILES if other.parts[0] != "support"}
    assert not modules & others, "what tests share belongs into tests/support"


def test_folders_are_those_of_the_package():
    wings = {folder.name for folder in PACKAGE.iterdir() if folder.is_dir()}
    folders = {path.parts[0] for path in FILES if len(path.parts) > 1}
    assert folders - OTHERS <= wings
