"""What a training run costs, on paper: memory of a GPU by layout, floating-point operations, hours.

Counts follow from shapes. Symbols: `T` tokens of a row, `L` layers, `P` parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.engine.kept import LAYERS, Kept
from megatron_infifpo.logprobs import CHUNK_BYTES
from megatron_infifpo.planning.saves import BY_RANK, Saving

GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks: tensor, pipeline and data parallel sizes."""

    tensor: int
    pipeline: int
    data: int


@dataclass(frozen=True)
class Precision:
    """Bytes of a parameter, of its gradient and of its optimizer state, as Megatron keeps them.

    Attributes:
        quantized: bytes of what linear layers multiply with in place of a parameter, beside it.
    """

    weight: int
    gradient: int
    optimizer: int
    quantized: int = 0


# bfloat16 has float32 gradients, and a float32 copy beside Adam's two moments. FP8 is bfloat16 with
# quantized weights, by rows and by columns; what layers keep is less, but counted as bfloat16.
PRECISIONS = {
    "bf16": Precision(2, 4, 12),
    "fp8": Precision(2, 4, 12, quantized=2),
    "fp32": Precision(4, 4, 8),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    Attributes:
        update: what the optimizer's step adds for a moment.
        save: what a save adds for a moment.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    update: float
    save: float

    @property
    def total(self) -> float:
        """Most at once: activations are gone when the optimizer steps, and when a save begins."""
        lasting = self.weights + self.gradients + self.optimizer
        return lasting + max(self.activations + self.head, self.update, self.save)


class Plan:
    """A model's cost, from the Megatron arguments of its architecture."""

    def __init__(
        self, model: Mapping[str, Any], precision: str = "bf16", kept: Kept = LAYERS["te"].kept
    ):
        """Take `megatron_args(config)`, a key of `PRECISIONS`, and what a layer keeps."""
        self.hidden: int = model["hidden_size"]
        self.layers: int = model["num_layers"]
        self.ffn: int = model["ffn_hidden_size"]
        self.vocabulary: int = model["padded_vocab_size"]
        self.untied: bool = model["untie_embeddings_and_output_weights"]
        self.head: int = model["kv_channels"]
        self.query: int = self.head * model["num_attention_heads"]
        self.key: int = self.head * model["num_query_groups"]
        self.kept = kept
        self.bytes = PRECISIONS[precision]

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
        recompute: bool = False,
        fused_adam: bool = True,
        saving: Saving = BY_RANK,
    ) -> list[Memory]:
        """Memory of a rank of each pipeline stage, with the distributed optimizer.

        Args:
            layout: sequence parallelism is taken as on where tensor is above 1.
            row_tokens: tokens of a micro-batch.
            micro_batches: of a step on a rank.
            gathered: keys that attention sees for a token of a row, with shared prompts.
            recompute: Megatron's `--recompute-granularity full`.
            fused_adam: Transformer Engine's or Apex's, else PyTorch's.
            saving: how checkpoints are saved.
        """
        layers = self.layers / layout.pipeline
        token = self.activation_bytes(gathered)
        kept = self.hidden * self.bytes.weight if recompute else token
        quantized = layers * self.layer_parameters / layout.tensor * self.bytes.quantized
        found = []
        for stage in range(layout.pipeline):
            parameters = self._parameters_of(layout, stage)
            in_flight = min(micro_batches, layout.pipeline - stage)
            rows = layers * kept * in_flight + (token if recompute else 0)
            memory = Memory(
                weights=parameters * self.bytes.weight + quantized,
                gradients=parameters * self.bytes.gradient,
                optimizer=parameters * self.bytes.optimizer / layout.data,
                activations=row_tokens * rows / layout.tensor,
                head=self._head(layout, row_tokens) if stage == layout.pipeline - 1 else 0.0,
                # PyTorch's Adam takes the roots of all second moments before it uses them.
                update=0.0 if fused_adam else 4.0 * parameters / layout.data,
                save=saving.gpu(parameters, layout.data),
            )
            found.append(memory)
        return found

    def host_memory(self, layout: Layout, saving: Saving, gpus_per_node: int) -> float:
        """Bytes of host memory that a save takes on the fullest node.

        Megatron counts ranks along tensor, data and pipeline parallelism, in this order.
        """
        tensor, data = layout.tensor, layout.data
        nodes: dict[int, float] = {}
        for rank in range(tensor * data * layout.pipeline):
            parameters = self._parameters_of(layout, rank // (tensor * data))
            first = rank // tensor % data == 0
            host = saving.host(parameters, data, self.bytes.weight, first=first)
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
        table = self.table_parameters / layout.tensor
        logits = 4.0 * row_tokens * self.vocabulary / layout.tensor
        chunk = min(logits, CHUNK_BYTES["cuda"]) * (1 + (self.bytes.weight == 2) / 2)
        return chunk + table * self.bytes.weight + row_tokens * self.end_bytes() / layout.tensor

    def activation_bytes(self, gathered: float = 0.0) -> float:
        """Bytes that a layer keeps of one token for its backward pass, as `Kept` says."""
        kept = self.kept
        attention = kept.query * self.query + (kept.key + kept.gathered * gathered) * self.key
        rows = kept.hidden * self.hidden + attention + kept.mlp * self.ffn + kept.rope * self.head
        return rows * self.bytes.weight

    def end_bytes(self) -> float:
        """Bytes that the last norm keeps of one token, and the head of a scored one."""
        return (self.kept.hidden / 2 + 1) * self.hidden * self.bytes.weight

    def operations(
        self, tokens: float, scored: float, length: float, *, recompute: bool = False
    ) -> float:
        """Floating-point operations of training on so many tokens, so many of them scored.

        Two a parameter and token forward, four backward; with recomputation two more. Attention's
        own products, causal in texts of `length` tokens, make `length x query` parameters a token.
        """
        passes = 8.0 if recompute else 6.0
        layers = passes * self.layers * (self.layer_parameters + length * self.query) * tokens
        # The head computes its logits twice: eight a parameter.
        return layers + 8.0 * self.table_parameters * scored


def layouts(
    gpus: int, tensor_sizes: list[int], layers: int, gpus_per_node: int, global_batch_size: int
) -> list[Layout]:
    """Every legal layout: tensor parallelism inside a node, equal stages, equal shares of a batch.

    A size that does not divide the node's would let some tensor-parallel groups straddle two.
    """
    found = [
        Layout(tensor, pipeline, gpus // (tensor * pipeline))
        for tensor in tensor_sizes
        if gpus_per_node % tensor == 0 or gpus <= gpus_per_node
        for pipeline in range(1, layers + 1)
        if layers % pipeline == 0 and gpus % (tensor * pipeline) == 0
    ]
    return [layout for layout in found if global_batch_size % layout.data == 0]
