"""Identity of a model, whatever folder, files or parallel layout it is stored in."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megatron_infifpo.convert.hf_export import hf_tensors
from megatron_infifpo.convert.hf_folder import weights_of
from megatron_infifpo.convert.megatron_folder import open_checkpoint
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import FAMILIES, megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.storage.safetensors_io import bytes_of

# Of Megatron's arguments, those that no log-prob depends on.
_FREE_ARGS = (
    "family", "make_vocab_size_divisible_by", "max_position_embeddings", "padded_vocab_size",
    "tokenizer_type", "vocab_size",
)  # fmt: skip
# Fields of config.json that no log-prob depends on: of training, of generation, and of files.
_FREE_FIELDS = {
    "_attn_implementation", "_name_or_path", "architectures", "attn_implementation",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "do_sample", "dtype", "early_stopping", "eos_token_id",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "generation_config",
    "gradient_checkpointing", "id2label", "initializer_range", "label2id", "length_penalty",
    "max_length", "max_new_tokens", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_router_logits", "output_scores",
    "pad_token_id", "prefix", "problem_type", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "router_aux_loss_coef",
    "router_jitter_noise", "router_z_loss_coef", "suppress_tokens", "task_specific_params",
    "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_cache",
}  # fmt: skip
_FREE_ENDINGS = ("dropout", "dropout_prob", "_pdrop", "dropout_rate")


class Weights(NamedTuple):
    """What the weights of a model are.

    Attributes:
        sha256: their identity, in the data type that they are stored in.
        dtype: this type, or all of them: `bfloat16`, or `F8_E4M3, bfloat16`.
    """

    sha256: str
    dtype: str


def weights_fingerprint(directory: str | Path) -> str:
    """Return what `read_weights` calls sha256."""
    return read_weights(directory).sha256


def read_weights(directory: str | Path) -> Weights:
    """Return the sha256 identity of a model in a Hugging Face folder or Megatron checkpoint.

    It covers the names, dtypes, shapes and bytes of the Hugging Face tensors, quantized ones too,
    not their order nor their files; and what config.json says about computing with them (norms,
    ropes, windows, caps, quantization), not what it says about training and generation. A Megatron
    checkpoint (its latest iteration) has the fingerprint of the folder that it exports to in its
    own dtype, so importing keeps the identity. One tensor is in memory at a time.

    Raises:
        UserError: neither kind of folder.
    """
    config = read_hf_config(directory)
    is_hf = (Path(directory) / "config.json").is_file()
    tensors = _hf_tensors(directory, config) if is_hf else _megatron_tensors(directory)
    digests, dtypes = {}, set()
    for name, dtype, shape, content in tensors:
        digests[name] = _digest(name, dtype, shape, content)
        dtypes.add(dtype.removeprefix("torch."))
    whole = hashlib.sha256(b"".join(digests[name] for name in sorted(digests)))
    whole.update(json.dumps(computation(config), sort_keys=True, default=str).encode())
    if is_hf and config.get("auto_map") and config.get("model_type") not in FAMILIES:
        for path in sorted(Path(directory).glob("*.py")):
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    return Weights(whole.hexdigest(), ", ".join(sorted(dtypes)))


def computation(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of config.json changes a log-prob.

    Megatron's arguments, where there are some: they do not depend on how a version of transformers
    writes the file.
    """
    try:
        args = megatron_args(config)
    except UserError:  # a model for transformers alone
        return _without_free(config)
    return {name: value for name, value in args.items() if name not in _FREE_ARGS}


def _without_free(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields, of the parts of a model too, without those that change nothing or say nothing."""
    return {
        name: _without_free(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value is not None and name not in _FREE_FIELDS and not name.endswith(_FREE_ENDINGS)
    }


def _hf_tensors(
    directory: str | Path, config: Mapping[str, Any]
) -> Iterator[tuple[str, str, tuple[int, ...], Tensor]]:
    weights = weights_of(directory, config)
    for name in weights.names():
        dtype, content = weights.content(name)
        yield name, dtype, weights.shape(name), content


def _megatron_tensors(
    directory: str | Path,
) -> Iterator[tuple[str, str, tuple[int, ...], Tensor]]:
    opened, mapping, _ = open_checkpoint(directory)
    for group in hf_tensors(opened, mapping):
        for name, tensor in group.items():
            yield name, str(tensor.dtype), tuple(tensor.shape), bytes_of(tensor.contiguous())


def _digest(name: str, dtype: str, shape: tuple[int, ...], content: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {dtype} {list(shape)}\n".encode())
    digest.update(content.numpy())
    return digest.digest()
