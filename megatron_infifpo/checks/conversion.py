"""Compare a Megatron checkpoint with its Hugging Face model, token by token, at a real layout."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_infifpo.checks.weights import worst_tensor
from megatron_infifpo.convert.megatron_folder import carries_architecture
from megatron_infifpo.engine.hf_model import load_causal_lm
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.flag_types import check_number, check_positive, check_types
from megatron_infifpo.rows.packing import collate_text
from megatron_infifpo.scoring.megatron_backend import MegatronBackend
from megatron_infifpo.scoring.top_k import observed
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
# Of the mean one, with experts in bfloat16, whose rounding sends tokens to others: docs/lab-log.md.
MEAN_TOLERANCE = 0.3


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


@dataclass(frozen=True)
class VerificationJob:
    """A conversion to verify; fields named as the flags of `infifpo verify`.

    Attributes:
        hf: Hugging Face folder.
        load: Megatron checkpoint, of other programs too, or another Hugging Face folder.
        tensor_model_parallel_size, pipeline_model_parallel_size: layout of Megatron's model.
        expert_model_parallel_size, expert_tensor_parallel_size: of its experts.
        by_layers: hold one layer of each model in memory at a time, on the CPU.
        bf16: compute in bfloat16, else float32.
        tolerance: largest difference of a token's log-prob; None: `TOLERANCES` of the dtype, or
            with experts in bfloat16 `MEAN_TOLERANCE` of the mean one.
        texts: a file with one text a line; None: `TEXTS`.
    """

    hf: str
    load: str
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    by_layers: bool = False
    bf16: bool = False
    tolerance: float | None = None
    texts: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            UserError: a value out of its range, or one without effect.
        """
        layout = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
        check_positive(self, *(f"{kind}_parallel_size" for kind in layout))
        check_types(self)
        check_number(self, "tolerance")
        if self.by_layers and self.pipeline_model_parallel_size != 1:
            raise UserError("--pipeline-model-parallel-size has no effect with --by-layers")

    @property
    def architecture(self) -> str | None:
        """The Hugging Face folder, where `load` does not say itself which model it is."""
        return None if carries_architecture(self.load) else self.hf

    @property
    def layout(self) -> dict[str, Any]:
        """How Megatron's model lies on ranks, and in which precision, as backends name it."""
        return {
            "tensor_parallel": self.tensor_model_parallel_size,
            "pipeline_parallel": self.pipeline_model_parallel_size,
            "expert_parallel": self.expert_model_parallel_size,
            "expert_tensor_parallel": self.expert_tensor_parallel_size,
            "bf16": self.bf16,
        }

    @property
    def dtype(self) -> torch.dtype:
        """What both models compute in."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def accepts(self, worst: "Difference", experts: bool) -> tuple[bool, str]:
        """Judge a difference, of a model with experts or without; and say by what."""
        if experts and self.bf16 and self.tolerance is None:
            said = f"{MEAN_TOLERANCE:g} on average (in bfloat16 tokens go to other experts)"
            return worst.mean <= MEAN_TOLERANCE, said
        accepted = TOLERANCES[self.dtype] if self.tolerance is None else self.tolerance
        return worst.size <= accepted, f"{accepted:g}"


@dataclass(frozen=True)
class Verification:
    """What came of a verification; all but the first on the rank alone that has both results.

    Attributes:
        passed: whether no log-prob differs by more than the tolerance.
        tolerance: what was accepted, to be read.
        worst: the token whose log-probs differ most.
        token: its text.
        layer: by layers, a sentence about the layer in which the two sides part most.
        weights: of a Megatron checkpoint, a sentence about the weights that differ most.
    """

    passed: bool
    tolerance: str = ""
    worst: Difference | None = None
    token: str = ""
    layer: str | None = None
    weights: str | None = None

    def sentences(self) -> list[str]:
        """Say it; nothing on the other ranks."""
        worst = self.worst
        if worst is None:
            return []
        said = [
            self.layer,
            f"{worst.tokens} tokens: mean difference {worst.mean:.2e}, largest {worst.size:.2e} "
            f"at text {worst.text}, token {worst.token} {self.token!r}: Hugging Face "
            f"{worst.hf:.6f}, Megatron {worst.megatron:.6f}",
            f"{'equal within' if self.passed else 'MISMATCH: above'} the tolerance of "
            + self.tolerance,
            self.weights,
        ]
        return [sentence for sentence in said if sentence]


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


def verify(job: VerificationJob) -> Verification:
    """Run both models over the same texts, and compare the log-probs of every token.

    Ranks of torchrun share Megatron's model at the layout given; all of them must call this.

    Returns:
        What came of it; `passed` is the same on all ranks.

    Raises:
        UserError: unusable folders, layout or texts.
    """
    model = _check_same_model(job.hf, job.architecture or job.load)
    context = model["max_position_embeddings"]
    tokenizer = load_tokenizer(job.hf)
    if job.texts is None:
        ids = [tokens[:context] for tokens in _tokenize(tokenizer, TEXTS)]
    else:
        ids = _tokenize(tokenizer, _read_texts(job.texts))
        if (longest := max(map(len, ids))) > context:
            raise UserError(
                f"--texts {job.texts} has a text of {longest} tokens, but the model is made for "
                f"{context} (max_position_embeddings, or what its rope is made for)"
            )
    found = _by_layers(job, ids) if job.by_layers else _whole(job, ids)
    failed, result = False, Verification(True)
    if found is not None:
        hf, megatron, layer = found
        worst = compare(hf, megatron)
        accepted, tolerance = job.accepts(worst, bool(model.get("num_experts")))
        failed = not accepted
        is_hf = (Path(job.load) / "config.json").is_file()
        result = Verification(
            not failed,
            tolerance,
            worst,
            tokenizer.decode(ids[worst.text][worst.token]),
            layer,
            None if is_hf else worst_tensor(job.hf, job.load, job.architecture),
        )
    verdict = torch.tensor([int(failed)], device=torch.cuda.current_device())
    torch.distributed.all_reduce(verdict)
    return replace(result, passed=not verdict.item())


def _check_same_model(hf_dir: str, load_dir: str) -> dict[str, Any]:
    """Refuse to compare models of other sizes: half of them may well be equal.

    Returns:
        Megatron arguments of both.
    """
    ours, theirs = (megatron_args(read_hf_config(folder)) for folder in (load_dir, hf_dir))
    for name in {**theirs, **ours}:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{load_dir} is another model than {hf_dir}: its {name} is {ours.get(name)!r}, "
                f"expected {theirs.get(name)!r}"
            )
    return ours


def _whole(
    job: VerificationJob, ids: list[np.ndarray]
) -> tuple[list[Tensor], list[Tensor], None] | None:
    """Log-probs of both models, each whole in memory, on the rank that has them."""
    backend = MegatronBackend(job.load, hf=job.architecture, **job.layout)
    megatron = backend([collate_text(tokens[:1], tokens[1:], backend.layout) for tokens in ids])
    if backend.is_writer and backend.data_parallel_rank == 0:
        return hf_logprobs(job.hf, ids, job.dtype), [observed(one) for one in megatron], None
    return None


def _by_layers(
    job: VerificationJob, ids: list[np.ndarray]
) -> tuple[list[Tensor], list[Tensor], str] | None:
    """The same, one layer in memory at a time, with the layer in which the sides part most."""
    from megatron_infifpo.checks.layers import layer_logprobs

    return layer_logprobs(job.hf, job.load, ids, job.layout, job.architecture)


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
