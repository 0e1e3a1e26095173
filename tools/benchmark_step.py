#!/usr/bin/env python
"""Compare a DPO step with TRL's and with Liger's fused loss: pairs/s, peak memory, matmul rate.

    python tools/benchmark_step.py --model smollm2 --input pairs.json --folder /tmp/benchmark

Same weights, same pairs, a reference that is computed beforehand, one optimizer step with AdamW a
batch, on one rank. TRL and Liger (where it is installed) run in transformers, in batches of
--peer-batch pairs; Liger without any reference, which it cannot take precomputed. The rate counts
what the model itself needs for its tokens (products with weights, causal attention, the head once),
and is given as a share of what large products reach just before and after each timed step.
"""

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.bench import Timer, alternate, on_gpu, table, training_steps, write_pairs
from megatron_infifpo.cli import positive, run
from megatron_infifpo.data.records import read_records
from megatron_infifpo.data.token_dataset import TokenDataset
from megatron_infifpo.data.tokenization import ChatTokenizer

OURS = {"shared prompt": "--share-prompt", "two prompts": "--no-share-prompt"}
TRL, LIGER = "TRL", "Liger"


def main() -> None:
    """Prepare data once, run every method in turn, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a llama model")
    parser.add_argument("--input", required=True, metavar="FILE", help="preference records")
    parser.add_argument("--folder", required=True, type=Path, help="for what is prepared once")
    parser.add_argument("--pairs", type=positive, default=8, help="of the batch (default: 8)")
    parser.add_argument("--longest", type=positive, default=1024, help="tokens of a text taken")
    parser.add_argument(
        "--prompt-share", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="of a pair's tokens, with two copies of the prompt; only such pairs (default: all)",
    )  # fmt: skip
    parser.add_argument("--micro-batch-size", type=positive, default=2, help="ours (default: 2)")
    parser.add_argument("--peer-batch", type=positive, default=1, help="(default: 1)")
    parser.add_argument("--steps", type=positive, default=1, help="timed a run (default: 1)")
    parser.add_argument("--rounds", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--bf16", action="store_true", help="(default: float32)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="of the CPU")
    parser.add_argument("--methods", nargs="+", help="some of them (default: all)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        measure = {TRL: trl_steps, LIGER: liger_steps}.get(args.only, our_steps)
        print(json.dumps(measure(args)))
        return
    prompts, responses = prepare(args)
    methods = [*OURS, TRL]
    if importlib.util.find_spec("liger_kernel"):
        methods.append(LIGER)
    found = alternate(args.methods or methods, args.rounds)
    for name, runs in found.items():
        for result in runs:
            flops = model_operations(args, shared=name == "shared prompt")
            result["pairs"] = args.pairs / result["seconds"]
            result["share"] = flops / result["seconds"] / result["peak"]
    peaks = [result["peak"] / 1e9 for runs in found.values() for result in runs]
    print(
        f"{args.pairs} pairs: {2 * prompts} prompt tokens ({prompts} shared), {responses} of "
        f"responses; {'bfloat16' if args.bf16 else 'float32'}, {args.threads} threads, medians of "
        f"{args.rounds}; large products reach {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s"
    )
    columns = {"pairs/s": "pairs", "of matmul": "share", "first loss": "loss"}
    table(found, TRL if TRL in found else next(iter(found)), columns)


def prepare(args: argparse.Namespace) -> tuple[int, int]:
    """Import the model and write pairs with log-probs of nobody; tokens of prompts, responses."""
    from megatron_infifpo.checkpoint.hf_import import import_checkpoint

    low, high = args.prompt_share
    tokenizer, records = ChatTokenizer.from_pretrained(args.model), []
    for record in read_records(args.input):
        tokens = tokenizer.encode(record)
        prompt, responses = len(tokens.prompt_ids), [len(ids) for ids in tokens.response_ids]
        share = 2 * prompt / (2 * prompt + sum(responses))
        if prompt + max(responses) <= args.longest and low <= share <= high:
            records.append(record)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "pivot").exists():
        import_checkpoint(args.model, args.folder / "pivot")
    data = write_pairs(records[: args.pairs], tokenizer, args.folder)
    return int(data.prompt_lengths.sum()), int(data.response_lengths.sum())


def our_steps(args: argparse.Namespace) -> dict[str, float]:
    """Steps of Megatron's own loop over our rows."""
    timer = Timer(args.bf16)
    losses = training_steps(
        args.folder, timer, args.steps + 1,
        "--seq-length", str(args.longest), "--global-batch-size", str(args.pairs),
        "--micro-batch-size", str(args.micro_batch_size), OURS[args.only],
        *(["--bf16"] if args.bf16 else []),
    )  # fmt: skip
    return timer.result() | {"loss": losses[0]}


def examples(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The pairs as TRL's collator takes them."""
    data, made = TokenDataset(args.folder / "pairs"), []
    for i in range(len(data)):
        prompt, chosen, rejected = (ids.tolist() for ids in data.sequences(i))
        reference = {"ref_chosen_logps": -2.0 * len(chosen)}
        reference["ref_rejected_logps"] = -2.0 * len(rejected)
        ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        made.append(ids | reference)
    return made


def hf_model(args: argparse.Namespace) -> Any:
    """The model in float32, or in bfloat16."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    device = "cuda" if on_gpu() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, device_map={"": device})
    return model.train()


def timed(args: argparse.Namespace, model: Any, batch_loss: Any) -> dict[str, float]:
    """Optimizer steps over all batches, each a share of the pairs; before them one small one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # the loss stays the first one
    timer = Timer(args.bf16)
    for step in range(args.steps + 1):
        total, pairs = 0.0, args.pairs if step else args.peer_batch
        with timer:
            for first in range(0, pairs, args.peer_batch):
                loss = batch_loss(first) * min(args.peer_batch, pairs - first) / pairs
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return timer.result() | {"loss": total}


def trl_steps(args: argparse.Namespace) -> dict[str, float]:
    """Steps with the loss and the collator of TRL's DPOTrainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs, model = examples(args), hf_model(args)
    text = {"prompt": "a", "chosen": "b", "rejected": "c"}  # the trainer wants some data
    config = DPOConfig(
        output_dir=str(args.folder / "trl"), beta=0.1, use_cpu=not on_gpu(), report_to=[],
        bf16=args.bf16, precompute_ref_log_probs=True, max_length=None,
        gradient_checkpointing=False, per_device_train_batch_size=args.peer_batch,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model, args=config, train_dataset=Dataset.from_list([text]),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )  # fmt: skip

    def batch_loss(first: int) -> Any:
        batch = trainer.data_collator(pairs[first : first + args.peer_batch])
        return trainer.compute_loss(model, {k: v.to(model.device) for k, v in batch.items()})

    return timed(args, model, batch_loss)


def liger_steps(args: argparse.Namespace) -> dict[str, float]:
    """Steps with Liger's fused linear DPO loss, chosen responses first as it expects them."""
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOLoss

    pairs, model = examples(args), hf_model(args)
    fused = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False, compiled=on_gpu())

    def batch_loss(first: int) -> Any:
        batch = pairs[first : first + args.peer_batch]
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

    return timed(args, model, batch_loss)


def model_operations(args: argparse.Namespace, *, shared: bool) -> float:
    """Floating-point operations of a step's model, forward and backward; nothing computed twice."""
    from megatron_infifpo.models.architecture import read_hf_config
    from megatron_infifpo.models.families import megatron_args
    from megatron_infifpo.planning import Plan

    plan, data = (
        Plan(megatron_args(read_hf_config(args.model))),
        TokenDataset(args.folder / "pairs"),
    )
    tokens = attended = 0.0
    for prompt, responses in zip(data.prompt_lengths, data.response_lengths, strict=True):
        copies = 1 if shared else len(responses)
        tokens += copies * prompt + responses.sum()
        attended += copies * prompt**2 + (responses * (2 * prompt + responses)).sum()
    scored = data.response_lengths.sum()
    layers = plan.operations(tokens, 0.0, attended / tokens)
    return float(layers + 6.0 * plan.table_parameters * scored)


if __name__ == "__main__":
    run(main)
