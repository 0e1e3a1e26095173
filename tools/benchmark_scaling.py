#!/usr/bin/env python
"""Time a training step over layouts of ranks, and as pairs, tokens and sources grow.

    python tools/benchmark_scaling.py --tokenizer smollm2 --folder /tmp/scaling

The model is a small llama with random weights and that tokenizer's vocabulary; pairs are random
words. Every rank has one thread (on a CPU), so a layout on two ranks can halve a step at best. Each
line changes one thing of the first. What sources cost is below the noise of whole steps, so it is
also timed by itself: `loss, %` is the share of a step that reads pairs, fuses references, and
computes the loss and its metrics.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.bench.jobs import (
    Timer,
    alternate,
    on_gpu,
    print_worst,
    table,
    training_steps,
    write_pairs,
)
from megatron_infifpo.commands.entry import run
from megatron_infifpo.flag_types import positive
from megatron_infifpo.records.records import PreferenceRecord, reply
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.tokenization import ChatTokenizer


@dataclass(frozen=True)
class Case:
    """What one line of the table trains, and where."""

    pairs: int = 8
    words: int = 64  # of a prompt, and of a response
    sources: int = 1
    ranks: int = 1
    flags: tuple[str, ...] = ()

    @property
    def data(self) -> str:
        """Name of the folder with such pairs."""
        return f"{self.pairs}x{self.words}x{self.sources}"


TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
CASES = {
    "one rank": Case(),
    "TP 2": Case(ranks=2, flags=(TP, "2")),
    "TP 2, SP": Case(ranks=2, flags=(TP, "2", "--sequence-parallel")),
    "PP 2": Case(ranks=2, flags=(PP, "2")),
    "DP 2": Case(ranks=2),
    "DP 2, distr. optimizer": Case(ranks=2, flags=("--use-distributed-optimizer",)),
    "2x pairs": Case(pairs=16),
    "2x tokens": Case(words=128),
    "16 sources": Case(sources=16),
}


def main() -> None:
    """Prepare models and data once, run every case in turn, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="with a chat template")
    parser.add_argument("--folder", required=True, type=Path, help="for what is prepared once")
    parser.add_argument("--hidden", type=positive, default=256, help="(default: 256)")
    parser.add_argument("--layers", type=positive, default=8, help="(default: 8)")
    parser.add_argument("--steps", type=positive, default=8, help="timed a run (default: 8)")
    parser.add_argument("--rounds", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES], metavar="CASE")
    parser.add_argument("--only", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(args)
        return
    tokenizer = ChatTokenizer.from_pretrained(args.tokenizer)
    prepare_model(args)
    for case in {case.data: case for case in CASES.values()}.values():
        prepare_data(case, tokenizer, args.folder / case.data)
    found = alternate(args.cases, args.rounds, [CASES[name].ranks for name in args.cases])
    print(f"{args.layers} layers of {args.hidden}, medians of {args.rounds} x {args.steps} steps")
    table(found, args.cases[0], {"loss, %": "percent"})


def prepare_model(args: argparse.Namespace) -> None:
    """Import a random llama with the tokenizer's vocabulary, once."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from megatron_infifpo.convert.hf_import import import_checkpoint

    pivot = args.folder / "pivot"
    if pivot.exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=len(tokenizer), tie_word_embeddings=True,
    )  # fmt: skip
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(args.folder / "model")
    import_checkpoint(args.folder / "model", pivot)


def prepare_data(case: Case, tokenizer: ChatTokenizer, folder: Path) -> None:
    """Write pairs of random words, and log-probs of nobody."""
    folder.mkdir(parents=True, exist_ok=True)
    words = random.Random(0)

    def text() -> str:
        return " ".join(words.choice(("red", "green", "blue", "grey")) for _ in range(case.words))

    records = [
        PreferenceRecord(
            str(i), "any", ({"role": "user", "content": text()},), (reply(text()), reply(text()))
        )
        for i in range(case.pairs)
    ]
    write_pairs(records, tokenizer, folder, case.sources)


def measure(args: argparse.Namespace) -> None:
    """Train, on as many ranks as this was started with; rank 0 prints what was measured."""
    if not on_gpu():
        torch.set_num_threads(1)
    import megatron_infifpo.training.run  # noqa: F401  (readies Megatron for the CPU)
    from megatron_infifpo.training.step import TrainingStep

    case, timer, clock = CASES[args.only], Timer(bf16=False), Clock()
    PreferenceDataset.__getitem__ = clock(PreferenceDataset.__getitem__)  # type: ignore[method-assign]
    TrainingStep.preference_loss = clock(TrainingStep.preference_loss)  # type: ignore[method-assign]
    training_steps(
        args.folder / case.data, timer, args.steps + 1,
        "--pretrained-checkpoint", str(args.folder / "pivot"), "--method", "infifpo",
        "--beta", "2.5", "--seq-length", "2048", "--global-batch-size", str(case.pairs),
        "--micro-batch-size", "2", *case.flags,
    )  # fmt: skip
    result = timer.result() | {"percent": 100 * clock.seconds / sum(timer.seconds)}
    print_worst(result)


class Clock:
    """Adds up the seconds that wrapped functions take."""

    seconds = 0.0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function."""

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return timed


if __name__ == "__main__":
    run(main)
