"""From an architecture to Megatron's GPTModel: the one place where the model is built.

Training hands `model_config` to Megatron's `pretrain`; the scorer and the converter's `verify`
build the same model, forward only, with `build_model`.
"""

import argparse
import contextlib
import io
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import add_megatron_arguments, validate_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_infifpo.engine.adapters import adapt_layer
from megatron_infifpo.engine.layer_kind import LayerKind, choose_kind
from megatron_infifpo.engine.packed import RowRope
from megatron_infifpo.engine.parallel import ModelLayout, initialize_parallel
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import FAMILIES, rotary
from megatron_infifpo.families.lora import Lora
from megatron_infifpo.families.mapping import WeightMapping
from megatron_infifpo.patches import cpu
from megatron_infifpo.ranks import rank_and_size


def fixed_arguments(kind: LayerKind) -> dict[str, Any]:
    """Megatron arguments that packed rows, the layers and the device leave no choice about."""
    fixed: dict[str, Any] = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "calculate_per_token_loss": True,
        "dataloader_type": "external",
        # Only experts have a dispatcher, but the default one forbids variable lengths.
        "moe_token_dispatcher_type": "alltoall",
        # A router's choice of experts is a step: rounded, it would be another one more often.
        "moe_router_dtype": "fp32",
    }
    fixed |= kind.arguments
    if cpu.is_enabled():
        fixed |= cpu.argument_overrides()
    return fixed


def model_config(
    values: Mapping[str, Any], kind: LayerKind, lora: Lora | None = None
) -> GPTModelConfig:
    """Megatron's model configuration for packed rows.

    Args:
        values: validated Megatron arguments, with what `megatron_args` of a family has more than
            them. `padded_vocab_size` is the vocabulary of the checkpoint; Megatron pads it to a
            multiple of `--make-vocab-size-divisible-by` times TP, and our log-prob head ignores
            the padding.
        kind: of its layers.
        lora: their adapters, where they have some.
    """
    config = gpt_config_from_args(argparse.Namespace(**values))
    config.should_pad_vocab = True
    config.rope_scaling_factor = values["rope_scaling_factor"]
    # Rows have lengths of their own.
    config.transformer.variable_seq_lengths = True
    # It works around a mistake of PyTorch older than ours, with a wait for the GPU every time.
    config.transformer.batch_p2p_sync = False
    config.transformer.layer_kind = kind
    config.transformer.moe_grouped_gemm = bool(values["num_experts"]) and kind.groups_experts
    family, extras = FAMILIES[values["family"]].layers(), values["extras"]
    family.configure(config, extras)
    rope = values.get("rope")
    if rope is not None:
        rotary.configure(config, [rope])

    def adapt(layer: ModuleSpec) -> ModuleSpec:
        if lora is None:
            return layer
        return adapt_layer(layer, lora, WeightMapping(FAMILIES[values["family"]].rows, values))

    def block(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        return kind.block(family, config.transformer, vp_stage, adapt)

    def complete(models: list[GPTModel]) -> list[GPTModel]:
        for model in models:
            if rope is not None:
                rotary.set_rope(model, rope)
            family.complete(model, extras)
            if kind.rotates_by_row:
                model.rotary_pos_emb = RowRope(model.rotary_pos_emb)
        return models

    config.transformer_layer_spec = block
    config.pre_wrap_hooks.append(complete)
    return config


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Let Megatron check flags inside; what it refuses is the user's to mend."""
    try:
        yield
    except UserError:  # of ours
        raise
    except (AssertionError, ValueError) as error:
        # Some of its assertions say nothing: then the condition does.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise UserError(f"Megatron refuses these flags: {reason}") from error


def megatron_length(tokens: int, context_parallel: int) -> int:
    """Return the longest length that Megatron takes for such texts; our rows have any."""
    if context_parallel == 1:
        return tokens
    return max(2 * context_parallel, tokens - tokens % (2 * context_parallel))


def validated(values: Mapping[str, Any]) -> argparse.Namespace:
    """Megatron's arguments from values by name, checked and completed by Megatron."""
    args = argparse.Namespace(**values)
    with refusals():
        validate_args(args)
    return args


def _forward_only(
    architecture: Mapping[str, Any], layout: ModelLayout, kind: LayerKind
) -> dict[str, Any]:
    """Validated Megatron arguments of a model that is only run forward."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    values = vars(parser.parse_args([])) | architecture | fixed_arguments(kind)
    rank, world_size = rank_and_size()
    values |= {
        "bf16": layout.bf16,
        "gradient_accumulation_fusion": False,  # there are no gradients
        "rank": rank,
        "world_size": world_size,
        "tensor_model_parallel_size": layout.tensor_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "num_virtual_stages_per_pipeline_rank": layout.virtual_pipeline,
        "context_parallel_size": layout.context_parallel,
        "expert_model_parallel_size": layout.expert_parallel,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel,
        # Where tensors are split, layers with experts would compute each token on every rank.
        "sequence_parallel": bool(values["num_experts"]) and layout.tensor_parallel > 1,
        "micro_batch_size": 1,
        "seq_length": megatron_length(
            architecture["max_position_embeddings"], layout.context_parallel
        ),
        "_is_global_batch_size_explicitly_specified": False,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every argument
        return vars(validated(values))


def build_model(
    architecture: Mapping[str, Any], layout: ModelLayout, kind: LayerKind | None = None
) -> list[GPTModel]:
    """Build this rank's model chunks in evaluation mode, weights not loaded.

    Starts torch.distributed and the process groups where they are not there yet.

    Args:
        architecture: as `megatron_args` of a model family returns it.
        layout: of its ranks.
        kind: of its layers; None: what a run gets without a flag about them.

    Returns:
        One chunk, or one a virtual pipeline stage; `get_model_config(chunk).layer_kind` is `kind`.

    Raises:
        UserError: a layout that the ranks, the model or the layers cannot have.
    """
    kind = kind or choose_kind(half=layout.bf16)
    values = _forward_only(architecture, layout, kind)  # a layout is refused before ranks wait
    initialize_parallel(layout)
    config = model_config(values, kind)
    config.transformer.perform_initialization = False
    config.finalize()
    builder = GPTModelBuilder(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    virtual = values["virtual_pipeline_model_parallel_size"]
    stages = [None] if virtual is None else list(range(virtual))
    models = [builder.build_model(groups, vp_stage=stage) for stage in stages]
    for hook in config.pre_wrap_hooks:
        models = hook(models)
    for model in models:
        model.to(device=torch.cuda.current_device(), dtype=values["params_dtype"])
        model.eval().requires_grad_(False)
    return models
