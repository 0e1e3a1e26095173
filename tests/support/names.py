"""Which names the package's modules have, read off their text: nothing is imported."""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from support.launcher import ROOT

PACKAGE = ROOT / "megatron_infifpo"
FILES = sorted(PACKAGE.rglob("*.py"))
BEFORE_DOCSTRINGS = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)


def module_of(path: Path) -> str:
    """`megatron_infifpo.rows.plan` of its file; of `__init__.py` its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@functools.cache
def names_in(module: str) -> set[str]:
    """What a module of ours has: definitions, what it imports, the modules in it."""
    found = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == module}
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def said_and_used(path: Path) -> Iterator[tuple[str, str]]:
    """Comments and docstrings of a file, ("said", text), and words of its code, ("used", word)."""
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield "said", token.string
            continue
        if token.type == tokenize.STRING and before in BEFORE_DOCSTRINGS:
            yield "said", token.string
        elif token.type in (tokenize.STRING, tokenize.NAME, tokenize.FSTRING_MIDDLE):
            yield from (("used", word) for word in re.findall(r"\w+", token.string))
        before = token.type
