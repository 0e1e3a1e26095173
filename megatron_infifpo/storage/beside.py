"""What a Hugging Face folder holds beside its weights that makes another model of it.

Programs that read only config.json and the weights would take no notice, and convert or score a
model that is not the one its owner means.
"""

import fnmatch
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError

# PEFT's and MLX's; some trainers write the weights alone.
_ADAPTERS = ("adapter_config.json", "adapter_model.*", "adapters.*", "*lora*.safetensors")
# Beside or in place of config.json's quantization_config: GPTQ's, AWQ's, ModelOpt's files.
_QUANTIZED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_QUANTIZATION = ("quantization_config", "compression_config", "quantization")
# The same weights in another format (Mistral's own) or precision, by their names; and the state of
# a training that went on from here.
_COPIES = ("consolidated*.safetensors", "model.*.safetensors", "optimizer*.safetensors")
_OTHER_FORMATS = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.msgpack", "*.h5", "*.ckpt")
# Files of these formats that hold no weights.
_NO_WEIGHTS = ("training_args.bin", "scheduler.pt", "optimizer.*", "rng_state*", "scaler.pt")


def check_adapters(directory: Path) -> None:
    """Refuse a folder with an adapter, which changes the model where it is loaded.

    Raises:
        UserError: there is one.
    """
    if adapters := _matching(directory, _ADAPTERS):
        raise UserError(
            f"{directory} holds an adapter ({', '.join(adapters[:3])}), which would be left out: "
            "merge it into its base model first (infifpo import --hf BASE --adapter DIR, each in a "
            "folder of its own; or peft: model.merge_and_unload(), then save_pretrained), or "
            "remove these files if the weights have it already"
        )


def check_quantized(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder whose weights are quantized, whatever says so.

    Raises:
        UserError: they are.
    """
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    keys = [key for part in parts for key in _QUANTIZATION if part.get(key) is not None]
    files = _matching(directory, _QUANTIZED)
    if keys or files:
        where = f"config.json has a {keys[0]}" if keys else f"there is a {files[0]}"
        raise UserError(
            f"{directory}: {where}: quantized weights are not supported here, use the original "
            "checkpoint or save a dequantized one; as a source, score it with --backend "
            "transformers"
        )


def check_strangers(directory: Path, read: Iterable[Path]) -> None:
    """Refuse safetensors that nobody reads and that may belong to the model.

    Args:
        directory: the folder.
        read: its files that are read.

    Raises:
        UserError: there are some.
    """
    names = {path.name for path in read}
    surplus = [n for n in _matching(directory, ("*.safetensors",)) if n not in names]
    if strangers := [name for name in surplus if not _matches(name, _COPIES)]:
        raise UserError(
            f"{directory} holds {', '.join(strangers[:3])}, which would not be read beside "
            f"{', '.join(sorted(names)[:3])}: remove what does not belong to the model, or save it "
            "again with save_pretrained"
        )


def other_formats(directory: Path) -> list[str]:
    """Names of files with weights that are not read, since the same ones are in safetensors."""
    found = _matching(directory, (*_COPIES, *_OTHER_FORMATS))
    return [name for name in found if not _matches(name, _NO_WEIGHTS)]


def without_code(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON file's content without what names Python files, which are not carried along."""
    return {key: value for key, value in content.items() if key != "auto_map"}


def drop_code(path: Path) -> None:
    """Rewrite a JSON file that names Python files; others stay as they are."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return
    if isinstance(content, dict) and "auto_map" in content:
        text = json.dumps(without_code(content), indent=2, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")


def _matching(directory: Path, patterns: tuple[str, ...]) -> list[str]:
    """Names of files in a folder; none where there is no folder."""
    if not directory.is_dir():
        return []
    return sorted(p.name for p in directory.iterdir() if p.is_file() and _matches(p.name, patterns))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)
