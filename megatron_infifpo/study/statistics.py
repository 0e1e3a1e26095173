"""What the study's numbers are worth: paired intervals, Holm's correction, power, AUC, slope.

All methods of one (condition, set, seed) share data, start and references: differences are taken
inside such a pair, and a seed is one observation. Seeds are nested in sets of sources, so there
are two questions, and two intervals:

- over seeds (`t_interval` of all differences): what would other seeds say, of *these* sets of
  sources? The main one; n - 1 degrees of freedom.
- over sets (`over_sets`): what would *other sources* say? Seeds of one set share its sources, so
  they are a cluster. Whatever the correlation inside, the means of sets are independent: a t
  interval of the S means has S - 1 degrees of freedom, which is right for few clusters, where
  sandwich errors with normal quantiles are too narrow. With three sets the quantile is 4.3, so it
  is wide; a difference that it excludes from zero holds beyond the sources that were drawn.

Student's distribution is the incomplete beta function of mpmath, which comes with torch (by SymPy).
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import mpmath  # type: ignore[import-untyped]
import numpy as np

LEVEL = 0.95
Pair = tuple[int, int]  # set, seed
FEWEST_SETS = 3
MOST_SEEDS = 10**6  # nobody runs more, and the answer is then as good as "never"


class Interval(NamedTuple):
    """A mean, and what is known of it.

    Attributes:
        mean: of the values.
        half: half the width of its 95 % interval.
        n: how many values.
        sd: their standard deviation, n - 1 in the denominator.
    """

    mean: float
    half: float
    n: int
    sd: float

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.half

    @property
    def p(self) -> float:
        """Two-sided p-value of a mean of zero; of equal values 1 if they are zero, else 0."""
        if self.sd == 0:
            return float(self.mean == 0)
        return two_sided_p(self.mean / self.sd * math.sqrt(self.n), self.n - 1)


def mean(values: Iterable[float]) -> float:
    """Return the mean, rounded once: the same in whatever order values come."""
    found = list(values)
    return math.fsum(found) / len(found)


def t_interval(values: Iterable[float]) -> Interval | None:
    """Return the mean with its t interval; None for fewer than two values, which have none.

    Values that are all equal have an interval of width zero.
    """
    found = list(values)
    n = len(found)
    if n < 2:
        return None
    middle = mean(found)
    sd = math.sqrt(math.fsum((value - middle) ** 2 for value in found) / (n - 1))
    return Interval(middle, t_quantile(0.5 + LEVEL / 2, n - 1) * sd / math.sqrt(n), n, sd)


def paired(a: Mapping[Pair, float], b: Mapping[Pair, float]) -> dict[Pair, float]:
    """Return a - b of every (set, seed) that both have, in their order."""
    return {pair: a[pair] - b[pair] for pair in sorted(a.keys() & b.keys())}


def over_sets(differences: Mapping[Pair, float]) -> Interval | None:
    """Return the t interval of the means of sets, each set one value; None for fewer than three.

    The mean is that of sets, which is the mean over seeds where all sets have as many.
    """
    sets: dict[int, list[float]] = {}
    for (group, _), value in differences.items():
        sets.setdefault(group, []).append(value)
    return t_interval(map(mean, sets.values())) if len(sets) >= FEWEST_SETS else None


def pooled_sd(groups: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    """Return the standard deviation inside groups, and its degrees of freedom.

    None where no group has two values.
    """
    squares: list[float] = []
    freedom = 0
    for values in groups:
        if len(values) > 1:
            middle = mean(values)
            squares += [(value - middle) ** 2 for value in values]
            freedom += len(values) - 1
    return (math.sqrt(math.fsum(squares) / freedom), freedom) if freedom else None


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p-values, in the order of the given ones.

    The smallest of m is multiplied by m, the next by m - 1, and none is below one before it. A test
    that was named but has no p-value still counts: m is what was said beforehand.
    """
    order = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, at) in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p))
        found[at] = least
    return found


def two_sided_p(t: float, freedom: int) -> float:
    """Return the probability that Student's |T| is above |t|."""
    if math.isinf(t):
        return 0.0
    inside = freedom / (freedom + t * t)
    return float(mpmath.betainc(freedom / 2, 0.5, 0, inside, regularized=True))


@functools.cache
def t_quantile(probability: float, freedom: int) -> float:
    """Return the t below which Student's T lies with a probability of 1/2 to 1."""
    assert 0.5 <= probability < 1 and freedom > 0
    tail = 2 * (1 - probability)
    high = 1.0
    while two_sided_p(high, freedom) > tail:
        high *= 2
    return _bisect(lambda t: two_sided_p(t, freedom) <= tail, 0.0, high)


def power(effect: float, sd: float, n: int, alpha: float = 0.05) -> float:
    """Return the power of the paired t test: noncentral t, both tails.

    Args:
        effect: true mean of the differences.
        sd: their standard deviation, above zero.
        n: seeds, at least two.
        alpha: two-sided level.
    """
    critical = t_quantile(1 - alpha / 2, n - 1)
    shift = abs(effect) / sd * math.sqrt(n)
    return _beyond(critical, n - 1, shift) + _beyond(critical, n - 1, -shift)


def seeds_needed(effect: float, sd: float, wanted: float = 0.8, alpha: float = 0.05) -> int:
    """Return the fewest seeds that find an effect with the wanted power; at least two."""
    if sd == 0:
        return 2
    assert effect != 0
    low, high = 1, 2
    while high < MOST_SEEDS and power(effect, sd, high, alpha) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if power(effect, sd, middle, alpha) < wanted:
            low = middle
        else:
            high = middle
    return high


def detectable(sd: float, n: int, wanted: float = 0.8, alpha: float = 0.05) -> float:
    """Return the effect that n seeds, at least two, find with the wanted power."""
    if sd == 0:
        return 0.0
    high = 1.0
    while power(high, 1.0, n, alpha) < wanted:
        high *= 2
    return sd * _bisect(lambda effect: power(effect, 1.0, n, alpha) >= wanted, 0.0, high)


def auc(scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray) -> float:
    """Return how often a positive has the larger score than a negative; ties count half.

    Args:
        scores: one a case, finite.
        labels: whether it is a positive.

    Returns:
        1 where the scores tell all positives, 1/2 by chance; nan without positives or negatives.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    assert values.shape == positive.shape and values.ndim == 1 and np.isfinite(values).all()
    wins, losses = int(positive.sum()), int((~positive).sum())
    if not wins or not losses:
        return math.nan
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # equal scores share their mean rank
    return float((ranks[positive].sum() - wins * (wins + 1) / 2) / (wins * losses))


def slope(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Return b of the least squares y = a + b x; nan where x does not vary."""
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    assert across.shape == up.shape and across.ndim == 1
    if not len(across) or np.ptp(across) == 0:
        return math.nan
    across = across - across.mean()
    return float(across @ (up - up.mean()) / (across @ across))


def _beyond(critical: float, freedom: int, shift: float) -> float:
    """P(T > critical) of the noncentral T = (Z + shift) / S, S = sqrt(chi square / freedom).

    The integral over S of P(Z > critical S - shift): S lies around 1 with a standard deviation of
    about 1 / sqrt(2 freedom), and nodes of Gauss and Legendre cover what is not below 1e-20 of it.
    """
    width = 10 / math.sqrt(2 * freedom)
    nodes, weights = _legendre()
    low, high = max(0.0, 1 - width), 1 + 1.3 * width
    s = low + (high - low) * (nodes + 1) / 2
    log_density = (math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)) + (
        (freedom - 1) * np.log(s) - freedom / 2 * s * s
    )
    tails = np.array([math.erfc((critical * at - shift) / math.sqrt(2)) / 2 for at in s])
    return float(np.exp(log_density) * tails @ weights * (high - low) / 2)


@functools.cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    """Nodes on [-1, 1], and their weights."""
    return np.polynomial.legendre.leggauss(200)


def _bisect(above: Callable[[float], bool], low: float, high: float) -> float:
    """Return where `above` turns true between low and high, to the last digits."""
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if above(middle):
            high = middle
        else:
            low = middle
    return high
