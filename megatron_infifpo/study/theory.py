"""Where the losses lead and how they start, on paper, and that the program does what paper says.

The policy is a table (`tabular`), so nothing but the loss decides. Names: s and i are the log-odds
of answer A against B under a source and under the initial pivot, q the probability that A is
labelled the better one, theta the policy's log-odds at the optimum, beta the loss's.

Let the reference's log-odds be u where A is labelled the better one, and l where B is. The
expected loss `-q log sigmoid(beta (theta - u)) - (1 - q) log sigmoid(beta (l - theta))` is lowest
where

    q sigmoid(beta (u - theta)) = (1 - q) sigmoid(beta (theta - l))

- DPO, u = l = i: theta = i + logit(q) / beta.
- Sources, not clipped, u = l = s: theta = s + logit(q) / beta. With labels by Bradley and Terry's
  rule on rewards r, of any number of answers: pi* = M exp(r / beta) / Z, M the fused reference.
  The initial pivot has no part in it.
- Clipped: u > l wherever they disagree. theta = u + log(y) / beta, with y the positive root of
  `(1 - q) y^2 + (1 - 2 q) y - q exp(-beta (u - l)) = 0`. Far apart, y is (2 q - 1) / (1 - q) for
  q > 1/2: the label's majority takes the whole of u, or of l for q < 1/2. At q = 1/2 theta is half
  way. One source, clipped by pair, or of two answers that are all there are: u = max(s, i) and
  l = min(s, i). In general, clipped by response, u = max over models of A's log-prob less min of
  B's: at least max(s, i), and above it by what a source finds both answers less or more likely
  than the pivot, its level, which has nothing to do with A or B.
- Centred sources have no level: u is the highest and l the lowest of all models' log-odds, of any
  number of sources. Without clipping, one centred source, or an average, changes no optimum of a
  pair: s and so theta are the same.
- Standardised, s becomes k s, k one number a source: theta = k s + logit(q) / beta.
- Weights of pairs, w where A is labelled the better one and v where B is: q w and (1 - q) v take
  the places of q and 1 - q, so logit(q) becomes logit(q) + log(w / v). Weights that a prompt's two
  labels share change no optimum. A source's verdict sigmoid(c s) has w / v = exp(c s): DPO's
  optimum becomes theta = i + (logit(q) + c s) / beta. A source is one more voter, which
  confidence in labels outvotes, and not a place to start from; and with c = beta theta is
  i + s + logit(q) / beta. The mean verdict p of several: logit(p) in place of c s.
  With a cut, one label alone may be left: q is 0 or 1 then, and theta has no bound.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import logsigmoid

from megatron_infifpo.losses import CHOSEN, REJECTED
from megatron_infifpo.methods import Method, resolve
from megatron_infifpo.reference import fuse_reference
from megatron_infifpo.study.tabular import optimum, settled, two_answers
from megatron_infifpo.training.objective import pair_losses

BETA = 0.5


def log_odds(upper: float, lower: float, q: float, beta: float = BETA) -> float:
    """The optimum on paper, of a reference with log-odds u, upper, and l, lower; see above."""
    apart = math.exp(-beta * (upper - lower))
    root = math.sqrt((1 - 2 * q) ** 2 + 4 * q * (1 - q) * apart)
    # Of two forms of the positive root the one in which nothing cancels.
    y = (2 * q - 1 + root) / (2 * (1 - q)) if q > 0.5 else 2 * q * apart / (1 - 2 * q + root)
    return upper + math.log(y) / beta


def logit(q: float) -> float:
    """Log-odds of a probability."""
    return math.log(q / (1 - q))


def sigmoid(x: float) -> float:
    """Probability of log-odds."""
    return 1 / (1 + math.exp(-x))


def answers(log_odds: float, level: float = 0.0) -> tuple[float, float]:
    """Log-probs of A and B that are all the answers there are, both shifted by a level."""
    one = torch.tensor([log_odds, -log_odds], dtype=torch.float64)
    a, b = (logsigmoid(one) + level).tolist()
    return a, b


INITIAL_ANCHOR = {"margin_anchor": "initial"}  # so that the reference stays where it is
VARIANTS: dict[str, Method] = {
    "dpo": resolve("dpo", beta=BETA),
    "weighted": resolve("dpo", beta=BETA, pair_weights="agreement"),
    "unclipped": resolve("fpo", beta=BETA, **INITIAL_ANCHOR),
    "standardised": resolve("fpo", beta=BETA, source_values="standardised", **INITIAL_ANCHOR),
    "clipped": resolve("infifpo", beta=BETA, **INITIAL_ANCHOR),
    "centred": resolve("infifpo", beta=BETA, source_values="centred", **INITIAL_ANCHOR),
    "by pair": resolve("infifpo", beta=BETA, clip_by="pair", **INITIAL_ANCHOR),
}


def _on_paper(name: str, s: Sequence[float], i: Sequence[float], q: float, scale: float) -> float:
    """The optimum of a variant: of answers' log-probs under a source and under the pivot."""
    source, initial = s[0] - s[1], i[0] - i[1]
    upper, lower = max(source, initial), min(source, initial)
    if name == "clipped":
        upper, lower = max(s[0], i[0]) - min(s[1], i[1]), min(s[0], i[0]) - max(s[1], i[1])
    known = {
        "dpo": initial + logit(q) / BETA,
        "weighted": initial + (logit(q) + source) / BETA,
        "unclipped": source + logit(q) / BETA,
        "standardised": scale * source + logit(q) / BETA,
    }
    return known[name] if name in known else log_odds(upper, lower, q)


def fixed_points(
    sources: Sequence[tuple[float, float]] = ((2.0, 0.0), (-2.0, 0.0), (0.0, -2.0)),
    initials: Sequence[float] = (-1.0, 1.0),
    shares: Sequence[float] = (0.9, 0.75, 0.5, 0.25),
) -> list[dict[str, float]]:
    """Optima of one source's variants, and how far from those on paper.

    Args:
        sources: log-odds of A, and level.
        initials: log-odds of the initial pivot.
        shares: q.

    Returns:
        A row a case: source, level, initial, q; the log-odds found by each of `VARIANTS`; and
        deviation, the largest one from paper.
    """
    cases = [(*source, i, q) for source in sources for i in initials for q in shares]
    said = [answers(s, level) for s, level, _, _ in cases]
    of_pivot = [answers(i) for _, _, i, _ in cases]
    table = two_answers(of_pivot, [[one] for one in said], [q for *_, q in cases])
    scale = (sum(i * i for _, _, i, _ in cases) / sum(s * s for s, *_ in cases)) ** 0.5
    rows = [dict(zip(("source", "level", "initial", "q"), case, strict=True)) for case in cases]
    for row in rows:
        row["deviation"] = 0.0
    for name, method in VARIANTS.items():
        found = optimum(method, table)
        for row, theta, s, i in zip(
            rows, (found[:, 0] - found[:, 1]).tolist(), said, of_pivot, strict=True
        ):
            away = abs(theta - _on_paper(name, s, i, row["q"], scale))
            row[name], row["deviation"] = theta, max(row["deviation"], away)
    return rows


def first_pushes(gaps: Sequence[float] = (0.0, 1.0, 2.0, 4.0)) -> list[dict[str, float]]:
    """Coefficients at step 0, where one source knows the truth, by beta times its gap to the pivot.

    On paper: unclipped sigmoid(gap) and sigmoid(-gap), of pairs with a right and with a wrong
    label; clipped sigmoid(gap) and 1/2, so from 1/2 up and below 1; weighted half the verdicts.
    """
    odds = [gap / BETA for gap in gaps]
    table = two_answers([answers(0.0)] * len(gaps), [[answers(s)] for s in odds], [0.5] * len(gaps))
    rows = [{"gap": gap, "deviation": 0.0} for gap in gaps]
    for name in ("unclipped", "clipped", "weighted"):
        row = table.row(VARIANTS[name])
        sums = row["initial_sum_logps"].clone().requires_grad_()
        losses, _, _ = pair_losses(VARIANTS[name], row, sums)
        (slopes,) = torch.autograd.grad(losses.sum(), sums)
        found = (-slopes[:, CHOSEN] / BETA).view(-1, 2).tolist()
        for out, gap, s, pair in zip(rows, gaps, odds, found, strict=True):
            paper = {
                "unclipped": (sigmoid(gap), sigmoid(-gap)),
                "clipped": (sigmoid(gap), 0.5),
                "weighted": (sigmoid(s) / 2, sigmoid(-s) / 2),
            }[name]
            for label, value, expected in zip(("right", "wrong"), pair, paper, strict=True):
                out[f"{name} {label}"] = value
                out["deviation"] = max(out["deviation"], abs(value - expected))
    return rows


def margins_by_sources(most: int = 5, pairs: int = 4000, seed: int = 0) -> list[dict[str, float]]:
    """Margins of the reference, with more and more sources that know nothing.

    All log-probs are drawn from one normal distribution of deviation 1, so no model says anything
    of any pair. Clipped by response, with margins to the initial pivot, the source that differs
    most is the highest of all models' values for the chosen response and the lowest for the
    rejected one: no further source can lower their difference, 2 e(M + 1) on average, e(n) being
    the mean of the highest of n draws.

    Returns:
        A row for each number of sources: of each fusion the mean margin, clipped, and the share of
        pairs whose margin the last source has lowered; and the mean margin unclipped.
    """
    draws = torch.Generator().manual_seed(seed)
    models = torch.randn(pairs, 2, 1 + most, generator=draws, dtype=torch.float64) - 8
    initial, preferred = models[..., 0], torch.tensor([True, False])

    def margins(count: int, fusion: str, *, clip: bool = True) -> torch.Tensor:
        sources = models[..., 1 : 1 + count]
        found = fuse_reference(sources, initial, initial, preferred, fusion=fusion, clip=clip).logps
        return found[:, CHOSEN] - found[:, REJECTED]

    rows = []
    before = dict.fromkeys(("max-margin", "average", "confidence"), initial[:, 0] - initial[:, 1])
    for count in range(1, most + 1):
        row = {"sources": float(count)}
        for fusion, last in before.items():
            now = before[fusion] = margins(count, fusion)
            row[fusion], row[f"{fusion} fell"] = (
                float(now.mean()),
                float((now < last).double().mean()),
            )
        row["unclipped"] = float(margins(count, "max-margin", clip=False).mean())
        rows.append(row)
    return rows


def moving_anchor(
    weaker: float = 1.0,
    stronger: float = 3.0,
    initial: float = -1.0,
    shares: Sequence[float] = (0.5, 0.6, 0.75, 0.9),
) -> list[dict[str, float]]:
    """Where two clipped sources lead if margins are to the policy as it is, the default.

    The stronger source is the farther one until the policy's probability is midway between both;
    then the weaker one is. So on paper the policy ends where the weaker source alone would lead, if
    that is past midway, where the stronger one would, if that is before, and midway else.

    Args:
        weaker, stronger: log-odds of A under the sources, both above the initial pivot's.
        initial: the pivot's.
        shares: q.
    """
    said = [[answers(weaker), answers(stronger)]] * len(shares)
    table = two_answers([answers(initial)] * len(shares), said, shares)
    found = settled(resolve("infifpo", beta=BETA), table).tolist()
    midway = logit((sigmoid(weaker) + sigmoid(stronger)) / 2)
    rows = []
    for q, theta in zip(shares, found, strict=True):
        one, other = (log_odds(s, initial, q) for s in (weaker, stronger))
        away = abs(theta - min(max(one, midway), other))
        rows.append({"q": q, "weaker": one, "midway": midway, "stronger": other})
        rows[-1] |= {"found": theta, "deviation": away}
    return rows
