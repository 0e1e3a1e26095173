"""Small training jobs, in processes of their own."""

import sys
from pathlib import Path
from typing import Any

from megatron_infifpo.bench.jobs import on_gpu, peak_mib, recorded_training, write_pairs

PAIRS = 16
# What tiny pairs and models need beside `bench.jobs.training_flags`.
SMALL = (
    "--seq-length", "256", "--use-distributed-optimizer", "--log-interval", "1",
)  # fmt: skip
# A shape whose losses say little of rounding: smaller weights; and sizes that FP8 takes.
CALM = {"initializer_range": 0.05, "head_dim": 16}
TITLES = {"losses": "losses", "norms": "norms of gradients"}
# Modules that Megatron and the program take for granted once they import.
OPTIONAL = ("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda")


def prepare(folder: Path, family: str, **shape: Any) -> None:
    """Save and import a tiny model, and write pairs with log-probs of nobody, by two sources."""
    from megatron_infifpo.convert.hf_import import import_checkpoint
    from megatron_infifpo.gpu_check import tiny
    from megatron_infifpo.records.records import read_records
    from megatron_infifpo.tokens.tokenization import ChatTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tiny.save_model(folder / "hf", family, seed=1, **shape)
    records = tiny.write_records(folder / "records.jsonl", PAIRS, pivot_chosen=False)
    tokenizer = ChatTokenizer.from_pretrained(folder / "hf")
    write_pairs(list(read_records(str(records))), tokenizer, folder, sources=2)
    import_checkpoint(folder / "hf", folder / "pivot")


def train(argument: dict[str, Any]) -> dict[str, Any]:
    """Train in this process.

    Args:
        argument: argv, flags of training; hide, whether Transformer Engine and Apex are to be as
            if they were not installed.

    Returns:
        losses and norms by step, and peak_mib.
    """
    if argument.get("hide"):
        for name in OPTIONAL:
            sys.modules[name] = None  # type: ignore[assignment]
    record: dict[str, Any] = recorded_training(argument["argv"])
    return record | {"peak_mib": peak_mib() if on_gpu() else 0.0}
