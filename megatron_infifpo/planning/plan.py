"""What a training run costs, on paper: memory of a GPU by layout, floating-point operations, hours.

Counts follow from shapes. Symbols: `T` tokens of a row, `L` layers, `P` parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.engine.kept import LAYERS, Kept
from megatron_infifpo.logprobs import CHUNK_BYTES
from megatron_infifpo.planning.precision import PRECISIONS
from megatron_infifpo.planning.saves import BY_RANK, Saving

GIB = 2**30
# What is computed again in the backward pass: nothing, attention, all of a layer.
NONE, SELECTIVE, FULL = "none", "selective", "full"
# Of attention, in units of its forward pass with two products: backward four, and scores again.
FLASH = 3.5


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks: tensor, pipeline, data and context parallel sizes.

    `data` is the ranks, or groups of ranks, that have rows of their own.
    """

    tensor: int
    pipeline: int
    data: int
    context: int = 1

    @property
    def shards(self) -> int:
        """Ranks that the optimizer's state of a parameter is spread over."""
        return self.data * self.context


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    Attributes:
        attention: what the backward pass of a layer's attention adds for a moment.
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


class Plan:
    """A model's cost, from the Megatron arguments of its architecture."""

    def __init__(
        self,
        model: Mapping[str, Any],
        precision: str = "bf16",
        kept: Kept = LAYERS["te"].kept,
        **lighter: Any,
    ):
        """Take `megatron_args(config)`, a key of `PRECISIONS`, and what a layer keeps.

        `lighter` are arguments of `Precision.lighter`.
        """
        self.hidden: int = model["hidden_size"]
        self.layers: int = model["num_layers"]
        self.ffn: int = model["ffn_hidden_size"]
        self.vocabulary: int = model["padded_vocab_size"]
        self.untied: bool = model["untie_embeddings_and_output_weights"]
        self.head: int = model["kv_channels"]
        self.query: int = self.head * model["num_attention_heads"]
        self.key: int = self.head * model["num_query_groups"]
        self.kept = kept
        self.bytes = PRECISIONS[precision].lighter(**lighter)

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer's products; norms and biases do not show."""
        attention = self.hidden * (2 * self.query + 2 * self.key)
        return attention + 3 * self.hidden * self.ffn

    @property
    def table_parameters(self) -> int:
        """Parameters of the embedding, or of the output layer."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.layer_parameters + (1 + self.untied) * self.table_parameters

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
            recompute: one of NONE, SELECTIVE, FULL, Megatron's `--recompute-granularity`.
            fused_adam: Transformer Engine's or Apex's, else PyTorch's.
            saving: how checkpoints are saved.
        """
        layers = self.layers / layout.pipeline
        tokens = row_tokens / (layout.tensor * layout.context)
        # Ranks that share a row each select among the keys of all of it.
        own, whole = self.activation_bytes(), self.activation_bytes(gathered * layout.context)
        kept = {NONE: whole, SELECTIVE: own, FULL: self.hidden * self.bytes.weight}[recompute]
        attention = self._attention(layout, row_tokens * max(gathered, 1.0), row_tokens)
        if recompute == SELECTIVE:
            selected = self.kept.gathered * gathered * self.key * self.bytes.weight
            attention += selected * row_tokens / layout.tensor
        quantized = layers * self.layer_parameters / layout.tensor * self.bytes.quantized
        # PyTorch's Adam takes the roots of all second moments before it uses them.
        update = self.bytes.update + (0.0 if fused_adam else 4.0)
        found = []
        for stage in range(layout.pipeline):
            parameters = self._parameters_of(layout, stage)
            share = parameters / layout.shards
            in_flight = min(micro_batches, layout.pipeline - stage)
            memory = Memory(
                weights=parameters * self.bytes.weight + quantized,
                gradients=parameters * self.bytes.gradient,
                optimizer=share * self.bytes.optimizer,
                activations=tokens * (layers * kept * in_flight + whole * (recompute == FULL)),
                attention=attention,
                head=self._head(layout, row_tokens) if stage == layout.pipeline - 1 else 0.0,
                update=share * update,
                save=share * self.bytes.save + saving.gpu(parameters, layout.shards),
            )
            found.append(memory)
        return found

    def host_memory(self, layout: Layout, saving: Saving, gpus_per_node: int) -> float:
        """Bytes of host memory that a save and the optimizer take on the fullest node.

        Megatron counts ranks along tensor, context, data and pipeline parallelism, in this order.
        """
        tensor, data = layout.tensor, layout.shards
        nodes: dict[int, float] = {}
        for rank in range(tensor * data * layout.pipeline):
            parameters = self._parameters_of(layout, rank // (tensor * data))
            first = rank // tensor % data == 0
            host = saving.host(parameters, data, self.bytes.weight, first=first)
            host += self.bytes.host * parameters / data
            node = rank // gpus_per_node
            nodes[node] = nodes.get(node, 0.0) + host
        return max(nodes.values())

    def _parameters_of(self, layout: Layout, stage: int) -> float:
        """Parameters of a rank of a pipeline stage."""
        first, last = stage == 0, stage == layout.pipeline - 1
        tables = first + last if self.untied or layout.pipeline > 1 else 1
        layers = self.layers / layout.pipeline * self.layer_parameters
        return (layers + tables * self.table_parameters) / layout.tensor

    def _head(self, layout: Layout, row_tokens: int) -> float:
        """Bytes that the last stage needs for log-probs, on a GPU.

        A chunk of float32 logits, and in bfloat16 its gradient for two products; autograd's
        stand-in for the weight's gradient; what the last norm and the head keep of the row.
        """
        table, tokens = self.table_parameters / layout.tensor, row_tokens / layout.context
        logits = 4.0 * tokens * self.vocabulary / layout.tensor
        chunk = min(logits, CHUNK_BYTES["cuda"]) * (1 + (self.bytes.weight == 2) / 2)
        return chunk + table * self.bytes.weight + tokens * self.end_bytes() / layout.tensor

    def _attention(self, layout: Layout, keys: float, row_tokens: int) -> float:
        """Bytes of gradients that a layer's attention makes at once, for so many keys of a rank.

        Where heads share keys, PyTorch's flash kernel first makes one gradient a query head. Under
        context parallelism those of the whole row's keys come after that; the forward pass holds
        less, the keys themselves.
        """
        spread = self.query * keys if self.query > self.key else 0.0
        whole = self.key * row_tokens if layout.context > 1 else 0.0
        gradients = 2.0 * (self.key * keys + max(spread, whole))  # of keys and of values
        return gradients * self.bytes.weight / layout.tensor

    def activation_bytes(self, gathered: float = 0.0) -> float:
        """Bytes that a layer keeps of one token for its backward pass, as `Kept` says.

        `gathered`: keys that attention selects for it; 0 where it takes them as they are, or is
        computed again.
        """
        kept = self.kept
        if gathered:
            attention = kept.query * self.query + kept.gathered * gathered * self.key
        else:
            attention = (kept.query + kept.joint) * self.query
            attention += (kept.key + 2 * kept.joint) * self.key
        rows = kept.hidden * self.hidden + attention + kept.mlp * self.ffn + kept.rope * self.head
        return rows * self.bytes.weight

    def end_bytes(self) -> float:
        """Bytes that the last norm keeps of one token, and the head of a scored one."""
        return (self.kept.hidden / 2 + 1) * self.hidden * self.bytes.weight

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

        Two a parameter and token forward, four backward. Attention's own products, causal in texts
        of `length` tokens, make `length x query` parameters a token: that is `4 A query` forward,
        where A is the sum of `P L + L^2 / 2` over segments of L tokens that see P others.

        Args:
            tokens: of rows.
            scored: of them.
            length: of texts; `2 A / tokens` where they differ.
            recompute: what is computed twice forward.
            attention: its passes, forward and backward, in units of the forward one; `FLASH` counts
                what a fused kernel computes again.
        """
        again = attention + (recompute != NONE)
        products = self.layer_parameters * (4.0 if recompute == FULL else 3.0)
        layers = 2.0 * self.layers * (products + again * length * self.query) * tokens
        # The head computes its logits twice: eight a parameter.
        return layers + 8.0 * self.table_parameters * scored

    def communication(self, layout: Layout, tokens: float, recompute: str) -> float:
        """Bytes of others' keys and values that a rank gets while its group trains on `tokens`.

        They are gathered forward, and their gradients scattered backward; gathered again where
        attention is computed again.
        """
        passes, others = 2 + (recompute != NONE), 1 - 1 / layout.context
        row = 2.0 * self.key * self.bytes.weight * tokens / layout.tensor
        return passes * self.layers / layout.pipeline * others * row


def layouts(
    gpus: int,
    tensor_sizes: list[int],
    layers: int,
    gpus_per_node: int,
    global_batch_size: int,
    *,
    contexts: bool = False,
) -> list[Layout]:
    """Every legal layout: ranks of a row inside a node, equal stages, equal shares of a batch.

    A tensor x context parallel size that does not divide the node's would let some groups straddle
    two, over a slower network. `contexts`: context parallelism is an option.
    """
    found = [
        Layout(tensor, pipeline, gpus // (tensor * pipeline * context), context)
        for tensor in tensor_sizes
        for context in range(1, min(gpus, gpus_per_node) + 1 if contexts else 2)
        if gpus_per_node % (tensor * context) == 0 or gpus <= gpus_per_node
        for pipeline in range(1, layers + 1)
        if layers % pipeline == 0 and gpus % (tensor * pipeline * context) == 0
    ]
    return [layout for layout in found if global_batch_size % layout.data == 0]
