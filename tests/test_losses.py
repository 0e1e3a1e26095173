"""Every objective, value and gradient: against its formula in plain floats, and against TRL."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infifpo.losses import CHOSEN, LOSSES, REJECTED, preference_loss


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


# Formulas of one pair, from the papers. w, r, p: log-ratios of chosen, rejected, pivot_chosen;
# b: beta; e: label smoothing.
ORACLES = {
    "dpo": lambda w, r, p, b, e=0.0: (
        -(1 - e) * log_sigmoid(b * (w - r)) - e * log_sigmoid(-b * (w - r))
    ),
    "ipo": lambda w, r, p, b: (w - r - 1 / (2 * b)) ** 2,
    "wrpo": lambda w, r, p, b, a, e=0.0: (
        -(1 - e) * log_sigmoid(b * (a * w + (1 - a) * p - r))
        - e * log_sigmoid(-b * (a * w + (1 - a) * p - r))
    ),
    "hinge": lambda w, r, p, b: max(0.0, 1 - b * (w - r)),
    "robust": lambda w, r, p, b, e: (
        (-(1 - e) * log_sigmoid(b * (w - r)) + e * log_sigmoid(-b * (w - r))) / (1 - 2 * e)
    ),
    "exo_pair": lambda w, r, p, b, e=1e-3: (
        sigmoid(b * (w - r)) * (log_sigmoid(b * (w - r)) - math.log(1 - e))
        + sigmoid(b * (r - w)) * (log_sigmoid(b * (r - w)) - math.log(e))
    ),
    "nca_pair": lambda w, r, p, b: (
        -log_sigmoid(b * w) - 0.5 * log_sigmoid(-b * w) - 0.5 * log_sigmoid(-b * r)
    ),
    "bco_pair": lambda w, r, p, b: -log_sigmoid(b * w) - log_sigmoid(-b * r),
    "sppo_hard": lambda w, r, p, b: (w - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "apo_zero": lambda w, r, p, b: 1 - sigmoid(b * w) + sigmoid(b * r),
    "apo_down": lambda w, r, p, b: sigmoid(b * w) + 1 - sigmoid(b * (w - r)),
    "discopop": lambda w, r, p, b, tau=0.05: (
        -log_sigmoid(b * (w - r)) * (1 - sigmoid(b * (w - r) / tau))
        + math.exp(-b * (w - r)) * sigmoid(b * (w - r) / tau)
    ),
}
PAIRS = [name for name, loss in LOSSES.items() if loss.responses is not None]
SHORT = {"label_smoothing": "e", "alpha": "a", "discopop_tau": "tau"}
OPTIONS = {"label_smoothing": 0.2, "alpha": 0.3, "discopop_tau": 0.4}


def options_of(objective: str, given: bool) -> dict[str, float]:
    """Options that must be given, or all that there are."""
    known = LOSSES[objective].options
    return {name: OPTIONS[name] for name, option in known.items() if option.required or given}


def read_by(objective: str, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values of a row that a loss needs, beside log-probs of that shape."""
    values = {"rewards": torch.linspace(-1, 1, logps.numel(), dtype=logps.dtype).view_as(logps)}
    return {name: values[name] for name, needs in LOSSES[objective].reads.items() if needs}


def oracle(objective: str, policy: list, reference: list, beta: float, options: dict) -> float:
    """Sum of the losses of all pairs, in plain floats."""
    ratios: list[Any]
    formula: Any
    if objective == "aot":
        gaps = [sorted(w - r for w, r, *_ in rows) for rows in (policy, reference)]
        ratios = [(a - b, 0.0, 0.0) for a, b in zip(*gaps, strict=True)]
        formula = ORACLES["dpo"]
    elif objective == "aot_unpaired":
        pairs = list(zip(policy, reference, strict=True))
        columns = [sorted(p[r] - q[r] for p, q in pairs) for r in (CHOSEN, REJECTED)]
        ratios = [(a, b, 0.0) for a, b in zip(*columns, strict=True)]
        formula = ORACLES["dpo"]
    else:
        pairs = list(zip(policy, reference, strict=True))
        ratios = [[p - r for p, r in zip(*pair, strict=True)] for pair in pairs]
        formula = ORACLES[objective]
    short = {SHORT[name]: value for name, value in options.items()}
    return sum(formula(*ratio, beta, **short) for ratio in ratios)


def gradient(objective: str, policy: list, reference: list, beta: float, options: dict) -> list:
    """Central differences of the oracle."""
    step = 1e-6
    rows: list[list[float]] = []
    for b, row in enumerate(policy):
        rows.append([])
        for r in range(len(row)):
            ends = []
            for sign in (1, -1):
                moved = [list(values) for values in policy]
                moved[b][r] += sign * step
                ends.append(oracle(objective, moved, reference, beta, options))
            rows[-1].append((ends[0] - ends[1]) / (2 * step))
    return rows


@pytest.mark.parametrize("given", [False, True], ids=["defaults", "all options"])
@pytest.mark.parametrize("objective", PAIRS)
def test_value_and_gradient_follow_the_formula(objective, given):
    generator = torch.Generator().manual_seed(5)
    policy, reference = -3 * torch.rand(2, 7, 3, generator=generator, dtype=torch.float64)
    policy.requires_grad_()
    options = options_of(objective, given)
    for beta in (0.1, 2.5):
        losses = preference_loss(objective, policy, reference, beta=beta, **options)
        assert losses.shape == (7,)
        (grad,) = torch.autograd.grad(losses.sum(), policy)
        arguments = (objective, policy.tolist(), reference.tolist(), beta, options)
        assert losses.sum().item() == pytest.approx(oracle(*arguments), rel=1e-6)
        expected = torch.tensor(gradient(*arguments), dtype=torch.float64)
        torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-6)


TRL_NAMES = {"dpo": "sigmoid"} | {
    name: name
    for name in (
        "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
        "aot_unpaired", "apo_zero", "apo_down", "discopop",
    )
}  # fmt: skip


def trl_loss(objective: str, token_logps: list, reference: torch.Tensor, **options) -> torch.Tensor:
    """Mean loss of TRL's DPOTrainer for given token log-probs of all chosen, then all rejected."""
    from collections import defaultdict

    from trl import DPOTrainer

    length = max(len(t) for t in token_logps) + 1
    padded = torch.nn.utils.rnn.pad_sequence(token_logps, batch_first=True)
    mask = torch.zeros(len(token_logps), length, dtype=torch.long)
    for row, tokens in zip(mask, token_logps, strict=True):
        row[1 : 1 + len(tokens)] = 1
    zeros = torch.zeros_like(padded)
    output = SimpleNamespace(
        log_probs=padded, entropy=zeros, mean_logits=zeros, is_top1=mask[:, 1:].bool()
    )  # fmt: skip
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
        args=SimpleNamespace(discopop_tau=options.pop("discopop_tau", 0.05)),
        beta=options.pop("beta"), label_smoothing=options.pop("label_smoothing", 0.0),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", use_weighting=False, loss_types=[TRL_NAMES[objective]],
        loss_weights=[1.0], _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    assert not options
    inputs = {
        "input_ids": mask, "attention_mask": mask, "completion_mask": mask,
        "ref_chosen_logps": reference[:, CHOSEN], "ref_rejected_logps": reference[:, REJECTED],
    }  # fmt: skip
    compute: Any = DPOTrainer._compute_loss
    return compute(trainer, lambda **_: output, inputs, False)


@pytest.mark.parametrize("objective", TRL_NAMES)
def test_value_and_gradient_match_trl(objective):
    """In float64, through token log-probs; TRL averages IPO's over tokens, the others are sums."""
    generator = torch.Generator().manual_seed(11)
    pairs, lengths = 5, [3, 1, 4, 2, 6, 2, 5, 1, 3, 4]
    tokens = [-torch.rand(n, generator=generator, dtype=torch.float64) for n in lengths]
    for t in tokens:
        t.requires_grad_()
    counts = torch.tensor(lengths).view(2, pairs).t()
    reference = -2 * torch.rand(pairs, 2, generator=generator, dtype=torch.float64) * counts
    options = options_of(objective, given=True)
    if objective == "dpo":
        options = {}  # TRL's sigmoid has no smoothing
    policy = torch.stack([t.sum() for t in tokens]).view(2, pairs).t()
    scale = counts if objective == "ipo" else torch.ones_like(counts)
    ours = preference_loss(objective, policy / scale, reference / scale, beta=0.3, **options).mean()
    theirs = trl_loss(objective, tokens, reference, beta=0.3, **options)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, tokens), torch.autograd.grad(theirs, tokens), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


EXTREMES = [-1e4, -300.0, -1.0, -1e-30, 0.0]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", LOSSES)
def test_extreme_log_probs_stay_finite(objective, kind):
    """Every combination of log-probs from -1e4 to 0, for policy and reference."""
    values = torch.tensor(EXTREMES, dtype=kind)
    grid = torch.cartesian_prod(*[values] * 4)
    policy = torch.stack([grid[:, 0], grid[:, 1], grid[:, 1]], dim=1).requires_grad_()
    reference = torch.stack([grid[:, 2], grid[:, 3], grid[:, 3]], dim=1)
    for beta in (0.1, 2.5):
        options = options_of(objective, given=False) | read_by(objective, policy)
        loss = preference_loss(objective, policy, reference, beta=beta, **options)
        (grad,) = torch.autograd.grad(loss.sum(), policy)
        # 1e4 squared is the largest that any formula yields, but for discopop's exponential.
        assert torch.isfinite(loss).all()
        assert torch.isfinite(grad).all()


def test_smoothing_zero_is_no_smoothing():
    policy, reference = -torch.rand(2, 6, 3, dtype=torch.float64)
    for objective in LOSSES:
        smoothing = LOSSES[objective].options.get("label_smoothing")
        if smoothing is not None and smoothing.expected(0.0) is None:
            needed = options_of(objective, given=False)
            a = preference_loss(objective, policy, reference, beta=1.0, **needed)
            b = preference_loss(
                objective, policy, reference, beta=1.0, **needed, label_smoothing=0.0
            )
            assert torch.equal(a, b), objective


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-30, 0), min_size=6, max_size=6), st.floats(0.01, 3))
def test_wrpo_between_two_dpo_losses(values, beta):
    """Alpha 1 is DPO on the sources' best response, alpha 0 DPO on the pivot's own."""
    policy, reference = torch.tensor(values, dtype=torch.float64).view(2, 1, 3)
    for alpha, columns in ((1.0, [0, 1]), (0.0, [2, 1])):
        loss = preference_loss("wrpo", policy, reference, beta=beta, alpha=alpha)
        expected = preference_loss("dpo", policy[:, columns], reference[:, columns], beta=beta)
        torch.testing.assert_close(loss, expected)


def test_losses_of_pairs_do_not_mix():
    """All but AOT look at each pair on its own; AOT at the sorted margins of all."""
    policy, reference = -torch.rand(2, 6, 3, dtype=torch.float64)
    for objective in LOSSES:
        options, read = options_of(objective, given=False), read_by(objective, policy)

        def losses(which: Any, objective=objective, options=options, read=read) -> torch.Tensor:
            rows = {name: value[which] for name, value in read.items()}
            return preference_loss(
                objective, policy[which], reference[which], beta=1.0, **options, **rows
            )

        together = losses(slice(None))
        alone = [losses(slice(i, i + 1)) for i in range(6)]
        alike = torch.equal(together, torch.cat(alone))
        assert alike != LOSSES[objective].several_pairs, objective
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        assert torch.equal(losses(order), together[order]), "each loss belongs to its pair"


def test_bad_arguments_say_what_was_expected():
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="one of dpo, ipo, wrpo"):
        preference_loss("dppo", zeros, zeros, beta=1.0)
    with pytest.raises(ValueError, match="'alpha' has no effect for objective 'dpo'"):
        preference_loss("dpo", zeros, zeros, beta=1.0, alpha=0.5)
    with pytest.raises(ValueError, match="'robust' needs the option 'label_smoothing'"):
        preference_loss("robust", zeros, zeros, beta=1.0)
    with pytest.raises(ValueError, match=r"\[1, 2\], expected 3 responses"):
        preference_loss("wrpo", zeros, zeros, beta=1.0, alpha=0.5)
