"""Sizes of a model and counts of its parameters, from Megatron's arguments of its architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_infifpo.planning.layout import Layout


@dataclass(frozen=True)
class Experts:
    """The experts of a layer that has them in place of one MLP.

    Attributes:
        count: of them.
        ffn: inner width of each.
        chosen: how many a token goes to.
        shared: inner width of an MLP that every token goes to as well; 0: there is none.
    """

    count: int
    ffn: int
    chosen: int
    shared: int = 0


@dataclass(frozen=True)
class Held:
    """Parameters of some layers, by how they are spread over ranks.

    Attributes:
        split: over tensor-parallel ranks.
        whole: on every tensor-parallel rank: routers.
        experts: over expert-parallel ranks.
    """

    split: float
    whole: float = 0.0
    experts: float = 0.0

    def on_rank(self, layout: Layout) -> tuple[float, float]:
        """Parameters of a rank: what all data-parallel ranks have alike, and its experts'."""
        return self.split / layout.tensor + self.whole, self.experts / layout.expert


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    Attributes:
        hidden, layers, vocabulary: width, number of layers, rows of the embedding.
        ffn: inner width of the MLP, where a layer has one.
        untied: the output layer has a weight of its own.
        head, query, key: width of a head, of all query heads, of all key heads.
        experts: of a layer that has some.
        sparse: for every layer, whether it is one with experts.
    """

    hidden: int
    layers: int
    ffn: int
    vocabulary: int
    untied: bool
    head: int
    query: int
    key: int
    experts: Experts | None
    sparse: tuple[bool, ...]

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> "Sizes":
        """Take `megatron_args(config)`."""
        head, layers = model["kv_channels"], model["num_layers"]
        experts, sparse = None, (False,) * layers
        if model.get("num_experts"):
            ffn = model["moe_ffn_hidden_size"]
            shared = model.get("moe_shared_expert_intermediate_size") or 0
            experts = Experts(model["num_experts"], ffn, model["moe_router_topk"], shared)
            sparse = tuple(map(bool, model["moe_layer_freq"]))
        return cls(
            hidden=model["hidden_size"],
            layers=layers,
            ffn=model["ffn_hidden_size"],
            vocabulary=model["padded_vocab_size"],
            untied=model["untie_embeddings_and_output_weights"],
            head=head,
            query=head * model["num_attention_heads"],
            key=head * model["num_query_groups"],
            experts=experts,
            sparse=sparse,
        )

    @property
    def table(self) -> int:
        """Parameters of the embedding, or of the output layer."""
        return self.vocabulary * self.hidden

    @property
    def attention(self) -> int:
        """Parameters of a layer's attention; norms and biases do not show."""
        return self.hidden * (2 * self.query + 2 * self.key)

    @property
    def mlp(self) -> int:
        """Parameters of the MLP of a layer without experts, which has a gate."""
        return 3 * self.hidden * self.ffn

    def layer(self, sparse: bool = False) -> Held:
        """Parameters of a layer, with experts or without."""
        if not sparse or self.experts is None:
            return Held(self.attention + self.mlp)
        experts = self.experts
        every = 3.0 * self.hidden * experts.ffn * experts.count
        split = self.attention + 3 * self.hidden * experts.shared
        return Held(split, self.hidden * experts.count, every)

    def used(self, sparse: bool = False) -> float:
        """Parameters of a layer that a token is multiplied with."""
        held = self.layer(sparse)
        share = self.experts.chosen / self.experts.count if self.experts else 0.0
        return held.split + held.whole + share * held.experts

    def stage(self, layout: Layout, number: int) -> Held:
        """Parameters of a pipeline stage, tables included, before they are spread over ranks."""
        kinds = [self.layer(sparse) for sparse in self.sparse_of(layout, number)]
        first, last = number == 0, number == layout.pipeline - 1
        tables = first + last if self.untied or layout.pipeline > 1 else 1
        return Held(
            sum(kind.split for kind in kinds) + tables * self.table,
            sum(kind.whole for kind in kinds),
            sum(kind.experts for kind in kinds),
        )

    def sparse_of(self, layout: Layout, stage: int) -> tuple[bool, ...]:
        """For every layer of a pipeline stage, whether it has experts."""
        each = self.layers // layout.pipeline
        return self.sparse[stage * each : (stage + 1) * each]

    @cached_property
    def parameters(self) -> float:
        """All parameters."""
        every = [self.layer(sparse) for sparse in self.sparse]
        layers = sum(held.split + held.whole + held.experts for held in every)
        return layers + (1 + self.untied) * self.table

    @cached_property
    def multiplied(self) -> float:
        """Parameters of all layers that a token is multiplied with, tables left out."""
        return sum(self.used(sparse) for sparse in self.sparse)
