"""Compare a Megatron checkpoint with its Hugging Face model, token by token, at a real layout."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_infifpo.convert.hf_export import hf_tensors, open_checkpoint
from megatron_infifpo.convert.hf_folder import open_hf
from megatron_infifpo.engine.hf_model import load_causal_lm
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferencePair
from megatron_infifpo.scoring.megatron_backend import MegatronBackend
from megatron_infifpo.storage.safetensors_io import bytes_of
from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer

# English, code, mathematics and other scripts, short and long.
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def fibonacci(n):\n    a, b = 0, 1\n    while n > 0:\n        a, b = b, a + b\n"
    "        n -= 1\n    return a\n\n\nprint([fibonacci(i) for i in range(10)])\n",
    "Let x be a real number with x^2 - 5x + 6 = 0. Then (x - 2)(x - 3) = 0, so x = 2 or x = 3.",
    "Grüße aus Köln! 今天天气很好，我们去公园散步吧。 Сколько будет дважды два? 🙂",
    "When in the course of human events it becomes necessary for one people to dissolve the "
    "political bands which have connected them with another, and to assume among the powers of "
    "the earth the separate and equal station to which the laws of nature entitle them, a decent "
    "respect to the opinions of mankind requires that they should declare the causes which impel "
    "them to the separation. " * 3,
)
# Largest absolute difference of a token's log-prob. A misplaced weight moves it by whole nats.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class Difference:
    """The token whose log-probs differ most.

    Attributes:
        text, token: where it is; token 0 has no log-prob.
        hf, megatron: its log-probs.
        mean: mean absolute difference over all tokens.
        tokens: tokens compared.
    """

    text: int
    token: int
    hf: float
    megatron: float
    mean: float
    tokens: int

    @property
    def size(self) -> float:
        """Absolute difference."""
        return abs(self.hf - self.megatron)


def compare(hf: list[Tensor], megatron: list[Tensor]) -> Difference:
    """Find the largest difference between per-token log-probs; NaN counts as the largest.

    Args:
        hf, megatron: `[tokens - 1]` log-probs of each text.
    """
    gaps = [
        (a.double() - b.double()).abs().nan_to_num(nan=torch.inf)
        for a, b in zip(hf, megatron, strict=True)
    ]
    text = max(range(len(gaps)), key=lambda i: float(gaps[i].max()))
    place = int(gaps[text].argmax())
    values = float(hf[text][place]), float(megatron[text][place])
    joined = torch.cat(gaps)
    return Difference(text, place + 1, *values, float(joined.mean()), joined.numel())


def verify(args: argparse.Namespace) -> int:
    """Run both models over texts, print the largest difference, and judge it.

    Args:
        args: `hf`, `load`, `texts`, `tensor_model_parallel_size`, `pipeline_model_parallel_size`,
            `by_layers`, `bf16`, `tolerance`, as tools/convert_checkpoint.py describes them.

    Returns:
        Exit code, the same on all ranks: 1 if some log-prob differs by more than the tolerance.

    Raises:
        UserError: unusable folders, layout or texts.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    tolerance = TOLERANCES[dtype] if args.tolerance is None else args.tolerance
    _check_same_model(args.hf, args.load)
    tokenizer = load_tokenizer(args.hf)
    ids = _tokenize(tokenizer, TEXTS if args.texts is None else _read_texts(args.texts))
    both = _by_layers(args, ids) if args.by_layers else _whole(args, ids, dtype)
    failed = 0
    if both is not None:
        worst = compare(*both)
        failed = int(not worst.size <= tolerance)
        _report(worst, tolerance, tokenizer.decode(ids[worst.text][worst.token]), failed)
        if not (Path(args.load) / "config.json").is_file():
            print(worst_tensor(args.hf, args.load))
    verdict = torch.tensor([failed], device=torch.cuda.current_device())
    torch.distributed.all_reduce(verdict)
    return int(verdict.item() > 0)


def _check_same_model(hf_dir: str, load_dir: str) -> None:
    """Refuse to compare models of other sizes: half of them may well be equal."""
    ours, theirs = (megatron_args(read_hf_config(folder)) for folder in (load_dir, hf_dir))
    for name, value in theirs.items():
        if ours.get(name) != value:
            raise UserError(
                f"{load_dir} is another model than {hf_dir}: its {name} is {ours.get(name)!r}, "
                f"expected {value!r}"
            )


def _whole(
    args: argparse.Namespace, ids: list[np.ndarray], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Log-probs of both models, each whole in memory, on the rank that has them."""
    backend = MegatronBackend(
        args.load,
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        bf16=args.bf16,
    )
    rows = [
        collate(
            [PreferencePair(i, tokens[:1], (tokens[1:],), domain_code=0)],
            pad_multiple=backend.pad_multiple,
        )
        for i, tokens in enumerate(ids)
    ]
    megatron = backend(rows)
    if backend.is_writer and backend.data_parallel_rank == 0:
        return hf_logprobs(args.hf, ids, dtype), megatron
    return None


def _by_layers(
    args: argparse.Namespace, ids: list[np.ndarray]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Log-probs of both models, one layer in memory at a time, on the first rank."""
    if args.pipeline_model_parallel_size != 1:
        raise UserError("--pipeline-model-parallel-size has no effect with --by-layers")
    from megatron_infifpo.checks.layers import layer_logprobs

    return layer_logprobs(
        args.hf, args.load, ids, tensor_parallel=args.tensor_model_parallel_size, bf16=args.bf16
    )


def worst_tensor(hf_dir: str | Path, load_dir: str | Path) -> str:
    """Compare the weights themselves, as Hugging Face names them; a sentence about the worst."""
    weights, mapping, _ = open_hf(hf_dir)
    checkpoint, _, _ = open_checkpoint(load_dir)
    worst, where = 0.0, ""
    for group in hf_tensors(checkpoint, mapping):
        for name, ours in group.items():
            relative = _gap(weights.load(name), ours)
            if not relative <= worst:  # NaN is the worst of all
                worst, where = relative, name
    if not where:
        return "all weights are equal to the bit"
    return f"the weights that differ most: {where}, by {worst:.1e} of its largest value"


def _gap(theirs: Tensor, ours: Tensor) -> float:
    """Largest difference, as a share of the largest value; 0 exactly where the bytes are equal."""
    if theirs.dtype == ours.dtype and torch.equal(bytes_of(theirs), bytes_of(ours.contiguous())):
        return 0.0
    largest = largest_gap = torch.zeros(())
    # By parts: a float32 copy of an embedding is as large as the model's largest tensors together.
    for a, b in zip(theirs.split(4096), ours.split(4096), strict=True):
        gap = (a.float() - b.float()).abs().nan_to_num(nan=torch.inf).max()
        largest_gap = torch.maximum(largest_gap, gap)
        largest = torch.maximum(largest, a.float().abs().nan_to_num(0.0, 0.0).max())
    # Equal numbers in other bytes: another dtype, or the sign of zero.
    return max(float(largest_gap) / (float(largest) or 1.0), 1e-30)


@torch.no_grad()
def hf_logprobs(directory: str | Path, ids: list[np.ndarray], dtype: torch.dtype) -> list[Tensor]:
    """Log-probs `[tokens - 1]` of each text under a Hugging Face model, float32, on the CPU."""
    device = torch.cuda.current_device()
    model = load_causal_lm(directory, dtype=dtype).to(device)
    results = []
    for tokens in ids:
        row = torch.from_numpy(tokens).long()[None].to(device)
        logprobs = model(input_ids=row, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        results.append(logprobs.gather(1, row[0, 1:, None]).squeeze(1).cpu())
    return results


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    ids = [np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in texts]
    for text, tokens in zip(texts, ids, strict=True):
        if len(tokens) < 2:
            raise UserError(f"text {text!r} has {len(tokens)} tokens, expected at least 2")
    return ids


def _read_texts(path: str | Path) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
    except UnicodeDecodeError as error:
        raise UserError(f"--texts {path} is not UTF-8 text: {error}") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UserError(f"--texts {path} holds no text: expected a file with one text a line")
    return texts


def _report(worst: Difference, tolerance: float, token: str, failed: int) -> None:
    print(
        f"{worst.tokens} tokens: mean difference {worst.mean:.2e}, largest {worst.size:.2e} at "
        f"text {worst.text}, token {worst.token} {token!r}: Hugging Face {worst.hf:.6f}, "
        f"Megatron {worst.megatron:.6f}"
    )
    print(f"{'MISMATCH: above' if failed else 'equal within'} the tolerance of {tolerance:g}")
