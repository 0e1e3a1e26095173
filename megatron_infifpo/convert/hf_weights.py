"""Fill a built, parallel GPTModel with weights that Megatron itself does not load."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from megatron_infifpo.convert.megatron_folder import open_weights
from megatron_infifpo.families.lora import is_adapter
from megatron_infifpo.families.mapping import Entry, WeightMapping


def load_into_model(
    models: Sequence[torch.nn.Module],
    directory: str | Path,
    *,
    scored: bool = False,
    hf: str | Path | None = None,
) -> None:
    """Copy weights into this rank's model chunks, in place; adapters that these have are left.

    Works at any tensor, pipeline and virtual pipeline layout: Megatron itself says which part of
    which tensor each parameter is. Weights are cast to the parameters' dtype; rows of the padded
    vocabulary become zero. One tensor of one layer is in memory at a time.

    Args:
        models: GPTModel chunks of this rank, one a virtual pipeline stage.
        directory: a Hugging Face folder, or a checkpoint, of adapters too: with their base.
        scored: for scoring alone, where weights may be in FP8 with scales of blocks.
        hf: of a checkpoint that carries no config.json, the Hugging Face folder that has it.

    Raises:
        UserError: an unsupported model, or tensors that do not fit config.json.
    """
    weights, mapping = open_weights(directory, scored=scored, hf=hf)
    fill(models, mapping, weights.read)


def fill(
    models: Sequence[torch.nn.Module],
    mapping: WeightMapping,
    read: Callable[[Entry], Tensor],
) -> None:
    """Copy whole Megatron tensors into this rank's part of a model.

    Args:
        models: GPTModel chunks of this rank.
        mapping: of the model.
        read: returns the tensor of an entry.
    """
    shards = [shard for model in models for shard in _shards(model)]
    parts = [(shard, _entry(shard, mapping)) for shard in shards]
    # The gate and the up projection are two shards of one tensor: neighbours share one reading.
    parts.sort(key=lambda part: (part[1].layer or 0, part[1].key, part[1].offset))
    last: Entry | None = None
    for shard, entry in parts:
        if entry != last:
            tensor = read(entry)
            last = entry
        before, own = len(entry.places), shard.prepend_axis_num
        part = tensor[shard.global_offset[before:own]]  # an expert of a tensor of all experts
        _copy_part(shard.data, part, shard.global_offset[max(before, own) :])


def _shards(model: torch.nn.Module) -> Iterator[ShardedTensor]:
    """Every parameter of a chunk but adapters, with its place in the whole tensor."""
    state = model.sharded_state_dict()  # type: ignore[operator]
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor) and not is_adapter(value.key):
            yield value


def _entry(shard: ShardedTensor, mapping: WeightMapping) -> Entry:
    assert shard.key in mapping.tensors, f"parameter {shard.key} has no row in the model's family"
    return mapping.at(shard.key, shard.global_offset)


@torch.no_grad()
def _copy_part(target: Tensor, whole: Tensor, offset: Sequence[int]) -> None:
    """Copy what `target` covers of `whole`, and zero what lies beyond its end."""
    part = whole
    inside = target
    for dim, start in enumerate(offset):
        length = max(0, min(target.shape[dim], whole.shape[dim] - start))
        part = part.narrow(dim, min(start, whole.shape[dim]), length)
        inside = inside.narrow(dim, 0, length)
    if inside.shape != target.shape:
        target.zero_()
    inside.copy_(part)
