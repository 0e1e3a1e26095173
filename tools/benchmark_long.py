#!/usr/bin/env python
"""Time and memory of a training step on one long text, by its length and by context-parallel size.

    python tools/benchmark_long.py --tokenizer smollm2 --folder /tmp/long --lengths 16384 65536

The model is a small llama with random weights and that tokenizer's vocabulary; a step is one pair,
whose chosen response is long. Attention is computed again in the backward pass, whatever the size.
`kept` is what a rank's forward pass keeps for its backward pass, beside it what `infifpo plan`
counts for it; `held` is the most resident memory of a rank, or of its GPU, above that before the
first step. Every rank has one thread on a CPU: with more ranks than cores, seconds say nothing.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.bench.jobs import (
    KeptBytes,
    Timer,
    in_a_process,
    on_gpu,
    peak_mib,
    print_worst,
    training_steps,
)
from megatron_infifpo.commands.entry import run
from megatron_infifpo.engine.kept import LAYERS, ON_CPU
from megatron_infifpo.families import megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.flag_types import positive, whole
from megatron_infifpo.planning.plan import Plan
from megatron_infifpo.records.records import PreferenceRecord, reply

MIB = 2**20


def main() -> None:
    """Prepare a model and pairs once, run every case in a process of its own, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="with a chat template")
    parser.add_argument("--folder", required=True, type=Path, help="for what is prepared once")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[16384], metavar="TOKENS")
    parser.add_argument("--context-parallel-sizes", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=positive, default=128, help="(default: 128)")
    parser.add_argument("--layers", type=positive, default=2, help="(default: 2)")
    parser.add_argument("--steps", type=whole(0), default=1, help="after the first (default: 1)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(args, *map(int, args.only.split("x")))
        return
    prepare(args)
    print(f"{args.layers} layers of {args.hidden}, float32")
    print(f"{'tokens':>8}{'CP':>4}{'seconds':>9}{'kept, MiB':>11}{'planned':>9}{'held, MiB':>11}")
    for length in args.lengths:
        for ranks in args.context_parallel_sizes:
            found = in_a_process(f"{length}x{ranks}", ranks)
            print(
                f"{found['tokens']:>8.0f}{ranks:>4}{found['seconds']:>9.2f}{found['kept']:>11.1f}"
                f"{found['planned']:>9.1f}{found['held']:>11.1f}",
                flush=True,
            )


def prepare(args: argparse.Namespace) -> None:
    """Import a random llama with the tokenizer's vocabulary; write a pair of each length."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from megatron_infifpo.bench.jobs import write_pairs
    from megatron_infifpo.convert.hf_import import import_checkpoint
    from megatron_infifpo.tokens.tokenization import ChatTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if not (args.folder / "pivot").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4,
            num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(tokenizer), max_position_embeddings=2**20, tie_word_embeddings=True,
        )  # fmt: skip
        for part in (LlamaForCausalLM(config), tokenizer):
            part.save_pretrained(args.folder / "model")
        import_checkpoint(args.folder / "model", args.folder / "pivot")
    for length in args.lengths:
        folder = args.folder / str(length)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "pivot").exists():
            (folder / "pivot").symlink_to((args.folder / "pivot").absolute())
        question = ({"role": "user", "content": "why?"},)
        answers = reply("red green " * (length // 2)), reply("blue")
        record = PreferenceRecord("long", "any", question, answers)
        write_pairs([record], ChatTokenizer(tokenizer), folder)


def measure(args: argparse.Namespace, length: int, ranks: int) -> None:
    """Train, on as many ranks as this was started with; rank 0 prints what was measured."""
    if not on_gpu():
        torch.set_num_threads(1)
    import megatron_infifpo.training.run  # noqa: F401  (readies Megatron for the CPU)
    import megatron_infifpo.training.step as step

    found: dict[str, float] = {"kept": 0.0}
    original, timer = step.run_packed, Timer(bf16=False)

    def run_packed(model: torch.nn.Module, row: dict[str, Any], vocab_size: int) -> torch.Tensor:
        found.setdefault("before", peak_mib())
        with KeptBytes(model) as kept:
            output = original(model, row, vocab_size)
        found.update(kept=kept.bytes / MIB, own=row["tokens"].numel())
        return output

    step.run_packed = run_packed
    training_steps(
        args.folder / str(length), timer, args.steps + 1, "--seq-length", str(4 * length),
        "--global-batch-size", "1", "--micro-batch-size", "1",
        "--context-parallel-size", str(ranks), "--recompute-granularity", "selective",
    )  # fmt: skip
    result = found | {"seconds": timer.result()["seconds"], "planned": planned(args, found["own"])}
    result |= {"held": peak_mib() - found["before"], "tokens": ranks * found["own"]}
    print_worst(result)


def planned(args: argparse.Namespace, tokens: float) -> float:
    """MiB that a rank's layers keep of so many tokens, with attention computed again, on paper."""
    kept = LAYERS["local"].kept if on_gpu() else replace(ON_CPU, query=ON_CPU.query - 1)
    plan = Plan(megatron_args(read_hf_config(args.folder / "model")), "fp32", kept)
    return (
        tokens * (plan.sizes.layers * plan.activations.of_layer() + plan.activations.of_end()) / MIB
    )


if __name__ == "__main__":
    run(main)
