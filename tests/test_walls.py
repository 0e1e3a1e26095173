"""The walls between the wings of the package, and docs/architecture.svg, which shows them."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import draw_architecture  # noqa: E402
from walls import PACKAGE, PLACE, WINGS, arrows, imports  # noqa: E402

# Formulas: torch, and each other.
PURE = tuple(
    "options distillation losses pair_weights source_values reference logprobs methods".split()
)
# What users give is read without Megatron, and formulas are computed without it. The head alone
# asks it, inside one function, for tensor-parallel communication.
WITHOUT_MEGATRON = {wing.name for wing in WINGS[: PLACE["storage"]]} | {"records"}
MAY_USE_MEGATRON = {"patches", "megatron_flags", "logprobs"}
NAMESPACES = {
    "training/megatron_args.py": "Megatron's own of a run, made and asked here alone",
    "engine/gpt.py": "Megatron checks them, and makes a model's configuration of them",
    "convert/hf_import.py": "a checkpoint of Megatron holds one",
    "storage/common_state.py": "and this reads it",
}


def test_wings_are_the_packages():
    """Every file and folder has a place in the order."""
    there = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__"}
    there |= {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert there == set(PLACE), "tools/walls.py lists the wings, low to high"


def test_imports_run_downwards():
    """A wing imports only what stands before it."""
    upward = [
        found
        for found in imports()
        if found.wing and found.target_wing and PLACE[found.wing] < PLACE[found.target_wing]
    ]
    assert not upward, "upward, against tools/walls.py:\n" + "\n".join(map(str, upward))


def test_no_star_and_no_relative_imports():
    """What is imported can be read where it is used."""
    for file in (ROOT / PACKAGE).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not node.level and node.names[0].name != "*", f"{file}:{node.lineno}"


def test_formulas_import_torch_alone():
    """Formulas work in any notebook: torch, and how flags and errors are said to the user."""
    for found in imports():
        first = found.target.split(".")[0]
        if found.wing in PURE and first not in sys.stdlib_module_names:
            ours = found.target_wing in (*PURE, "errors", "flag_types")
            head = found.wing == "logprobs" and first == "megatron"
            assert first == "torch" or ours or head, found


def test_errors_import_nothing_of_ours():
    """Everything may raise them."""
    assert not [str(found) for found in imports() if found.wing == "errors" and found.target_wing]


def test_megatron_is_above_data():
    """No wing below storage, nor records, imports Megatron, but those that are about it."""
    for found in imports():
        if found.target.split(".")[0] == "megatron":
            assert found.wing not in WITHOUT_MEGATRON - MAY_USE_MEGATRON, found


def test_command_lines_stay_in_commands():
    """Below the commands there are typed jobs."""
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = file.relative_to(ROOT / PACKAGE).as_posix()
        if not name.startswith("commands/") and name not in NAMESPACES:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                named = re.search(r"\bNamespace\b", line)
                assert not named, f"{PACKAGE}/{name}:{number}: {line.strip()}"


def test_picture_is_up_to_date():
    """The wings and the imports of docs/architecture.svg are those of the code."""
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    shown = re.search(r"<desc>(.*?)</desc>", picture, re.DOTALL)
    assert shown and shown.group(1).split("\n") == draw_architecture.said(arrows()), (
        "wings import others than docs/architecture.svg shows: "
        "draw it again with `python tools/draw_architecture.py`"
    )


def test_readme_has_the_tree():
    """The README's list of parts is that of tools/walls.py, in its order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = [f"      {name:<16}{line.replace('`', '')}" for name, line in WINGS if name[0] != "_"]
    assert "\n".join(["    megatron_infifpo/", *tree]) in readme
