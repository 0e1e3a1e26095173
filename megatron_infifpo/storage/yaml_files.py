"""YAML files that people write: a name twice is refused, where YAML would take the last one."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def read_yaml(
    path: Path, *, texts: bool = False, same: Callable[[str], str] = lambda name: name
) -> Any:
    """Read a YAML file.

    Args:
        path: the file.
        texts: keep all but true, false and null as the text that it is: YAML would take `1:30` for
            90, `010` for 8 and `off` for false.
        same: gives two spellings of one name the same value.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
        ValueError, yaml.YAMLError: it is not YAML, or has a name twice.
    """
    loader = (_Texts if texts else _Loader)(path.read_text(encoding="utf-8"))
    loader.same = same
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def lines_of(path: str | Path) -> dict[tuple[str | int, ...], int]:
    """Return the line, from 1, of every value in a YAML file, by the names that lead to it.

    Raises:
        OSError, UnicodeDecodeError, yaml.YAMLError: as `read_yaml`.
    """
    found: dict[tuple[str | int, ...], int] = {(): 1}

    def visit(node: yaml.Node, place: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*place, str(key.value))
                found[inner] = key.start_mark.line + 1
                visit(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                found[*place, number] = value.start_mark.line + 1
                visit(value, (*place, number))

    root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if root is not None:
        visit(root, ())
    return found


class _Loader(yaml.SafeLoader):
    """Refuses names that are given twice."""

    same: Callable[[str], str]

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose it, and look at its names before others are merged into it."""
        node = super().compose_mapping_node(anchor)
        first: dict[str, Any] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = self.same(key.value)
            if name in first:
                lines = sorted({each.start_mark.line + 1 for each in (first[name], key)})
                where = f"line{'s' * (len(lines) > 1)} {' and '.join(map(str, lines))}"
                raise yaml.YAMLError(f"{key.value} is given twice, in {where}")
            first[name] = key
        return node


class _Texts(_Loader):
    """Knows true, false and null, and what is merged; all else is text."""

    yaml_implicit_resolvers = {
        letter: [(tag, what) for tag, what in found if tag.endswith((":null", ":merge"))]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Texts.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
