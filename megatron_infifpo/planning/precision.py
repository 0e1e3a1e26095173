"""Bytes of a parameter, of its gradient and of its optimizer state, by precision."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Precision:
    """Bytes of a parameter, of its gradient and of its optimizer state, as Megatron keeps them.

    Attributes:
        quantized: bytes of what linear layers multiply with in place of a parameter, beside it.
        update, save: bytes of float32 copies that a fused Adam's step makes, and a save.
        host: bytes of a parameter's optimizer state in host memory.
        offloaded: share of the parameters whose optimizer state is there.
    """

    weight: int
    gradient: int
    optimizer: float
    quantized: int = 0
    update: int = 0
    save: int = 0
    host: float = 0.0
    offloaded: float = 0.0

    def lighter(
        self,
        *,
        gradients: bool = False,
        aware: bool = False,
        moments: bool = False,
        offload: float = 0.0,
    ) -> "Precision":
        """Return what makes training lighter, as Megatron 0.19 and Transformer Engine do it.

        Args:
            gradients: they are in bfloat16, and made float32 for the optimizer's step.
            aware: Transformer Engine's Adam keeps of a parameter only the 16 bits that bfloat16
                lacks, and reads gradients as they are.
            moments: that, and both of Adam's are in bfloat16.
            offload: share of the parameters whose optimizer state is in host memory, with their
                gradients in float32. What was made float32 of the others' remains there.
        """
        found = replace(self, gradient=2, update=4) if gradients else self
        if aware:
            found = replace(found, optimizer=10, update=0)
        if moments:
            found = replace(found, optimizer=6, update=8, save=8)
        if offload:
            stays = (1 - offload) * (found.optimizer + found.update)
            host = offload * (self.optimizer + 4)
            found = replace(found, optimizer=stays, update=0, host=host, offloaded=offload)
        return found


# bfloat16 has float32 gradients, and a float32 copy beside Adam's two moments. FP8 is bfloat16 with
# quantized weights, by rows and by columns; what layers keep is less, but counted as bfloat16.
PRECISIONS = {
    "bf16": Precision(2, 4, 12),
    "fp8": Precision(2, 4, 12, quantized=2),
    "fp32": Precision(4, 4, 8),
}
