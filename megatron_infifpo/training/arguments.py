"""Command-line options of a training run beside its method, and checks of Megatron's own."""

import argparse
from typing import Any

from megatron_infifpo.engine.environment import ShowEnvironment
from megatron_infifpo.engine.layer_kind import KINDS
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive
from megatron_infifpo.megatron_flags.check import refuse_yaml, unsupported
from megatron_infifpo.methods import Method, add_method_flags, flag
from megatron_infifpo.rows.layout import RowLayout


def add_training_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of a preference-training run to Megatron's parser."""
    add_method_flags(parser)
    group = parser.add_argument_group(
        "preference data", "pairs, their log-probs, and how long to train on them"
    )
    group.add_argument(
        "--preference-data",
        metavar="PREFIX",
        help="the pivot's token dataset, written by tools/prepare_preferences.py",
    )
    group.add_argument(
        "--preference-sources",
        metavar="FILE",
        help="sources.yaml: the log-prob datasets of the initial pivot and of the sources",
    )
    group.add_argument(
        "--preference-valid-data",
        metavar="PREFIX",
        help="a held-out token dataset: evaluated whole every --eval-interval steps",
    )
    group.add_argument(
        "--preference-valid-sources", metavar="FILE", help="sources.yaml of the held-out pairs"
    )
    group.add_argument(
        "--preference-epochs",
        type=int,
        help="passes over the pairs, in whole steps, where --train-iters is not given (default: 1)",
    )
    group.add_argument(
        "--micro-batch-tokens",
        type=positive,
        metavar="N",
        help="in place of --micro-batch-size: as many pairs a micro-batch as N tokens hold in "
        "every step of training",
    )
    group.add_argument(
        "--share-prompt",
        action=argparse.BooleanOptionalAction,
        help="compute a pair's prompt once for all of its responses (default: yes, but not with "
        "--te-attention, which cannot)",
    )
    group.add_argument(
        "--te-attention",
        action="store_true",
        help="on Transformer Engine's layers, its own attention too (cuDNN or FlashAttention) in "
        "place of PyTorch's variable-length kernel",
    )
    group.add_argument(
        "--reference-check",
        choices=["error", "warn", "off"],
        help="what to do when the initial pivot's log-probs are of other weights than a run "
        "starts from, or when it does not give these log-probs at step 0 (default: error)",
    )
    group.add_argument(
        "--reference-probes",
        type=positive,
        metavar="N",
        help="records that the check runs the pivot on, at every start (default: 64)",
    )
    group.add_argument(
        "--reference-tolerance",
        type=float,
        metavar="NATS",
        help="mean absolute difference of a response's log-probs, a token, that the check allows "
        "(default: 0.002 in float32, 0.04 in float16, 0.25 in bfloat16, 1.0 with FP8)",
    )
    group.add_argument(
        "--tokenizer-check",
        choices=["error", "warn", "off"],
        default="error",
        help="what to do when the data were prepared with another tokenizer or chat template than "
        "those that the checkpoint carries (default: error)",
    )
    group.add_argument(
        "--allow-changed-run",
        action="store_true",
        help="resume although the method, the data or a source is not what run.json says; the "
        "schedule has flags of its own: --override-opt-param-scheduler",
    )
    parser.add_argument(
        "--environment",
        action=ShowEnvironment,
        help="print what is installed and what each part would use, and exit",
    )
    refuse_yaml(parser)
    return parser


def refuse_unsupported(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what does not work of Megatron's flags; the first check of a run.

    Args:
        args: as parsed.
        parser: Megatron's with ours.

    Raises:
        UserError: names every such flag and the reason.
    """
    sentences = unsupported(args, parser)
    if sentences:
        raise UserError("\n       ".join(sentences))


def set_share_prompt(args: argparse.Namespace, method: Method) -> None:
    """Share prompts unless the layers cannot, or a row has nothing to share.

    Raises:
        UserError: `--share-prompt` where it cannot work or has no effect.
    """
    able = KINDS[args.layer_kind].shares_prompts
    if args.share_prompt and not able:
        raise UserError(
            "--share-prompt does not work with Transformer Engine's attention: leave out one of it "
            "and --te-attention"
        )
    if args.share_prompt is not None and method.responses == 1:
        raise UserError("--share-prompt has no effect with --method sft: it sees one response")
    if args.share_prompt is None:
        args.share_prompt = able and method.responses != 1


def row_layout(args: argparse.Namespace) -> RowLayout:
    """Return the layout of a run's rows, once its layers and shared prompts are settled."""
    return KINDS[args.layer_kind].row_layout(
        args.tensor_model_parallel_size,
        fp8_recipe=args.fp8_recipe if args.fp8 else None,
        share_prompt=args.share_prompt,
    )


def override(
    args: argparse.Namespace, parser: argparse.ArgumentParser, values: dict[str, Any]
) -> None:
    """Set arguments that leave no choice.

    Raises:
        UserError: the command line gives another value, which would have no effect.
    """
    for name, value in values.items():
        given = getattr(args, name)
        if given != parser.get_default(name) and given != value:
            raise UserError(
                f"{flag(name)} is {given!r}, but only {value!r} works here: leave it out"
            )
        setattr(args, name, value)


def escape_help(parser: argparse.ArgumentParser) -> None:
    """Make `--help` work: some of Megatron's help texts hold a lone percent sign."""
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        try:
            if action.help:
                formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%") if action.help else None
