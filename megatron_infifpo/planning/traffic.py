"""What ranks send each other while they train, on paper."""

from dataclasses import dataclass

from megatron_infifpo.planning.layout import Layout
from megatron_infifpo.planning.recompute import ATTENTION, BOTH, FULL, MLP
from megatron_infifpo.planning.sizes import Sizes


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank gets of others. What is computed again is sent again.

    Attributes:
        tensor: with sequence parallelism attention and an MLP each gather rows and scatter sums
            forward, and so they do backward, where they gather once more for their gradients.
        context: keys and values of ranks that share its rows are gathered forward, and their
            gradients scattered backward; gathered again where attention is computed again.
        expert: rows go to their experts and back, and so do their gradients.
    """

    tensor: float
    context: float
    expert: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.tensor + self.context + self.expert

    @classmethod
    def of(
        cls, sizes: Sizes, width: int, layout: Layout, tokens: float, recompute: str
    ) -> "Traffic":
        """Count a group's training on `tokens`.

        Args:
            sizes: of the model.
            width: bytes of a number.
            layout: of the ranks.
            tokens: of the group's rows.
            recompute: what is computed again, a key of `recompute.FLAGS`.
        """
        full, shared = recompute == FULL, bool(sizes.experts and sizes.experts.shared)
        sublayers = 2 * sizes.layers - sum(sizes.sparse) * (not shared)
        again = sublayers * full + sizes.sparse.count(False) * (recompute in (MLP, BOTH))
        rows = (5 * sublayers + 2 * again) * (layout.tensor - 1) * sizes.hidden / layout.context
        keys = (2 + (recompute in ATTENTION)) * (1 - 1 / layout.context)
        keys *= sizes.layers * 2.0 * sizes.key
        sent = sum(sizes.sparse) * sizes.hidden / layout.context
        sent *= sizes.experts.chosen if sizes.experts else 0
        sent *= (4 + 2 * full) * (1 - 1 / layout.expert)
        rank = width * tokens / (layout.tensor * layout.pipeline)
        return cls(rank * rows, rank * keys, rank * sent)
