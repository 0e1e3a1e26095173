#!/usr/bin/env python
"""The wings of the package from low to high, and the imports between them.

    python tools/walls.py        # every arrow between two wings, and how many imports it stands for

A wing imports only what stands before it in `WINGS`: tests/test_walls.py holds the code to it, and
tools/draw_architecture.py draws it.
"""

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "megatron_infifpo"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE


class Wing(NamedTuple):
    """A file or a folder of the package, by what it is for."""

    name: str
    line: str  # what it is for


WINGS = (
    Wing("errors", "what a user did wrong: one sentence, exit code 2"),
    Wing("flag_types", "numbers and ranges on a command line"),
    Wing("ranks", "who this process is among the ranks"),
    Wing("options", "what a loss or a fusion takes: ranges, defaults"),
    Wing("distillation", "distances of distributions over tokens"),
    Wing("losses", "the losses, unreduced, each with its paper"),
    Wing("pair_weights", "what the sources say of a pair's label"),
    Wing("source_values", "sources' values before fusion: spread, clip"),
    Wing("reference", "clip and fuse sources into one reference"),
    Wing("alignment", "tokens of two tokenizers, aligned by bytes"),
    Wing("logprobs", "the log-prob head: chunked, vocabulary-parallel"),
    Wing("methods", "presets of loss, reference and options"),
    Wing("patches", "what is changed in Megatron, and until when"),
    Wing("megatron_flags", "what becomes of every flag of Megatron"),
    Wing("storage", "what lies on disk: documents, weights, manifests"),
    Wing("records", "what users give: files, forms, messages"),
    Wing("tokens", "chat templates, and what exactly is scored"),
    Wing("references", "stored log-probs of models, and sources.yaml"),
    Wing("families", "model families: configuration, tensors, layers"),
    Wing("convert", "Hugging Face to Megatron and back"),
    Wing("rows", "pairs into rows, rows into steps"),
    Wing("engine", "Megatron's model on packed rows, with our head"),
    Wing("scoring", "log-probs of every response under one model"),
    Wing("fusing", "what sources say of every token, fused into soft targets"),
    Wing("planning", "memory and hours of a run, on paper"),
    Wing("training", "a run: start, data, step, resume, failures"),
    Wing("checks", "is a conversion exact, do data belong together"),
    Wing("bench", "benchmarks, beside others' programs"),
    Wing("gpu_check", "what only a GPU can prove"),
    Wing("responses", "sampling, labels, benchmarks of models"),
    Wing("report", "a page about a run"),
    Wing("recipes", "stages and command lines for clusters"),
    Wing("rounds", "rounds on samples of the policy, stage by stage"),
    Wing("run", "run.yaml: one file says what a run is, one command makes it"),
    Wing("study", "does fusing help? methods in a small world"),
    Wing("commands", "one file a subcommand of `infifpo`"),
    Wing("__main__", "`python -m megatron_infifpo`"),
    Wing("train", "`python -m megatron_infifpo.train`, for torchrun"),
)
GROUND = ("errors", "flag_types", "ranks")  # below everything, and imported by nearly everything
PLACE = {wing.name: place for place, wing in enumerate(WINGS)}


class Import(NamedTuple):
    """One import statement's target, wherever in a file it stands."""

    file: Path
    line: int
    target: str  # a dotted name: `torch`, `megatron_infifpo.rows.packing`

    @property
    def wing(self) -> str:
        """The wing that imports; empty for the package's own `__init__.py`."""
        first = self.file.relative_to(ROOT).parts[0].removesuffix(".py")
        return "" if first == "__init__" else first

    @property
    def target_wing(self) -> str | None:
        """The wing that is imported; None where it is no wing, such as the package's version."""
        package, _, rest = self.target.partition(".")
        return rest.split(".")[0] or None if package == PACKAGE else None

    def __str__(self) -> str:
        """A place to click on: file, line, import."""
        return f"{self.file.relative_to(ROOT.parent)}:{self.line}: imports {self.target}"


def imports() -> Iterator[Import]:
    """Every import of the package, those inside functions and under TYPE_CHECKING, too."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [_full_name(file, node, alias.name) for alias in node.names]
            else:
                continue
            yield from (Import(file, node.lineno, name) for name in dict.fromkeys(names))


def arrows() -> Counter[tuple[str, str]]:
    """How often modules of one wing import modules of another: (wing, imported wing) -> imports."""
    pairs = {
        (found.file, found.target): (found.wing, str(found.target_wing))
        for found in imports()
        if found.wing in PLACE and found.target_wing in PLACE and found.wing != found.target_wing
    }
    return Counter(pairs.values())


def lines() -> dict[str, int]:
    """Lines of each wing."""
    count = {wing.name: 0 for wing in WINGS}
    for file in ROOT.rglob("*.py"):
        name = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if name in count:
            count[name] += len(file.read_text(encoding="utf-8").splitlines())
    return count


def _full_name(file: Path, node: ast.ImportFrom, name: str) -> str:
    """`from a.b import c` as `a.b.c` where c is a module of ours, else as `a.b`."""
    module = node.module or ""
    if node.level:  # relative: from the file's own folder, or one above for each further dot
        folder = file.relative_to(ROOT.parent).parts[: -node.level]
        module = ".".join([*folder, *filter(None, [module])])
    path = ROOT.parent.joinpath(*module.split("."), name)
    ours = module.split(".")[0] == PACKAGE and (path.is_dir() or path.with_suffix(".py").is_file())
    return f"{module}.{name}" if ours else module


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for (wing, target), count in sorted(arrows().items(), key=lambda item: PLACE[item[0][0]]):
        mark = "" if PLACE[target] < PLACE[wing] else "   upward"
        print(f"{wing:>15} -> {target:<15} {count:3d}{mark}")
