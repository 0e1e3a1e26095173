"""What forked ranks run in conversion tests."""

import argparse
import sys
from pathlib import Path
from typing import Any

from support.tools import run_tool


def megatron_argument_names() -> list[str]:
    """Names of all of Megatron's arguments."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return list(vars(parser.parse_args([])))


def build(hf: str, layout: dict[str, Any]) -> list:
    """Build this rank's chunks of the model of a Hugging Face folder."""
    from megatron_infifpo.engine.gpt import build_model
    from megatron_infifpo.engine.parallel import ModelLayout
    from megatron_infifpo.families import megatron_args
    from megatron_infifpo.families.architecture import read_hf_config

    return build_model(megatron_args(read_hf_config(hf)), ModelLayout(**layout))


def load_both(hf: str, checkpoint: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Fill a model from Hugging Face weights and from a checkpoint; return what differs."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron_infifpo.convert.hf_weights import load_into_model
    from megatron_infifpo.storage.checkpoints import find_checkpoint

    models = build(hf, layout)

    def load_checkpoint() -> None:
        # All chunks at once: Megatron checks that together the ranks read every tensor whole.
        state = {f"model{i}": model.sharded_state_dict() for i, model in enumerate(models)}
        state = dist_checkpointing.load(state, str(find_checkpoint(checkpoint)))
        for i, model in enumerate(models):
            model.load_state_dict(state[f"model{i}"])

    filled = []
    for load in (lambda: load_into_model(models, hf), load_checkpoint):
        for model in models:
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        load()
        filled.append(
            {
                f"{i}.{name}": parameter.clone()
                for i, model in enumerate(models)
                for name, parameter in model.named_parameters()
            }
        )
    differ = [name for name in filled[0] if not torch.equal(filled[0][name], filled[1][name])]
    dtypes = {str(parameter.dtype) for parameter in filled[0].values()}
    return {"names": list(filled[0]), "differ": differ, "dtypes": dtypes}


def save_with_megatron(hf: str, checkpoint: str, layout: dict[str, Any]) -> None:
    """Fill a model from Hugging Face weights and let Megatron save it at this layout."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_infifpo.convert.hf_weights import load_into_model
    from megatron_infifpo.families.architecture import read_hf_config

    vocab_size = read_hf_config(hf)["vocab_size"]
    models = build(hf, layout)
    load_into_model(models, hf)
    for model in models:
        for name, parameter in model.named_parameters():
            if "word_embeddings" in name or "output_layer" in name:
                # Padding that training has moved: export must not let it out.
                first = parallel_state.get_tensor_model_parallel_rank() * len(parameter)
                parameter[max(0, vocab_size - first) :] = 7.0
    state = {f"model{i}": model.sharded_state_dict() for i, model in enumerate(models)}
    state["iteration"] = 5
    if torch.distributed.get_rank() == 0:
        Path(checkpoint).mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, checkpoint)


def megatrons_own_arguments(checkpoint: str, flags: list[str]) -> dict[str, Any]:
    """Megatron-LM's arguments after `--use-checkpoint-args` with some flags."""
    from megatron.training.arguments import parse_args
    from megatron.training.checkpointing import load_args_from_checkpoint

    sys.argv = ["pretrain_gpt.py", "--load", checkpoint, "--use-checkpoint-args", *flags]
    args = parse_args()
    loaded, _ = load_args_from_checkpoint(args)
    return vars(loaded)


def convert(function: str, source: str, target: str, options: dict[str, Any]) -> None:
    """Import or export as one of several ranks."""
    from megatron_infifpo.convert.hf_export import export_checkpoint
    from megatron_infifpo.convert.hf_import import import_checkpoint

    if function == "import_checkpoint":
        import_checkpoint(source, target, **options)
    else:
        export_checkpoint(source, target, **options)


def import_with_full_disk(source: str, target: str) -> None:
    """Import as one of two ranks, of which the second cannot write much."""
    import os
    import resource

    if os.environ["RANK"] == "1":
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit))
    convert("import_checkpoint", source, target, {})


def verify(argv: list[str]) -> int:
    """Run `tools/convert_checkpoint.py verify ARGV` as one rank; return its exit code."""
    return run_tool("convert_checkpoint", ["verify", *argv]) or 0


def merge(method: str, base: str, models: list[str], output: str, shard_bytes: int) -> None:
    """Merge folders as one of several ranks."""
    from megatron_infifpo.convert import merge as program
    from megatron_infifpo.convert.merge_job import MergeJob

    program.merge(MergeJob(method, base, models, output, shard_bytes=shard_bytes))
