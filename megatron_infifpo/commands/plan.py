"""Say what a run costs: memory of a GPU at every legal layout, and hours.

    infifpo plan --model phi-4 --gpus 16 --gpu-memory 80
    infifpo plan --model phi-4 --gpus 8 --gpu-memory 80 --seq-length 131072
    infifpo plan --model mistral-small-24b --fit 8 --gpu-memory 80

The three best layouts are printed, each with flags for `infifpo train`: the fastest ones that fit,
then those that need least memory. GiB is the most at once: of a step, of the optimizer's update, or
of a save. `attn.` is what the backward pass of one layer's attention takes for a moment, `host` the
memory of a node, beside its GPUs, that a save takes, and an optimizer that is there.

With --seq-length memory is that of the longest text's pair, or list, and ranks may share a row
(context parallelism, CP); tensor and context parallel groups are kept inside a node.

With --fit N the planner also chooses what makes memory go further: MLPs or whole layers computed
again (`mlp`, `full`; attention is, too, where ranks share a row: `selective`, `attn+mlp`), an Adam
that keeps less of a parameter, a share of the optimizer on the host. It prints the fastest plan
that fits, what each of these saves and costs, and all flags for `infifpo train`; or, if nothing
fits, what would. With --lora-rank adapters alone are trained, here and in all layouts.

Hours are for the paper's run by default: three epochs of SFT on 75,000 responses and one of
preference optimization on 75,000 pairs. They follow from floating-point operations and --mfu, the
share of a GPU's peak that training reaches. To measure yours, divide the operations by the seconds
of some steps (Megatron's --log-throughput counts a pair as one text of --seq-length: it misleads).
"""

import argparse
from collections.abc import Iterator

from megatron_infifpo.commands.flags import fields_of, hidden_alias, take_defaults
from megatron_infifpo.engine.kept import LAYERS
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive, real, whole
from megatron_infifpo.planning.estimate import Estimate, best, estimate
from megatron_infifpo.planning.fit import EXACT, MEASURES, Fitted, fit
from megatron_infifpo.planning.flags import training_flags
from megatron_infifpo.planning.job import MOMENTS, SAVINGS, PlanningJob
from megatron_infifpo.planning.models import NAMES, planned_model
from megatron_infifpo.planning.plan import GIB
from megatron_infifpo.planning.precision import PRECISIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the machine and the run."""
    parser.add_argument(
        "--model", required=True, help=f"Hugging Face folder, or one of {', '.join(NAMES)}"
    )
    _add_machine(parser)
    _add_state(parser)
    _add_adapters(parser)
    _add_run(parser)
    take_defaults(parser, PlanningJob)
    parser.add_argument("--all", action="store_true", help="print every layout after that")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    some = real(0.001)
    gpus = parser.add_mutually_exclusive_group(required=True)
    gpus.add_argument("--gpus", type=whole(1, 100_000), help="print the best layouts of so many")
    gpus.add_argument(
        "--fit", type=gpu_count, metavar="N", help="print the fastest way that fits so many GPUs"
    )
    parser.add_argument(
        "--measures",
        nargs="+",
        choices=MEASURES,
        help=f"what --fit may take (default: {' '.join(EXACT)}; moments, in bfloat16, are less "
        "exact)",
    )
    parser.add_argument("--gpus-per-node", type=positive, help="(default: %(default)s)")
    parser.add_argument("--gpu-memory", type=some, help="GiB (default: %(default)g)")
    parser.add_argument("--gpu-tflops", type=some, help="(default: %(default)g, H100 bf16)")
    parser.add_argument("--mfu", type=real(0.001, 1), help="0 to 1 (default: %(default)s)")
    parser.add_argument(
        "--gpu-bandwidth",
        type=some,
        metavar="GB/S",
        help="of a GPU that gathers keys under context parallelism, or sends rows to experts "
        "(default: %(default)g, NVLink)",
    )
    parser.add_argument("--host-memory", type=some, help="GiB of a node (default: %(default)g)")
    parser.add_argument(
        "--host-bandwidth",
        type=some,
        metavar="GB/S",
        help="of all of a node's processors to its memory, for an optimizer that is there; they "
        "need OMP_NUM_THREADS (default: %(default)g)",
    )
    parser.add_argument(
        "--host-link",
        type=some,
        metavar="GB/S",
        help="between each GPU and the host, all at once (default: %(default)g)",
    )


def _add_state(parser: argparse.ArgumentParser) -> None:
    """Add what a GPU keeps, and how it is saved."""
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
        "--grad-reduce-in-bf16", action="store_true", help="gradients in bfloat16, as in training"
    )
    parser.add_argument(
        "--precision-aware",
        action="store_true",
        help="training's --use-precision-aware-optimizer: 10 bytes a parameter in place of 12; "
        "needs Transformer Engine",
    )
    parser.add_argument(
        "--adam-moments",
        choices=MOMENTS,
        help="bf16: training's --use-precision-aware-optimizer with --exp-avg-dtype and "
        "--exp-avg-sq-dtype bf16, which need Transformer Engine (default: %(default)s)",
    )
    parser.add_argument(
        "--optimizer-offload",
        type=real(0, 1),
        metavar="FRACTION",
        help="share of the optimizer in host memory: training's --optimizer-cpu-offload with "
        "--optimizer-offload-fraction (default: %(default)g)",
    )
    parser.add_argument(
        "--optimizer-state",
        choices=list(SAVINGS),
        help="as it is saved: by-name is training's --dist-ckpt-optim-fully-reshardable, sparing "
        "--distrib-optim-fully-reshardable-mem-efficient (default: %(default)s, as in training)",
    )
    parser.add_argument(
        "--async-save", action="store_true", help="as in training: copies what is on the host, too"
    )


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    """Add what is trained where the model is frozen."""
    parser.add_argument(
        "--lora-rank", type=positive, metavar="R", help="train adapters alone, as in training"
    )
    parser.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        help="linear layers that have adapters, such as q_proj (default: all)",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Add what is trained on."""
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
    parser.add_argument(
        "--seq-length",
        type=positive,
        metavar="N",
        help="tokens of the longest text that must fit, a prompt with one response",
    )
    for name, usual, part in (("prompt", 400, 7), ("response", 600, 1)):
        parser.add_argument(
            f"--{name}-tokens",
            type=positive,
            help=f"on average (default: {usual}; with --seq-length N {part}/32 of N)",
        )


def gpu_count(text: str) -> int:
    """Read a number of GPUs: `8` or `8-gpus`."""
    return whole(1, 100_000)(text.removesuffix("-gpus"))


def run(args: argparse.Namespace) -> None:
    """Print the best layouts, or all; or the fastest way that fits.

    Raises:
        UserError: there is no legal layout, or nothing fits.
    """
    if args.fit is None and args.measures:
        raise UserError("--measures has no effect without --fit")
    if args.fit is not None and args.all:
        raise UserError("--all has no effect with --fit: ask for all layouts with --gpus")
    given = {"model": planned_model(args.model), "gpus": args.fit or args.gpus}
    job = PlanningJob(**fields_of(args, PlanningJob) | given)
    for text in introduction(args.model, job):
        print(text)
    if args.fit is not None:
        for text in fitted(fit(job, measures=args.measures or EXACT)):
            print(text)
        return
    found = estimate(job)
    if not found:
        raise UserError(f"{job.gpus} GPUs fit no legal layout of {args.model}; see --help")
    header = columns(job)
    print(header)
    for one in best(found):
        print(f"{line(job, one)}\n    {training_flags(job, one)}")
    if not found[0].fits:
        print(f"what needs less: infifpo plan --fit {job.gpus} looks for it")
    if args.all:
        print(f"\n{header}")
        for one in found:
            print(line(job, one))


def fitted(found: Fitted) -> Iterator[str]:
    """Say what was chosen, what it costs, and with which flags training does it."""
    yield columns(found.job)
    yield line(found.job, found.estimate)
    for measure in found.measures:
        instead = "nothing fits" if measure.without is None else f"{measure.without:.1f} hours"
        yield (
            f"{LONG[measure.name]}: {measure.saves / GIB:.1f} GiB less, "
            f"{measure.costs:.1f} hours; without it {instead}"
        )
    if found.spent.waiting:
        yield f"pipeline stages wait {found.spent.waiting:.1f} hours"
    if found.spent.exchanging:
        yield f"ranks exchange rows for {found.spent.exchanging:.1f} hours"
    yield "infifpo train ... \\"
    yield f"    {' '.join(found.flags)}"


LONG = {
    "recompute": "layers, or their MLPs, computed again",
    "precision-aware": "16 bits of a parameter beside its bfloat16, exact",
    "moments": "Adam's moments in bfloat16, less exact",
    "offload": "optimizer on the host",
}


def introduction(name: str, job: PlanningJob) -> Iterator[str]:
    """Say what is planned."""
    plan, used = job.plan, ""
    if plan.adapters:
        used = f", {plan.trained / 1e6:.1f} million trained"
    if plan.sizes.experts:
        used = f", {(plan.sizes.multiplied + plan.sizes.table) / 1e9:.2f} used by a token"
    yield (
        f"{name}: {plan.sizes.parameters / 1e9:.2f} billion parameters{used}, {job.precision}, "
        f"rows of {job.row_tokens} tokens"
    )
    if job.seq_length is None:
        return
    usual, longest, context = job.texts, job.longest, job.model["max_position_embeddings"]
    yield (
        f"the longest text: {longest.prompt:,} tokens of the prompt, {longest.response:,} of a "
        f"response; hours are for {usual.prompt:,} and {usual.response:,} on average"
    )
    if context < job.seq_length:
        yield (
            f"{name} is made for texts of {context:,} tokens: its rope must be extended for "
            f"{job.seq_length:,}"
        )


def columns(job: PlanningJob) -> str:
    """Names of the table's columns."""
    expert = f"{'EP':>4}" if job.plan.sizes.experts else ""
    return (
        f"{'TP':>3}{'PP':>4}{'CP':>4}{'DP':>4}{expert}  recompute{'weights':>9}{'grads':>8}"
        f"{'optim.':>8}{'activ.':>8}{'attn.':>7}{'head':>6}{'GiB':>7}{'host':>7}{'hours':>9}"
    )


def line(job: PlanningJob, one: Estimate) -> str:
    """A row of the table."""
    layout, memory = one.layout, one.memory
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
    expert = f"{layout.expert:>4}" if job.plan.sizes.experts else ""
    text = (
        f"{layout.tensor:>3}{layout.pipeline:>4}{layout.context:>4}{layout.data:>4}{expert}"
        f"{one.recompute:>11}"
        + "".join(f"{x / GIB:>{9 if i == 0 else 8}.1f}" for i, x in enumerate(parts))
        + f"{memory.attention / GIB:>7.1f}{memory.head / GIB:>6.1f}{memory.total / GIB:>7.1f}"
        + f"{one.host / GIB:>7.0f}{one.hours:>9.1f}"
    )
    return text if one.fits else f"{text}  does not fit"
