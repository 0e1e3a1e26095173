"""What a judge says of lists of responses, and which models rank them as it does."""

import numpy as np

from megatron_infifpo.report.collect import Pairs, gaps_between
from megatron_infifpo.report.html import Page


def judge(page: Page, pairs: Pairs) -> None:
    """Say what a judge makes of lists, and which models rank their responses as it does."""
    if not pairs.lists or pairs.scores is None:
        return
    counts, known = pairs.valid.sum(axis=1), np.isfinite(pairs.scores)
    judged = pairs.scores[known.any(axis=1)]
    best, worst = np.nanmax(judged, axis=1), np.nanmin(judged, axis=1)
    page.heading("What the judge says of the responses")
    page.table(
        {
            "records": len(counts),
            "responses": f"{counts.sum()}, {counts.min()} to {counts.max()} a record",
            "with a score": f"{known.sum() / counts.sum():.1%}",
            "mean score": float(pairs.scores[known].mean()),
            "best less worst, mean": float((best - worst).mean()),
            "records with equal scores": f"{(best == worst).mean():.1%}",
        }
    )
    page.note(
        "Share of two responses to a prompt with different scores of which a model gives the "
        "better one the larger mean log-prob (the fused reference: what the method compares). "
        "0.5 is chance."
    )
    names, alike, compared = ranked_as_judged(pairs)
    codes = pairs.dataset.domain_codes[pairs.indices]
    groups = {"all": codes >= 0}
    groups |= {pairs.dataset.domains[code]: codes == code for code in np.unique(codes)}
    rows = [["ranks as the judge", *groups]]
    for model, name in enumerate(names):
        rows.append([name])
        for inside in groups.values():
            right, total = (int(table[inside, model].sum()) for table in (alike, compared))
            rows[-1].append(f"{right / total:.3f} of {total}" if total else "-")
    page.table(rows)


def ranked_as_judged(pairs: Pairs) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Count how often models rank two responses to a prompt as the judge does, by their scores.

    Returns:
        K names, of the models and of the fused reference; how many pairs of a record's responses
        with different scores each ranks as they are, and how many it knows, both int64 `[N, K]`.
    """
    assert pairs.scores is not None, "there are no scores"
    names, values = pairs.models, pairs.means
    if pairs.reference is not None:
        names, values = (*names, "fused reference"), np.dstack([values, pairs.reference])
    alike = np.zeros((len(values), len(names)), np.int64)
    known = alike.copy()
    for gaps, judged in zip(gaps_between(values), gaps_between(pairs.scores), strict=True):
        differs = np.isfinite(judged) & (judged != 0)
        there = np.isfinite(gaps) & differs[..., None]
        known += there.sum(axis=1)
        alike += (there & (np.sign(gaps) == np.sign(judged)[..., None])).sum(axis=1)
    return names, alike, known
