"""PEFT's folders of low-rank adapters: made of a run's checkpoint, merged into an import."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_infifpo.convert.adapters import Adapters
from megatron_infifpo.convert.hf_files import HfWeights
from megatron_infifpo.convert.megatron_folder import open_checkpoint
from megatron_infifpo.convert.model_weights import AdaptedWeights
from megatron_infifpo.errors import UserError
from megatron_infifpo.families.lora import Lora, merged
from megatron_infifpo.storage.checkpoints import new_folder
from megatron_infifpo.storage.safetensors_io import SafetensorsFile, SafetensorsWriter, Scratch
from megatron_infifpo.storage.share import Share

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Settings without which B A is another thing: with some beginnings the base was changed, too.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}
# What the sum does not depend on once it is trained, and what is read; all others must be unset.
_FREE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "r",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def export_adapter(
    load_dir: str | Path,
    save_dir: str | Path,
    iteration: int | None = None,
    base: str | Path | None = None,
) -> None:
    """Write the adapters of a run as a folder that PEFT loads.

    Args:
        load_dir: what a run with --lora-rank saved.
        save_dir: must not exist, or be empty.
        iteration: which checkpoint; default: the latest.
        base: the folder of the base; default: where it was.

    Raises:
        UserError: no checkpoint of adapters, or nowhere to write.
    """
    weights, mapping, _ = open_checkpoint(load_dir, iteration, base)
    if not isinstance(weights, AdaptedWeights):
        raise UserError(
            f"--adapter-only: {load_dir} holds whole weights, no adapters: leave the flag out"
        )
    tensors: dict[str, Tensor] = {}
    for entry in mapping.entries():
        pair = weights.adapters_of(entry)
        for _, (name, a, b) in weights.lora.factors(entry, *pair) if pair else ():
            tensors |= {f"{_PREFIX}{name}{_A}": a, f"{_PREFIX}{name}{_B}": b}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtype = next(iter(tensors.values())).dtype
    where = base or Adapters.read(Path(load_dir)).base
    with new_folder(save_dir, Share(alone=True)) as folder:
        with SafetensorsWriter(folder / WEIGHTS, shapes, dtype) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        text = json.dumps(_config(weights.lora, str(where)), indent=2)
        (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")


def _config(lora: Lora, base: str) -> dict[str, Any]:
    """PEFT's description of these adapters."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
    }


class MergedFolder(HfWeights):
    """A Hugging Face folder's tensors with the adapters of a PEFT folder merged into them."""

    def __init__(
        self, weights: HfWeights, folder: str | Path, rename: Callable[[str], str | None] = str
    ):
        """Read the adapters.

        Args:
            weights: of the base.
            folder: adapter_config.json and adapter_model.safetensors.
            rename: from names in the base's files to those of its family, as `Family.hf_name`.

        Raises:
            UserError: files that are missing or broken, adapters of another kind than LoRA's, or of
                another model.
        """
        self.directory, self._files = weights.directory, weights._files
        self.scale, self.adapters = _read(Path(folder), weights, rename)

    def load(self, name: str, scratch: Scratch | None = None) -> Tensor:
        """Return a tensor, with its adapter where it has one, added in float32."""
        weight = super().load(name, scratch)
        pair = self.adapters.get(name)
        return weight if pair is None else merged(weight, *pair, self.scale)


def _read(
    folder: Path, weights: HfWeights, rename: Callable[[str], str | None]
) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """Read a PEFT folder: the scale, and A and B by the name of the weight they belong to."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"--adapter {folder} is no PEFT folder: expected {CONFIG} and {WEIGHTS}, as "
            "save_pretrained writes them"
        )
    scale = _scale(folder / CONFIG)
    file = SafetensorsFile(folder / WEIGHTS)
    names = set(weights.names())
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key in sorted(file.shapes):
        ending = _B if key.endswith(_B) else _A
        name = rename(f"{key.removeprefix(_PREFIX).removesuffix(ending)}.weight")
        other = key.removesuffix(ending) + (_A if ending == _B else _B)
        whole = key.endswith(ending) and other in file.shapes
        if name is None or name not in names or not whole:
            raise UserError(
                f"{folder / WEIGHTS}: {key} belongs to no linear layer of {weights.directory}: "
                "expected lora_A and lora_B of its layers; merge it with peft"
            )
        if ending == _A:
            a, b = file.read(key), file.read(other)
            if (b.shape[0], a.shape[1]) != weights.shape(name) or a.shape[0] != b.shape[1]:
                raise UserError(
                    f"{folder / WEIGHTS}: {key} is {list(a.shape)} and {other} {list(b.shape)}, "
                    f"but {name} is {list(weights.shape(name))}: they are of another model"
                )
            pairs[name] = a, b
    return scale, pairs


def _scale(path: Path) -> float:
    """Read what B A is multiplied by.

    Raises:
        UserError: a broken file, or adapters that are merged otherwise.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        for name, value in ({"peft_type": None} | config).items():
            other = value not in _PLAIN[name] if name in _PLAIN else bool(value)
            if other and name not in _FREE:
                raise UserError(
                    f"{path}: {name} is {value!r}, which is no plain LoRA: merge it with peft "
                    "(merge_and_unload), and import the result"
                )
        rank, alpha = config["r"], config["lora_alpha"]
        return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({error!r}): copy it again") from None
