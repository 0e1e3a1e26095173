"""Group regression: the policy gradient with a leave-one-out baseline, whose optimum is pi*."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_infifpo.losses import group_regression, preference_loss
from megatron_infifpo.losses.lists import deviation, regression_residuals

NAN = math.nan


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def some_lists(records: int = 6, responses: int = 5) -> dict[str, Any]:
    """Policy, reference, rewards `[B, n]`, and lists of 5, 4, 3, 2, 5, 4 responses."""
    policy, reference, rewards = random(3, records, responses, seed=4)
    lengths = torch.tensor([5, 4, 3, 2, 5, 4])[:records, None]
    return {
        "policy": policy.requires_grad_(), "reference": reference, "rewards": rewards,
        "valid": torch.arange(responses) < lengths,
    }  # fmt: skip


def test_gradient_is_the_policy_gradient_with_a_leave_one_out_baseline():
    """Of a softmax over 9 answers, from 6 of them drawn for each of 4 prompts."""
    logits, reference, rewards = random(4, 9).requires_grad_(), random(4, 9, seed=1), random(4, 9)
    drawn = torch.multinomial(logits.detach().softmax(1), 6, replacement=True)
    beta = 0.3

    def of(values: Tensor) -> Tensor:
        return values.gather(1, drawn)

    log_pi = of(logits.log_softmax(1))
    loss = group_regression(log_pi, of(reference), of(rewards), beta=beta)
    (found,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    # max J: sum_i (R_i - mean of the others' R) grad log pi(y_i) / n, R a constant.
    residuals = of(rewards) - beta * (log_pi.detach() - of(reference))
    others = (residuals.sum(1, keepdim=True) - residuals) / 5
    (ascent,) = torch.autograd.grad(((residuals - others) * log_pi).mean(1).sum(), logits)
    torch.testing.assert_close(found, -ascent, atol=1e-12, rtol=0)
    assert found.abs().max() > 0.01


def test_gradient_of_the_expectation_without_the_baseline():
    """All answers, weighed by their probability: the exact gradient of E[r] - beta KL."""
    logits, reference, rewards = random(9).requires_grad_(), random(9, seed=1), random(9, seed=2)
    beta, log_pi = 0.3, logits.log_softmax(0)
    objective = (log_pi.exp() * (rewards - beta * (log_pi - reference))).sum()
    (exact,) = torch.autograd.grad(objective, logits, retain_graph=True)
    # Any two answers at a time, as often as pi draws them: the mean of the losses' gradients.
    pairs = torch.tensor([*itertools.product(range(9), repeat=2)])
    loss = group_regression(log_pi[pairs], reference[pairs], rewards[pairs], beta=beta)
    (found,) = torch.autograd.grad((loss * log_pi.exp()[pairs].prod(1).detach()).sum(), logits)
    torch.testing.assert_close(found, -exact, atol=1e-12, rtol=0)


def test_two_responses_are_ipo():
    """Rewards 1/4 and -1/4: beta (d - 1 / (2 beta))^2 / 4."""
    policy, reference = random(2, 7, 2)
    rewards = torch.tensor([0.25, -0.25], dtype=torch.float64).expand(7, 2)
    for beta in (0.1, 2.5):
        found = group_regression(policy, reference, rewards, beta=beta)
        ipo = preference_loss("ipo", policy, reference, beta=beta)
        torch.testing.assert_close(found, beta * ipo / 4, atol=1e-12, rtol=0)


STRINGS = ["".join(s) for n in range(4) for s in itertools.product("ab", repeat=n)]
PREFIXES = [s for s in STRINGS if len(s) < 3]


def log_probs(table: Tensor) -> Tensor:
    """Of the 15 strings over {a, b} of up to 3 letters, from logits of a, b, end by prefix."""
    steps = table.log_softmax(1)
    return torch.stack([
        torch.stack([
            steps[PREFIXES.index(s[:i]), "ab$".index(c)]
            for i, c in enumerate(s + "$") if i < 3
        ]).sum() for s in STRINGS
    ])  # fmt: skip


def minimise(loss: Any, parameters: Tensor) -> None:
    descent = torch.optim.LBFGS(
        [parameters], max_iter=800, line_search_fn="strong_wolfe",
        tolerance_grad=1e-13, tolerance_change=1e-16,
    )  # fmt: skip

    def closure() -> float:
        descent.zero_grad()
        loss().backward()
        return loss().item()

    descent.step(closure)


@pytest.mark.parametrize("lists", ["all", "overlapping"])
def test_optimum_off_the_policy(lists):
    """Any responses, of nobody's distribution: M exp(r / beta) / Z, and R is beta log Z."""
    beta, gamma = 0.7, (0.3, 0.7)
    # The second source does not add up to 1, as one that knows canonical tokenizations only.
    sources = log_probs(random(7, 3, seed=1)), log_probs(random(7, 3, seed=2)) - 0.67
    fused = gamma[0] * sources[0] + gamma[1] * sources[1]
    rewards = torch.tensor([s.count("a") - 0.5 * s.count("b") for s in STRINGS]).double()
    table = random(7, 3, seed=3).requires_grad_()
    chosen = torch.arange(15)[None]
    if lists == "overlapping":  # 5 lists of 4, each with a response of the one before
        chosen = torch.tensor([[(3 * i + j) % 15 for j in range(4)] for i in range(5)])

    def loss() -> Tensor:
        policy = log_probs(table)[chosen]
        return group_regression(policy, fused[chosen], rewards[chosen], beta=beta).sum()

    minimise(loss, table)
    log_z = (fused + rewards / beta).logsumexp(0)
    with torch.no_grad():
        found = log_probs(table)
    torch.testing.assert_close(found, fused + rewards / beta - log_z, atol=1e-6, rtol=0)
    residuals = regression_residuals(found[None], fused[None], rewards[None], beta=beta)
    torch.testing.assert_close(residuals[0], (beta * log_z).expand(15), atol=1e-6, rtol=0)


def test_loss_is_the_variance_of_the_residuals():
    lists = some_lists()
    arguments = (lists["policy"], lists["reference"], lists["rewards"])
    options: Any = {"beta": 0.3, "valid": lists["valid"], "reward_scale": 2.0}
    spread = deviation(regression_residuals(*arguments, **options), lists["valid"])
    torch.testing.assert_close(group_regression(*arguments, **options), spread**2 / 0.6)
    residuals = 2 * lists["rewards"] - 0.3 * (lists["policy"] - lists["reference"])
    for b in range(6):
        expected = residuals[b][lists["valid"][b]].std()
        torch.testing.assert_close(spread[b], expected)


@pytest.mark.parametrize("normalization", ["none", "group"])
def test_absent_responses_might_as_well_not_be_there(normalization):
    lists = some_lists()
    policy, valid = lists["policy"], lists["valid"]
    options: Any = {"beta": 0.3, "reward_normalization": normalization}
    for filler in (NAN, math.inf, -1e30):
        dirty = [torch.where(valid, lists[k], filler) for k in ("policy", "reference", "rewards")]
        found = group_regression(*dirty, valid=valid, **options)
        (grad,) = torch.autograd.grad(found.sum(), policy)
        assert (grad[~valid] == 0).all()
        for b in range(6):
            there = valid[b]
            one = policy[b : b + 1, there].detach().requires_grad_()
            alone = group_regression(
                one, lists["reference"][b : b + 1, there], lists["rewards"][b : b + 1, there],
                **options,
            )  # fmt: skip
            torch.testing.assert_close(found[b : b + 1], alone, atol=1e-14, rtol=0)
            (expected,) = torch.autograd.grad(alone.sum(), one)
            torch.testing.assert_close(grad[b : b + 1, there], expected, atol=1e-14, rtol=0)


def test_fewer_than_two_responses_are_no_comparison():
    lists = some_lists(3)
    valid = torch.tensor([[False] * 5, [False, True, False, False, False], [True] * 5])
    arguments = (lists["policy"], lists["reference"], lists["rewards"])
    for normalization in ("none", "group"):
        found = group_regression(
            *arguments, beta=1.0, valid=valid, reward_normalization=normalization
        )
        (grad,) = torch.autograd.grad(found.sum(), lists["policy"])
        assert found[:2].tolist() == [0, 0] and found[2] > 0
        assert (grad[:2] == 0).all() and (grad[2] != 0).all()


def test_what_changes_nothing():
    """A constant on a prompt's rewards or reference, and the order of its responses."""
    lists = some_lists()
    arguments = [lists[name] for name in ("policy", "reference", "rewards", "valid")]

    def loss(policy: Tensor, reference: Tensor, rewards: Tensor, valid: Tensor) -> Tensor:
        return group_regression(policy, reference, rewards, beta=0.3, valid=valid)

    expected, shift = loss(*arguments), random(6, 1, seed=9)
    policy, reference, rewards, valid = arguments
    torch.testing.assert_close(loss(policy, reference + shift, rewards, valid), expected)
    torch.testing.assert_close(loss(policy, reference, rewards + shift, valid), expected)
    order = torch.randperm(5)
    torch.testing.assert_close(loss(*(x[:, order] for x in arguments)), expected)


def test_derivatives():
    lists = some_lists()
    assert torch.autograd.gradcheck(
        lambda policy: group_regression(
            policy, lists["reference"], lists["rewards"], beta=0.3, valid=lists["valid"],
            reward_normalization="group", reward_scale=3.0,
        ),
        lists["policy"],
    )  # fmt: skip


def test_scale_and_normalization_of_rewards():
    """At the reference R is the reward: its variance over 2 beta."""
    zeros = torch.zeros(1, 4, dtype=torch.float64)
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=torch.float64)  # variance 14 / 3

    def loss(**options: Any) -> float:
        return group_regression(zeros, zeros, rewards, beta=0.5, **options).item()

    assert loss() == pytest.approx(14 / 3)
    assert loss(reward_scale=0.5) == pytest.approx(14 / 12)
    assert loss(reward_normalization="group") == pytest.approx(1.0), "of z-scores it is 1"
    assert loss(reward_normalization="group", reward_scale=3.0) == pytest.approx(9.0)
    # The z-scores themselves: a policy that has them over beta leaves nothing.
    scores = (rewards - 3) / math.sqrt(14 / 3)
    left = group_regression(scores / 0.5, zeros, rewards, beta=0.5, reward_normalization="group")
    assert left.item() == pytest.approx(0, abs=1e-15)


def test_equal_rewards_have_no_z_scores():
    """Seven times 0.7 is not seven times its mean in float32: noise must not become a reward."""
    zeros = torch.zeros(1, 7)
    rewards = torch.full((1, 7), 0.7)
    assert (rewards - rewards.sum() / 7).abs().max() > 0, "the trap"
    found = group_regression(zeros, zeros, rewards, beta=0.1, reward_normalization="group")
    assert found.tolist() == [0]


def test_bad_arguments_say_what_was_expected():
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"rewards is \[2, 2\] beside .* \[2, 3\], expected"):
        group_regression(zeros, zeros, zeros[:, :2], beta=1.0)
    with pytest.raises(ValueError, match=r"reference_logps is \[3\]"):
        group_regression(zeros, zeros[0], zeros, beta=1.0)
    with pytest.raises(ValueError, match="reward_normalization is 'batch', expected none, group"):
        group_regression(zeros, zeros, zeros, beta=1.0, reward_normalization="batch")
    with pytest.raises(ValueError, match="'group_regression' needs the option 'rewards'"):
        preference_loss("group_regression", zeros, zeros, beta=1.0)
    with pytest.raises(ValueError, match=r"reward_scale is 0.0, expected a number in \(0, inf\)"):
        preference_loss("group_regression", zeros, zeros, beta=1.0, rewards=zeros, reward_scale=0.0)
    with pytest.raises(ValueError, match=r"\[2, 1\], expected 2 responses"):
        preference_loss("group_regression", zeros[:, :1], zeros[:, :1], beta=1.0, rewards=zeros)


@pytest.mark.parametrize("normalization", ["none", "group"])
def test_rewards_far_from_0_are_told_apart(normalization):
    """A constant changes nothing, also one beside which float32 would round the rest away."""
    torch.manual_seed(2)
    policy, reference = (-10 * torch.rand(3, 4) for _ in range(2))
    rewards = torch.rand(3, 4, dtype=torch.float64).mul(100).round() / 100
    options = {"beta": 0.1, "reward_normalization": normalization}

    def found(offset: float) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = policy.clone().requires_grad_()
        losses = group_regression(leaf, reference, rewards + offset, **options)
        assert losses.dtype == torch.float32
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    for offset in (1e6, -1e8):
        torch.testing.assert_close(found(offset), found(0.0), rtol=1e-4, atol=1e-6)
