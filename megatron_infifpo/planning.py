"""What a training run costs, on paper: memory of a GPU by layout, floating-point operations, hours.

Counts follow from shapes. Symbols: `T` tokens of a row, `L` layers, `P` parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.logprobs import CHUNK_BYTES

GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks: tensor, pipeline and data parallel sizes."""

    tensor: int
    pipeline: int
    data: int


@dataclass(frozen=True)
class Precision:
    """Bytes of a parameter, of its gradient and of its optimizer state, as Megatron keeps them."""

    weight: int
    gradient: int
    optimizer: int


# bfloat16 has float32 gradients, and a float32 copy beside Adam's two moments.
PRECISIONS = {"bf16": Precision(2, 4, 12), "fp32": Precision(4, 4, 8)}


@dataclass(frozen=True)
class Kept:
    """What a layer keeps of one token for its backward pass, in numbers of each width.

    Attributes:
        hidden: inputs and outputs of both norms.
        query: queries as attention sees them, the part of the joint projection that its values
            hold alive, the output.
        key: keys, and the same part.
        gathered: keys and values of shared prompts, a second time.
        mlp: both halves of the first product, what the gate became, their product.
        rope: sines and cosines, of a head's width.
    """

    hidden: int
    query: int
    key: int
    gathered: int
    mlp: int
    rope: int


# Transformer Engine's layers with this program's attention, and with their own; Megatron's local
# layers on a GPU, where the norm, attention and the gate are one kernel each; and on a CPU, where
# norms keep the normalised rows beside, and attention its output once a segment and once whole.
TE_KEPT = Kept(hidden=4, query=3, key=3, gathered=2, mlp=3, rope=0)
TE_ATTENTION_KEPT = Kept(hidden=4, query=3, key=3, gathered=0, mlp=3, rope=0)
LOCAL_KEPT = Kept(hidden=4, query=3, key=3, gathered=2, mlp=3, rope=4)
CPU_KEPT = Kept(hidden=6, query=4, key=3, gathered=2, mlp=4, rope=4)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


class Plan:
    """A model's cost, from the Megatron arguments of its architecture."""

    def __init__(self, model: Mapping[str, Any], precision: str = "bf16", kept: Kept = TE_KEPT):
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

    def memory(
        self,
        layout: Layout,
        row_tokens: int,
        micro_batches: int,
        *,
        gathered: float = 0.0,
        recompute: bool = False,
    ) -> Memory:
        """Memory of the fullest rank, with the distributed optimizer.

        Args:
            layout: sequence parallelism is taken as on where tensor is above 1.
            row_tokens: tokens of a micro-batch.
            micro_batches: of a step on a rank.
            gathered: keys that attention sees for a token of a row, with shared prompts.
            recompute: Megatron's `--recompute-granularity full`.
        """
        return max(
            (
                self._stage(layout, stage, row_tokens, micro_batches, gathered, recompute)
                for stage in range(layout.pipeline)
            ),
            key=lambda memory: memory.total,
        )

    def _stage(
        self,
        layout: Layout,
        stage: int,
        row_tokens: int,
        micro_batches: int,
        gathered: float,
        recompute: bool,
    ) -> Memory:
        first, last = stage == 0, stage == layout.pipeline - 1
        layers = self.layers / layout.pipeline
        tables = first + last if self.untied or layout.pipeline > 1 else 1
        parameters = layers * self.layer_parameters + tables * self.table_parameters
        parameters /= layout.tensor
        in_flight = min(micro_batches, layout.pipeline - stage)
        token = self.activation_bytes(gathered)
        kept = self.hidden * self.bytes.weight if recompute else token
        rows = layers * kept * in_flight + (token if recompute else 0)
        # A chunk of logits in float32, and in bfloat16 too; autograd's stand-in for the weight's
        # gradient, and in bfloat16 the product that is added to the buffer.
        half = self.bytes.weight == 2
        table = self.table_parameters / layout.tensor * self.bytes.weight
        end = row_tokens * self.end_bytes() / layout.tensor
        head = (1 + half) * (CHUNK_BYTES + table) + end if last else 0
        return Memory(
            weights=parameters * self.bytes.weight,
            gradients=parameters * self.bytes.gradient,
            optimizer=parameters * self.bytes.optimizer / layout.data,
            activations=row_tokens * rows / layout.tensor,
            head=head,
        )

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
