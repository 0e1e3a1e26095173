"""Divergences between rankings: against enumeration, and against numbers worked out by hand."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_infifpo.losses import plackett_luce, preference_loss
from megatron_infifpo.losses.lists import MOST_RANKED

NAN = math.nan


def scores_of(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def log_ranking(scores: list[float], ranking: tuple[int, ...]) -> float:
    """Log of the product of softmaxes over what is left."""
    left = [scores[i] for i in ranking]
    return sum(
        left[k] - math.log(sum(math.exp(x) for x in left[k:])) for k in range(len(left))
    )  # fmt: skip


def enumerated(student: list[float], teacher: list[float], divergence: str) -> float:
    """The divergence in plain floats, ranking by ranking."""
    rankings = [*itertools.permutations(range(len(student)))]
    q, p = ([log_ranking(scores, r) for r in rankings] for scores in (student, teacher))
    if divergence == "kl":
        return sum(math.exp(b) * (b - a) for a, b in zip(q, p, strict=True))
    total = 0.0
    for a, b in zip(q, p, strict=True):
        middle = math.log((math.exp(a) + math.exp(b)) / 2)
        total += (math.exp(a) * (a - middle) + math.exp(b) * (b - middle)) / 2
    return total


@pytest.mark.parametrize(
    ("divergence", "responses"),
    [("kl", n) for n in range(2, 7)] + [("jsd", n) for n in range(2, 6)],
)
def test_equals_enumeration(divergence, responses):
    student, teacher = random(2, 4, responses, seed=responses)
    found = plackett_luce(student, teacher, divergence=divergence)
    assert found.max() > 0.01
    for value, s, t in zip(found.tolist(), student.tolist(), teacher.tolist(), strict=True):
        assert value == pytest.approx(enumerated(s, t, divergence), abs=1e-13)


# Scores of 10 times mean log-probs.
TWO = scores_of(-5.0, -6.0), scores_of(-4.0, -9.0)
THREE = scores_of(-5.0, -6.0, -5.5), scores_of(-4.0, -9.0, -4.5)


@pytest.mark.parametrize(
    ("pair", "divergence", "expected"),
    [
        (TWO, "kl", 0.2797749),
        # Half the sum of both KLs from the mixture. KL(M || P), as in PAD's program, is 0.1724571.
        (TWO, "jsd", 0.0897897),
        (THREE, "kl", 0.5502580),
        (THREE, "jsd", 0.1672960),
    ],
)
def test_numbers(pair, divergence, expected):
    assert plackett_luce(*pair, divergence=divergence).item() == pytest.approx(expected, abs=6e-8)


def test_of_two_responses_it_is_dpo_with_soft_labels():
    """The label is the teacher's sigmoid; the labels' entropy is a constant."""
    policy, teacher = random(2, 8, 2)
    policy.requires_grad_()
    beta = 0.4
    label = (beta * (teacher[:, 0] - teacher[:, 1])).sigmoid()
    # DPO's loss against a reference of 0, smoothed by each pair's own share of wrong labels.
    right, wrong = (
        preference_loss("dpo", x, torch.zeros_like(x), beta=beta) for x in (policy, policy.flip(1))
    )
    entropy = -(label * label.log() + (1 - label) * (1 - label).log())
    soft = label * right + (1 - label) * wrong
    found = preference_loss("plackett_luce", policy, teacher, beta=beta)
    torch.testing.assert_close(found, soft - entropy, atol=1e-14, rtol=0)
    grads = [torch.autograd.grad(x.sum(), policy, retain_graph=True)[0] for x in (found, soft)]
    torch.testing.assert_close(*grads, atol=1e-14, rtol=0)


@pytest.mark.parametrize("divergence", MOST_RANKED)
def test_a_student_that_is_its_teacher_is_left_alone(divergence):
    for kind, tolerance in ((torch.float64, 1e-14), (torch.float32, 3e-6)):
        teacher = random(3, 5).to(kind)
        student = teacher.clone().requires_grad_()
        loss = plackett_luce(student, teacher, divergence=divergence)
        (grad,) = torch.autograd.grad(loss.sum(), student)
        assert loss.abs().max() <= tolerance and grad.abs().max() <= tolerance


@pytest.mark.parametrize("divergence", MOST_RANKED)
def test_what_changes_nothing(divergence):
    """A constant on all scores of a side, and the order of the responses."""
    student, teacher = random(2, 3, 4)
    expected = plackett_luce(student, teacher, divergence=divergence)
    shift = torch.tensor([[-700.0], [3.0], [700.0]])
    for pair in ((student + shift, teacher), (student, teacher + shift)):
        torch.testing.assert_close(plackett_luce(*pair, divergence=divergence), expected)
    order = torch.tensor([2, 0, 3, 1])
    permuted = plackett_luce(student[:, order], teacher[:, order], divergence=divergence)
    torch.testing.assert_close(permuted, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("divergence", MOST_RANKED)
def test_absent_responses_might_as_well_not_be_there(divergence, kind):
    student, teacher = random(2, 4, 5).to(kind)
    student.requires_grad_()
    valid = torch.tensor([
        [True, True, True, False, False], [False, True, False, True, True],
        [True, False, True, False, False], [True] * 5,
    ])  # fmt: skip
    tolerance: Any = {"atol": 1e-14 if kind == torch.float64 else 2e-6, "rtol": 0}
    for filler in (NAN, math.inf, -1e30):
        dirty = (torch.where(valid, x, filler) for x in (student, teacher))
        found = plackett_luce(*dirty, divergence=divergence, valid=valid)
        (grad,) = torch.autograd.grad(found.sum(), student)
        assert (grad[~valid] == 0).all()
        for b, there in enumerate(valid):
            one = student[b : b + 1, there].detach().requires_grad_()
            alone = plackett_luce(one, teacher[b : b + 1, there], divergence=divergence)
            (expected,) = torch.autograd.grad(alone.sum(), one)
            torch.testing.assert_close(found[b : b + 1], alone, **tolerance)
            torch.testing.assert_close(grad[b : b + 1, there], expected, **tolerance)


@pytest.mark.parametrize("divergence", MOST_RANKED)
def test_fewer_than_two_responses_are_no_ranking(divergence):
    student, teacher = random(2, 2, 3)
    student.requires_grad_()
    valid = torch.tensor([[False, True, False], [False] * 3])
    loss = plackett_luce(student, teacher, divergence=divergence, valid=valid)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("divergence", MOST_RANKED)
def test_derivatives(divergence):
    student, teacher = random(2, 3, 4)
    valid = torch.tensor([[True] * 4, [True, True, False, True], [False, True, True, False]])
    assert torch.autograd.gradcheck(
        lambda x: plackett_luce(x, teacher, divergence=divergence, valid=valid),
        student.requires_grad_(),
    )


def test_the_teacher_is_a_constant():
    student, teacher = random(2, 3, 4)
    teacher.requires_grad_()
    assert not plackett_luce(student, teacher).requires_grad
    loss = plackett_luce(student.requires_grad_(), teacher)
    assert torch.autograd.grad(loss.sum(), teacher, allow_unused=True) == (None,)


def test_ten_responses_take_a_thousand_sets_and_no_ranking():
    """No tensor, kept for the gradient or not, has more than one number a set and record."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            found = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (found,) if isinstance(x, Tensor))
            return found

    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    records = 3
    student, teacher = random(2, records, 10)
    student.requires_grad_()
    with Watch(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = plackett_luce(student, teacher).sum()
        loss.backward()
    assert max(sizes) == records * 2**10
    assert sum(kept) < 8 * records * 2**10
    # Of ten responses, too: seven at the end that neither side would ever rank higher.
    few, most = scores_of(-5, -6, -5.5), scores_of(-4, -9, -4.5)
    tail = -1000.0 * torch.arange(1, 8).double()[None]
    longer = plackett_luce(torch.cat([few, tail], 1), torch.cat([most, tail], 1))
    torch.testing.assert_close(longer, plackett_luce(few, most), atol=1e-11, rtol=0)


def test_bad_arguments_say_what_was_expected():
    zeros = torch.zeros(1, 11)
    with pytest.raises(ValueError, match=r"\[1, 11\]: 11 responses, expected at most 10 .* 'kl'"):
        plackett_luce(zeros, zeros)
    with pytest.raises(ValueError, match=r"6 responses, expected at most 5 .* 'jsd'"):
        plackett_luce(zeros[:, :6], zeros[:, :6], divergence="jsd")
    with pytest.raises(ValueError, match="divergence is 'js', expected kl, jsd"):
        plackett_luce(zeros, zeros, divergence="js")
    with pytest.raises(ValueError, match=r"teacher_scores is \[1, 3\] beside .* \[1, 4\]"):
        plackett_luce(zeros[:, :4], zeros[:, :3])
    with pytest.raises(ValueError, match="'rewards' has no effect for objective 'plackett_luce'"):
        preference_loss("plackett_luce", zeros, zeros, beta=1.0, rewards=zeros)
    with pytest.raises(ValueError, match="divergence is 'js', expected one of kl, jsd"):
        preference_loss("plackett_luce", zeros, zeros, beta=1.0, divergence="js")
