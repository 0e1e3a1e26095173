"""How tests lie: as the package does, in short files, none of which needs another."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FILES = [path.relative_to(TESTS) for path in sorted(TESTS.rglob("*.py"))]
MOST_LINES = 400
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


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file(path):
    assert len((TESTS / path).read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    modules = {name.rpartition(".")[2] for name in imported(TESTS / path)}
    others = {other.stem for other in FILES if other.parts[0] != "support"}
    assert not modules & others, "what tests share belongs into tests/support"


def test_folders_are_those_of_the_package():
    package = TESTS.parent / "megatron_infifpo"
    wings = {folder.name for folder in package.iterdir() if folder.is_dir()}
    folders = {path.parts[0] for path in FILES if len(path.parts) > 1}
    assert folders - OTHERS <= wings
