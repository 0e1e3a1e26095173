"""Which layers and data types can be checked here. Imports Megatron: after `cpu.enable()`."""

import argparse
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
        flags: of `megatron_infifpo.train`.
        arguments: Megatron arguments that choose the layers.
    """

    name: str
    bf16: bool
    flags: tuple[str, ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()


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
    flags = {"bf16": bf16, "fp16": False, "fp8": None, "te_attention": False}
    return choose_kind(argparse.Namespace(transformer_impl="transformer_engine", **flags))
