"""Distances of distributions over tokens, against closed forms worked out by hand."""

import math

import pytest
import torch

from megatron_infifpo.distillation import (
    bucket_logps,
    chunk_binary_kl,
    ghost_kl,
    renormalised_kl,
    topk_l1,
    topk_standardised_l1,
)

LOGITS = [1, 0.5, 0, -0.5, -1]
TEACHER = [0.6, 0.25, 0.1, 0.04, 0.01]


def logits() -> torch.Tensor:
    return torch.tensor([LOGITS], dtype=torch.float64, requires_grad=True)


def teacher(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    probs = torch.tensor([TEACHER], dtype=torch.float64)
    return probs[:, :k], probs[:, k:].sum(dim=1)


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), of, retain_graph=True)[0]


# Values, and gradients with respect to LOGITS, from the formulas in 40 digits; of two kept ids but
# for the first. The ghost's gradient is the whole KL's at these ids, and its tail is shared as q.
DISTANCES = {
    "whole": (
        0.093967437131569814,
        [-0.17134447122283307, 0.009992720658682782, 0.057693556381593284, 0.055645976784559129,
         0.04801221739799787],
    ),
    "ghost": (
        0.082424232956440944,
        [-0.17134447122283307, 0.009992720658682782, 0.081721497723245181, 0.04956659392678437,
         0.030063658914120733],
    ),
    "dropped": (
        0.19196743441181077,
        [-0.23564280053940811, -0.029006187440119635, 0.13403952292435429, 0.08129908026687526,
         0.049310384788298189],
    ),
    "renormalised": (
        0.38836296998225817,
        [-0.27722682416400954, -0.034124926400140747, 0.15769355638159328, 0.095645976784559129,
         0.05801221739799787],
    ),
    "both renormalised": (
        0.015338308337214459,
        [-0.083423021739321906, 0.083423021739321906, 0, 0, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", DISTANCES)
def test_numbers(form):
    """The tail dropped is a ghost of no mass; both renormalised, a student of two ids."""
    z = logits()
    logps, (probs, tail) = z.log_softmax(-1), teacher(2)
    loss = {
        "whole": lambda: ghost_kl(logps, *teacher(5)),
        "ghost": lambda: ghost_kl(logps[:, :2], probs, tail),
        "dropped": lambda: ghost_kl(logps[:, :2], probs, torch.zeros_like(tail)),
        "renormalised": lambda: renormalised_kl(logps[:, :2], probs),
        "both renormalised": lambda: renormalised_kl(z[:, :2].log_softmax(-1), probs),
    }[form]()
    value, expected = DISTANCES[form]
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert gradient(loss, z)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_ghost_grows_to_the_whole_kl():
    logps = torch.tensor([LOGITS], dtype=torch.float64).log_softmax(-1)
    found = [ghost_kl(logps[:, :k], *teacher(k)).item() for k in range(6)]
    assert found == sorted(found) and found[0] == 0
    entropy = -sum(p * math.log(p) for p in TEACHER)
    assert entropy == pytest.approx(1.0581342086935806, abs=1e-12)
    cross = -(torch.tensor(TEACHER, dtype=torch.float64) * logps[0]).sum().item()
    assert cross == pytest.approx(1.1521016458251504, abs=1e-12)
    assert found[5] == pytest.approx(cross - entropy, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", range(1, 8))
def test_a_student_that_agrees_is_left_alone(k, dtype):
    generator = torch.Generator().manual_seed(k)
    z = (3 * torch.randn(5, 7, generator=generator, dtype=dtype)).requires_grad_()
    probs = z.detach().softmax(-1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    tail = probs[:, k:].sum(dim=1)
    loss = ghost_kl(z.log_softmax(-1)[:, :k], probs[:, :k], tail)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=tolerance, rtol=0)
    grad = gradient(loss, z)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=tolerance, rtol=0)
    if k < 7:
        scaled = gradient(renormalised_kl(z.log_softmax(-1)[:, :k], probs[:, :k]), z)
        kept = probs[:, :k]
        bias = torch.cat([kept - kept / kept.sum(1, keepdim=True), probs[:, k:]], dim=1)
        torch.testing.assert_close(scaled, bias, atol=tolerance, rtol=0)


def test_padding_and_rows_without_ids():
    logps = torch.tensor([[-0.5, -2.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    logps.requires_grad_()
    probs = torch.tensor([[0.5, 0.2, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    tail = torch.tensor([0.3, 1.0], dtype=torch.float64)
    loss = ghost_kl(logps, probs, tail)
    short = ghost_kl(logps[:1, :2], probs[:1, :2], tail[:1])
    assert loss[0].item() == short.item() and loss[1].item() == 0
    assert (gradient(loss, logps)[1] == 0).all() and gradient(loss, logps)[0, 2] == 0
    scaled = renormalised_kl(logps, probs)
    assert scaled[1].item() == 0 and (gradient(scaled, logps)[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_finite(dtype):
    logps = torch.tensor([[0.0, -1e4], [-1e4, -1e-8], [-1e4, -1e4]], dtype=dtype).requires_grad_()
    probs = torch.tensor([[0.0, 0.5], [0.9, 0.1], [1.0, 0.0]], dtype=dtype)
    tail = torch.tensor([0.5, 0.0, 0.0], dtype=dtype)
    for loss in (ghost_kl(logps, probs, tail), renormalised_kl(logps, probs)):
        assert loss.isfinite().all() and gradient(loss, logps).isfinite().all()


def test_standardised_top_k():
    student = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    given = torch.tensor([TEACHER[:3]], dtype=torch.float64).log()
    biased = topk_standardised_l1(student, given, unbiased=False)
    assert biased.item() == pytest.approx(0.0094561062997356655, abs=1e-12)
    unbiased = topk_standardised_l1(student, given)
    assert unbiased.item() == pytest.approx(0.0084951276819385158, abs=1e-12)
    assert topk_l1(student, given).item() == pytest.approx(0.25019711262553405, abs=1e-12)
    # Over the whole vocabulary and without a scale it is ULD.
    whole = topk_l1(
        torch.tensor([LOGITS], dtype=torch.float64),
        torch.tensor([TEACHER], dtype=torch.float64).log(),
    )
    assert whole.item() == pytest.approx(0.34268894244566613, abs=1e-12)


def test_standardised_top_k_sees_neither_scale_nor_ids():
    student = torch.tensor([[2.0, 0.3, -1.0, -1.5]], dtype=torch.float64)
    given = torch.tensor([[0.0, -0.1, -3.0, -8.0]], dtype=torch.float64)
    loss = topk_standardised_l1(student, given, temperature=0.7)
    for a, b in ((3.0, 5.0), (0.01, -40.0)):
        moved = topk_standardised_l1(a * student + b, given, temperature=0.7)
        assert moved.item() == pytest.approx(loss.item(), abs=1e-12)
    for k in (1, 2):
        short = student[:, :k].clone().requires_grad_()
        none = topk_standardised_l1(short, given[:, :k])
        assert none.item() == pytest.approx(0, abs=1e-12)
        assert gradient(none, short).abs().max().item() <= 1e-12
    flat = torch.full((1, 4), -2.0, dtype=torch.float64, requires_grad=True)
    assert gradient(topk_standardised_l1(flat, given), flat).isfinite().all()


def test_likelihoods_of_chunks():
    given, student = torch.tensor([[0.54], [0.30]], dtype=torch.float64).log()
    alone = chunk_binary_kl(student, given, tau=1)
    assert alone.item() == pytest.approx(0.12427203008942283, abs=1e-12)
    evened = chunk_binary_kl(student, given)
    assert evened.item() == pytest.approx(0.17450580863699924, abs=1e-12)
    limit = math.log(0.54 / 0.30) - math.log(0.54) * math.log(math.log(0.54) / math.log(0.30))
    assert limit == pytest.approx(0.17504488811420979, abs=1e-12)
    assert chunk_binary_kl(student, given, tau=1e5).item() == pytest.approx(limit, abs=1e-5)


def test_likelihoods_of_chunks_at_the_ends():
    generator = torch.Generator().manual_seed(2)
    student = -9 * torch.rand(50, generator=generator, dtype=torch.float64)
    given = -9 * torch.rand(50, generator=generator, dtype=torch.float64)
    assert (chunk_binary_kl(student, given) >= 0).all()
    same = student.clone().requires_grad_()
    loss = chunk_binary_kl(same, student)
    assert loss.abs().max().item() <= 1e-12
    assert gradient(loss, same).abs().max().item() <= 1e-12
    ends = torch.tensor([0.0, -1e-9, -1e5, -3.0]).requires_grad_()
    loss = chunk_binary_kl(ends, torch.tensor([-3.0, -1e5, 0.0, 0.0]))
    assert loss.isfinite().all() and gradient(loss, ends).isfinite().all()


def test_buckets_sum_probabilities():
    generator = torch.Generator().manual_seed(3)
    logps = (9 * torch.randn(4, 6, generator=generator, dtype=torch.float64)).log_softmax(-1)
    logps.requires_grad_()
    buckets = torch.tensor([[0, 0, 1, 2, 2, 2], [2, -1, 1, 1, 0, -1], [1] * 6, [-1] * 6])
    found = bucket_logps(logps, buckets, 3)
    for row, places in enumerate(buckets.tolist()):
        for bucket in range(3):
            inside = [i for i, place in enumerate(places) if place == bucket]
            value = found[row, bucket]
            if not inside:
                assert value.item() == 0
                continue
            expected = logps[row, inside].logsumexp(0)
            assert value.item() == pytest.approx(expected.item(), abs=1e-12)
            first, second = (gradient(x, logps) for x in (value, expected))
            torch.testing.assert_close(first, second, atol=1e-12, rtol=0)
    far = bucket_logps(torch.tensor([[-0.1, -500.0]]), torch.tensor([[0, 1]]), 2)
    assert far[0, 1].item() == pytest.approx(-500), "a small one does not drown beside a large one"


def lesson(q, ids, probs, tail, buckets=None):
    """The loss, and its gradient with respect to the logits of q, of what a source teaches."""
    z = torch.tensor([q], dtype=torch.float64).log().requires_grad_()
    students = z.log_softmax(-1)[:, ids]
    if buckets is not None:
        students = bucket_logps(students, torch.tensor([buckets]), len(probs))
    target = torch.tensor([probs], dtype=torch.float64)
    loss = ghost_kl(students, target, torch.tensor([tail], dtype=torch.float64))
    return loss.item(), gradient(loss, z)[0].tolist()


def exactly(found, loss, grad):
    assert found[0] == pytest.approx(loss, abs=1e-12)
    assert found[1] == pytest.approx(grad, abs=1e-12)


def test_digits_that_a_source_splits():
    """q over 2, 20, 201, 3, the, x; the source says 2, 3, the: its 2 means a number that begins so.

    As ids it pushes 20 and 201 down although both models agree on the text; as a tail, or as a
    group of ids, it does not.
    """
    q = [0.05, 0.10, 0.55, 0.05, 0.20, 0.05]
    agreeing, group = ([0.70, 0.05, 0.20], 0.05), [0, 0, 0, 1, 2]
    grad = [-0.65, 0.65 / 7, 3.575 / 7, 0, 0, 0.325 / 7]
    exactly(lesson(q, [0, 3, 4], *agreeing), 1.7153872642499181, grad)
    exactly(lesson(q, [4], [0.20], 0.80), 0, [0] * 6)
    exactly(lesson(q, [0, 1, 2, 3, 4], *agreeing, group), 0, [0] * 6)
    other = ([0.90, 0.02, 0.06], 0.02)
    grad = [-0.85, 0.68 / 7, 3.74 / 7, 0.03, 0.14, 0.34 / 7]
    exactly(lesson(q, [0, 3, 4], *other), 2.4396634379797207, grad)
    tail = lesson(q, [4], [0.06], 0.94)
    grad = [-0.00875, -0.0175, -0.09625, -0.00875, 0.14, -0.00875]
    exactly(tail, 0.079353690480798787, grad)
    grouped = lesson(q, [0, 1, 2, 3, 4], *other, group)
    exactly(grouped, 0.11729298791829311, [-0.1 / 7, -0.2 / 7, -1.1 / 7, 0.03, 0.14, 0.03])
    assert tail[0] <= grouped[0], "a coarser view never sees more"


def test_digits_are_pushed_up_as_a_group():
    """Where the source is surer of a number than the pivot is, ids alone push 201 down by all."""
    q, source = [0.05, 0.10, 0.60, 0.05, 0.20], ([0.80, 0.05, 0.15], 0.0)
    exactly(lesson(q, [0, 3, 4], *source), 2.1749186669240579, [-0.75, 0.10, 0.60, 0, 0.05])
    grad = [-0.05 / 15, -0.10 / 15, -0.04, 0, 0.05]
    found = lesson(q, [0, 1, 2, 3, 4], *source, [0, 0, 0, 1, 2])
    exactly(found, 0.0084785060422897982, grad)
