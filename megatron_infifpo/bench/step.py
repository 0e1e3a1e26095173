"""DPO steps of this program, of TRL and of Liger on the same pairs.

Every one runs in a process of its own, from the same weights, with references that are computed
beforehand. TRL and Liger run in transformers; Liger without any reference, which it cannot take
precomputed.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.bench.jobs import Timer, on_gpu, training_steps
from megatron_infifpo.tokens.dataset import TokenDataset

OURS = {"shared prompt": "--share-prompt", "two prompts": "--no-share-prompt"}
TRL, LIGER = "TRL", "Liger"
PACKAGES = {TRL: "trl", LIGER: "liger_kernel"}


@dataclass(frozen=True)
class StepJob:
    """What is measured.

    Attributes:
        model: a Hugging Face folder.
        folder: where `jobs.write_pairs` wrote pairs, with the model's checkpoint in `pivot`.
        pairs: of a step.
        longest: tokens of a text.
        micro_batch, peer_batch: pairs at once, of this program and of peers.
        steps: timed, after a first one.
        bf16: compute in bfloat16, else in float32.
        mixed: with bf16, peers keep float32 weights, as this program does: autocast.
    """

    model: str
    folder: str
    pairs: int
    longest: int
    micro_batch: int
    peer_batch: int
    steps: int
    bf16: bool
    mixed: bool = False

    def examples(self) -> list[dict[str, Any]]:
        """The pairs as TRL's collator takes them."""
        data, made = TokenDataset(Path(self.folder) / "pairs"), []
        for i in range(len(data)):
            prompt, chosen, rejected = (ids.tolist() for ids in data.sequences(i))
            reference = {"ref_chosen_logps": -2.0 * len(chosen)}
            reference["ref_rejected_logps"] = -2.0 * len(rejected)
            ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            made.append(ids | reference)
        return made

    def hf_model(self) -> Any:
        """The model in transformers, on this rank's device."""
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if self.bf16 and not self.mixed else torch.float32
        place = {"": "cuda" if on_gpu() else "cpu"}
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype, device_map=place)
        return model.train()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What peers compute under."""
        if not self.mixed:
            return contextlib.nullcontext()
        return torch.autocast("cuda" if on_gpu() else "cpu", torch.bfloat16)


def installed(name: str) -> bool:
    """Whether a method can run here."""
    return name in OURS or importlib.util.find_spec(PACKAGES[name]) is not None


def measure_step(name: str, job: StepJob, *flags: str) -> dict[str, float]:
    """Take steps by a method; flags are of this program alone.

    Returns:
        What `Timer.result` says, and loss: the first one.
    """
    if name in OURS:
        return _our_steps(job, OURS[name], *flags)
    return {TRL: _trl_steps, LIGER: _liger_steps}[name](job)


def _our_steps(job: StepJob, *flags: str) -> dict[str, float]:
    """Steps of Megatron's own loop over our rows."""
    import megatron_infifpo.training.run  # noqa: F401  (it sets what must be set before CUDA starts)

    timer = Timer(job.bf16)
    losses = training_steps(
        Path(job.folder), timer, job.steps + 1,
        "--seq-length", str(job.longest), "--global-batch-size", str(job.pairs),
        "--micro-batch-size", str(job.micro_batch), *(["--bf16"] if job.bf16 else []), *flags,
    )  # fmt: skip
    return timer.result() | {"loss": losses[0]}


def _timed(job: StepJob, model: Any, batch_loss: Callable[[int], Any]) -> dict[str, float]:
    """Optimizer steps over all batches, each a share of the pairs; before them one small one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # the loss stays the first one
    timer = Timer(job.bf16)
    for step in range(job.steps + 1):
        losses, pairs = [], job.pairs if step else job.peer_batch
        with timer:
            for first in range(0, pairs, job.peer_batch):
                with job.autocast():
                    loss = batch_loss(first) * min(job.peer_batch, pairs - first) / pairs
                loss.backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    gradients = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    result = timer.result()
    if on_gpu():  # this program holds its gradients between steps, too
        result["kept_mib"] += gradients
    return result | {"loss": float(torch.stack(losses).sum())}


def _trl_steps(job: StepJob) -> dict[str, float]:
    """Steps with the loss and the collator of TRL's DPOTrainer, which pads."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs, model = job.examples(), job.hf_model()
    text = {"prompt": "a", "chosen": "b", "rejected": "c"}  # the trainer wants some data
    config = DPOConfig(
        output_dir=str(Path(job.folder) / "trl"), beta=0.1, use_cpu=not on_gpu(), report_to=[],
        bf16=job.bf16, precompute_ref_log_probs=True, max_length=None,
        gradient_checkpointing=False, per_device_train_batch_size=job.peer_batch,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model, args=config, train_dataset=Dataset.from_list([text]),
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )  # fmt: skip

    def batch_loss(first: int) -> Any:
        batch = trainer.data_collator(pairs[first : first + job.peer_batch])
        return trainer.compute_loss(model, {k: v.to(model.device) for k, v in batch.items()})

    return _timed(job, model, batch_loss)


def _liger_steps(job: StepJob) -> dict[str, float]:
    """Steps with Liger's fused linear DPO loss, chosen responses first as it expects them."""
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOLoss

    pairs, model = job.examples(), job.hf_model()
    fused = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False, compiled=on_gpu())

    def batch_loss(first: int) -> Any:
        batch = pairs[first : first + job.peer_batch]
        texts, labels = [], []
        for name in ("chosen_ids", "rejected_ids"):
            for pair in batch:
                texts.append(torch.tensor([*pair["prompt_ids"], *pair[name]]))
                labels.append(torch.tensor([*([-100] * len(pair["prompt_ids"])), *pair[name]]))
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(texts, batch_first=True).to(model.device)
        mask = pad([torch.ones_like(t) for t in texts], batch_first=True).to(model.device)
        targets = pad(labels, batch_first=True, padding_value=-100).to(model.device)
        hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        loss, _ = fused(model.lm_head.weight, hidden[:, :-1], targets[:, 1:])
        return loss

    return _timed(job, model, batch_loss)


def model_operations(job: StepJob, *, shared: bool) -> float:
    """Floating-point operations of a step's model, forward and backward; nothing computed twice."""
    from megatron_infifpo.families import megatron_args
    from megatron_infifpo.families.architecture import read_hf_config
    from megatron_infifpo.planning.plan import Plan

    plan = Plan(megatron_args(read_hf_config(job.model)))
    data = TokenDataset(Path(job.folder) / "pairs")
    tokens = attended = 0.0
    for prompt, responses in zip(data.prompt_lengths, data.response_lengths, strict=True):
        copies = 1 if shared else len(responses)
        tokens += copies * prompt + responses.sum()
        attended += copies * prompt**2 + (responses * (2 * prompt + responses)).sum()
    scored = data.scored_lengths.sum()
    layers = plan.operations(tokens, 0.0, attended / tokens)
    return float(layers + 6.0 * plan.sizes.table * scored)
