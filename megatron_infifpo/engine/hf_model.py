"""Load a model with transformers: all of its weights, or a sentence that says what is wrong."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from megatron_infifpo.convert.hf_files import open_files, some
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import FAMILIES
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.ranks import rank

# What transformers raises where a folder, its configuration or the installation is wrong.
_REFUSALS = (
    AttributeError, ImportError, KeyError, OSError, RuntimeError, SafetensorError, TypeError,
    ValueError, ZeroDivisionError, StrictDataclassError,
)  # fmt: skip
_CAUSAL, _CLASSIFIER = "a causal language model", "a sequence classifier"


def load_causal_lm(
    directory: str | Path, *, dtype: torch.dtype, trust_remote_code: bool = False, **placement: Any
) -> Any:
    """Load a causal language model, in evaluation mode.

    Args:
        directory: a Hugging Face folder with safetensors.
        dtype: of the weights, where they are not quantized.
        trust_remote_code: run the Python files of the folder.
        placement: `device_map` or `tp_plan`, as transformers takes them.

    Raises:
        UserError: no such model, a tensor that is missing, unknown or of another shape, or a
            package that is not installed.
    """
    kind = check_folder(directory).get("model_type")
    # Those that also read images, of families that are known to be causal where there are none.
    images = kind in FAMILIES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    return _load(auto, _CAUSAL, directory, dtype, trust_remote_code, placement)


def load_classifier(
    directory: str | Path, *, dtype: torch.dtype, trust_remote_code: bool = False, **placement: Any
) -> Any:
    """Load a sequence classifier, as `load_causal_lm` loads its models."""
    kind = AutoModelForSequenceClassification
    return _load(kind, _CLASSIFIER, directory, dtype, trust_remote_code, placement)


def check_whole(directory: str | Path, *, trust_remote_code: bool = False) -> None:
    """Check that a causal language model would load, reading its weights but keeping none.

    For programs that load it themselves. A quantized one is not tried, since they may have kernels
    of their own for it: its files are looked at.

    Raises:
        UserError: as `load_causal_lm`.
    """
    if _quantization(check_folder(directory)) is None:
        load_causal_lm(
            directory,
            dtype=torch.bfloat16,
            trust_remote_code=trust_remote_code,
            device_map={"": "meta"},
        )


def check_folder(directory: str | Path) -> dict[str, Any]:
    """Check that a Hugging Face folder has a configuration and readable safetensors.

    Returns:
        Its config.json.

    Raises:
        UserError: it has not, or its weights are those of an adapter.
    """
    if not Path(directory).is_dir():
        raise UserError(
            f"{directory} is not a folder: expected a Hugging Face model; download it first "
            "(hf download NAME --local-dir DIR)"
        )
    config = read_hf_config(directory)
    if not (Path(directory) / "config.json").is_file():
        raise UserError(
            f"{directory} has no config.json, expected a Hugging Face folder; a Megatron "
            "checkpoint needs --backend megatron, or to be exported first"
        )
    open_files(directory)
    return config


def _load(
    auto: Any,
    kind: str,
    directory: str | Path,
    dtype: torch.dtype,
    trust_remote_code: bool,
    placement: Mapping[str, Any],
) -> Any:
    config = check_folder(directory)
    _check_code(config, directory, trust_remote_code)
    method = _quantization(config)
    try:
        with _quiet():
            model, info = auto.from_pretrained(
                str(directory),
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told by name
                **placement,
            )
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        reason = _reason(error)
        if method is not None:
            raise UserError(
                f"{directory} is quantized with {method}, which transformers cannot load here "
                f"({reason}): install what it names, or use the original or a dequantized model"
            ) from error
        raise UserError(
            f"transformers cannot load {directory} ({reason}), expected {kind} with config.json "
            "and safetensors"
        ) from error
    check_loaded(directory, model, info, config)
    return model.eval()


def _reason(error: Exception) -> str:
    """Return what an exception says, in a line."""
    text = " ".join(str(error).split()).rstrip(".")[:300]
    plain = isinstance(error, OSError | ValueError | ImportError | RuntimeError) and text
    return text if plain else f"{type(error).__name__}: {text}"


def _check_code(config: Mapping[str, Any], directory: str | Path, trust_remote_code: bool) -> None:
    """Refuse a model that transformers does not have, unless it brings code that may run."""
    kind, own = config.get("model_type"), config.get("auto_map") or {}
    if kind in CONFIG_MAPPING_NAMES or (trust_remote_code and own):
        return
    if own:
        raise UserError(
            f"{directory}: {kind!r} models run Python code of their own, from the folder: read it, "
            "and pass --trust-remote-code if you trust it"
        )
    raise UserError(
        f"{directory}: config.json has the model_type {kind!r}, which transformers "
        f"{transformers.__version__} does not have: install one that does"
    )


def _quantization(config: Mapping[str, Any]) -> str | None:
    """Name how a model's weights are quantized; None if they are not."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        found = part.get("quantization_config") or part.get("compression_config")
        if found is None:
            continue
        if not isinstance(found, dict):
            raise UserError(f"config.json: quantization_config is {found!r}, expected an object")
        bits = next((b for b in ("4bit", "8bit") if found.get(f"load_in_{b}")), None)
        name = "bitsandbytes" if bits else found.get("quant_method")
        if (f"{name}_{bits}" if bits else name) not in AUTO_QUANTIZER_MAPPING:
            # transformers would load it as if it were not quantized
            raise UserError(
                f"config.json: transformers {transformers.__version__} does not know the "
                f"quantization {name!r}: use the original or a dequantized model"
            )
        return str(name)
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out transformers' table of what did not fit: it is refused in a sentence."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def check_loaded(
    directory: str | Path, model: Any, info: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Compare what transformers found in a folder with what the model needs.

    Args:
        directory: of the model.
        model: as loaded.
        info: transformers' loading info.
        config: the folder's config.json.

    Raises:
        UserError: a tensor is missing, of another shape, or belongs to a part of the model that
            its configuration leaves out.
    """
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        also = f"; {some(unknown)} has no place in the model: renamed?" if unknown else ""
        raise UserError(
            f"{directory}: tensor {some(missing)} is missing: config.json asks for it, and random "
            f"numbers would stand for it{also}"
        )
    for name, found, asked in sorted(info["mismatched_keys"], key=str):
        raise UserError(
            f"{directory}: tensor {name} has shape {list(found)}, but config.json asks for "
            f"{list(asked)}"
        )
    for message in info.get("error_msgs") or ():
        raise UserError(f"{directory}: transformers cannot load it: {message}")
    if needed := _needed(unknown, model, config):
        raise UserError(
            f"{directory}: tensor {some(needed)} is unknown: config.json describes a model without "
            "it, so the numbers would be another model's"
        )
    _check_tied(directory, model)
    _check_scaled(directory, model)
    if unknown and rank() == 0:
        print(f"{directory}: not used: {some(unknown)}")


def _needed(unknown: Sequence[str], model: Any, config: Mapping[str, Any]) -> list[str]:
    """Tensors without a place that belong to a part which the model has.

    Parts that are missing as a whole are of other uses: an image tower, a value head. Not so a
    layer more than config.json has, or a bias of a projection.
    """
    modules = {name for name, _ in model.named_modules()}
    quantized, base = _quantization(config) is not None, model.base_model_prefix
    text = model.config.get_text_config()

    def ahead(name: str) -> bool:
        """Whether it is of a layer that predicts several tokens at once."""
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        more = getattr(text, "num_nextn_predict_layers", None)
        return bool(more and layer and int(layer[1]) >= text.num_hidden_layers)

    def inside(name: str) -> bool:
        *path, leaf = name.split(".")
        if leaf in ("masked_bias", "inv_freq") or (leaf == "bias" and path[-1:] == ["attn"]):
            return False  # buffers of old files: masks, frequencies
        if quantized and leaf not in ("weight", "bias"):
            return False  # scales that other programs use
        whole = path if path[:1] == [base] else [base, *path]
        parts = (".".join(whole[:n]) for n in range(2, len(whole) + 1))
        return any(part in modules for part in parts) or (path != whole and path[0] in modules)

    return [name for name in unknown if inside(name) and not ahead(name)]


def _check_tied(directory: str | Path, model: Any) -> None:
    """Refuse an output layer of its own where config.json ties it to the embedding.

    transformers 5 takes both as they are, older ones and other programs take the embedding. Of a
    model that also reads images the language model's word counts: the outer one is a default.
    """
    if not model.config.get_text_config().tie_word_embeddings:
        return
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name in sorted(tied.keys() - model.all_tied_weights_keys.keys()):
        raise UserError(
            f"{directory}: config.json ties {name} to {tied[name]}, but their weights differ: set "
            "tie_word_embeddings to false if that is right"
        )


def _check_scaled(directory: str | Path, model: Any) -> None:
    """Refuse 8-bit weights in layers that would take them as they are, without their scale."""
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and module.weight.element_size() == 1:
            raise UserError(
                f"{directory}: the scale of {name}.weight ({module.weight.dtype}) is missing: "
                "config.json asks for it"
            )
