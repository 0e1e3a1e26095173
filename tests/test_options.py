"""A loss or a fusion with options of its own touches one file: all else follows from its entry."""

import argparse
import math
from typing import Annotated, Any

import pytest
import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.losses import LOSSES, Loss, preference_loss
from megatron_infifpo.methods import Method, add_method_flags, method_from_options, resolve
from megatron_infifpo.options import Option
from megatron_infifpo.records.records import RESPONSES
from megatron_infifpo.reference import FUSIONS, Fusion, fuse_reference
from megatron_infifpo.training.metrics import preference_metrics
from megatron_infifpo.training.objective import pair_losses


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_method_flags(parser)
    return parser


def parse(*argv: str) -> Method:
    args = command_line().parse_args(argv)
    return method_from_options(args.method, vars(args))


Gap = Annotated[float, Option("reward that a pair is pushed to", range="(0, 10]")]


def square_hinge(policy, reference, *, beta, gap: Gap = 1.0):
    d = (policy - reference)[:, 0] - (policy - reference)[:, 1]
    return torch.relu(gap - beta * d) ** 2


def chosen_alone(policy, reference, *, beta, gap: Gap):
    return -torch.nn.functional.logsigmoid(beta * (policy - reference)[:, 0] - gap)


def by_length(
    policy,
    reference,
    *,
    beta,
    token_counts: torch.Tensor,
    push: Annotated[
        float, Option("push of long ones", range="[0, inf)", default=2.0, grows=True)
    ],
    kind: Annotated[str, Option("what is compared", choices=("all", "best"))] = "all",
):  # fmt: skip
    assert kind == "best"
    return ((policy - reference) * beta * token_counts * push).sum(dim=1)


@pytest.fixture
def more_losses(monkeypatch):
    """What someone adds who edits one file of losses/ alone."""
    monkeypatch.setitem(LOSSES, "square_hinge", Loss(square_hinge, beta=0.2))
    monkeypatch.setitem(LOSSES, "chosen_alone", Loss(chosen_alone, responses=1))
    monkeypatch.setitem(LOSSES, "by_length", Loss(by_length, responses=3, several_pairs=True))
    monkeypatch.setitem(LOSSES, "three", Loss(lambda p, r, *, beta: p.sum(dim=1), responses=3))


def row_of(responses: int, **more) -> dict:
    """Two pairs of one-token responses; everybody's log-probs are -1, but the policy's."""
    ones = torch.ones(2, responses)
    return {
        "token_counts": ones, "initial_sum_logps": -ones, "source_sum_logps": -ones[..., None],
        "source_token_counts": ones[..., None], "source_mask": torch.ones(2, 1, dtype=torch.bool),
        "domain_codes": torch.zeros(2), **more,
    }  # fmt: skip


def losses_of(method: Method, row: dict, progress: float = 1.0) -> list[float]:
    """Losses of a policy of -3, -2, ... a response; its metrics have names."""
    policy = torch.arange(-3.0, -3.0 + row["token_counts"].shape[1]).expand_as(row["token_counts"])
    losses, logps, reference = pair_losses(method, row, policy, progress=progress)
    metrics = preference_metrics(method, row, logps, reference, losses, ("a",), ())
    names = ("chosen", "rejected", "pivot_chosen")[: policy.shape[1]]
    assert [name for name in metrics if name in {f"rewards/{n}" for n in RESPONSES}] == [
        f"rewards/{name}" for name in names
    ]
    assert ("rewards/accuracy" in metrics) == (len(names) > 1)
    return losses.tolist()


def test_new_option_of_a_loss(more_losses):
    """One entry of `LOSSES` gives a flag, its help, its checks, and the value in the loss."""
    text = " ".join(command_line().format_help().split())
    assert (
        "--gap GAP reward that a pair is pushed to (square_hinge: in (0, 10], default 1; "
        "chosen_alone: in (0, 10], needed)" in text
    )
    assert "plackett_luce 0.4 and 10, square_hinge 0.2 and 5" in text
    new = ("--objective", "square_hinge")
    assert parse(*new).beta == 5
    # beta d = 5 (-2 + 1) = -5.
    assert losses_of(parse(*new), row_of(2)) == [36, 36]
    assert losses_of(parse(*new, "--gap", "2"), row_of(2)) == [49, 49]
    with pytest.raises(UserError, match=r"--gap is 0.0, expected a number in \(0, 10\]"):
        parse(*new, "--gap", "0")
    with pytest.raises(UserError, match="--gap has no effect with the objective dpo: it belongs"):
        parse("--gap", "2")
    with pytest.raises(UserError, match="--gap has no effect with --method sft"):
        parse("--method", "sft", "--gap", "2")
    with pytest.raises(UserError, match="--objective chosen_alone needs --gap$"):
        parse("--objective", "chosen_alone")
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="'gap' has no effect for objective 'dpo'"):
        preference_loss("dpo", zeros, zeros, beta=1.0, gap=2.0)
    assert preference_loss("square_hinge", zeros, zeros, beta=1.0, gap=2.0).tolist() == [4]


def test_losses_of_one_and_of_three_responses(more_losses):
    method = resolve("infifpo", objective="chosen_alone", gap=1.0)
    assert method.responses == 1
    assert losses_of(method, row_of(1)) == pytest.approx([math.log(1 + math.exp(6))] * 2)
    three = resolve("infifpo", objective="three")
    assert three.responses == 3
    assert losses_of(three, row_of(3)) == [-6, -6]
    with pytest.raises(ValueError, match=r"\[1, 2\], expected 3 responses"):
        preference_loss("three", torch.zeros(1, 2), torch.zeros(1, 2), beta=1.0)


def test_loss_that_reads_the_row(more_losses):
    """A value of the row, an option that grows, one of choices."""
    method = resolve("dpo", objective="by_length", kind="best")
    assert method.responses == 3 and method.several_pairs and method.growing == ("push",)
    row = row_of(3) | {"token_counts": torch.tensor([[1.0, 0.0, -1.0]] * 2)}
    # 0.1 (-2 - 0) push
    assert losses_of(method, row) == pytest.approx([-0.4] * 2)
    assert losses_of(method, row, progress=0.25) == pytest.approx([-0.1] * 2)
    with pytest.raises(ValueError, match="'by_length' needs the option 'token_counts'"):
        preference_loss("by_length", torch.zeros(1, 3), torch.zeros(1, 3), beta=1.0, push=1.0)
    with pytest.raises(UserError, match="--kind is 'worst', expected one of all, best"):
        resolve("dpo", objective="by_length", kind="worst")


def best_of_list(policy, reference, rewards: torch.Tensor, valid: torch.Tensor, *, beta):
    logits = torch.where(valid, beta * (policy - reference), -math.inf)
    best = torch.where(valid, rewards, -math.inf).argmax(dim=1)
    return -logits.log_softmax(dim=1).gather(1, best[:, None])[:, 0]


def test_new_loss_of_a_list(monkeypatch):
    """It reads the row at its parameters, before the star as behind it, and can be clipped for."""
    monkeypatch.setitem(LOSSES, "best_of_list", Loss(best_of_list, responses=None))
    method = parse("--objective", "best_of_list", "--beta", "1", "--margin-anchor", "initial")
    assert method.responses is None and method.clip and method.most_responses is None
    assert dict(method.reads) == {"rewards": True, "valid": True}
    valid = torch.tensor([[True, True, False], [True] * 3])
    row = row_of(3, valid=valid, ended=valid, rewards=torch.tensor([[0.1, 0.2, 9], [3.0, 2, 1]]))
    row["source_sum_logps"] = row["source_sum_logps"] - 1  # -2: it may lower the worse ones only
    policy = torch.tensor([[-1.0, -1.0, 0.0]] * 2)
    losses, logps, reference = pair_losses(method, row, policy)
    assert reference.logps.tolist() == [[-2, -1, 0], [-1, -2, -2]]
    # Log-ratios 1, 0 and 0, 1, 2.
    expected = [math.log(1 + math.e), math.log(1 + math.e + math.e**2)]
    assert losses.tolist() == pytest.approx(expected)
    metrics = preference_metrics(method, row, logps, reference, losses, ("a",), ())
    assert "reward" in metrics and "residual/std" not in metrics
    with pytest.raises(ValueError, match="'best_of_list' needs the option 'rewards'"):
        preference_loss("best_of_list", policy, policy, beta=1.0, valid=valid)


def test_new_option_of_a_fusion(monkeypatch):
    """One entry of `FUSIONS` gives the same."""

    def sharpened(
        clipped, mask, current, initial, *,
        power: Annotated[float, Option("power", range="[1, 9]")] = 1.0,
    ):  # fmt: skip
        return (clipped.exp() * mask) ** power

    monkeypatch.setitem(FUSIONS, "sharpened", Fusion(sharpened))
    values = torch.tensor([[[0.5, 0.25]]]).log()
    own = torch.zeros(1, 1)
    for power, share in ((1.0, 2 / 3), (2.0, 0.8)):
        fused = fuse_reference(
            values, own, own, torch.tensor([True]), fusion="sharpened", clip=False, power=power
        )
        assert fused.weights[0, 0, 0].item() == pytest.approx(share)
    assert parse("--fusion", "sharpened", "--power", "2").fusion_options == {"power": 2.0}
    with pytest.raises(UserError, match="--power has no effect with --fusion max-margin"):
        parse("--power", "2")
    with pytest.raises(UserError, match=r"--power is 0.5, expected a number in \[1, 9\]"):
        parse("--fusion", "sharpened", "--power", "0.5")
    with pytest.raises(ValueError, match="'speed' is no option of a fusion"):
        fuse_reference(values, own, own, torch.tensor([True]), speed=1)


def test_every_declared_range_can_be_read():
    declared: list[Any] = [*LOSSES.values(), *FUSIONS.values()]
    for takes in declared:
        for name, option in takes.options.items():
            assert option.default is None or option.expected(option.default) is None, name
            assert option.expected(math.nan) is not None, name


def test_required_options_of_a_fusion(monkeypatch):
    def needy(
        clipped, mask, current, initial, *, power: Annotated[float, Option("p", range="[1, 9]")]
    ):
        return mask.to(clipped.dtype)

    def preset(
        clipped, mask, current, initial, *,
        power: Annotated[float, Option("power", range="[1, 9]", default=2.0)],
    ):  # fmt: skip
        return mask.to(clipped.dtype)

    monkeypatch.setitem(FUSIONS, "needy", Fusion(needy))
    monkeypatch.setitem(FUSIONS, "preset", Fusion(preset))
    with pytest.raises(UserError, match="--fusion needy needs --power"):
        resolve("infifpo", fusion="needy")
    assert resolve("infifpo", fusion="needy", power=3.0).fusion_options == {"power": 3.0}
    assert resolve("infifpo", fusion="preset").options == {"power": 2.0}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("clip", "no", "True or False"),
        ("clip", 1, "True or False"),
        ("beta", "2", r"a number in \(0, inf\)"),
        ("beta", True, r"a number in \(0, inf\)"),
        ("label_smoothing", None, r"a number in \[0, 0.5\)"),
        ("objective", ["dpo"], "one of dpo"),
        ("selection", 1, "one of response, pair"),
    ],
)
def test_values_of_another_type(option, value, expected):
    spelled = option.replace("_", "-")
    with pytest.raises(UserError, match=f"--{spelled} is .*, expected {expected}"):
        resolve("infifpo", **{option: value})


@pytest.mark.parametrize(
    ("objective", "change", "said"),
    [
        ("dpo", {"beta": -1.0}, "beta is -1.0, expected a number in"),
        ("dpo", {"beta": math.nan}, "beta is nan"),
        ("dpo", {"label_smoothing": 0.9}, r"label_smoothing is 0.9, expected a number in \[0, 0.5"),
        ("exo_pair", {"label_smoothing": 0.0}, r"label_smoothing is 0.0, expected .* \(0, 0.5\)"),
        ("wrpo", {"alpha": 2}, r"alpha is 2, expected a number in \[0, 1\]"),
    ],
)
def test_losses_refuse_values_out_of_range(objective, change, said):
    zeros = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=said):
        preference_loss(objective, zeros, zeros, **{"beta": 1.0, **change})
