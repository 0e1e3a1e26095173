"""Group 4: every model family on every kind of layers, against transformers in float64 on the CPU.

What the data type explains is measured too: transformers in that data type on this device. Ours may
err by `FACTOR` times as much; both errors are noted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_infifpo.families import OWN_LAYERS, TINY, megatron_args
from megatron_infifpo.families.mapping import Entry
from megatron_infifpo.gpu_check.records import Options, Recorder, Result
from megatron_infifpo.gpu_check.rows import random_pairs
from megatron_infifpo.patches import cpu
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferencePair

FACTOR = 3.0
NATS, RELATIVE = 2e-5, 2e-5  # beside that, in float32
VOCABULARY = 307  # prime
QUICK = ("qwen2-tied", "phi3-window", "qwen3", *OWN_LAYERS)
# Tokens of prompts, and of their responses; windows of the tiny models are 16.
LENGTHS = ((9, (21, 1)), (30, (6, 14)), (1, (5, 40)))


@dataclass(frozen=True)
class Values:
    """Log-probs of all response tokens, and gradients of their weighted sum by parameter."""

    logprobs: Tensor
    gradients: dict[str, Tensor]


def check(options: Options, record: Recorder) -> None:
    """Check all families, or some that differ most."""
    if not options.cuda:
        cpu.enable(announce=False)
    from megatron_infifpo.gpu_check import kinds, tiny

    variants = kinds.variants()
    for variant, reason in variants.items():
        if reason is not None:
            record.skip(f"all families, {variant.name}", reason)
    for number, family in enumerate(QUICK if options.quick else TINY):
        folder = Path(options.folder) / family
        tiny.save_model(folder, family, vocab_size=VOCABULARY, seed=number)
        pairs = random_pairs(LENGTHS, VOCABULARY - 1)
        exact = in_transformers(folder, pairs, torch.float64, "cpu")
        noisy: dict[torch.dtype, Values] = {}
        for variant in (v for v, reason in variants.items() if reason is None):
            gradients = Result()
            with record.check(f"{family}, {variant.name}: log-probs", unit="nats") as logprobs:
                dtype = torch.bfloat16 if variant.bf16 else torch.float32
                if dtype not in noisy:
                    noisy[dtype] = in_transformers(folder, pairs, dtype, options.device)
                compare(folder, pairs, variant, exact, noisy[dtype], logprobs, gradients)
            record.result(f"{family}, {variant.name}: gradients", gradients, unit="relative")


def token_weights(count: int) -> Tensor:
    """How much each response token counts in the sum whose gradient is taken, `[K]`."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, generator=generator, dtype=torch.float64) / count


def in_transformers(
    folder: Path, pairs: Sequence[PreferencePair], dtype: torch.dtype, device: str
) -> Values:
    """Values of the Hugging Face model, text by text; gradients under its names, on the CPU."""
    from transformers import AutoModelForCausalLM

    from megatron_infifpo.engine.hf_names import as_saved

    # Experts one by one: their grouped products know no float64.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    model = model.to(device).train()
    found = []
    for pair in pairs:
        for response in pair.response_ids:
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, response])).to(device)[None]
            logits = model(ids, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
            logits = logits.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
            found.append(logits.gather(1, ids[0, len(pair.prompt_ids) :, None])[:, 0])
    logprobs = torch.cat(found)
    (logprobs * token_weights(len(logprobs)).to(logprobs)).sum().backward()
    gradients = as_saved(model, {name: p.grad for name, p in model.named_parameters()})
    exact = {name: gradient.double().cpu() for name, gradient in gradients.items()}
    return Values(logprobs.detach().double().cpu(), exact)


def compare(
    folder: Path,
    pairs: Sequence[PreferencePair],
    variant: Any,
    exact: Values,
    noisy: Values,
    logprobs: Result,
    gradients: Result,
) -> None:
    """Run our model, and compare it with transformers."""
    got, wanted = in_megatron(folder, pairs, variant, exact)
    least = torch.finfo(torch.bfloat16).eps if variant.bf16 else RELATIVE
    noise = float((noisy.logprobs - exact.logprobs).abs().max())
    logprobs.value = float((got.logprobs - exact.logprobs).abs().max())
    logprobs.limit = FACTOR * noise + (0.0 if variant.bf16 else NATS)
    logprobs.note = f"transformers itself: {noise:.2g}"
    noise, _ = largest_error(noisy.gradients, exact.gradients)
    error, name = largest_error(got.gradients, wanted)
    gradients.value, gradients.limit = error, FACTOR * noise + least
    gradients.note = f"{name}; transformers itself: {noise:.2g}"


def largest_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error of a parameter's gradient (in its norm), and whose it is.

    A gradient that hardly counts is held to a hundredth of the whole one.
    """
    assert found.keys() == exact.keys()
    least = 0.01 * float(torch.stack([g.norm() for g in exact.values()]).norm())
    errors = {
        name: float((found[name] - g).norm()) / max(float(g.norm()), least)
        for name, g in exact.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def in_megatron(
    folder: Path, pairs: Sequence[PreferencePair], variant: Any, exact: Values
) -> tuple[Values, dict[str, Tensor]]:
    """Values of our model on one packed row, and the exact gradients under its parameters' names.

    Prompts are shared where the layers can.
    """
    from megatron_infifpo.convert.hf_folder import open_hf
    from megatron_infifpo.convert.hf_weights import fill, load_into_model
    from megatron_infifpo.engine.gpt import build_model
    from megatron_infifpo.engine.packed import run_packed, to_device
    from megatron_infifpo.engine.parallel import ModelLayout
    from megatron_infifpo.families.architecture import read_hf_config

    architecture, layout = megatron_args(read_hf_config(folder)), ModelLayout(bf16=variant.bf16)
    models = build_model(architecture, layout, variant.kind)
    load_into_model(models, folder)
    model = models[0].train().requires_grad_(True)
    for parameter in model.parameters():  # as Megatron's data parallelism prepares them
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    row = to_device(collate(pairs, variant.kind.row_layout(1)))
    logprobs = run_packed(model, row, architecture["padded_vocab_size"])
    (logprobs * token_weights(len(logprobs)).to(logprobs)).sum().backward()
    gradients = {name: collected(p).double().cpu() for name, p in model.named_parameters()}
    mapping = open_hf(folder)[1]

    def read(entry: Entry) -> Tensor:
        return entry.to_megatron([exact.gradients[name] for name in entry.hf_names])

    model.float()
    fill([model], mapping, read)  # the exact gradients, laid out as our parameters are
    wanted = {name: p.detach().double().cpu() for name, p in model.named_parameters()}
    return Values(logprobs.detach().double().cpu(), gradients), wanted


def collected(parameter: Any) -> Tensor:
    """Return a parameter's whole gradient, as Megatron's hook adds it up after a backward pass."""
    gradient: Tensor = parameter.main_grad
    again = getattr(parameter, "zero_out_wgrad", False)
    if parameter.grad is not None and (not parameter.grad_added_to_main_grad or again):
        gradient = gradient + parameter.grad
    return gradient
