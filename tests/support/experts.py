"""Training models with experts as one of several ranks, and what of it is compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.launcher import ROOT


def golden_keys() -> dict[str, list[int]]:
    """Names in a checkpoint of the tiny `qwen3_moe-mixed`: shapes of tensors, shards of states."""
    found: dict[str, list[int]] = json.loads((ROOT / "tests/golden/expert_keys.json").read_text())
    return found


def train_noting_rows(argv: list[str]) -> list[list[list[int]]]:
    """Train as `support.training.train` does; return the texts of every row that is trained on."""
    import megatron_infifpo.training.step as step
    from support.training import train

    rows: list[list[list[int]]] = []
    original = step.run_packed

    def run_packed(model: Any, row: dict[str, Any], vocab_size: int) -> Tensor:
        if model.training:
            texts = row["tokens"][0].split(row["segment_lengths"])
            rows.append([text.tolist() for text in texts])
        return original(model, row, vocab_size)

    step.run_packed = run_packed
    train(argv)
    return rows


def router_gradients(
    hf: Path, rows: Sequence[Sequence[Sequence[int]]], auxiliary: float, z: float
) -> dict[str, Tensor]:
    """Gradients of the losses on routers, under the names of files, by transformers and autograd.

    Both are means over the tokens of all rows: of a row's load balancing in each layer, which
    transformers counts a choice of experts `top_k` times; and of the squared log-sum-exp.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    from megatron_infifpo.engine.hf_names import as_saved

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    config = model.config
    experts, top_k = config.num_local_experts, config.num_experts_per_tok
    tokens = sum(len(text) for row in rows for text in row)
    for row in rows:
        found = [
            model(torch.tensor([text]), output_router_logits=True, use_cache=False).router_logits
            for text in row
        ]
        for layer in zip(*found, strict=True):
            logits = torch.cat(layer)
            balance = load_balancing_loss_func((logits,), experts, top_k) / top_k
            loss = auxiliary * balance * len(logits) / tokens
            loss = loss + z * logits.logsumexp(-1).square().sum() / tokens
            loss.backward(retain_graph=True)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return as_saved(model, gradients)
