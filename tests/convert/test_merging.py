"""Formulas of merging: closed forms, a plain loop, and another program's numbers."""

import math

import pytest
import torch

from megatron_infifpo.convert import merging
from megatron_infifpo.convert.merging import linear, sce, task_arithmetic, varm
from megatron_infifpo.options import declared
from support import mergekit_numbers

DELTAS = torch.tensor([[0.4, 0.1, -0.2, 0.05], [0.2, 0.12, 0.3, 0.05]], dtype=torch.float64)
ZERO = torch.zeros(4, dtype=torch.float64)


def close(found, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def trained(count, shape=(40, 50), step=0.1, dtype=torch.float32, seed=0):
    """A base, and models around it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    moves = torch.randn((count, *shape), generator=generator, dtype=torch.float64)
    return base.to(dtype), (base + step * moves).to(dtype)


def test_selecting_deltas():
    """The one element that varies most is merged: (0.3 * 9/13) / (9/13)."""
    close(sce(ZERO, DELTAS, select_top=0.5), [0, 0, 0.3, 0])


def test_selecting_weights():
    """It says that the models weigh 4/13 and 9/13; everything is merged."""
    expected = [(0.4 * 4 + 0.2 * 9) / 13, (0.1 * 4 + 0.12 * 9) / 13, 0.3, 0.05]
    close(sce(ZERO, DELTAS, select_top=0.5, select="weights"), expected)


def test_variation_ratio():
    """The models weigh 0.59126 and 0.40874, by the sums of their squares."""
    a, b = 0.16 + 0.01 + 0.04 + 0.0025, 0.04 + 0.0144 + 0.09 + 0.0025
    first = a / (a + b)
    assert first == pytest.approx(0.59126321647189761, abs=1e-12)
    expected = [first * x + (1 - first) * y for x, y in DELTAS.T.tolist()]
    close(varm(ZERO, DELTAS), expected)
    digits = [0.31825264329437952, 0.10817473567056205, 0.0043683917640511964, 0.05]
    close(torch.tensor(expected, dtype=torch.float64), digits)


def test_sce_of_all_elements_of_equal_signs_is_varm():
    base, models = trained(3, dtype=torch.float64)
    models = base + (models - base).abs()
    close(sce(base, models, select_top=1.0), varm(base, models))
    close(sce(base, models, select_top=1), sce(base, models, select_top=1, select="weights"), 0)


def loop(base, models, share, select):
    """SCE, an element at a time, in plain floats."""
    deltas = [[x - b for x, b in zip(row, base, strict=True)] for row in models]
    columns = list(zip(*deltas, strict=True))
    means = [sum(column) / len(column) for column in columns]
    variances = [
        sum((x - mean) ** 2 for x in column) / len(column)
        for column, mean in zip(columns, means, strict=True)
    ]
    count = int(sum(v > 0 for v in variances) * share)
    order = sorted(range(len(base)), key=lambda i: -variances[i])
    chosen = set(order if share == 1 else order[:count])
    weights = [sum(row[i] ** 2 for i in chosen) for row in deltas]
    merged = []
    for i, column in enumerate(columns):
        column = column if i in chosen or select == "weights" else (0.0,) * len(column)
        sign = 1 if sum(column) >= 0 else -1
        left = [(w, x) for w, x in zip(weights, column, strict=True) if x * sign > 0]
        total = sum(w for w, _ in left)
        merged.append(base[i] + (sum(w * x for w, x in left) / total if left else 0))
    return merged


@pytest.mark.parametrize("select", ["deltas", "weights"])
@pytest.mark.parametrize("share", [0.1, 0.37, 1.0])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_against_a_loop(count, share, select, monkeypatch):
    monkeypatch.setattr(merging, "_BLOCK", 64)
    base, models = trained(count, (150,), dtype=torch.float64, seed=count)
    models[:, :20] = base[:20]  # where no model has moved
    found = sce(base, models, select_top=share, select=select)
    close(found, loop(base.tolist(), models.tolist(), share, select))
    assert torch.equal(found[:20], base[:20])


@pytest.mark.parametrize(
    "method",
    [
        sce,
        lambda base, models: sce(base, models, select="weights"),
        varm,
        lambda base, models: linear(models, [0.3] * len(models)),
    ],
)
def test_one_model_is_returned_bit_by_bit(method):
    base, models = trained(1, (5000,), step=0.7)
    assert not torch.equal(base + (models[0] - base), models[0]), "else it would prove nothing"
    found = method(base, models)
    assert torch.equal(found, models[0]) and found.data_ptr() != models.data_ptr()


@pytest.mark.parametrize(
    "method",
    [
        sce,
        lambda base, models: sce(base, models, select="weights"),
        varm,
        lambda base, models: linear(models),
        task_arithmetic,
    ],
)
def test_the_order_of_models_changes_nothing(method):
    base, models = trained(4, dtype=torch.float64)
    close(method(base, models[[2, 0, 3, 1]]), method(base, models))


def test_equal_weights_where_nothing_differs():
    """Two models of the same change: no variance, so nothing is selected."""
    base, models = trained(1, dtype=torch.float64)
    twice = models.expand(2, -1, -1)
    assert torch.equal(sce(base, twice), base)
    close(sce(base, twice, select="weights"), models[0])
    unmoved = base.expand(3, -1, -1)
    assert torch.equal(varm(base, unmoved), base) and torch.equal(sce(base, unmoved), base)


def test_a_share_of_less_than_one_element_selects_none():
    assert torch.equal(sce(ZERO, DELTAS, select_top=0.3), ZERO)  # 3 of 4 vary: 0.9 elements
    close(sce(ZERO, DELTAS, select_top=0.34), [0, 0, 0.3, 0])


def test_small_changes_are_weighed_like_large_ones():
    """mergekit gives models equal weights where the mean squares add up to less than 1e-6."""
    base, models = trained(2, dtype=torch.float64)
    deltas = models - base
    deltas[1] *= 4
    for method in (varm, sce):
        large, small = method(base * 0, deltas), method(base * 0, deltas * 2.0**-30)
        close(small * 2.0**30, large)
    close(sce(ZERO[:1], 1e-9 * torch.tensor([[1.0], [2]]).double(), select_top=1), [1.8e-9], 1e-20)


def test_linear_and_task_arithmetic():
    base, models = trained(3, dtype=torch.float64)
    a, b, c = models
    close(linear(models), (a + b + c) / 3)
    close(linear(models, [1, 0, 3]), a / 4 + c * 3 / 4)
    close(task_arithmetic(base, models), a + b + c - 2 * base)
    expected = base + 0.4 * (2 * (a - base) - (b - base))
    close(task_arithmetic(base, models, [2, -1, 0], scale=0.4), expected)
    assert torch.equal(task_arithmetic(base, models, scale=0), base)
    with pytest.raises(ValueError, match="2 weights for 3 models"):
        linear(models, [1, 2])


@pytest.mark.parametrize("select", ["deltas", "weights"])
def test_bits_depend_on_neither_threads_nor_blocks(select, monkeypatch):
    base, models = trained(3, (400_000,))
    threads, found = torch.get_num_threads(), []
    for count, block in ((1, 1 << 18), (2, 1 << 18), (2, 1 << 15)):
        monkeypatch.setattr(merging, "_BLOCK", block)
        torch.set_num_threads(count)
        found.append((sce(base, models, select=select), varm(base, models)))
    torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))


def test_variance_is_that_of_torch():
    base, models = trained(3, (200, 300))
    variance = torch.var(models - base, 0, unbiased=False).flatten()
    expected = torch.zeros(60_000, dtype=torch.bool)
    expected[variance.topk(6000).indices] = True
    assert torch.equal(merging._most_varied(base, models, 0.1), expected)


def test_half_precision_is_computed_in_float32():
    base, models = trained(3, dtype=torch.bfloat16)
    wide, lists = models.float(), list(models)
    for found, expected in (
        (sce(base, lists), sce(base.float(), wide)),
        (varm(base, lists), varm(base.float(), wide)),
        (linear(lists), linear(wide)),
        (task_arithmetic(base, lists), task_arithmetic(base.float(), wide)),
    ):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_inputs_stay_as_they_are():
    base, models = trained(3)
    before = base.clone(), models.clone()
    for method in (sce, varm, task_arithmetic):
        method(base, models)
    linear(models)
    assert torch.equal(base, before[0]) and torch.equal(models, before[1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", mergekit_numbers.CASES)
def test_numbers_of_mergekit(name, dtype):
    case = mergekit_numbers.CASES[name]
    base, *targets = mergekit_numbers.models(getattr(torch, dtype))
    known = {"base": base, "targets": targets, **case.options}
    takes = merging.parameters(case.method)
    found = merging.MERGES[case.method](**{key: known[key] for key in known if key in takes})
    assert found.tolist() == getattr(case, dtype)


def test_options_are_declared():
    assert declared(sce)["select_top"].expected(0) == "a number in (0, 1]"
    assert declared(task_arithmetic)["scale"].expected(math.nan) is not None
    assert declared(task_arithmetic)["scale"].expected(-math.inf) is not None
    assert set(merging.all_options()) == {"select_top", "select", "scale"}
