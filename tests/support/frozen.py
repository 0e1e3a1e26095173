"""What users and their files rely on: flags by command, and file formats, as plain values."""

import argparse
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from support.job_setup import Setup
from support.launcher import ROOT, Ranks

FROZEN = ROOT / "tests" / "frozen"
# Objects whose names are data, such as a reason of a note.
BY_DATA = {"notes", "note_counts", "remarks", "remark_counts", "sources", "flags"}
BY_DATA |= {"models", "masked", "coverage"}
VARYING = {"git_revision": "str or null"}  # by where the tests run
INDEX_HEADER = 17  # bytes of Megatron's mark and version; then one byte, the code of the type


def flags() -> dict[str, dict[str, str]]:
    """Every flag of every command, in words: its values, default and kind. Megatron's own are not
    ours to freeze."""
    from megatron_infifpo.commands.main import COMMANDS, make_parser

    found: dict[str, dict[str, str]] = {}
    for name in COMMANDS:
        for words, parser in _parsers(name, make_parser(name)[1]):
            found[words] = {
                option: in_words(action)
                for option, action in sorted(parser._option_string_actions.items())
                if option not in ("-h", "--help")
            } | {
                action.dest: in_words(action)
                for action in parser._get_positional_actions()
                if not isinstance(action, argparse._SubParsersAction)
            }
    for option in megatrons_own():
        found["train"].pop(option, None)
    return found


def megatrons_own() -> set[str]:
    """Options of Megatron's parser."""
    from megatron_infifpo.patches import cpu

    cpu.enable()
    from megatron.training.arguments import add_megatron_arguments

    return set(add_megatron_arguments(argparse.ArgumentParser())._option_string_actions)


def _parsers(
    name: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A command, and those in it."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner, its in action.choices.items():
                yield from _parsers(f"{name} {inner}", its)


def in_words(action: argparse.Action) -> str:
    """A flag's kind, values and default: what a change of it would break."""
    kind = type(action).__name__.strip("_").removesuffix("Action").lower()
    words = [] if kind == "store" else [kind]
    if action.type is not None:
        words.append(_reader(action.type))
    if action.choices is not None:
        words.append("one of " + ", ".join(map(str, action.choices)))
    if action.nargs not in (None, 0):
        words.append(f"nargs {action.nargs}")
    if action.required:
        words.append("required")
    elif action.default not in (None, argparse.SUPPRESS):
        words.append(f"default {action.default}")
    if action.option_strings[1:]:
        words.append("also " + ", ".join(action.option_strings))
    return "; ".join(words)


def _reader(kind: Any) -> str:
    """Name of what reads a value, with the limits that it was made with."""
    limits = inspect.getclosurevars(kind).nonlocals if inspect.isfunction(kind) else {}
    inside = ", ".join(f"{name}={value}" for name, value in limits.items())
    return kind.__qualname__.split(".")[0] + (f"({inside})" if inside else "")


def formats(setup: Setup, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Every file format between two commands, as a tiny job writes it."""
    sources = setup.sources("frozen", "{name: qwen, logprobs: qwen}", "{name: phi, logprobs: phi}")
    run = folder / "run"
    ranks(1, "support.training:train", setup.flags(sources, "--save", str(run)))
    adapters = folder / "adapters"
    few = ["--lora-rank", "2", "--stop-at", "1", "--save", str(adapters)]
    ranks(1, "support.training:train", setup.flags(sources, *few))
    scoring = ["--backend", "megatron", "--model", str(setup.hf), "--input", str(setup.records)]
    ranks(1, "support.scoring:score", [*scoring, "--output", str(folder / "top"), "--top-k", "4"])
    soft = _soft_targets(setup, folder)
    return {
        "token dataset": dataset_format(setup.data, setup.records),
        "log-prob dataset": dataset_format(setup.folder / "initial", setup.records),
        "log-prob dataset with the most probable tokens": dataset_format(
            folder / "top", setup.records
        ),
        **{name: dataset_format(prefix, setup.records) for name, prefix in soft.items()},
        "run.json": json_format(run / "run.json"),
        "imported checkpoint": checkpoint_format(setup.pivot),
        "trained checkpoint": checkpoint_format(run),
        "lora.json": json_format(adapters / "lora.json"),
        "checkpoint of adapters": checkpoint_format(adapters),
    }


def _soft_targets(setup: Setup, folder: Path) -> dict[str, Path]:
    """Fuse the data set `top`, with all files that soft targets may have."""
    from megatron_infifpo.fusing.job import FusingJob, fuse_targets

    sources = folder / "fused.yaml"
    sources.write_text("initial: top\nsources: [{name: top, logprobs: top}]\n", encoding="utf-8")
    found = {"soft-target dataset": folder / "soft", "soft-target dataset of values": folder / "v"}
    options: list[dict[str, Any]] = [{"ambiguous": "group"}, {"fusion": "none"}]
    for prefix, more in zip(found.values(), options, strict=True):
        fuse_targets(FusingJob(str(setup.data), str(sources), str(prefix), **more))
    return found


def dataset_format(prefix: Path, records: Path) -> dict[str, Any]:
    """The files of a data set, their types, and the tree of its manifest.

    Args:
        prefix: of the data set.
        records: a file beside it that is none of it.
    """
    manifest = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    files = {}
    for path in sorted({*prefix.parent.glob(f"{prefix.name}[._]*")} - {records}):
        name = path.name.removeprefix(prefix.name)
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
            files[name] = f"{array.dtype}, {array.ndim} axes"
        elif path.suffix == ".idx":
            files[name] = f"index of type {path.read_bytes()[INDEX_HEADER]}"
        else:
            files[name] = ""
    return _versioned(manifest) | {"files": files, "manifest": tree(manifest)}


def json_format(path: Path) -> dict[str, Any]:
    """The tree of a JSON file that names its format."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return _versioned(found) | {"manifest": tree(found)}


def checkpoint_format(folder: Path) -> dict[str, Any]:
    """The files of a checkpoint's folder, its weights, and the tree of its marks."""
    from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint

    (metadata,) = folder.glob("*/.metadata")
    step = TorchDistCheckpoint(metadata.parent)
    return {
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")),
        "weights": {
            name: f"{step.dtype(name)} of {len(step.shape(name))} axes".removeprefix("torch.")
            for name in step.names()
        },
        "marks": {
            name: tree(json.loads((metadata.parent / name).read_text(encoding="utf-8")))
            for name in ("metadata.json", "checksums.json")
        },
    }


def tree(value: Any) -> Any:
    """A JSON value with types in place of its values; of a list its first entry."""
    if isinstance(value, dict):
        return {
            name: {"*": tree(next(iter(inside.values())))}
            if name in BY_DATA and isinstance(inside, dict) and inside
            else VARYING.get(name) or tree(inside)
            for name, inside in value.items()
        }
    if isinstance(value, list):
        return [tree(entry) for entry in value[:1]]
    return "null" if value is None else type(value).__name__


def _versioned(found: dict[str, Any]) -> dict[str, Any]:
    return {"format": found["format"], "version": found["version"]}
