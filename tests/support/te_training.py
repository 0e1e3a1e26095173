"""Training jobs of forked ranks where Transformer Engine's Python has been imported."""

from pathlib import Path
from typing import Any

from support import te_layers, tiny, training
from support.tools import run_tool


def make_job(folder: str, name: str) -> None:
    """A tiny pivot of a family, imported, and pairs with log-probs of nobody, to train on."""
    from transformers import AutoTokenizer

    from megatron_infifpo.bench.jobs import write_pairs
    from megatron_infifpo.records.records import iter_records
    from megatron_infifpo.tokens.tokenization import ChatTokenizer

    job = Path(folder)
    hf = tiny.save_model(job / "hf", name, seed=1)
    run_tool("convert_checkpoint", ["import", "--hf", str(hf), "--save", f"{job}/pivot"])
    records = list(iter_records([str(tiny.write_records(job / "records.jsonl", 20))]))
    tokenizer = ChatTokenizer(AutoTokenizer.from_pretrained(hf))
    write_pairs(records, tokenizer, job, sources=2)


def flags(folder: str, *more: str) -> list[str]:
    """Command line of a training run of `make_job`'s pairs: eight a step, in four rows."""
    return [
        "--method", "infifpo", "--preference-data", f"{folder}/pairs",
        "--preference-sources", f"{folder}/sources.yaml", "--reference-check", "off",
        "--pretrained-checkpoint", f"{folder}/pivot", "--global-batch-size", "8",
        "--micro-batch-size", "2", "--lr", "1e-3", "--lr-decay-style", "constant",
        "--log-interval", "1", *more,
    ]  # fmt: skip


def train(argv: list[str], kind: str | None, old: bool = False) -> dict[str, Any]:
    """Train as a GPU would, with this kind of layers; by default as the program chooses.

    Args:
        argv: the command line; flags for GPUs are let through.
        kind: of layers, or None.
        old: save what local layers saved before their norms had an extra state.

    Returns:
        What `training.train` does, the calls of emulated kernels, `te_host_optimizer.STEPS`, and
        `te_host_optimizer.held` after the last step.
    """
    import megatron.training.training as loop
    from megatron.training import get_args

    import megatron_infifpo.training.megatron_args as program
    from megatron_infifpo.engine.layer_kind import KINDS
    from megatron_infifpo.engine.layers import OutputRMSNorm
    from megatron_infifpo.megatron_flags import check
    from support import te_emulation, te_host_optimizer

    te_layers.as_on_a_gpu()
    te_host_optimizer.stand_in()
    check.GPU = ""  # no flag is refused for being one for GPUs
    if kind is not None:
        program.choose_kind = lambda **_: KINDS[kind]
    if old:
        del OutputRMSNorm.get_extra_state
    step, held = loop.train_step, {}

    def train_step(*args: Any, **options: Any) -> Any:
        result = step(*args, **options)
        held.update(te_host_optimizer.held(args[2], args[3]))
        return result

    loop.train_step = train_step
    record = training.train(argv)
    return record | {
        "held": held,
        "calls": dict(te_emulation.CALLS),
        "kind": get_args().layer_kind,
        "host": te_host_optimizer.STEPS,
    }


def count_waits(argv: list[str], kind: str | None) -> dict[str, dict[str, int]]:
    """Train, and return what `training.counted_places` counts."""
    found = training.counted_places()
    train(argv, kind)
    return found
