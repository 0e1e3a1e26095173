"""Training as one of several ranks, with more recorded than training does."""

import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from support.training import train


def observe(argv: list[str], event: str = "") -> dict[str, Any]:
    """Train as `training.train` does, and record more of every step.

    Args:
        argv: flags of the run.
        event: `late`, the job began an hour ago; `signal`, the first rank gets SIGUSR1 in step 1.

    Returns:
        What `training.train` does, and: `groups`, the optimizer's settings before each step;
        `moved`, by how much each step changed this rank's parameters; `scales`, of the loss;
        `layers`, of each chunk; `place`, of this rank: pipeline and data; `attended`, calls of the
        attention; `wandb`, what it was started with and what was logged.
    """
    import megatron.training.training as loop

    import megatron_infifpo.engine.layers as layers

    wandb = mock.MagicMock()
    sys.modules["wandb"] = wandb
    record: dict[str, Any] = {"groups": [], "moved": [], "scales": [], "attended": 0}
    train_step, training_log = loop.train_step, loop.training_log
    attention: Any = layers.PackedAttention
    attend = attention.forward
    if event == "late":
        loop._TRAIN_START_TIME -= 3600

    def step(forward, data, models, optimizer, *args, **kwargs):
        keys = ("lr", "weight_decay", "betas", "eps", "momentum", "wd_mult", "params")
        groups = [{k: g[k] for k in keys if k in g} for g in optimizer.param_groups]
        for group in groups:
            group["params"] = sum(p.numel() for p in group["params"])
        record["groups"].append(groups)
        before = flat(models)
        if event == "signal" and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGUSR1)
        result = train_step(forward, data, models, optimizer, *args, **kwargs)
        record["moved"].append(float((flat(models) - before).norm()))
        record["layers"] = [len(unwrapped(model).decoder.layers) for model in models]
        return result

    def log(losses, total, rate, iteration, scale, *args, **kwargs):
        record["scales"].append(scale)
        return training_log(losses, total, rate, iteration, scale, *args, **kwargs)

    def counted(*args, **kwargs):
        record["attended"] += 1
        return attend(*args, **kwargs)

    loop.train_step, loop.training_log = step, log
    attention.forward = counted
    record |= train(argv)
    from megatron.core import mpu

    record["place"] = mpu.get_pipeline_model_parallel_rank(), mpu.get_data_parallel_rank()
    started = wandb.init.call_args.kwargs if wandb.init.called else {}
    started = {key: value for key, value in started.items() if isinstance(value, str)}
    logged = {key for call in wandb.log.call_args_list for key in call.args[0]}
    return record | {"wandb": (started, logged)}


def flat(models: list[torch.nn.Module]) -> torch.Tensor:
    """All parameters of this rank, in float64."""
    parts = [p.detach().double().flatten() for model in models for p in model.parameters()]
    return torch.cat(parts)


def unwrapped(model: Any) -> Any:
    """The GPTModel inside of Megatron's wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def fingerprints(*folders: str) -> list[str]:
    """Hashes of the models in the latest checkpoints of these folders."""
    from megatron_infifpo.convert.fingerprint import weights_fingerprint

    return [weights_fingerprint(Path(folder)) for folder in folders]
