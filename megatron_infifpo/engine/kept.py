"""What the kinds of layers can and what they cost: known without Megatron, which builds them.

What a layer keeps of a token for its backward pass is counted from code, and checked on the CPU.
"""

from dataclasses import dataclass


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
    "te": LayerTraits(Kept(hidden=4, query=3, key=3, gathered=2, mlp=3, rope=0)),
    "te-attention": LayerTraits(
        Kept(hidden=4, query=3, key=3, gathered=0, mlp=3, rope=0), shares_prompts=False
    ),
    "local": LayerTraits(Kept(hidden=4, query=3, key=3, gathered=2, mlp=3, rope=4)),
}
