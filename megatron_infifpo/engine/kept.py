"""What a layer keeps of a token for its backward pass: counted from code, checked on the CPU."""

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


# Transformer Engine's layers with this program's attention, and with their own; Megatron's local
# layers on a GPU, where the norm, attention and the gate are one kernel each; and on a CPU, where
# norms keep the normalised rows beside, and attention its output once a segment and once whole.
TE_KEPT = Kept(hidden=4, query=3, key=3, gathered=2, mlp=3, rope=0)
TE_ATTENTION_KEPT = Kept(hidden=4, query=3, key=3, gathered=0, mlp=3, rope=0)
LOCAL_KEPT = Kept(hidden=4, query=3, key=3, gathered=2, mlp=3, rope=4)
CPU_KEPT = Kept(hidden=6, query=4, key=3, gathered=2, mlp=4, rope=4)
