#!/usr/bin/env python
"""Say what a run costs: memory of a GPU at every legal layout, and hours.

    python tools/plan_run.py --model phi-4 --gpus 16 --gpu-memory 80

GiB is the most at once: of a step, of the optimizer's update, or of a save. `host` is the memory of
a node, beside its GPUs, that a save takes.

Hours are for the paper's run by default: three epochs of SFT on 75,000 responses and one of
preference optimization on 75,000 pairs. They follow from floating-point operations and --mfu, the
share of a GPU's peak that training reaches. To measure yours, divide the operations by the seconds
of some steps (Megatron's --log-throughput counts a pair as one text of --seq-length: it misleads).
"""

import argparse
from pathlib import Path

from megatron_infifpo.commands.entry import run
from megatron_infifpo.engine.kept import LOCAL_KEPT, TE_ATTENTION_KEPT, TE_KEPT
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import megatron_args, tensor_parallel_sizes
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.families.published import PUBLISHED
from megatron_infifpo.flag_types import positive, real, whole
from megatron_infifpo.planning.plan import GIB, PRECISIONS, Layout, Plan, layouts
from megatron_infifpo.planning.saves import BY_NAME, BY_RANK, SPARING

# Left free for the allocator, NCCL and the CUDA context.
RESERVED = 6 * GIB
LAYERS = {"te": TE_KEPT, "te-attention": TE_ATTENTION_KEPT, "local": LOCAL_KEPT}
SAVINGS = {"by-rank": BY_RANK, "by-name": BY_NAME, "by-name-sparing": SPARING}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help=f"Hugging Face folder, or one of {', '.join(PUBLISHED)}"
    )
    some = real(0.001)
    parser.add_argument("--gpus", type=whole(1, 100_000), required=True)
    parser.add_argument("--gpus-per-node", type=positive, default=8, help="(default: 8)")
    parser.add_argument("--gpu-memory", type=some, default=80.0, help="GiB (default: 80)")
    parser.add_argument("--gpu-tflops", type=some, default=989.0, help="(default: 989, H100 bf16)")
    parser.add_argument("--mfu", type=real(0.001, 1), default=0.35, help="0 to 1 (default: 0.35)")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
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
        default="by-rank",
        help="as it is saved: by-name is training's --dist-ckpt-optim-fully-reshardable, sparing "
        "--distrib-optim-fully-reshardable-mem-efficient (default: by-rank, as in training)",
    )
    parser.add_argument("--row-tokens", type=positive, default=8192, help="of a micro-batch")
    parser.add_argument("--global-batch-size", type=positive, default=128, help="(default: 128)")
    parser.add_argument("--pairs", type=positive, default=75_000, help="(default: 75000)")
    parser.add_argument("--sft-records", type=whole(0), default=75_000, help="(default: 75000)")
    parser.add_argument("--sft-epochs", type=positive, default=3, help="(default: 3)")
    parser.add_argument(
        "--share-prompt",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="as in training; else a copy of the prompt for each response (default: yes)",
    )
    parser.add_argument("--prompt-tokens", type=positive, default=400, help="on average")
    parser.add_argument("--response-tokens", type=positive, default=600, help="on average")
    return parser


def main() -> None:
    """Parse the command line and print one line a layout."""
    args = make_parser().parse_args()
    known = args.model in PUBLISHED and not Path(args.model).is_dir()
    model = megatron_args(PUBLISHED[args.model] if known else read_hf_config(args.model))
    args.layers = args.layers or ("local" if args.precision == "fp32" else "te")
    if args.layers == "te-attention" and args.share_prompt:
        raise UserError("--layers te-attention cannot share prompts: pass --no-share-prompt")
    if args.precision == "fp8" and args.layers == "local":
        raise UserError("--precision fp8 needs Transformer Engine's layers, not --layers local")
    plan = Plan(model, args.precision, LAYERS[args.layers])
    found = layouts(
        args.gpus,
        tensor_parallel_sizes(model),
        model["num_layers"],
        args.gpus_per_node,
        args.global_batch_size,
    )
    if not found:
        raise UserError(f"{args.gpus} GPUs fit no legal layout of {args.model}; see --help")
    print(
        f"{args.model}: {plan.parameters / 1e9:.2f} billion parameters, {args.precision}, "
        f"rows of {args.row_tokens} tokens"
    )
    print(
        f"{'TP':>3}{'PP':>4}{'DP':>4}  recompute{'weights':>9}{'grads':>8}{'optim.':>8}"
        f"{'activ.':>8}{'head':>6}{'GiB':>7}{'host':>7}{'hours':>8}"
    )
    lines = [line for layout in found for line in describe(plan, layout, args)]
    for fits, _, text in sorted(lines, key=lambda line: (not line[0], line[1])):
        print(text if fits else f"{text}  does not fit")


def describe(plan: Plan, layout: Layout, args: argparse.Namespace) -> list[tuple]:
    """Return `(fits, order, text)` without recomputation and with it; the best order is lowest."""
    text = args.prompt_tokens + args.response_tokens
    pair = 2 * text - args.share_prompt * args.prompt_tokens
    share = args.global_batch_size // layout.data
    least = args.global_batch_size * pair / (args.row_tokens * layout.data)
    rows = next(n for n in range(1, share + 1) if share % n == 0 and n >= min(least, share))
    # Pipeline stages wait for the first and the last row of a step.
    bubble = 1 + (layout.pipeline - 1) / rows
    sft = args.sft_records * args.sft_epochs
    tokens = sft * text + args.pairs * pair
    scored = (sft + 2 * args.pairs) * args.response_tokens
    gathered = 2 * text / pair if args.share_prompt else 0.0
    saving = SAVINGS[args.optimizer_state]
    host = plan.host_memory(layout, saving, min(args.gpus, args.gpus_per_node))
    lines = []
    for recompute in (False, True):
        memory = plan.memory(
            layout,
            args.row_tokens,
            rows,
            gathered=gathered,
            recompute=recompute,
            fused_adam=not args.torch_adam,
            saving=saving,
        )
        work = plan.operations(tokens, scored, text, recompute=recompute)
        hours = work * bubble / (args.gpus * args.gpu_tflops * 1e12 * args.mfu) / 3600
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
        line = (
            f"{layout.tensor:>3}{layout.pipeline:>4}{layout.data:>4}"
            f"{'full' if recompute else 'none':>11}"
            + "".join(f"{x / GIB:>{9 if i == 0 else 8}.1f}" for i, x in enumerate(parts))
            + f"{memory.head / GIB:>6.1f}{memory.total / GIB:>7.1f}{host / GIB:>7.0f}{hours:>8.1f}"
        )
        fits = memory.total + RESERVED <= args.gpu_memory * GIB
        lines.append((fits, (hours, layout.tensor * layout.pipeline, layout.tensor), line))
    return lines


if __name__ == "__main__":
    run(main)
