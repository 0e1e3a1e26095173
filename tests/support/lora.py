"""The same adapters by PEFT: logits and gradients."""

from pathlib import Path
from typing import Any

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
    """Write a PEFT folder of a run's checkpoint, as the command line does."""
    from support.tools import run_tool

    words = ["--load", checkpoint, "--save", folder, "--iteration", str(iteration)]
    run_tool("convert_checkpoint", ["export", *words, "--adapter-only"])


def adapters(folder: Path) -> dict[str, Tensor]:
    """The matrices of a PEFT folder, by its names."""
    return load_file(folder / "adapter_model.safetensors")


def transformers_model(hf: Path) -> Any:
    """A model of transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)


def peft_model(hf: Path, folder: Path, *, trainable: bool = False) -> Any:
    """The same with the adapters of a folder, as PEFT loads them."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(transformers_model(hf), folder, is_trainable=trainable)
    made = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(made) == len(adapters(folder)), "PEFT made adapters that the folder lacks"
    return model


@torch.no_grad()
def logprobs(model: Any, text: Tensor) -> Tensor:
    """Log-prob of every token of a text but the first."""
    values = model(input_ids=text[None]).logits[0, :-1].log_softmax(-1)
    return values.gather(1, text[1:, None]).squeeze(1)


def row(text: Tensor) -> dict[str, Any]:
    """A text as a packed row that scores every token but the first, padded for two ranks."""
    length = len(text)
    assert length % 2 == 1
    padded = torch.cat([text, text[:1]])
    return {
        "tokens": padded[None],
        "position_ids": torch.cat([torch.arange(length), torch.zeros(1, dtype=torch.int64)])[None],
        "cu_seqlens": torch.tensor([0, length, length + 1]).int(),
        "max_seqlen": length,
        "segment_lengths": [length, 1],
        "scored_rows": torch.arange(length - 1),
        "target_ids": text[1:],
    }


def sft_gradients(model: Any, data: Path) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over the tokens of chosen responses, and gradients by the folder's names."""
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


def held_bytes(argv: list[str]) -> dict[str, int]:
    """Train, and count what the model holds between two steps, by what it is for.

    Returns:
        Bytes of the parameters, of gradient buffers, and of all other tensors of numbers: the
        optimizer's.
    """
    import gc

    import megatron.training.training as loop

    from support import training

    found: dict[str, int] = {}
    step = loop.train_step

    def train_step(forward, data, model, *rest, **options):
        result = step(forward, data, model, *rest, **options)
        storages = {
            "parameters": _storages(p for chunk in model for p in chunk.parameters()),
            "gradients": _storages(buffer.grad_data for chunk in model for buffer in chunk.buffers),
        }
        known = {key for part in storages.values() for key in part}
        live = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.is_floating_point()]
        other = {k: v for k, v in _storages(live).items() if k not in known}
        found.update({name: sum(part.values()) for name, part in storages.items()})
        found["others"] = sum(other.values())
        return result

    loop.train_step = train_step
    training.train(argv)
    return found


def _storages(tensors: Any) -> dict[int, int]:
    """Bytes of the memory behind tensors, by where it is: each counted once."""
    memory = (tensor.untyped_storage() for tensor in tensors)
    return {each.data_ptr(): each.nbytes() for each in memory if each.nbytes()}
