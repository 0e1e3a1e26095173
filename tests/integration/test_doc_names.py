"""What the docs name is there: commands and their flags, files, modules, links."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

from megatron_infifpo.commands.main import COMMANDS, PAGES
from support.launcher import ROOT
from support.names import MODULES, names_in

# The changelog and the lab log speak of their own day.
DATED = {ROOT / "CHANGELOG.md", ROOT / "docs" / "lab-log.md"}
DOCS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")})
NOW = [path for path in DOCS if path not in DATED]
# `infifpo NAME ...`, `-m megatron_infifpo NAME ...`, `-m megatron_infifpo.train ...`
COMMAND = re.compile(
    r"(?:(?:(?<![\w./-])infifpo|-m megatron_infifpo) +(?P<name>[a-z][a-z-]+)"
    r"|-m megatron_infifpo\.train)(?P<words>[^`\n]*)"
)
OPTIONS = re.compile(r"""--([a-z]+)-options ["']([^"']*)["']""")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
PATH = re.compile(
    r"(?<![\w/.-])((?:megatron_infifpo|tests|tools|docs|examples|\.github)/[\w./-]*\w)"
)
MODULE = re.compile(r"(?<![\w/.-])(megatron_infifpo(?:\.\w+)+)")
# `rows/plan.py` and `rows/plan.py: plan_step`, from the package's folder
IN_PACKAGE = re.compile(
    r"`((?:[a-z_]+/[\w/]+|losses|reference|logprobs|methods|options)\.py)(?::\s(\w+))?"
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"(?:^ {4}.*\n|^\n(?= {4}))+", re.M)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")

PACKAGE = "megatron_infifpo"
ENTRY_POINTS = {"megatron_infifpo.executors"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    """A page, with commands that go over several lines in one."""
    return re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", NOW, ids=name_of)
def test_commands_and_flags(path):
    for match in COMMAND.finditer(text_of(path)):
        name, words = match["name"] or "train", match["words"].split(" #")[0]
        assert name in COMMANDS, match[0]
        # Of rounds: words of a stage are flags of that.
        inner = OPTIONS.findall(words) if name == "rounds" else []
        for command, given in [(name, OPTIONS.sub(r"--\1-options", words)), *inner]:
            pages = "".join(page.read_text("utf-8") for page in PAGES.glob(f"{command}*.txt"))
            unknown = {*FLAG.findall(given)} - {*FLAG.findall(pages), "--help"}
            assert not unknown, f"{match[0]}: {command} {unknown}"


@pytest.mark.parametrize("path", NOW, ids=name_of)
def test_files(path):
    for found in PATH.findall(path.read_text(encoding="utf-8")):
        assert (ROOT / found).exists(), found


@pytest.mark.parametrize("path", NOW, ids=name_of)
def test_modules(path):
    for found in MODULE.findall(path.read_text(encoding="utf-8")):
        path = ROOT.joinpath(*found.split("."))
        module = path.parent.with_suffix(".py")  # where it is a name in a module
        there = path.is_dir() or path.with_suffix(".py").is_file()
        there = there or (module.is_file() and path.name in module.read_text(encoding="utf-8"))
        assert there or found in ENTRY_POINTS, found


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_links(path):
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", [p for p in NOW if p.parent != ROOT], ids=name_of)
def test_functions(path):
    elsewhere = ("tests/", "tools/", "examples/", "megatron_infifpo/", "commands/NAME")
    for file, name in IN_PACKAGE.findall(path.read_text(encoding="utf-8")):
        if not file.startswith(elsewhere):
            text = (ROOT / "megatron_infifpo" / file).read_text(encoding="utf-8")
            assert re.search(rf"^ *(def|class) {name}\b|^{name}\b.* = ", text, re.M), (file, name)


def programs(text: str) -> list[ast.Module]:
    """Blocks of a page, fenced or indented, that are Python and import from the package."""
    blocks = [block for language, block in FENCED.findall(text) if language == "python"]
    blocks += [textwrap.dedent(block) for block in INDENTED.findall(FENCED.sub("", text))]
    return [ast.parse(block) for block in blocks if "from megatron_infifpo" in block]


@pytest.mark.parametrize("path", NOW, ids=name_of)
def test_imported_names(path):
    for program in programs(path.read_text(encoding="utf-8")):
        taken = {}  # a module of ours -> what it is called here
        for node in ast.walk(program):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                for alias in node.names:
                    assert alias.name in names_in(node.module), ast.unparse(node)
                    taken[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(program):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = taken.get(node.value.id)
                assert module not in MODULES or node.attr in names_in(module), ast.unparse(node)


def test_a_name_that_is_gone_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("So:\n\n    from megatron_infifpo import train\n    train.gone(1)\n")
    with pytest.raises(AssertionError, match=r"train\.gone"):
        test_imported_names(page)
