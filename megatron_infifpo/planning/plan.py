"""What a training run costs, on paper: memory of a GPU by layout, floating-point operations, hours.

Counts follow from shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.engine.kept import LAYERS, Kept
from megatron_infifpo.planning.activations import Activations
from megatron_infifpo.planning.adapters import Adapters
from megatron_infifpo.planning.layout import Layout
from megatron_infifpo.planning.precision import PRECISIONS
from megatron_infifpo.planning.recompute import ATTENTION, BOTH, FULL, MLP, NONE
from megatron_infifpo.planning.saves import BY_RANK, SAVED, Saving
from megatron_infifpo.planning.sizes import Sizes
from megatron_infifpo.planning.traffic import Traffic

GIB = 2**30
# Of attention, in units of its forward pass with two products: backward four, and scores again.
FLASH = 3.5


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    Attributes:
        attention: what the backward pass of a layer's attention adds for a moment, or of its
            experts, or of an MLP that is computed again, if that is more.
        head: what log-probs add, before that.
        update: what the optimizer's step adds for a moment.
        save: what a save adds for a moment.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    attention: float
    head: float
    update: float
    save: float

    @property
    def total(self) -> float:
        """Most at once: activations are gone when the optimizer steps, and when a save begins."""
        lasting = self.weights + self.gradients + self.optimizer
        step = self.activations + max(self.attention, self.head)
        return lasting + max(step, self.update, self.save)


@dataclass(frozen=True)
class Share:
    """Parameters of a rank.

    Attributes:
        trained: that all data-parallel ranks have alike.
        experts: trained ones that only some of them have.
        frozen: that are not trained.
    """

    trained: float
    experts: float
    frozen: float

    def sharded(self, layout: Layout) -> float:
        """Parameters whose optimizer state the rank has."""
        return self.trained / layout.shards + self.experts / layout.expert_shards


class Plan:
    """A model's cost, from the Megatron arguments of its architecture."""

    def __init__(
        self,
        model: Mapping[str, Any],
        precision: str = "bf16",
        kept: Kept = LAYERS["te"].kept,
        adapters: Adapters | None = None,
        **lighter: Any,
    ):
        """Take `megatron_args(config)`, a key of `PRECISIONS`, and what a layer keeps.

        With `adapters` they are trained and nothing else is. `lighter` are arguments of
        `Precision.lighter`.
        """
        self.sizes = Sizes.of(model)
        self.adapters = adapters
        self.bytes = PRECISIONS[precision].lighter(**lighter)
        self.activations = Activations(self.sizes, kept, self.bytes.weight, adapters is not None)

    @property
    def trained(self) -> float:
        """Parameters that are trained."""
        if self.adapters is None:
            return self.sizes.parameters
        return self.sizes.layers * self.adapters.parameters

    def memory(self, layout: Layout, row_tokens: int, micro_batches: int, **options: Any) -> Memory:
        """Memory of the fullest rank, with the distributed optimizer; arguments of `stages`."""
        ranks = self.stages(layout, row_tokens, micro_batches, **options)
        return max(ranks, key=lambda memory: memory.total)

    def stages(
        self,
        layout: Layout,
        row_tokens: int,
        micro_batches: int,
        *,
        gathered: float = 0.0,
        recompute: str = NONE,
        fused_adam: bool = True,
        saving: Saving = BY_RANK,
    ) -> list[Memory]:
        """Memory of a rank of each pipeline stage, with the distributed optimizer.

        Args:
            layout: sequence parallelism is taken as on where tensor is above 1.
            row_tokens: tokens of a micro-batch.
            micro_batches: of a step on a rank.
            gathered: keys that a rank's attention selects, for a token of the row (`Texts.keys`);
                0 without shared prompts and context parallelism.
            recompute: what is computed again, a key of `recompute.FLAGS`.
            fused_adam: Transformer Engine's or Apex's, else PyTorch's.
            saving: how checkpoints are saved.
        """
        # PyTorch's Adam takes the roots of all second moments before it uses them.
        update = self.bytes.update + (0.0 if fused_adam else 4.0)
        found = []
        for stage in range(layout.pipeline):
            parameters, last = self._share(layout, stage), stage == layout.pipeline - 1
            share, trained = parameters.sharded(layout), parameters.trained + parameters.experts
            in_flight = min(micro_batches, layout.pipeline - stage)
            kept, moment = self._layers(layout, stage, row_tokens, gathered, recompute, in_flight)
            weights = (trained + parameters.frozen) * self.bytes.weight
            saved = saving.gpu(parameters.trained, layout.shards)
            saved += saving.gpu(parameters.experts, layout.expert_shards)
            memory = Memory(
                weights=weights + self._quantized(layout, stage),
                gradients=trained * self.bytes.gradient,
                optimizer=share * self.bytes.optimizer,
                activations=kept,
                attention=moment,
                head=self.activations.head(layout, row_tokens) if last else 0.0,
                update=share * update,
                save=share * self.bytes.save + saved,
            )
            found.append(memory)
        return found

    def _layers(
        self,
        layout: Layout,
        stage: int,
        row_tokens: int,
        gathered: float,
        recompute: str,
        in_flight: int,
    ) -> tuple[float, float]:
        """Bytes that a stage's layers keep, and what the backward pass of one adds for a moment.

        Ranks that share a row each select among the keys of all of it.
        """
        tokens = row_tokens / (layout.tensor * layout.context)
        spread, kinds = layout.expert > 1, self.sizes.sparse_of(layout, stage)

        inner = self.adapters.rows(layout.tensor) * self.bytes.weight if self.adapters else 0

        mlp = self.activations.of_mlp() if recompute in (MLP, BOTH) else 0.0
        seen = 0.0 if recompute in ATTENTION else gathered * layout.context

        def of_layer(keys: float, sparse: bool) -> float:
            return self.activations.of_layer(keys, sparse=sparse, spread=spread) + inner

        kept = {kind: of_layer(seen, kind) - mlp * (not kind) for kind in set(kinds)}
        keys = row_tokens * max(gathered, 1.0)
        moment = self.activations.attention(layout, keys, row_tokens)
        again = 0.0
        if recompute == FULL:
            again = max(of_layer(gathered * layout.context, kind) for kind in kept)
            kept = dict.fromkeys(kept, float(self.sizes.hidden * self.bytes.weight))
        elif recompute in ATTENTION:
            selected = self.activations.kept.gathered * gathered * self.sizes.key
            moment += selected * self.bytes.weight * row_tokens / layout.tensor
        moment = max(moment, tokens * mlp)
        if True in kept:  # gradients of all that experts keep
            moment = max(moment, tokens * self.activations.of_experts(spread))
        return tokens * (in_flight * sum(kept[kind] for kind in kinds) + again), moment

    def _quantized(self, layout: Layout, stage: int) -> float:
        """Bytes of what linear layers of a stage multiply with in place of their parameters."""
        if not self.bytes.quantized:
            return 0.0
        kinds = self.sizes.sparse_of(layout, stage)
        return self.bytes.quantized * sum(sum(self.sizes.layer(x).on_rank(layout)) for x in kinds)

    def host_memory(
        self, layout: Layout, saving: Saving, gpus_per_node: int, *, asynchronous: bool = False
    ) -> float:
        """Bytes of host memory that a save and the optimizer take on the fullest node.

        Megatron counts ranks along tensor, context, data and pipeline parallelism, in this order.
        Its writer copies what is on GPUs; an `asynchronous` one, what is on the host, too.
        """
        ranks = layout.tensor * layout.shards
        shares = [self._share(layout, stage) for stage in range(layout.pipeline)]
        nodes: dict[int, float] = {}
        for rank in range(ranks * layout.pipeline):
            share, within = shares[rank // ranks], rank % ranks
            first = within // layout.tensor == 0, within // layout.expert == 0
            weight = self.bytes.weight
            host = saving.host(share.trained, layout.shards, weight, first=first[0])
            host += saving.host(share.experts, layout.expert_shards, weight, first=first[1])
            there = 0.0 if saving.gathers or asynchronous else SAVED * self.bytes.offloaded
            host += (self.bytes.host - there) * share.sharded(layout)
            node = rank // gpus_per_node
            nodes[node] = nodes.get(node, 0.0) + host
        return max(nodes.values())

    def _share(self, layout: Layout, stage: int) -> Share:
        """Parameters of a rank of a pipeline stage."""
        split, experts = self.sizes.stage(layout, stage).on_rank(layout)
        if self.adapters is None:
            return Share(split, experts, 0.0)
        layers = self.sizes.layers / layout.pipeline
        return Share(layers * self.adapters.on_rank(layout.tensor), 0.0, split + experts)

    def operations(
        self,
        tokens: float,
        scored: float,
        length: float,
        *,
        recompute: str = NONE,
        attention: float = 3.0,
    ) -> float:
        """Floating-point operations of training on so many tokens, so many of them scored.

        Two a parameter and token forward, four backward; two of these where it is frozen.
        Attention's own products, causal in texts of `length` tokens, make `length x query`
        parameters a token: that is `4 A query` forward, where A is the sum of `P L + L^2 / 2` over
        segments of L tokens that see P others.

        Args:
            tokens: of rows.
            scored: of them.
            length: of texts; `2 A / tokens` where they differ.
            recompute: what is computed twice forward, a key of `recompute.FLAGS`.
            attention: its passes, forward and backward, in units of the forward one; `FLASH` counts
                what a fused kernel computes again.
        """
        sizes, again = self.sizes, attention + (recompute in ATTENTION)
        forward = 1.0 + self._again(recompute)
        products = (forward + (1.0 if self.adapters else 2.0)) * sizes.multiplied
        if self.adapters:
            products += (forward + 2.0) * self.trained
        layers = 2.0 * (products + sizes.layers * again * length * sizes.query) * tokens
        # The head computes its logits twice: eight a parameter, six of a frozen one.
        return layers + (6.0 if self.adapters else 8.0) * sizes.table * scored

    def _again(self, recompute: str) -> float:
        """Share of the products with weights that are computed again."""
        if recompute in (MLP, BOTH):
            return self.sizes.sparse.count(False) * self.sizes.mlp / self.sizes.multiplied
        return float(recompute == FULL)

    def communication(self, layout: Layout, tokens: float, recompute: str) -> Traffic:
        """Bytes that a rank gets of others while its group trains on `tokens`."""
        return Traffic.of(self.sizes, self.bytes.weight, layout, tokens, recompute)
