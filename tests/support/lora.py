"""Runs of adapters, and the same model and gradients by PEFT."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_infifpo.rows.preference_dataset import PreferenceDataset

RATE = 4.0
# Plain steps of the gradient: what a step changes is the gradient, in the dtype of the weights.
PLAIN = [
    "--optimizer", "sgd", "--sgd-momentum", "0", "--lr", str(RATE), "--clip-grad", "0",
    "--weight-decay", "0",
]  # fmt: skip


def export(checkpoint: str, folder: str, iteration: int) -> None:
    """Write a PEFT folder of a run's checkpoint."""
    from megatron_infifpo.convert.peft import export_adapter

    export_adapter(checkpoint, folder, iteration)


def adapters(folder: Path) -> dict[str, Tensor]:
    """The matrices of a PEFT folder, by its names."""
    return load_file(folder / "adapter_model.safetensors")


def peft_model(hf: Path, folder: Path, *, trainable: bool = False) -> torch.nn.Module:
    """A model of transformers with the adapters of a folder, as PEFT loads them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    loaded = {n for n, _ in model.named_parameters() if "lora_" in n}
    assert len(loaded) == len(adapters(folder)), "PEFT made adapters that the folder lacks"
    return model


def sft_gradients(model: torch.nn.Module, data: Path) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over the scored tokens of chosen responses, and gradients by the folder's names."""
    pairs, total, count = PreferenceDataset(data, responses=1), 0.0, 0
    for i in range(len(pairs)):
        pair = pairs[i]
        prompt, response = pair.prompt_ids.tolist(), pair.response_ids[0]
        marks = np.ones(len(response), bool) if pair.scored is None else pair.scored[0]
        labels = [-100] * len(prompt) + np.where(marks, response, -100).tolist()
        scored = int(marks.sum())
        text = torch.tensor([prompt + response.tolist()])
        loss = model(input_ids=text, labels=torch.tensor([labels])).loss * scored
        loss.backward()
        total, count = total + loss.item(), count + scored
    found = {
        name.replace(".default", ""): parameter.grad / count
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    return total / count, found


def describe(folder: Path) -> dict:
    """What a PEFT folder says of its adapters."""
    return json.loads((folder / "adapter_config.json").read_text())
