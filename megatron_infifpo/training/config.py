"""What a training run is: every flag of it, from a command line or a file, checked once."""

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from megatron_infifpo.patches import cpu

cpu.enable()

from megatron.training.arguments import add_megatron_arguments  # noqa: E402

from megatron_infifpo.engine.environment import ShowEnvironment  # noqa: E402
from megatron_infifpo.errors import UserError  # noqa: E402
from megatron_infifpo.flag_types import flag, positive  # noqa: E402
from megatron_infifpo.megatron_flags.check import defaults, mend, unsupported  # noqa: E402
from megatron_infifpo.methods import Method, add_method_flags, method_from_options  # noqa: E402
from megatron_infifpo.training.config_checks import check_config  # noqa: E402
from megatron_infifpo.training.config_file import CONFIG, with_file  # noqa: E402


def _flag(help: str, default: Any = None, **how: Any) -> Any:
    """A field that is a flag of its name: its default, and how argparse reads it."""
    return field(default=default, metadata={"help": help, **how})


_CHECK = {"choices": ["error", "warn", "off"]}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run as it was asked for; made by `from_arguments` or `from_file`.

    Attributes:
        method: what is trained.
        flags: all other flags by name, read only: Megatron's, and the method's as they were given.
            Every other field is the flag of its name, with its help.

    Raises:
        UserError: a flag is missing, has no effect, or contradicts another.
    """

    method: Method
    flags: Mapping[str, Any]
    preference_data: str = _flag(
        "the pivot's token dataset, written by infifpo prepare", metavar="PREFIX"
    )
    preference_sources: str | None = _flag(
        "sources.yaml: the log-prob datasets of the initial pivot and of the sources",
        metavar="FILE",
    )
    preference_valid_data: str | None = _flag(
        "a held-out token dataset: evaluated whole every --eval-interval steps", metavar="PREFIX"
    )
    preference_valid_sources: str | None = _flag(
        "sources.yaml of the held-out pairs", metavar="FILE"
    )
    soft_targets: str | None = _flag(
        "soft targets of these tokens, written by infifpo fuse-targets", metavar="PREFIX"
    )
    valid_soft_targets: str | None = _flag(
        "soft targets of the held-out tokens; without them these count by cross-entropy alone",
        metavar="PREFIX",
    )
    preference_epochs: int | None = _flag(
        "passes over the pairs, in whole steps, where --train-iters is not given (default: 1)",
        type=int,
    )
    micro_batch_tokens: int | None = _flag(
        "in place of --micro-batch-size: as many pairs a micro-batch as N tokens hold in every "
        "step of training (of a whole row, however many ranks share it)",
        type=positive,
        metavar="N",
    )
    share_prompt: bool | None = _flag(
        "compute a pair's prompt once for all of its responses (default: yes, but not with "
        "--te-attention, which cannot)",
        action=argparse.BooleanOptionalAction,
    )
    te_attention: bool = _flag(
        "on Transformer Engine's layers, its own attention too (cuDNN or FlashAttention) in place "
        "of PyTorch's variable-length kernel",
        default=False,
        action="store_true",
    )
    reference_check: str | None = _flag(
        "what to do when the initial pivot's log-probs are of other weights than a run starts "
        "from, or when it does not give these log-probs at step 0 (default: error)",
        **_CHECK,
    )
    reference_probes: int | None = _flag(
        "records that the check runs the pivot on, at every start (default: 64)",
        type=positive,
        metavar="N",
    )
    reference_tolerance: float | None = _flag(
        "mean absolute difference of a response's log-probs, a token, that the check allows "
        "(default: 0.002 in float32, 0.04 in float16, 0.25 in bfloat16, 1.0 with FP8)",
        type=float,
        metavar="NATS",
    )
    sampler_logprobs: str | None = _flag(
        "OUTPUT.measured of infifpo sample: refuse to begin a round on samples of another model",
        metavar="FILE",
    )
    sampler_tolerance: float | None = _flag(
        "mean absolute difference of these log-probs, a token, that is accepted, and three times "
        "as much of a response alone (default: 0.002 in float32, 0.01 in float16, 0.07 in "
        "bfloat16, 0.4 with FP8)",
        type=float,
        metavar="NATS",
    )
    tokenizer_check: str = _flag(
        "what to do when the data were prepared with another tokenizer or chat template than those "
        "that the checkpoint carries (default: error)",
        default="error",
        **_CHECK,
    )
    lora_rank: int | None = _flag(
        "train low-rank adapters of this rank and leave the pivot's own weights as they are",
        type=positive,
        metavar="R",
    )
    lora_alpha: float | None = _flag(
        "adapters count alpha / rank times (default: alpha is twice the rank)",
        type=float,
        metavar="X",
    )
    lora_targets: list[str] | None = _flag(
        "linear layers with adapters, by their Hugging Face names: q_proj v_proj (default: "
        "all-linear, all of every layer)",
        nargs="+",
        metavar="NAME",
    )
    stop_at: int | None = _flag(
        "save and end once N steps of the run are done; its schedule is that of --train-iters "
        "(default: all steps)",
        type=positive,
        metavar="N",
    )
    export: str | None = _flag(
        "once all steps are done, write a Hugging Face folder of the last checkpoint there",
        metavar="DIR",
    )
    next_round: bool = _flag(
        "resume with other data, of the same references: a new round, on samples of the policy as "
        "it is now",
        default=False,
        action="store_true",
    )
    allow_changed_run: bool = _flag(
        "resume although the method, the data or a source is not what run.json says; the schedule "
        "has flags of its own: --override-opt-param-scheduler",
        default=False,
        action="store_true",
    )

    @classmethod
    def from_arguments(cls, argv: Sequence[str]) -> Self:
        """Read the words of a command line, which go before those of its `--config FILE`.

        Raises:
            UserError: an unknown flag, or a value that cannot be.
        """
        parser = run_parser()
        return cls.from_options(vars(parser.parse_args(with_file(parser, argv))))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a YAML file of flags by their names, as in `lr: 1e-7`; errors as `from_arguments`.

        A flag without a value is `true`; `false` is its `--no-` form where it has one.
        """
        return cls.from_arguments([CONFIG, str(path)])

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Take flags by name, as a parser with `add_run_flags` has read them."""
        if sentences := unsupported(options, run_parser()):
            raise UserError("\n       ".join(sentences))
        own = {each.name: options[each.name] for each in own_fields()}
        flags = {name: value for name, value in options.items() if name not in own}
        method = method_from_options(options["method"], options)
        return cls(method=method, flags=MappingProxyType(flags), **own)

    def __post_init__(self) -> None:
        """Check what needs neither data nor checkpoint."""
        check_config(self)

    @property
    def checks_reference(self) -> bool:
        """Whether the run's first pivot must be the initial pivot of its references."""
        return self.method.reference is not None and self.reference_check != "off"

    def named(self) -> dict[str, Any]:
        """All flags by name, but `config`."""
        return {**self.flags, **{each.name: getattr(self, each.name) for each in own_fields()}}

    def given(self) -> dict[str, str]:
        """Flags with another value than their default, by name, as text."""
        usual = defaults(run_parser())
        return {n: str(value) for n, value in self.named().items() if value != usual[n]}


def own_fields() -> list[Any]:
    """Fields of `RunConfig` that are flags of ours."""
    return [each for each in fields(RunConfig) if each.metadata]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Raise UserError, where a command would print its usage."""
        raise UserError(message)


@functools.cache
def run_parser() -> argparse.ArgumentParser:
    """The parser of a run that reports errors as Python does; it is never changed."""
    parser = _Parser(add_help=False)
    add_run_flags(parser)
    return parser


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run to a parser, and after them Megatron's."""
    parser.allow_abbrev = False
    parser.add_argument(
        CONFIG,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a YAML file of flags by name, without their dashes; what is on the command line goes "
        "before it",
    )
    add_method_flags(parser)
    group = parser.add_argument_group(
        "preference data", "pairs, their log-probs, and how long to train on them"
    )
    for each in own_fields():
        group.add_argument(flag(each.name), default=each.default, **each.metadata)
    parser.add_argument(
        "--environment",
        action=ShowEnvironment,
        nargs=0,
        help="print what is installed and what each part would use, and exit",
    )
    add_megatron_arguments(parser)
    mend(parser)
