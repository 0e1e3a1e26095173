"""Sources of one response, fused: beside plain loops, and section by section of what must hold."""

import math

import numpy as np
import pytest
import torch

from megatron_infifpo.distillation import bucket_logps, ghost_kl
from megatron_infifpo.fusing.fuse import FUSIONS, Candidate, average_ce, fuse, mince
from megatron_infifpo.fusing.vocabulary import map_vocabulary
from megatron_infifpo.references.soft_targets import SEVERAL, SoftTargets
from support.fusing import toy

LENGTH, V, K = 9, 12, 4


def candidate(number: int, *, weight: float = 1.0, ce: float = 1.0, seed=None, k=K) -> Candidate:
    """A source with distributions of two thirds of the tokens, and with a chunk."""
    rng = np.random.default_rng(number if seed is None else seed)
    rows = np.flatnonzero(rng.random(LENGTH) < 0.67)
    probs = -np.sort(-rng.dirichlet([0.4] * (k + 1), len(rows)), axis=1)
    ids = np.stack([rng.permutation(V)[:k] for _ in rows])
    ids[rng.random(ids.shape) < 0.2] = -1
    return Candidate(
        number, weight, ce, rows, ids, probs[:, :k], probs[:, k],
        np.log(probs[:, :k]).astype(np.float32), np.array([[number, number + 2]]),
        np.array([-1.5 - number]),
    )  # fmt: skip


def run(found, fusion="mean", *, top_k=V, sources=5) -> SoftTargets:
    targets = fuse(found, LENGTH, fusion=fusion, top_k=top_k, sources=sources)
    assert targets is not None
    return targets


def as_dicts(targets: SoftTargets) -> list[dict[int, float]]:
    return [
        {int(i): float(p) for i, p in zip(ids, probs, strict=True) if i != -1} | {-1: float(tail)}
        for ids, probs, tail in zip(targets.ids, targets.probs, targets.tail, strict=True)
    ]


def nothing_but(rows=(), chunks=(), *, number=0, weight=1.0, ids=(5,)) -> Candidate:
    """A source with rows of one distribution, and chunks."""
    count = len(rows)
    probs = np.full((count, len(ids)), 0.5 / len(ids))
    return Candidate(
        number, weight, 1.0, np.array(rows, int), np.tile(np.array(ids), (count, 1)), probs,
        np.full(count, 0.5), np.log(probs).astype(np.float32),
        np.array(chunks, int).reshape(-1, 2), -np.arange(1.0, len(chunks) + 1),
    )  # fmt: skip


def by_hand(found, shares, top_k):
    """The fused distributions, token by token and id by id."""
    result = []
    for t in range(LENGTH):
        here = [
            (share, c, int(np.flatnonzero(c.rows == t)[0]))
            for c, share in zip(found, shares, strict=True)
            if t in c.rows and share > 0
        ]
        total = sum(share for share, _, _ in here)
        mass: dict[int, float] = {}
        for share, c, n in here:
            for i, p in zip(c.ids[n].tolist(), c.probs[n].tolist(), strict=True):
                mass[i] = mass.get(i, 0.0) + share / total * p
            mass[-1] = mass.get(-1, 0.0) + share / total * float(c.tail[n])
        tail = mass.pop(-1, 1.0)
        order = sorted(mass, key=lambda i: -mass[i])
        kept = {i: mass[i] for i in order[:top_k]}
        result.append(kept | {-1: tail + sum(mass[i] for i in order[top_k:])} if kept else {-1: 1})
    return result


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert all(math.isclose(x[i], y[i], abs_tol=1e-12) for i in x), (x, y)


@pytest.mark.parametrize("top_k", [1, 3, V])
@pytest.mark.parametrize("seed", range(5))
def test_against_a_plain_loop(top_k, seed):
    found = [candidate(m, weight=1.0 + m, seed=[seed, m]) for m in range(3)]
    targets = run(found, top_k=top_k)
    expected = by_hand(found, [1 / 6, 2 / 6, 3 / 6], top_k)
    assert_same(as_dicts(targets), expected)
    np.testing.assert_allclose(targets.probs.sum(1) + targets.tail, 1, atol=1e-12)
    assert (np.diff(targets.probs, axis=1) <= 0).all()
    for t in range(LENGTH):
        there = [c.number + 1 for c in found if t in c.rows]
        expected_source = SEVERAL if len(there) > 1 else sum(there)
        assert targets.sources[t] == (expected_source if (targets.ids[t] != -1).any() else 0)


def test_shares():
    ce, weights = np.array([1.2, 0.8]), np.array([3.0, 1.0])
    assert mince(ce, weights).tolist() == [0, 1]
    assert mince(np.array([0.5, 0.5]), weights).tolist() == [1, 0]
    # FuseLLM's code: CE .8 and 1.2 are rewards .449 and .301, and these weights .537 and .463.
    np.testing.assert_allclose(
        average_ce(ce, weights), [0.46303388564665435, 0.53696611435334565], rtol=0, atol=1e-12
    )
    rewards = np.exp(np.exp(-ce))
    np.testing.assert_allclose(average_ce(ce, weights), rewards / rewards.sum(), rtol=1e-15)


@pytest.mark.parametrize("fusion", ["mince", "average-ce", "mean"])
def test_order_of_sources(fusion):
    """Numbers, not places, say who is who."""
    found = [candidate(m, weight=m + 0.5, ce=1 + 0.1 * ((m + 1) % 3)) for m in range(3)]
    first, second = (run(c, fusion) for c in (found, found[::-1]))
    assert_same(as_dicts(first), as_dicts(second))
    assert np.array_equal(first.sources, second.sources)
    assert sorted(first.chunks.tolist()) == sorted(second.chunks.tolist())


def test_two_copies_are_one():
    one, other = candidate(0, seed=3), candidate(1, seed=3)
    assert_same(as_dicts(run([one, other])), as_dicts(run([one])))


def test_weight_0_is_absent():
    found = [candidate(0, weight=2), candidate(1, weight=0), candidate(2)]
    left = [found[0], found[2]]
    with_it, without = run(found), run(left)
    assert_same(as_dicts(with_it), as_dicts(without))
    assert np.array_equal(with_it.sources, without.sources)
    assert np.array_equal(with_it.chunks, without.chunks)


def test_mince_takes_one():
    """All of the best source's, and nothing where it has nothing."""
    found = [candidate(0, ce=1.1), candidate(1, ce=0.9)]
    targets = run(found, "mince")
    assert_same(as_dicts(targets), by_hand(found, [0, 1], V))
    assert set(targets.sources.tolist()) == {0, 2}
    assert targets.chunks.tolist() == [[1, 3]] and targets.chunk_weights.tolist() == [1.0]
    nothing = targets.sources == 0
    assert (targets.tail[nothing] == 1).all() and (targets.ids[nothing] == -1).all()


@pytest.mark.parametrize("fusion", ["mince", "average-ce", "mean"])
def test_a_row_of_the_tail_alone_is_none(fusion):
    """It would take away part of its cross-entropy, and teach no id."""
    empty = nothing_but([2, 3], ids=(-1, -1))
    targets = run([empty], fusion)
    assert not targets.sources.any() and (targets.tail == 1).all()
    if fusion != "mince":
        both = run([empty, nothing_but([3, 4], number=1)], fusion)
        assert both.sources.tolist() == [0, 0, 0, SEVERAL, 2, 0, 0, 0, 0]
        np.testing.assert_allclose(both.tail[2:5], [1, 0.75, 0.5])


def test_chunks_of_several():
    """Weights are shares among the sources that say something of some of the same tokens."""
    one = nothing_but([6], [[0, 2], [3, 4], [7, 9]], weight=3)
    other = nothing_but([8], [[1, 3], [5, 7]], number=1)
    targets = run([one, other])
    assert targets.chunks.tolist() == [[0, 2], [3, 4], [7, 9], [1, 3], [5, 7]]
    assert targets.chunk_logps.tolist() == [-1, -2, -3, -1, -2]
    assert targets.chunk_weights.tolist() == [0.75, 1, 0.75, 0.25, 0.25]
    assert targets.chunks.dtype == np.int32 and targets.chunk_logps.dtype == np.float32
    # What a source that says nothing there is weighted by makes no difference.
    silent = nothing_but([8], number=2, weight=96, ids=(-1,))
    again = run([one, silent, nothing_but([], [[1, 3], [5, 7]], number=1)])
    assert again.chunk_weights.tolist() == [0.75, 1, 1, 0.25, 0.25]


def test_weights_of_random_chunks():
    """By a plain loop; at no token do chunks weigh more than 1 together."""
    rng = np.random.default_rng(4)
    for _ in range(50):
        found = []
        for number in range(3):
            marks = np.sort(rng.choice(LENGTH + 1, 5, replace=False))
            chunks = [[a, b] for a, b in zip(marks, marks[1:], strict=False) if rng.random() < 0.5]
            inside = {t for a, b in chunks for t in range(a, b)}
            rows = [t for t in range(LENGTH) if t not in inside and rng.random() < 0.4]
            found.append(nothing_but(rows, chunks, number=number, weight=number + 1.0))
        targets, expected = run(found), []
        said = [{*c.rows.tolist(), *(t for a, b in c.chunks for t in range(a, b))} for c in found]
        covered = np.zeros(LENGTH)
        for c in found:
            for a, b in c.chunks:
                here = [o.weight for o, s in zip(found, said, strict=True) if s & {*range(a, b)}]
                expected.append(c.weight / sum(here))
                covered[a:b] += expected[-1]
        np.testing.assert_allclose(targets.chunk_weights, expected, rtol=1e-6)
        assert covered.max(initial=0) <= 1 + 1e-12


def test_many_ids_to_one_add_up():
    """Two ids of a source that are one of the pivot's: their mass adds."""
    one = Candidate(
        0, 1.0, 1.0, np.array([2]), np.array([[5, 7, 5, -1]]), np.array([[0.4, 0.2, 0.1, 0.1]]),
        np.array([0.2]), np.zeros((1, 4), np.float32), np.zeros((0, 2), int), np.zeros(0),
    )  # fmt: skip
    targets = run([one], top_k=2)
    assert targets.ids[2].tolist() == [5, 7]
    np.testing.assert_allclose(targets.probs[2], [0.5, 0.2], rtol=1e-12)
    np.testing.assert_allclose(targets.tail[2], 0.3, rtol=1e-12)


def test_small_tails_stay():
    """The tail is added up and not what is left of 1: 1e-9 does not drown."""
    one = candidate(0)
    sharp = Candidate(
        0, 1.0, 1.0, one.rows, np.abs(one.ids), np.full(one.probs.shape, 0.25),
        np.full(len(one.rows), 1e-9), one.values, one.chunks, one.chunk_logps,
    )  # fmt: skip
    targets = run([sharp], top_k=V)
    assert (targets.tail[one.rows] == 1e-9).all()


def test_values_side_by_side():
    found = [candidate(0), candidate(3)]
    targets = run(found, "none", top_k=3)
    assert targets.values is not None and targets.values.shape == (LENGTH, 5, 3)
    for c in found:
        assert np.array_equal(targets.values[c.rows, c.number], c.values[:, :3])
    there = np.zeros((LENGTH, 5), bool)
    for c in found:
        there[c.rows, c.number] = True
    assert np.array_equal(np.isnan(targets.values).all(axis=2), ~there)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nobody(fusion):
    assert fuse([], LENGTH, fusion=fusion, top_k=2, sources=1) is None


# A pivot with numbers as tokens (all but never 30), and a source that splits them.
PIVOT, Q = ["2", "20", "201", "3", "the", "x", "30"], [0.05, 0.10, 0.55, 0.05, 0.20, 0.05, 1e-30]
SOURCE = ["2", "3", "the"]
AGREES, DISAGREES = [0.70, 0.05, 0.20], [0.90, 0.02, 0.06]


@pytest.mark.parametrize(
    ("probs", "ambiguous", "loss", "gradient"),
    [
        (AGREES, "id", 1.7153872642499181, [-0.65, 0.65 / 7, 3.575 / 7, 0, 0, 0.325 / 7]),
        (AGREES, "tail", 0.0, [0.0] * 6),
        (AGREES, "digits", 0.0, [0.0] * 6),
        (AGREES, "group", 0.0, [0.0] * 6),
        (
            DISAGREES, "id", 2.4396634379797207,
            [-0.85, 0.68 / 7, 3.74 / 7, 0.03, 0.14, 0.34 / 7],
        ),
        (
            DISAGREES, "tail", 0.079353690480798787,
            [-0.00875, -0.0175, -0.09625, -0.00875, 0.14, -0.00875],
        ),
        (
            DISAGREES, "group", 0.11729298791829311,
            [-0.1 / 7, -0.2 / 7, -1.1 / 7, 0.03, 0.14, 0.03],
        ),
    ],
)  # fmt: skip
def test_numbers_that_a_source_splits(probs, ambiguous, loss, gradient):
    """Ambiguous ids in the tail or as groups: no pull where both mean the same text."""
    found = map_vocabulary(toy([*SOURCE, "0", "1", "x"]), toy(PIVOT), 0, ambiguous)
    one = Candidate(
        0, 1.0, 1.0, np.array([0]), found.ids[:3][None], np.array([probs]),
        np.array([1 - sum(probs)]), np.zeros((1, 3), np.float32), np.zeros((0, 2), int),
        np.zeros(0),
    )  # fmt: skip
    targets = run([one], top_k=3)
    z = torch.log(torch.tensor(Q, dtype=torch.float64)).requires_grad_()
    ids = targets.ids[0]
    members = [
        (place, i)
        for place, number in enumerate(ids.tolist())
        if number != -1
        for i in ([number] if number >= 0 else found.groups[-(number + 2)].tolist())
    ]
    logps = torch.log_softmax(z, 0)[[i for _, i in members]][None]
    buckets = torch.tensor([[place for place, _ in members]])
    student = bucket_logps(logps, buckets, 3)
    value = ghost_kl(student, torch.tensor(targets.probs[:1]), torch.tensor(targets.tail[:1]))
    assert value.item() == pytest.approx(loss, abs=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert slope[:6].tolist() == pytest.approx(gradient, abs=1e-12)
