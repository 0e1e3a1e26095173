"""What the kinds of layers can and what they cost: known without Megatron, which builds them.

What a layer keeps of a token for its backward pass is counted from code, and checked on the CPU.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """What a layer keeps of one token for its backward pass, in numbers of each width.

    Attributes:
        hidden: inputs and outputs of both norms.
        query: queries as attention sees them, and its output.
        key: keys as attention sees them.
        joint: queries, keys and values as one product made them, which the values hold alive.
        gathered: keys and values that attention selects, for shared prompts and under context
            parallelism, in place of `key` and `joint`.
        mlp: both halves of the first product, what the gate became, their product.
        fused_norm: of `hidden`, the outputs of norms that are a part of an MLP's first product.
        rope: sines and cosines, of a head's width.
    """

    hidden: int
    query: int
    key: int
    joint: int
    gathered: int
    mlp: int
    fused_norm: int
    rope: int


@dataclass(frozen=True)
class LayerTraits:
    """What is known of a kind of layers.

    Attributes:
        kept: what a layer keeps of a token, on a GPU.
        shares_prompts: whether a segment's keys may begin with a prompt that lies elsewhere.
    """

    kept: Kept
    shares_prompts: bool = True


# Transformer Engine's layers with this program's attention, and with their own; Megatron's local
# layers, where the norm, attention and the gate are one kernel each.
LAYERS = {
    "te": LayerTraits(
        Kept(hidden=4, query=2, key=1, joint=1, gathered=2, mlp=3, fused_norm=1, rope=0)
    ),
    "te-attention": LayerTraits(
        Kept(hidden=4, query=2, key=1, joint=1, gathered=0, mlp=3, fused_norm=1, rope=0),
        shares_prompts=False,
    ),
    "local": LayerTraits(
        Kept(hidden=4, query=2, key=1, joint=1, gathered=2, mlp=3, fused_norm=0, rope=4)
    ),
}
# Of local layers on a CPU: norms keep the normalised rows beside, attention its output once a
# segment and once whole, the gate what it became and that in place of both.
ON_CPU = Kept(hidden=6, query=3, key=1, joint=1, gathered=2, mlp=5, fused_norm=0, rope=4)
