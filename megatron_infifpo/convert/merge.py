"""Hugging Face folders of one origin -> one folder, a tensor at a time.

The formulas are in `merging`. Weights are read through buffers and written aside, so that memory
holds one tensor of every model, and a folder that has its name is whole.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_infifpo import __version__
from megatron_infifpo.convert.fingerprint import computation, weights_fingerprint
from megatron_infifpo.convert.hf_files import HfWeights
from megatron_infifpo.convert.hf_folder import check_weights, only_dtype, open_hf
from megatron_infifpo.convert.hf_shards import plan_shards, shapes_of, write_index
from megatron_infifpo.convert.merge_job import MergeJob
from megatron_infifpo.convert.merging import MERGES, parameters
from megatron_infifpo.errors import UserError
from megatron_infifpo.families.mapping import Entry, WeightMapping
from megatron_infifpo.storage.checkpoints import carry, new_folder, write_config
from megatron_infifpo.storage.safetensors_io import SafetensorsWriter, Scratch
from megatron_infifpo.storage.share import Share
from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer

MERGE_FILE = "infifpo_merge.json"  # what a folder was merged of


class Part(NamedTuple):
    """One of the folders: the base, whose weight is None, or a model."""

    name: str
    folder: str
    weight: float | None
    weights: HfWeights
    scratch: Scratch
    sha256: str


def merge(job: MergeJob) -> None:
    """Merge models into a Hugging Face folder.

    One tensor of each model is in memory at a time. Ranks of torchrun share the files.

    Raises:
        UserError: folders that cannot be read or are no models of one origin, a model that is the
            base itself, weights that are not finite, or nowhere to write.
    """
    mapping, config, dtype, opened = _open(job)
    _check_tokenizers(job)
    share = Share()
    parts = _identify(job, opened, quiet=not share.first)
    shards = plan_shards(mapping, dtype, job.shard_bytes)
    mine = [name for number, name in enumerate(shards) if share.mine(number)]
    count = sum(len(entry.hf_names) for name in mine for entry in shards[name])
    with (
        new_folder(job.output, share, "--output") as folder,
        tqdm(total=count, unit="tensor", desc="merge", disable=not share.first) as bar,
    ):
        for name in mine:
            _write_shard(folder / name, shards[name], job, parts, dtype, bar)
        if share.first:
            write_index(folder, shards, dtype)
            carry(Path(job.base), folder)
            write_config(folder / "config.json", config, dtype)
            text = json.dumps(_describe(job, parts, dtype), indent=2, ensure_ascii=False)
            (folder / MERGE_FILE).write_text(text + "\n", encoding="utf-8")


def _open(
    job: MergeJob,
) -> tuple[WeightMapping, dict[str, Any], torch.dtype, list[HfWeights]]:
    """Open all folders, and refuse those that are no models of one origin.

    Returns:
        The base's tensors and its configuration, what is written in, and the weights of all.
    """
    opened: list[HfWeights] = []
    dtypes: dict[torch.dtype, str] = {}
    for name, folder in job.named:
        weights, mapping, config = open_hf(folder)
        for dtype, tensor in check_weights(weights, mapping).items():
            dtypes.setdefault(dtype, f"{folder}: {tensor}")
        opened.append(weights)
        if name == "--base":
            first, its_config = mapping, config
            expected, computed = shapes_of(mapping.entries()), computation(config)
            continue
        shapes = shapes_of(mapping.entries())
        for tensor in sorted(expected.keys() | shapes.keys()):
            if (shape := shapes.get(tensor)) != (origin := expected.get(tensor)):
                raise UserError(
                    f"{name} {folder}: tensor {tensor} is {_shaped(shape)}, but {_shaped(origin)} "
                    f"in --base {job.base}: expected models that were trained from the base"
                )
        for field, value in computation(config).items():
            if value != computed.get(field):
                raise UserError(
                    f"{name} {folder}: its config.json gives {field} {value!r}, that of --base "
                    f"{job.base} {computed.get(field)!r}: expected models that were trained from "
                    "the base"
                )
    written = job.dtype or only_dtype(dtypes, "--base and --models")
    return first, its_config, written, opened


def _shaped(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else f"of shape {list(shape)}"


def _check_tokenizers(job: MergeJob) -> None:
    """Refuse models of other vocabularies: the rows of their embeddings mean other tokens.

    A folder without a tokenizer is taken for one that has the base's.
    """
    tokenizers = {
        folder: load_tokenizer(folder)
        for _, folder in job.named
        if any(Path(folder).glob("tokenizer*"))
    }
    if job.base not in tokenizers:
        return
    base = tokenizers.pop(job.base)
    vocabulary = base.get_vocab()
    for folder, tokenizer in tokenizers.items():
        other = tokenizer.get_vocab()
        if differing := sorted(vocabulary.items() ^ other.items()):
            token = differing[0][0]
            raise UserError(
                f"--models {folder} has another vocabulary than --base {job.base}: token "
                f"{token!r} has the id {other.get(token)}, not {vocabulary.get(token)}; expected "
                "models that were trained from the base, with its tokenizer"
            )
        if tokenizer.chat_template != base.chat_template:
            print(f"{folder}: its chat template is not that of {job.base}, which is written")


def _identify(job: MergeJob, opened: list[HfWeights], *, quiet: bool) -> list[Part]:
    """Find out which weights there are, and refuse the same ones in two folders.

    Returns:
        The base, and the models sorted by their folders: sums do not depend on the order on the
        command line.
    """
    given = [None, *(job.weights or [1.0] * len(job.models))]
    parts: list[Part] = []
    folders = list(zip(job.named, given, opened, strict=True))
    for (name, folder), weight, weights in tqdm(folders, "identify", unit="model", disable=quiet):
        sha256 = weights_fingerprint(folder)
        for other in parts:
            if other.sha256 == sha256:
                raise UserError(
                    f"{name} {folder} has the weights of {other.name} {other.folder}: expected "
                    "models that were trained, each one once"
                )
        parts.append(Part(name, folder, weight, weights, Scratch(), sha256))
    return [parts[0], *sorted(parts[1:], key=lambda part: str(Path(part.folder).resolve()))]


def _write_shard(
    path: Path,
    entries: list[Entry],
    job: MergeJob,
    parts: Sequence[Part],
    dtype: torch.dtype,
    bar: tqdm,
) -> None:
    takes, given = parameters(job.method), dict(job.options)
    if "weights" in takes:
        given["weights"] = [part.weight for part in parts[1:]]
    with SafetensorsWriter(path, shapes_of(entries), dtype) as writer:
        for name in (name for entry in entries for name in entry.hf_names):
            if "base" in takes:
                given["base"] = _load(parts[0], name)
            targets = [_load(part, name) for part in parts[1:]]
            merged = MERGES[job.method](targets=targets, **given).to(dtype)
            if not _is_finite(merged):
                raise UserError(
                    f"merged tensor {name} has elements beyond {dtype}: expected smaller --weights "
                    "or --scale, or --dtype fp32"
                )
            writer.write(name, merged)
            bar.update()


def _load(part: Part, name: str) -> Tensor:
    """Read a tensor into memory that the next one is read into."""
    part.scratch.clear()
    tensor = part.weights.load(name, part.scratch)
    if not _is_finite(tensor):
        raise UserError(
            f"{part.name} {part.folder}: tensor {name} has elements that are infinite or NaN, and "
            "so would the merged one: leave the model out, its training has failed"
        )
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    """Whether all elements are numbers: least and largest are neither infinite nor NaN."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _describe(job: MergeJob, parts: Sequence[Part], dtype: torch.dtype) -> dict[str, Any]:
    """What a folder was merged of, and how."""
    weighted = "weights" in parameters(job.method)
    folders = [
        {"folder": str(Path(part.folder).resolve()), "weights_sha256": part.sha256}
        | ({"weight": part.weight} if weighted and part.weight is not None else {})
        for part in parts
    ]
    return {
        "format": "megatron_infifpo merge",
        "version": 1,
        "method": job.method,
        "options": job.options,
        "dtype": str(dtype).removeprefix("torch."),
        "base": folders[0],
        "models": folders[1:],
        "versions": {"megatron_infifpo": __version__, "torch": torch.__version__},
    }
