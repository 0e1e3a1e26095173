"""Kinds of layers: what a model's layers are made of, chosen once and read everywhere.

A kind is independent of the device: the CPU runs local layers as a GPU does. A family may adapt the
layers of any kind, by `FamilyLayers` of its own.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_infifpo.engine.kept import LAYERS, LayerTraits
from megatron_infifpo.engine.layers import OutputRMSNorm, PackedAttention, RMSNorm
from megatron_infifpo.engine.packed import row_params, te_params
from megatron_infifpo.engine.sinks import SinkAttention
from megatron_infifpo.errors import UserError
from megatron_infifpo.families.common import FamilyLayers, LayerParts
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.layout import RowLayout

# Tokens that FP8 products of Transformer Engine take a multiple of where values are scaled in
# blocks; else 16, for their backward pass.
FP8_TOKENS = {"mxfp8": 32, "blockwise": 128}


@dataclass(frozen=True)
class LayerKind:
    """What the layers of a model are made of.

    Attributes:
        name: its key in `KINDS`, and in `kept.LAYERS`.
        arguments: Megatron arguments that it leaves no choice about.
        layer: specification of a layer, from the configuration and whether it has experts.
        parts: the norm of what is normalised outside of a linear layer (heads, outputs, the last
            layer), and a linear layer without a norm in it.
        params: from a collated row to what the layers are told of it.
        rotates_by_row: whether `params` has every token's position, else Megatron counts.
        groups_experts: whether a layer's experts are one grouped product, else one after the other.
    """

    name: str
    arguments: Mapping[str, Any]
    layer: Callable[[TransformerConfig, bool], ModuleSpec]
    parts: Callable[[], LayerParts]
    params: Callable[[Row], PackedSeqParams]
    rotates_by_row: bool
    groups_experts: bool

    @property
    def traits(self) -> LayerTraits:
        """What is known of such layers without Megatron."""
        return LAYERS[self.name]

    def row_layout(
        self,
        tensor_parallel: int,
        *,
        context_parallel: int = 1,
        fp8_recipe: str | None = None,
        share_prompt: bool | None = None,
    ) -> RowLayout:
        """Return the layout of the rows that such layers take.

        Args:
            tensor_parallel: ranks that compute a row together.
            context_parallel: ranks that each compute a part of it.
            fp8_recipe: Megatron's name of how FP8 is scaled; None without FP8.
            share_prompt: None: where the layers can.

        Raises:
            UserError: they cannot.
        """
        able = self.traits.shares_prompts
        for flag, given in (
            ("--share-prompt", share_prompt),
            ("--context-parallel-size", context_parallel > 1),
        ):
            if given and not able:
                raise UserError(
                    f"{flag} does not work with Transformer Engine's attention: leave out one of "
                    "it and --te-attention"
                )
        shared = able if share_prompt is None else share_prompt
        products = 1 if fp8_recipe is None else FP8_TOKENS.get(fp8_recipe, 16)
        return RowLayout(tensor_parallel, products, shared, context_parallel)

    def block(
        self,
        family: FamilyLayers,
        config: TransformerConfig,
        vp_stage: int | None,
        adapt: Callable[[ModuleSpec], ModuleSpec] = lambda layer: layer,
    ) -> TransformerBlockSubmodules:
        """Layers of this pipeline stage, and the norm after the last.

        Args:
            family: adapts the layers, after `adapt`: it may add to what a linear layer returns.
            config: of the model.
            vp_stage: virtual pipeline stage, where there are some.
            adapt: changes a layer of this kind.
        """
        parts = self.parts()
        first = get_transformer_layer_offset(config, vp_stage)
        count = get_num_layers_to_build(config, vp_stage)
        sparse = sparse_layers(config)[first : first + count]
        kinds = {kind: family.adapt(adapt(self.layer(config, kind)), parts) for kind in set(sparse)}
        specs = [kinds[kind] for kind in sparse]
        return TransformerBlockSubmodules(layer_specs=specs, layer_norm=parts.norm)


def sparse_layers(config: TransformerConfig) -> list[bool]:
    """Which layers of a whole model have experts."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    assert isinstance(config.moe_layer_freq, list)
    return [bool(sparse) for sparse in config.moe_layer_freq]


def _attention(config: TransformerConfig) -> type[PackedAttention]:
    """Our core attention."""
    return PackedAttention if config.softmax_type == "vanilla" else SinkAttention


def _local_layer(config: TransformerConfig, experts: bool) -> ModuleSpec:
    """Megatron's local modules, our norm and our attention."""
    layer: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if experts else None,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if experts:
        # Transformer Engine fuses it with no linear layer then; Megatron names it as if it did.
        layer.submodules.pre_mlp_layernorm = OutputRMSNorm
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = _attention(config)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = OutputRMSNorm
    return layer


def _te_attention_layer(config: TransformerConfig, experts: bool) -> ModuleSpec:
    """Transformer Engine's modules, its attention included."""
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=experts,
        qk_layernorm=config.qk_layernorm,
    )


def _te_layer(config: TransformerConfig, experts: bool) -> ModuleSpec:
    """Transformer Engine's modules, and our attention."""
    layer = _te_attention_layer(config, experts)
    layer.submodules.self_attention.submodules.core_attention = _attention(config)
    return layer


def _te_parts() -> LayerParts:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    return LayerParts(TENorm, TEColumnParallelLinear)


_TE: dict[str, Any] = {"transformer_impl": "transformer_engine"}
_LOCAL: dict[str, Any] = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "apply_rope_fusion": False,
}
if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
    _LOCAL["gradient_accumulation_fusion"] = False  # of local linear layers it is Apex's

_ALL = (
    LayerKind(
        name="te",
        arguments=_TE,
        layer=_te_layer,
        parts=_te_parts,
        params=row_params,
        rotates_by_row=True,
        groups_experts=True,
    ),
    LayerKind(
        name="te-attention",
        arguments=_TE,
        layer=_te_attention_layer,
        parts=_te_parts,
        params=te_params,
        rotates_by_row=False,
        groups_experts=True,
    ),
    LayerKind(
        name="local",
        arguments=_LOCAL,
        layer=_local_layer,
        parts=lambda: LayerParts(OutputRMSNorm, ColumnParallelLinear),
        params=row_params,
        rotates_by_row=True,
        groups_experts=False,
    ),
)
KINDS = {kind.name: kind for kind in _ALL}


def choose_kind(
    *,
    half: bool,
    fp8: bool = False,
    transformer_impl: str = "transformer_engine",
    te_attention: bool = False,
) -> LayerKind:
    """Choose the layers of a run or of a scoring job; called once.

    Transformer Engine's where it imports, with our attention. Float32 is for the local ones:
    Transformer Engine would multiply it as TF32, which has 10 bits of it.

    Args:
        half: compute in bfloat16 or float16.
        fp8: with products in FP8.
        transformer_impl: Megatron's, `local` to do without Transformer Engine.
        te_attention: with Transformer Engine's attention.

    Raises:
        UserError: a flag that the chosen layers do not have.
    """
    te = HAVE_TE and half and transformer_impl != "local"
    why = "--transformer-impl is local" if HAVE_TE and half else "float32 runs on local layers"
    if not HAVE_TE:
        why = "Transformer Engine is not installed, or there is no GPU"
    for flag, given in (("--te-attention", te_attention), ("--fp8-format", fp8)):
        if given and not te:
            raise UserError(f"{flag} needs Transformer Engine's layers, but {why}: leave it out")
    return KINDS[("te-attention" if te_attention else "te") if te else "local"]
