#!/usr/bin/env python
"""Does a source teach? A rule that it alone knows, and a pivot that cuts numbers in other tokens.

Answers are drawn from a distribution that a hidden rule of the question fixes. The source has seen
thousands of them; the pivot knows the words and no rule, and trains on a few. Plain SFT and every
kind of token-level fusion take the same texts, steps and seeds; what counts is the cross-entropy of
held-out answers, against SFT's, seed by seed. Two controls must not help: a source that was never
trained, and the source's own targets dealt out to other questions.

    python examples/baselines/rule.py                # five rules: 20 minutes on two busy cores
    python examples/baselines/rule.py --seeds 1
"""

import argparse
import os
import random
import re
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_infifpo.commands.entry import run
from megatron_infifpo.references.soft_target_writer import SoftTargetWriter
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.tokens.dataset import TokenDataset

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "demo")]

from examples.baselines.rule_job import RuleJob  # noqa: E402
from examples.baselines.rule_language import Language, write_records  # noqa: E402
from examples.baselines.rule_models import KINDS, make  # noqa: E402

SIZES = {"train": 256, "heldout": 1024}
TRAIN = ["--train-iters", "192", "--global-batch-size", "16", "--micro-batch-size", "16"]
TRAIN += ["--lr", "5e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine"]
TRAIN += ["--lr-warmup-fraction", "0.1", "--clip-grad", "1.0", "--weight-decay", "0.0"]
TRAIN += ["--seq-length", "128", "--log-interval", "32", "--eval-interval", "32"]
HALF = ["--method", "fusellm", "--lm-weight", "0.5"]
SFT, SHUFFLED = "sft", "shuffled"
PUBLISHED = ["--method", "fusellm", "--tail", "renormalised", "--chunk-weight", "0"]
# name -> label, targets that it learns from, flags
VARIANTS: dict[str, tuple[str, str | None, list[str]]] = {
    SFT: ("SFT", None, ["--method", "sft"]),
    "fusellm": ("FuseLLM, lm 0.9", "source", ["--method", "fusellm"]),
    "half": ("FuseLLM, lm 0.5", "source", HALF),
    "tenth": ("FuseLLM, lm 0.1", "source", ["--method", "fusellm", "--lm-weight", "0.1"]),
    "renormalised": ("  lm 0.5, renormalised", "source-id", [*HALF, "--tail", "renormalised"]),
    "ids": ("  lm 0.5, no chunks", "source", [*HALF, "--chunk-weight", "0"]),
    "tail": ("  lm 0.5, --ambiguous tail", "source-tail", HALF),
    "published": ("  as published", "source-id", PUBLISHED),
    "infifusion": ("InfiFusion", "source-values", ["--method", "infifusion"]),
    "untrained": ("untrained source, lm 0.5", "untrained", HALF),
    "shuffled": ("shuffled targets, lm 0.5", SHUFFLED, HALF),
    "infifusion-untrained": (
        "untrained source, InfiFusion", "untrained-values", ["--method", "infifusion"],
    ),
}  # fmt: skip
# name -> source, flags of fuse-targets
TARGETS = {
    "source": ("source", ["--fusion", "mince"]),
    "source-id": ("source", ["--fusion", "mince", "--ambiguous", "id"]),
    "source-tail": ("source", ["--fusion", "mince", "--ambiguous", "tail"]),
    "source-values": ("source", ["--fusion", "none"]),
    "untrained": ("untrained", ["--fusion", "mince"]),
    "untrained-values": ("untrained", ["--fusion", "none"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/rule"), help="folder to work in")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="rules (default: 5)")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows beside SFT"
    )
    parser.add_argument("--fresh", action="store_true", help="delete the folder first")
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.output, ignore_errors=True)
    torch.set_num_threads(1)
    chosen = [name for name in VARIANTS if name in (SFT, *args.only)]
    models, targets = needed(chosen)
    count = args.seeds * (3 + len(models) + len(targets) + len(chosen))
    with (
        tqdm(desc="rule", total=count, unit=" command") as bar,
        ThreadPoolExecutor(max(1, min(args.seeds, os.cpu_count() or 1))) as pool,
    ):
        folders = [args.output / f"seed-{seed}" for seed in range(args.seeds)]
        jobs = [RuleJob(folder, list(SIZES), bar) for folder in folders]
        asked = [pool.submit(study, job, seed, chosen) for seed, job in enumerate(jobs)]
        found = [one.result() for one in asked]
    if "source" in targets:
        print((jobs[0].folder / "logs" / f"{fused('source')}.log").read_text().split("->")[-1])
    print_table(chosen, [losses for _, losses in found], [floor for floor, _ in found])


def needed(chosen: list[str]) -> tuple[list[str], list[str]]:
    """Sources and targets of these variants."""
    wanted = {VARIANTS[name][1] for name in chosen}
    if SHUFFLED in wanted:
        wanted.add("source")
    targets = [target for target in TARGETS if target in wanted]
    return list(dict.fromkeys(TARGETS[target][0] for target in targets)), targets


def fused(target: str) -> str:
    """Name of the command that fuses targets."""
    return f"fuse-{target}"


def study(job: RuleJob, seed: int, chosen: list[str]) -> tuple[float, dict[str, list[float]]]:
    """Make one rule's models and data, train all variants.

    Returns the rule's own cross-entropy of the held-out answers, in nats a token of the pivot, and
    those of every variant on the way.
    """
    language, data = Language(seed), job.folder / "data"
    models, targets = needed(chosen)
    hf = {
        name: make(kind, language, job.folder / "hf" / name, seed=seed)
        for name, kind in KINDS.items()
        if name == "pivot" or name in models
    }
    logps = {
        split: write_records(job.records[split], language, count, f"{split} {seed}")
        for split, count in SIZES.items()
    }
    job.infifpo("import", "import", "--hf", hf["pivot"], "--save", job.folder / "pivot")
    for split, records in job.records.items():
        words = ["--input", records, "--tokenizer", hf["pivot"], "--output", data / split]
        job.infifpo(f"data-{split}", "prepare", *words)
    for name in models:
        job.infifpo(
            f"score-{name}", "score", "--backend", "transformers", "--model", hf[name],
            "--input", job.records["train"], "--output", job.folder / "logprobs" / f"train-{name}",
            "--name", name, "--top-k", "16", "--top-k-responses", "chosen",
        )  # fmt: skip
    for target in targets:
        fuse(job, target)
    if any(VARIANTS[name][1] == SHUFFLED for name in chosen):
        shuffle(data / "train", job.folder / "targets" / "source", seed)
    losses = {name: train(job, name, seed) for name in chosen}
    tokens = int(TokenDataset(data / "heldout").scored_lengths[:, 0].sum())
    return -logps["heldout"] / tokens, losses


def fuse(job: RuleJob, target: str) -> None:
    """Turn what one source says into soft targets, or keep its values."""
    name, flags = TARGETS[target]
    job.infifpo(
        fused(target), "fuse-targets", "--data", job.folder / "data" / "train",
        "--sources", job.sources("train", "pivot", [name]),
        "--output", job.folder / "targets" / target, *flags,
    )  # fmt: skip


def shuffle(data: Path, targets: Path, seed: int) -> None:
    """Deal the targets out anew, among answers of as many tokens."""
    output = targets.with_name(SHUFFLED)
    if output.with_suffix(".json").exists():
        return
    store, lengths = SoftTargetStore(targets), TokenDataset(data).scored_lengths[:, 0].tolist()
    rng = random.Random(seed)
    source_of: dict[int, int] = {}
    for length in set(lengths):
        alike = [index for index, found in enumerate(lengths) if found == length]
        source_of |= dict(zip(alike, rng.sample(alike, len(alike)), strict=True))
    with SoftTargetWriter(
        output, responses=store.manifest["responses"], fusion=store.fusion, manifest=store.manifest
    ) as writer:
        for index, length in enumerate(lengths):
            writer.add([store.take(source_of[index], 0, length)])


def train(job: RuleJob, name: str, seed: int) -> list[float]:
    """Train a variant; return the cross-entropies of the held-out answers on the way."""
    _, targets, flags = VARIANTS[name]
    if targets:
        flags = [*flags, "--soft-targets", str(job.folder / "targets" / targets)]
    log = job.infifpo(
        name, "train", *flags, *TRAIN, "--seed", seed + 1,
        "--preference-data", job.folder / "data" / "train",
        "--preference-valid-data", job.folder / "data" / "heldout",
        "--pretrained-checkpoint", job.folder / "pivot",
    )  # fmt: skip
    found = re.findall(r"validation loss at .*?\| loss value: (\S+)", log.read_text())
    return [float(loss) for loss in found]


def print_table(
    chosen: list[str], losses: list[dict[str, list[float]]], floors: list[float]
) -> None:
    """Print each variant's held-out cross-entropy, and by seed how much it is above SFT's."""
    seeds = range(len(losses))
    print("held-out cross-entropy, nats a token, after the last step and at its lowest;")
    print("by seed, last: SFT's, and of the others what they are above it (below 0: taught)")
    heads = "".join(f"{f'seed {s}':>9}" for s in seeds)
    print(f"{'':<30}{'last':>8}{heads}{'below':>7}{'lowest':>9}{'below':>7}")
    print(f"{'the rule itself':<30}{statistics.mean(floors):>8.4f}")
    for name in chosen:
        last = [losses[s][name][-1] for s in seeds]
        best = [min(losses[s][name]) for s in seeds]
        others = [losses[s][SFT] for s in seeds] if name != SFT else [[0.0] for s in seeds]
        last_less = [value - other[-1] for value, other in zip(last, others, strict=True)]
        best_less = [value - min(other) for value, other in zip(best, others, strict=True)]
        sign = "" if name == SFT else "+"
        shown = "".join(f"{difference:>{sign}9.4f}" for difference in last_less)
        below = ["" if name == SFT else f"{sum(d < 0 for d in less)}/{len(less)}"
                 for less in (last_less, best_less)]  # fmt: skip
        print(
            f"{VARIANTS[name][0]:<30}{statistics.mean(last):>8.4f}{shown}{below[0]:>7}"
            f"{statistics.mean(best):>9.4f}{below[1]:>7}"
        )


if __name__ == "__main__":
    run(main)
