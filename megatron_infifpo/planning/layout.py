"""How a model is spread over ranks, and which ways of it are legal."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks: tensor, pipeline, data and context parallel sizes.

    Attributes:
        data: the ranks, or groups of ranks, that have rows of their own.
        expert: ranks, of all tensor, context and data parallel ones of a pipeline stage, that
            experts are spread over; each has whole ones (expert-tensor-parallel size 1).
    """

    tensor: int
    pipeline: int
    data: int
    context: int = 1
    expert: int = 1

    @property
    def shards(self) -> int:
        """Ranks that the optimizer's state of a parameter is spread over."""
        return self.data * self.context

    @property
    def expert_shards(self) -> int:
        """Ranks that the optimizer's state of an expert's parameter is spread over."""
        return self.tensor * self.context * self.data // self.expert


def layouts(
    gpus: int,
    tensor_sizes: list[int],
    layers: int,
    gpus_per_node: int,
    global_batch_size: int,
    *,
    contexts: bool = False,
    experts: int = 1,
) -> list[Layout]:
    """Every legal layout: ranks of a row inside a node, equal stages, equal shares of a batch.

    A tensor x context parallel size that does not divide the node's would let some groups straddle
    two, over a slower network; so would an expert parallel size.

    Args:
        gpus: how many.
        tensor_sizes: that are legal for the model.
        layers: of it.
        gpus_per_node: how many GPUs are in a node.
        global_batch_size: pairs of a step.
        contexts: context parallelism is an option.
        experts: of a layer that has some, else 1.
    """
    found = [
        Layout(tensor, pipeline, gpus // (tensor * pipeline * context), context)
        for tensor in tensor_sizes
        for context in range(1, min(gpus, gpus_per_node) + 1 if contexts else 2)
        if gpus_per_node % (tensor * context) == 0 or gpus <= gpus_per_node
        for pipeline in range(1, layers + 1)
        if layers % pipeline == 0 and gpus % (tensor * pipeline * context) == 0
    ]
    legal = [layout for layout in found if global_batch_size % layout.data == 0]
    inside = min(gpus, gpus_per_node)
    return [spread for layout in legal for spread in _over_experts(layout, experts, inside)]


def _over_experts(layout: Layout, experts: int, inside: int) -> Iterator[Layout]:
    """A layout with every legal expert parallel size, of ranks that are `inside` a node."""
    stage = layout.tensor * layout.shards
    for size in range(1, min(experts, inside) + 1):
        if experts % size == 0 and stage % size == 0 and inside % size == 0:
            yield Layout(layout.tensor, layout.pipeline, layout.data, layout.context, size)
