"""What a rank holds of a micro-batch until its backward pass, and what it needs for a moment."""

from dataclasses import dataclass

from megatron_infifpo.engine.kept import Kept
from megatron_infifpo.logprobs import CHUNK_BYTES
from megatron_infifpo.planning.layout import Layout
from megatron_infifpo.planning.sizes import Sizes

# Tokens of the fullest expert-parallel rank, in units of the average one's: taken, not measured.
IMBALANCE = 1.5


@dataclass(frozen=True)
class Activations:
    """Bytes of activations.

    Attributes:
        sizes: of the model.
        kept: what a layer keeps of a token.
        weight: bytes of a number.
        frozen: the output layer is not trained.
    """

    sizes: Sizes
    kept: Kept
    weight: int
    frozen: bool = False

    def of_layer(
        self, gathered: float = 0.0, *, sparse: bool = False, spread: bool = False
    ) -> float:
        """Bytes that a layer keeps of one token for its backward pass, as `Kept` says.

        Args:
            gathered: keys that attention selects for it; 0 where it takes them as they are, or is
                computed again.
            sparse: the layer has experts.
            spread: they are on several ranks, and the fullest one counts.
        """
        kept, sizes = self.kept, self.sizes
        if gathered:
            attention = kept.query * sizes.query + kept.gathered * gathered * sizes.key
        else:
            attention = (kept.query + kept.joint) * sizes.query
            attention += (kept.key + 2 * kept.joint) * sizes.key
        rows = kept.hidden * sizes.hidden + attention + kept.rope * sizes.head
        if not sparse:
            return (rows + kept.mlp * sizes.ffn) * self.weight
        return rows * self.weight + self.of_experts(spread)

    def of_mlp(self) -> float:
        """Bytes of these that an MLP does not keep which is computed again: all but its input."""
        return (
            self.kept.fused_norm * self.sizes.hidden + self.kept.mlp * self.sizes.ffn
        ) * self.weight

    def of_experts(self, spread: bool) -> float:
        """Bytes that experts keep of one token; `of_layer` says the rest.

        Its row for each expert that it goes to, before and after; what each keeps inside; logits
        and probabilities of the router in float32.
        """
        experts = self.sizes.experts
        assert experts is not None
        each = 2 * self.sizes.hidden + self.kept.mlp * experts.ffn
        rows = each * experts.chosen * (IMBALANCE if spread else 1.0)
        return (rows + self.kept.mlp * experts.shared) * self.weight + 8.0 * experts.count

    def of_end(self) -> float:
        """Bytes that the last norm keeps of one token, and the head of a scored one."""
        return (self.kept.hidden / 2 + 1) * self.sizes.hidden * self.weight

    def head(self, layout: Layout, row_tokens: int) -> float:
        """Bytes that the last stage needs for log-probs, on a GPU.

        A chunk of float32 logits, and in bfloat16 its gradient for two products; autograd's
        stand-in for the weight's gradient, if it has one; what the last norm and the head keep of
        the row.
        """
        table = 0.0 if self.frozen else self.sizes.table / layout.tensor
        tokens = row_tokens / layout.context
        logits = 4.0 * tokens * self.sizes.vocabulary / layout.tensor
        chunk = min(logits, CHUNK_BYTES["cuda"]) * (1 + (self.weight == 2) / 2)
        return chunk + table * self.weight + tokens * self.of_end() / layout.tensor

    def attention(self, layout: Layout, keys: float, row_tokens: int) -> float:
        """Bytes of gradients that a layer's attention makes at once, for so many keys of a rank.

        Where heads share keys, PyTorch's flash kernel first makes one gradient a query head. Under
        context parallelism those of the whole row's keys come after that; the forward pass holds
        less, the keys themselves.
        """
        sizes = self.sizes
        spread = sizes.query * keys if sizes.query > sizes.key else 0.0
        whole = sizes.key * row_tokens if layout.context > 1 else 0.0
        gradients = 2.0 * (sizes.key * keys + max(spread, whole))  # of keys and of values
        return gradients * self.weight / layout.tensor
