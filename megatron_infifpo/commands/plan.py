"""Say what a run costs: memory of a GPU at every legal layout, and hours.

    infifpo plan --model phi-4 --gpus 16 --gpu-memory 80

GiB is the most at once: of a step, of the optimizer's update, or of a save. `host` is the memory of
a node, beside its GPUs, that a save takes.

Hours are for the paper's run by default: three epochs of SFT on 75,000 responses and one of
preference optimization on 75,000 pairs. They follow from floating-point operations and --mfu, the
share of a GPU's peak that training reaches. To measure yours, divide the operations by the seconds
of some steps (Megatron's --log-throughput counts a pair as one text of --seq-length: it misleads).
"""

import argparse
from pathlib import Path

from megatron_infifpo.commands.flags import fields_of, hidden_alias, take_defaults
from megatron_infifpo.engine.kept import LAYERS
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import PUBLISHED, megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.flag_types import positive, real, whole
from megatron_infifpo.planning.estimate import (
    SAVINGS,
    Estimate,
    PlanningJob,
    estimate,
)
from megatron_infifpo.planning.plan import GIB, PRECISIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the machine and the run."""
    parser.add_argument(
        "--model", required=True, help=f"Hugging Face folder, or one of {', '.join(PUBLISHED)}"
    )
    some = real(0.001)
    parser.add_argument("--gpus", type=whole(1, 100_000), required=True)
    parser.add_argument("--gpus-per-node", type=positive, help="(default: %(default)s)")
    parser.add_argument("--gpu-memory", type=some, help="GiB (default: %(default)g)")
    parser.add_argument("--gpu-tflops", type=some, help="(default: %(default)g, H100 bf16)")
    parser.add_argument("--mfu", type=real(0.001, 1), help="0 to 1 (default: %(default)s)")
    parser.add_argument("--precision", choices=list(PRECISIONS))
    parser.add_argument(
        "--layers",
        choices=list(LAYERS),
        help="Transformer Engine's with this program's attention, or its own, or Megatron's local "
        "ones (default: te; local in float32)",
    )
    parser.add_argument(
        "--torch-adam", action="store_true", help="no Transformer Engine and no apex is installed"
    )
    parser.add_argument(
        "--optimizer-state",
        choices=list(SAVINGS),
        help="as it is saved: by-name is training's --dist-ckpt-optim-fully-reshardable, sparing "
        "--distrib-optim-fully-reshardable-mem-efficient (default: %(default)s, as in training)",
    )
    tokens = "--micro-batch-tokens"
    parser.add_argument(tokens, type=positive, help="of a row (default: %(default)s)")
    hidden_alias(parser, "--row-tokens", tokens)
    parser.add_argument("--global-batch-size", type=positive, help="(default: %(default)s)")
    parser.add_argument("--pairs", type=positive, help="(default: %(default)s)")
    parser.add_argument("--sft-records", type=whole(0), help="(default: %(default)s)")
    parser.add_argument("--sft-epochs", type=positive, help="(default: %(default)s)")
    parser.add_argument(
        "--responses", type=whole(2), help="of a list, where --pairs counts lists (default: 2)"
    )
    parser.add_argument(
        "--share-prompt",
        action=argparse.BooleanOptionalAction,
        help="as in training; else a copy of the prompt for each response (default: yes)",
    )
    parser.add_argument("--prompt-tokens", type=positive, help="on average")
    parser.add_argument("--response-tokens", type=positive, help="on average")
    take_defaults(parser, PlanningJob)


def run(args: argparse.Namespace) -> None:
    """Print one line a layout.

    Raises:
        UserError: there is no legal one.
    """
    name = args.model
    known = name in PUBLISHED and not Path(name).is_dir()
    model = megatron_args(PUBLISHED[name] if known else read_hf_config(name))
    job = PlanningJob(**fields_of(args, PlanningJob) | {"model": model})
    found = estimate(job)
    if not found:
        raise UserError(f"{job.gpus} GPUs fit no legal layout of {name}; see --help")
    print(
        f"{name}: {job.plan.parameters / 1e9:.2f} billion parameters, {job.precision}, "
        f"rows of {job.micro_batch_tokens} tokens"
    )
    print(
        f"{'TP':>3}{'PP':>4}{'DP':>4}  recompute{'weights':>9}{'grads':>8}{'optim.':>8}"
        f"{'activ.':>8}{'head':>6}{'GiB':>7}{'host':>7}{'hours':>8}"
    )
    for one in found:
        print(line(one))


def line(one: Estimate) -> str:
    """A row of the table."""
    layout, memory = one.layout, one.memory
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
    text = (
        f"{layout.tensor:>3}{layout.pipeline:>4}{layout.data:>4}"
        f"{'full' if one.recompute else 'none':>11}"
        + "".join(f"{x / GIB:>{9 if i == 0 else 8}.1f}" for i, x in enumerate(parts))
        + f"{memory.head / GIB:>6.1f}{memory.total / GIB:>7.1f}"
        + f"{one.host / GIB:>7.0f}{one.hours:>8.1f}"
    )
    return text if one.fits else f"{text}  does not fit"
