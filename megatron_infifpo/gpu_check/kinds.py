"""Which layers and data types can be checked here. Imports Megatron: after `cpu.enable()`."""

from dataclasses import dataclass
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_infifpo.engine.layer_kind import LayerKind, choose_kind


@dataclass(frozen=True)
class Variant:
    """Layers in a data type.

    Attributes:
        name: as tables show it.
        bf16: in bfloat16, else in float32.
        flags: of `infifpo train`.
        choice: of the layers, beside their data type: arguments of `choose_kind`.
    """

    name: str
    bf16: bool
    flags: tuple[str, ...] = ()
    choice: tuple[tuple[str, Any], ...] = ()

    @property
    def kind(self) -> LayerKind:
        """Its kind of layers."""
        return choose_kind(half=self.bf16, **dict(self.choice))


LOCAL = ("--transformer-impl", "local")
FP32 = Variant("local fp32", False, LOCAL, (("transformer_impl", "local"),))
BF16 = Variant("local bf16", True, (*LOCAL, "--bf16"), (("transformer_impl", "local"),))
TE = Variant("te bf16", True, ("--bf16",))
TE_ATTENTION = Variant(
    "te-attention bf16", True, ("--bf16", "--te-attention"), (("te_attention", True),)
)


def variants() -> dict[Variant, str | None]:
    """All variants, and why one cannot be checked here."""
    reason = None if HAVE_TE else "Transformer Engine is not installed, or there is no GPU"
    return {FP32: None, BF16: None, TE: reason, TE_ATTENTION: reason}


def default_kind(*, bf16: bool) -> LayerKind:
    """Return the layers that a run without any flag about them gets here."""
    return choose_kind(half=bf16)
