"""What families of experts share: Megatron arguments, and which rows a layer with experts has.

In such a layer a router sends every token to some of many MLPs. Layers that have none are dense.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import llama
from megatron_infifpo.families.common import required
from megatron_infifpo.families.mapping import DENSE, SPARSE, Row
from megatron_infifpo.families.transforms import GATE_UP

# Megatron's arguments of a model without experts.
NO_EXPERTS: dict[str, Any] = {
    "num_experts": None,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": None,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
}
_MLP = "decoder.layers.mlp."
EXPERTS = f"{_MLP}experts.experts."  # before the names of their tensors


def expert_args(
    *, experts: int, width: int, chosen: int, normalised: bool, sparse: Sequence[bool]
) -> dict[str, Any]:
    """Megatron arguments of layers with experts.

    Args:
        experts: of a layer.
        width: inner width of an expert.
        chosen: experts that a token goes to.
        normalised: whether the weights of those sum to 1, and not those of all.
        sparse: which layers have experts.

    Raises:
        UserError: a router that Megatron would compute otherwise.
    """
    for name, value, least in (("experts", experts, 1), ("experts a token", chosen, 1)):
        if type(value) is not int or value < least:
            raise UserError(f"config.json: the number of {name} is {value!r}, expected an integer")
    if chosen > experts:
        raise UserError(f"config.json: a token goes to {chosen} experts of {experts}")
    if chosen == 1 and normalised:
        raise UserError(
            "config.json: num_experts_per_tok is 1 with normalised weights, which are then 1 "
            "whatever the router says: Megatron would take the router's probability"
        )
    return {
        "num_experts": experts,
        # A list, also where all have them: then Megatron names the tensors of each layer.
        "moe_layer_freq": [int(layer) for layer in sparse],
        "moe_ffn_hidden_size": width,
        "moe_router_topk": chosen,
        # The softmax is over all experts, or over the chosen ones: the same once normalised.
        "moe_router_pre_softmax": not normalised,
        "moe_shared_expert_intermediate_size": None,
        "moe_shared_expert_gate": False,
    }


def sparse_layers(config: Mapping[str, Any]) -> list[bool]:
    """Which layers of a Qwen model have experts: every so many, but for those it names.

    Raises:
        UserError: none has.
    """
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    layers = range(required(config, "num_hidden_layers"))
    found = [layer not in dense and (layer + 1) % step == 0 for layer in layers]
    if not any(found):
        raise UserError(
            "config.json: decoder_sparse_step and mlp_only_layers leave no layer with experts: "
            "give it the model_type of the dense family"
        )
    return found


def one_sparse_layer(config: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Fields of a Qwen model that has just this layer of another one."""
    dense = [] if sparse_layers(config)[layer] else [0]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def with_experts(
    rows: Sequence[Row],
    router: str,
    experts: tuple[str, str, str] | None,
    more: Sequence[Row] = (),
) -> tuple[Row, ...]:
    """Rows of a family whose layers have experts, some or all.

    Args:
        rows: of the family that it is without experts.
        router: Hugging Face's name of the router's weight, `{}` standing for the layer.
        experts: those of an expert's gate, up and down projection, a second `{}` for the expert;
            None: they are among `more`.
        more: rows of layers with experts beyond these.
    """
    norm = next(row for row in llama.ROWS if row.key == f"{_MLP}linear_fc1.layer_norm_weight")
    return (
        *(replace(row, layers=DENSE) if row.key.startswith(_MLP) else row for row in rows),
        Row("decoder.layers.pre_mlp_layernorm.weight", norm.hf_names, ("hidden",), layers=SPARSE),
        Row(
            f"{_MLP}router.weight",
            (router,),
            ("experts", "hidden"),
            layers=SPARSE,
            stateless=True,
        ),
        *(() if experts is None else _each_expert(*experts)),
        *more,
    )


def _each_expert(gate: str, up: str, down: str) -> tuple[Row, Row]:
    """Rows of experts that have tensors of their own in Hugging Face folders."""
    return (
        Row(
            f"{EXPERTS}linear_fc1.weight",
            (gate, up),
            ("expert_gate_up", "hidden"),
            GATE_UP,
            layers=SPARSE,
            per_expert=True,
        ),
        Row(
            f"{EXPERTS}linear_fc2.weight",
            (down,),
            ("hidden", "expert_ffn"),
            layers=SPARSE,
            per_expert=True,
        ),
    )
