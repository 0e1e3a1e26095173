"""Results of evaluations as files: what each was made of, and whether it still holds.

A result holds as long as nothing changed that its number follows from: the model (weights,
configuration, tokenizer, chat template, generation settings), the task (its files and local data,
settings, the harness), and how it was run. Data sets of a hub are taken to stay as they are.
"""

import glob
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.errors import UserError
from megatron_infifpo.responses.benchmarks import BENCHMARKS, Benchmark
from megatron_infifpo.storage.aside import Aside, write_text
from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*")
_LONGEST_NAME = 200  # bytes; file systems take 255, and a part is added while it is written


def result_path(output: Path, model: str, benchmark: str) -> Path:
    """Where a result is kept; characters that no file name has are escaped.

    Raises:
        UserError: the name of the model is none, or too long.
    """
    name = f"{quote(model, safe=' +,@=')}-{quote(benchmark, safe=' +,@=')}.json"
    if not model.strip() or len(os.fsencode(name)) > _LONGEST_NAME:
        raise UserError(f"--model {model[:80]}=...: expected a short name before the equals sign")
    return output / name


def reserve(path: Path) -> None:
    """Make sure that a result can be written, before it takes hours to get it.

    Raises:
        UserError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Aside().path(path)
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def read(path: Path) -> dict[str, Any]:
    """Return what `write` wrote, or nothing where there is no such result."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a result whole or not at all."""
    write_text(path, json.dumps(found, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as Python's; other things as a text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def model_settings(folder: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """What a model's numbers follow from, as hashes.

    Raises:
        UserError: not a model's folder, or one without a chat template.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # of several, the harness takes this one
        template = template.get("default")
    if not template:
        raise UserError(
            f"{folder} has no chat template, and benchmarks are asked as chats: put the model's "
            "chat_template.jinja into the folder"
        )
    code = folder.glob("*.py") if trust_remote_code else ()
    return {
        "weights_sha256": weights_fingerprint(folder),
        "config_sha256": _hash_files([folder / "config.json"], folder),
        "generation_config_sha256": _hash_files([folder / "generation_config.json"], folder),
        "tokenizer_sha256": _hash_files((p for g in _TOKENIZER for p in folder.glob(g)), folder),
        "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest(),
        "code_sha256": _hash_files(code, folder),
    }


def task_settings(name: str, benchmark: Benchmark, tasks: str | None) -> dict[str, Any]:
    """What a task is: its name, its examples, its files, and the harness.

    Args:
        name: of the benchmark.
        benchmark: the benchmark.
        tasks: folder of the user's task files, if there is one.
    """
    try:
        harness = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        harness = None
    own = None if tasks is None else _tasks_hash(Path(tasks), None if name not in BENCHMARKS else
                                                 str(benchmark.task))  # fmt: skip
    settings = {"task": benchmark.task, "shots": benchmark.shots, "lm_eval": harness}
    return settings | {"task_files_sha256": own}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of settings that differ, without the ends that say they are hashes."""
    names = sorted(before.keys() | now.keys())
    return [n.removesuffix("_sha256") for n in names if before.get(n) != now.get(n)]


def _tasks_hash(folder: Path, task: str | None) -> str | None:
    """Hash of task files, their code, and the data on this machine that they name.

    None where a task of the harness is asked for that none of the files mentions.
    """
    files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    described = [p for p in files if p.suffix in (".yaml", ".yml")]
    if task is not None and not any(task in p.read_text(errors="replace") for p in described):
        return None
    data = {path for file in described for path in _named_in(file)}
    return _hash_files([*files, *data], folder)


def _named_in(file: Path) -> Iterator[Path]:
    """Files that a task file names, and those in the folders of its data."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _AnyTag)
    except (yaml.YAMLError, ValueError):
        return  # the harness says so
    for text in _texts(content):
        if len(text) < 1000 and "\n" not in text:
            yield from (p for p in (Path(text), file.parent / text) if p.is_file())
    if isinstance(content, dict):
        for text in _texts([content.get("dataset_path"), content.get("dataset_kwargs")]):
            for found in map(Path, glob.glob(text, recursive=True)):
                yield from (
                    (p for p in found.rglob("*") if p.is_file()) if found.is_dir() else [found]
                )


class _AnyTag(yaml.SafeLoader):
    """Reads a tag of the harness's (`!function utils.f`) as the text behind it."""


_AnyTag.add_multi_constructor("!", lambda loader, tag, node: getattr(node, "value", None))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _hash_files(paths: Iterable[Path], folder: Path) -> str | None:
    """Hash of the names and contents of files; None where there are none."""
    digest = hashlib.sha256()
    found = sorted({path.resolve(): path for path in paths if path.is_file()}.values())
    for path in found:
        inside = path.relative_to(folder) if path.is_relative_to(folder) else path
        with open(path, "rb") as file:
            digest.update(f"{inside} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest() if found else None
