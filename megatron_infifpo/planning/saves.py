"""What saving a checkpoint needs beside training, on paper: by how optimizer state is saved.

Follows Megatron 0.19's `DistributedOptimizer.get_parameter_state_dp_zero` and its writer, which
moves all that a rank writes to the host before it begins.
"""

from dataclasses import dataclass

# A parameter and Adam's two moments, in float32, as a checkpoint has them.
SAVED = 12


@dataclass(frozen=True)
class Saving:
    """How the distributed optimizer's state is saved, and what that needs.

    Attributes:
        gathers: whether a rank puts the state of all data-parallel ranks together.
        over_gpu: whether that goes over the GPU and to every rank, else to the first only.
    """

    gathers: bool = False
    over_gpu: bool = False

    def gpu(self, parameters: float, data: int) -> float:
        """Bytes on a GPU: a buffer of gathered float32 values, and what the rank sends."""
        return 4.0 * parameters * (1 + 1 / data) if self.gathers and self.over_gpu else 0.0

    def host(self, parameters: float, data: int, weight: int, *, first: bool) -> float:
        """Bytes of host memory that a rank needs for a moment.

        Args:
            parameters: of the rank's shard of the model, taken as one buffer: Megatron's buckets
                are smaller, but only on the first pipeline stage and with overlap.
            data: data-parallel size.
            weight: bytes of a parameter in the model.
            first: whether this is the first data-parallel rank.
        """
        written = self.written_bytes(parameters, data, weight, first=first)
        held = SAVED * parameters if self._holds(first) else 0.0
        return max(self.gathered_bytes(parameters, data, first=first), held + written)

    def gathered_bytes(self, parameters: float, data: int, *, first: bool) -> float:
        """Bytes while state is gathered: the rank's own, and all of it; and one value three times.

        As it came, and put together, now and the one before, which is still referred to.
        """
        own = SAVED * parameters / data if self.gathers else 0.0
        return own + (SAVED + 12.0) * parameters * self._holds(first)

    def written_bytes(self, parameters: float, data: int, weight: int, *, first: bool) -> float:
        """Bytes of what a rank writes, copied to the host.

        Ranks share what all of them have. The first, if it is alone with the optimizer state, has
        enough to write, and the others share the weights.
        """
        if not self.gathers or self.over_gpu or data == 1:
            return (SAVED + weight) * parameters / data
        return SAVED * parameters if first else weight * parameters / (data - 1)

    def _holds(self, first: bool) -> bool:
        """Whether a rank has the state of all data-parallel ranks."""
        return self.gathers and (self.over_gpu or first)


BY_RANK = Saving()  # Megatron's default
BY_NAME = Saving(gathers=True, over_gpu=True)  # --dist-ckpt-optim-fully-reshardable
SPARING = Saving(gathers=True)  # and --distrib-optim-fully-reshardable-mem-efficient
