"""What a method is, every preset, and the options that a preset's choices have."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from megatron_infifpo.losses import BETA, LOSSES, TOKEN_LOSSES, Loss, TokenLoss
from megatron_infifpo.options import Option
from megatron_infifpo.pair_weights import CUT, PAIR_WEIGHTS, SCALE
from megatron_infifpo.reference import DEFAULT_FUSION, FUSIONS
from megatron_infifpo.source_values import VALUE_OPTIONS


@dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
        objective: a key of `losses.LOSSES`, or of `losses.TOKEN_LOSSES`: of the chosen responses.
        reference: "fused" source model or "initial" pivot; None for losses of tokens.
        length_normalization: log-probs are means over response tokens, else sums.
        beta: strength of the implied KL constraint; 0 in a preset: `resolve` fills it in.
        fusion, clip: see `reference.fuse_reference`.
        initial_as_source: the initial pivot competes as one more source.
        sft_weight: weight of an SFT term on the chosen response, a mean over its tokens.
        pair_weights, verdict_scale, verdict_cut: see `pair_weights.pair_weights`; None without.
            `resolve` fills in the scale.
        options: of the loss, the fusion and what comes before it, by name; what is not here has its
            default.
    """

    objective: str
    reference: str | None
    length_normalization: bool
    beta: float = 0.0
    fusion: str = DEFAULT_FUSION
    clip: bool = True
    initial_as_source: bool = False
    sft_weight: float | None = None
    pair_weights: str | None = None
    verdict_scale: float | None = None
    verdict_cut: float | None = None
    options: Mapping[str, Any] = field(default=MappingProxyType({}), hash=False)

    @property
    def fused(self) -> bool:
        """Whether the reference is the fused source model."""
        return self.reference == "fused"

    @property
    def reads_sources(self) -> bool:
        """Whether sources' log-probs are read: for a fused reference, or for weights of pairs."""
        return self.fused or self.pair_weights is not None

    @property
    def reads_logprobs(self) -> bool:
        """Whether any stored log-probs are read, the sources' or the initial pivot's."""
        return self.reference is not None or self.reads_sources

    @property
    def loss(self) -> Loss | None:
        """The preference loss; None where `token_loss` is the loss."""
        return LOSSES.get(self.objective)

    @property
    def token_loss(self) -> TokenLoss | None:
        """The loss of single tokens of one response: SFT, alone or with soft targets."""
        return TOKEN_LOSSES.get(self.objective)

    @property
    def _any_loss(self) -> Loss | TokenLoss:
        return self.loss or TOKEN_LOSSES[self.objective]

    @property
    def loss_declares(self) -> Mapping[str, Option]:
        """Options of the loss."""
        return self._any_loss.options

    @property
    def responses(self) -> int | None:
        """How many of chosen, rejected, pivot_chosen the loss looks at; None: a list's, all."""
        return 1 if self.loss is None else self.loss.responses

    @property
    def most_responses(self) -> int | None:
        """The most responses of a record that the loss takes; None: any number."""
        return None if self.loss is None else self.loss.most(**self.loss_options(1.0))

    @property
    def reads(self) -> Mapping[str, bool]:
        """Values of a row that the loss takes beside log-probs, and whether it needs them."""
        return self._any_loss.reads

    @property
    def soft_targets(self) -> bool:
        """Whether the loss reads soft targets of tokens, fused by `infifpo fuse-targets`."""
        return self.token_loss is not None and bool(self.reads)

    def uses_scores(self, *, listed: bool) -> bool:
        """Whether scores of responses matter: the loss reads them, or they choose from a list."""
        return "rewards" in self.reads or (listed and self.responses is not None)

    @property
    def several_pairs(self) -> bool:
        """Whether the loss depends on which pairs share a row."""
        return self.loss is not None and self.loss.several_pairs

    @property
    def growing(self) -> tuple[str, ...]:
        """Options of the loss that grow over training, so its length matters."""
        return tuple(name for name, option in self.loss_declares.items() if option.grows)

    def loss_option(self, name: str) -> Any:
        """Return the value of one of the loss's options, its default where none is given."""
        return self.options.get(name, self.loss_declares[name].default)

    def loss_options(self, progress: float) -> dict[str, Any]:
        """Arguments of the loss beside beta, when a share `progress` of the training is done."""
        return {
            name: option.at(self.options[name], progress)
            for name, option in self.loss_declares.items()
            if name in self.options
        }

    @property
    def fusion_options(self) -> dict[str, Any]:
        """Arguments of the fusion."""
        known = FUSIONS[self.fusion].options
        return {name: self.options.get(name, option.default) for name, option in known.items()}

    @property
    def value_options(self) -> dict[str, Any]:
        """Arguments of what comes before the fusion, where they are given."""
        return {name: self.options[name] for name in VALUE_OPTIONS if name in self.options}

    @property
    def source_values(self) -> str:
        """What the sources' values are before they are clipped."""
        default: str = VALUE_OPTIONS["source_values"].default
        return self.options.get("source_values", default)

    @property
    def standardised(self) -> bool:
        """Whether sources' values are scaled by what all training records say of them."""
        return self.source_values == "standardised"

    def describe(self) -> dict[str, Any]:
        """Return fields and options as one flat mapping, as run.json keeps them.

        Options that are not given have their default if they are a fusion's, else None.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "options"}
        rest = {n: option.default for f in FUSIONS.values() for n, option in f.options.items()}
        rest |= dict.fromkeys(VALUE_OPTIONS)
        rest |= dict.fromkeys(name for loss in LOSSES.values() for name in loss.options)
        rest |= dict.fromkeys(name for loss in TOKEN_LOSSES.values() for name in loss.options)
        return own | rest | dict(self.options)

    @classmethod
    def from_description(cls, found: Mapping[str, Any]) -> "Method":
        """Return the method that `describe` described.

        Raises:
            TypeError: it has a field or an option that this version does not have.
        """
        options = {n: v for n, v in found.items() if n in shared_options() and v is not None}
        own = {name: value for name, value in found.items() if name not in shared_options()}
        return cls(**own, options=MappingProxyType(options))


METHODS: dict[str, Method] = {
    "sft": Method("sft", None, length_normalization=True),
    "dpo": Method("dpo", "initial", length_normalization=False),
    "ipo": Method("ipo", "initial", length_normalization=True),
    "wrpo": Method("wrpo", "initial", length_normalization=False),
    "fpo": Method("dpo", "fused", length_normalization=False, clip=False),
    "infifpo": Method("dpo", "fused", length_normalization=True),
    "infifpo-ipo": Method("ipo", "fused", length_normalization=True),
    "infifpo-wrpo": Method("wrpo", "fused", length_normalization=True),
    "fuserlhf": Method(
        "group_regression",
        "fused",
        length_normalization=False,
        fusion="weighted",
        clip=False,
        initial_as_source=True,
    ),
    "pad": Method(
        "plackett_luce", "fused", length_normalization=True, fusion="average", clip=False
    ),
    "fusellm": Method("fusellm", None, length_normalization=True),
    "fusechat": Method("fusechat", None, length_normalization=True),
    "infifusion": Method("infifusion", None, length_normalization=True),
}

# The fields of `Method` that have a flag; losses, fusions and what comes before declare the others.
OWN = {
    "objective": Option("preference loss", choices=LOSSES),
    "reference": Option(
        "the initial pivot, or the fused source model", choices=("initial", "fused")
    ),
    "length_normalization": Option("mean log-probs over response tokens instead of sums"),
    "beta": BETA,
    "fusion": Option("how the sources become one reference", choices=FUSIONS),
    "clip": Option("clip sources against the initial pivot before fusion"),
    "initial_as_source": Option("the initial pivot competes as one more source"),
    "sft_weight": Option(
        "add this times the cross-entropy of the chosen response, a mean over its tokens",
        range="(0, inf)",
    ),
    "pair_weights": Option(
        "multiply each pair's loss by what the sources say of its label: the mean of their "
        "verdicts, or the verdict of the most accurate one in the domain, by sources.yaml",
        choices=PAIR_WEIGHTS,
    ),
    "verdict_scale": SCALE,
    "verdict_cut": CUT,
}


def shared_options() -> dict[str, dict[str, Option]]:
    """Options of fusions, what comes before, and losses: by name, then by who takes them."""
    takes = [("a fused reference", VALUE_OPTIONS)]
    takes += [(user, fusion.options) for user, fusion in FUSIONS.items()]
    takes += [(user, loss.options) for user, loss in LOSSES.items()]
    takes += [(user, loss.options) for user, loss in TOKEN_LOSSES.items()]
    found: dict[str, dict[str, Option]] = {}
    for user, options in takes:
        for name, option in options.items():
            found.setdefault(name, {})[user] = option
    return found
