"""A Megatron checkpoint as a model: its weights, what they are called, and what it is."""

from pathlib import Path
from typing import Any

from megatron_infifpo.convert.adapters import Adapters, adapted, holds_adapters
from megatron_infifpo.convert.block_fp8 import open_scored
from megatron_infifpo.convert.foreign import check_arguments
from megatron_infifpo.convert.hf_folder import check_weights, open_hf
from megatron_infifpo.convert.model_weights import FolderWeights, MegatronWeights, ModelWeights
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import family, megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.families.mapping import Keys, WeightMapping
from megatron_infifpo.ranks import rank
from megatron_infifpo.storage.checkpoints import HF_FOLDER, find_checkpoint
from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint


def open_checkpoint(
    load_dir: str | Path,
    iteration: int | None = None,
    base: str | Path | None = None,
    hf: str | Path | None = None,
) -> tuple[ModelWeights, WeightMapping, dict[str, Any]]:
    """Open a Megatron checkpoint and check that it holds the model of its config.json.

    One of adapters alone is opened with its base, as the model that both are.

    Args:
        load_dir: of the checkpoint.
        iteration: which one; default: the latest.
        base: of adapters; default: where it was when they were trained.
        hf: a Hugging Face folder whose config.json it is, for one that carries none.

    Raises:
        UserError: not a checkpoint, or a tensor is missing, surplus or of another shape; arguments
            that were trained with and contradict config.json; a base that is not there, has other
            weights than adapters were trained on, or is needless.
    """
    path = find_checkpoint(load_dir, iteration)
    config = read_hf_config(_architecture(Path(load_dir), hf))
    args = megatron_args(config)
    checkpoint = TorchDistCheckpoint(path)
    checkpoint.check_sizes()
    rows = family(config).rows
    mapping = WeightMapping(rows, args)
    if holds_adapters(checkpoint):
        adapters = Adapters.read(Path(load_dir))
        whole = _open_base(adapters, None if base is None else Path(base))
        return adapted(checkpoint, mapping, whole, adapters.lora), mapping, config
    if base is not None:
        raise UserError(f"--base has no effect: {load_dir} holds whole weights, no adapters")
    stored = WeightMapping(rows, args, Keys.found(list(checkpoint.names())))
    _check_tensors(checkpoint, stored)
    check_arguments(checkpoint, args)
    return MegatronWeights(checkpoint, stored), mapping, config


def carries_architecture(directory: str | Path) -> bool:
    """Whether config.json is in a folder, or in the one that import and training put there."""
    folder = Path(directory)
    return any((place / "config.json").is_file() for place in (folder, folder / HF_FOLDER))


def named_otherwise(checkpoint: TorchDistCheckpoint, directory: str | Path) -> bool:
    """Whether Megatron would not find our model's tensors in a checkpoint, which has them.

    Args:
        checkpoint: the files.
        directory: what carries its config.json.
    """
    found = Keys.found(list(checkpoint.names()))
    return found not in (None, Keys.ours(megatron_args(read_hf_config(directory))))


def _architecture(load_dir: Path, hf: str | Path | None) -> Path:
    """Where the config.json of a checkpoint is."""
    if not carries_architecture(load_dir):
        if hf is None:
            raise UserError(
                f"{load_dir} has no {HF_FOLDER}/config.json, which import writes and training "
                "copies: say with --hf which Hugging Face model it is, or copy that one's "
                f"config.json and tokenizer into {load_dir / HF_FOLDER}"
            )
        return Path(hf)
    if hf is not None:
        raise UserError(f"--hf has no effect: {load_dir} carries a config.json of its own")
    return load_dir


def open_weights(
    directory: str | Path, *, scored: bool = False, hf: str | Path | None = None
) -> tuple[ModelWeights, WeightMapping]:
    """Open the weights of a Hugging Face folder or a Megatron checkpoint, and check their shapes.

    Args:
        directory: of them.
        scored: for scoring alone, where a folder's may be in FP8 with scales of blocks.
        hf: of a checkpoint that carries no config.json.

    Raises:
        UserError: neither, an unsupported model, or tensors that do not fit config.json.
    """
    if not (Path(directory) / "config.json").is_file():
        return open_checkpoint(directory, hf=hf)[:2]
    weights, mapping = open_scored(directory) if scored else open_hf(directory)[:2]
    check_weights(weights, mapping)
    return FolderWeights(weights), mapping


def _open_base(adapters: Adapters, given: Path | None) -> ModelWeights:
    """Open what adapters belong to, once it is known to be that."""
    from megatron_infifpo.convert.fingerprint import weights_fingerprint  # here: it opens, too

    base = given or adapters.base
    if not base.is_dir():
        raise UserError(
            f"the base of the adapters is not in {base}, where it was: say with --base, or with "
            "--pretrained-checkpoint in training, where it is now"
        )
    if rank() == 0:
        adapters.check_base(base, weights_fingerprint(base))
    return open_weights(base)[0]


def _check_tensors(checkpoint: TorchDistCheckpoint, mapping: WeightMapping) -> None:
    """Refuse a checkpoint of another model than its config.json describes."""
    path, found = checkpoint.directory, set(checkpoint.names())
    for key in sorted(mapping.tensors.keys() - found):
        raise UserError(f"{path}: tensor {key} is missing: config.json asks for it")
    for key in sorted(found - mapping.tensors.keys()):
        raise UserError(
            f"{path}: tensor {key} is unknown: config.json describes a model without it"
        )
    for key, (entry, *_) in mapping.tensors.items():
        shape, expected = checkpoint.shape(key), entry.whole
        vocabulary = entry.row.shape[0] == "vocab"
        padded = vocabulary and shape[0] >= expected[0] and shape[1:] == expected[1:]
        if shape != expected and not padded:
            raise UserError(
                f"{path}: tensor {key} has shape {list(shape)}, but config.json asks for "
                f"{list(expected)}"
            )
