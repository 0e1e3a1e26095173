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


def test_numbers_of_two_kept_ids():
    z = logits()
    logps = z.log_softmax(-1)[:, :2]
    probs, tail = teacher(2)
    ghost, scaled = ghost_kl(logps, probs, tail), renormalised_kl(logps, probs)
    assert ghost.item() == pytest.approx(0.0824242, abs=5e-8)
    assert scaled.item() == pytest.approx(0.3883630, abs=5e-8)
    q = z.detach().softmax(-1)
    expected = q - q * (tail / (1 - q[:, :2].sum()))
    expected[:, :2] = q[:, :2] - probs
    torch.testing.assert_close(gradient(ghost, z), expected, atol=1e-12, rtol=0)
    given = [[-0.171344, 0.009993, 0.081721, 0.049567, 0.030064]]
    torch.testing.assert_close(expected, torch.tensor(given).double(), atol=5e-7, rtol=0)
    expected = q.clone()
    expected[:, :2] -= probs / probs.sum()
    z = logits()
    scaled = renormalised_kl(z.log_softmax(-1)[:, :2], probs)
    torch.testing.assert_close(gradient(scaled, z), expected, atol=1e-12, rtol=0)


def test_what_dropping_the_tail_would_be():
    """The ghost is what makes it a KL: without its term it is biased, and with it never above."""
    logps = torch.tensor([LOGITS], dtype=torch.float64).log_softmax(-1)
    probs, _ = teacher(2)
    dropped = (probs * (probs.log() - logps[:, :2])).sum()
    assert dropped.item() == pytest.approx(0.1919674, abs=5e-8)
    kept = ghost_kl(logps[:, :2], probs, torch.zeros(1, dtype=torch.float64))
    assert kept.item() == pytest.approx(dropped.item(), abs=1e-14)


def test_the_ghost_grows_to_the_whole_kl():
    logps = torch.tensor([LOGITS], dtype=torch.float64).log_softmax(-1)
    found = [ghost_kl(logps[:, :k], *teacher(k)).item() for k in range(6)]
    assert found == sorted(found) and found[0] == 0
    assert found[5] == pytest.approx(0.0939674, abs=5e-8)
    entropy = -sum(p * math.log(p) for p in TEACHER)
    cross = -(torch.tensor(TEACHER, dtype=torch.float64) * logps[0]).sum().item()
    assert cross == pytest.approx(1.1521016, abs=5e-8)
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
    assert biased.item() == pytest.approx(0.0094561, abs=5e-8)
    assert topk_standardised_l1(student, given).item() == pytest.approx(0.0084951, abs=5e-8)
    assert topk_l1(student, given).item() == pytest.approx(0.2501971, abs=5e-8)
    # Over the whole vocabulary and without a scale it is ULD.
    whole = topk_l1(
        torch.tensor([LOGITS], dtype=torch.float64),
        torch.tensor([TEACHER], dtype=torch.float64).log(),
    )
    assert whole.item() == pytest.approx(0.3426889, abs=5e-8)


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
    given, student = torch.tensor([0.54]).double().log(), torch.tensor([0.30]).double().log()
    assert chunk_binary_kl(student, given, tau=1).item() == pytest.approx(0.1242720, abs=5e-8)
    assert chunk_binary_kl(student, given).item() == pytest.approx(0.1745058, abs=5e-8)
    limit = math.log(0.54 / 0.30) - math.log(0.54) * math.log(math.log(0.54) / math.log(0.30))
    assert limit == pytest.approx(0.1750449, abs=5e-8)
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


def test_digits_that_a_source_splits():
    """q over 2, 20, 201, 3, the, x; the source says 2, 3, the: its 2 means a number that begins so.

    As ids it pushes 20 and 201 down although both models agree on the text; as a tail, or as a
    group of ids, it does not.
    """
    q = torch.tensor([[0.05, 0.10, 0.55, 0.05, 0.20, 0.05]], dtype=torch.float64)
    z = q.log().requires_grad_()

    def lesson(ids, probs, tail, buckets=None):
        students = z.log_softmax(-1)[:, ids]
        if buckets is not None:
            students = bucket_logps(students, torch.tensor([buckets]), len(probs))
        target = torch.tensor([probs], dtype=torch.float64)
        loss = ghost_kl(students, target, torch.tensor([tail], dtype=torch.float64))
        return loss.item(), gradient(loss, z)[0]

    loss, grad = lesson([0, 3, 4], [0.70, 0.05, 0.20], 0.05)
    assert loss == pytest.approx(1.7154, abs=5e-5)
    assert grad[0].item() == pytest.approx(-0.65, abs=5e-5)
    assert grad[2].item() == pytest.approx(0.5107, abs=5e-5)
    for found in (
        lesson([4], [0.20], 0.80),
        lesson([0, 1, 2, 3, 4], [0.70, 0.05, 0.20], 0.05, [0, 0, 0, 1, 2]),
    ):
        assert found[0] == pytest.approx(0, abs=1e-12) and found[1].abs().max() <= 1e-12
    assert lesson([0, 3, 4], [0.90, 0.02, 0.06], 0.02)[0] == pytest.approx(2.4397, abs=5e-5)
    tail = lesson([4], [0.06], 0.94)
    assert tail[0] == pytest.approx(0.0793537, abs=5e-8)
    given = torch.tensor([-0.0087, -0.0175, -0.0962, -0.0087, 0.14, -0.0087]).double()
    torch.testing.assert_close(tail[1], given, atol=6e-5, rtol=0)
    group = lesson([0, 1, 2, 3, 4], [0.90, 0.02, 0.06], 0.02, [0, 0, 0, 1, 2])
    assert group[0] == pytest.approx(0.1172930, abs=5e-8) and tail[0] <= group[0]
