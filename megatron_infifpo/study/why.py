"""Why a method does what it does: how hard it pushes each pair, and what its reference is made of.

All from stored numbers, those that training reads, of all records at once and in float64; no model
is run. The policy is the initial pivot, which is step 0, or a trained model that was scored on the
same records.

The coefficient of a pair is how hard its loss pulls chosen and rejected apart: half of what
gradient descent adds to the difference of their log-probs, by autograd through
`training.objective.pair_losses`, so that weights of pairs are in it, too. Its unit is the pull of
the method's loss, unweighted, on a pair whose policy stands where its reference stands; that is
1/2. For DPO's loss it is `sigmoid(-beta d)`, beta being gone; for IPO's `1/2 - beta d`, which may
be negative. An SFT term is left out: it pulls all pairs alike.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_infifpo.errors import UserError
from megatron_infifpo.losses import CHOSEN, REJECTED, preference_loss
from megatron_infifpo.losses.lists import deviation
from megatron_infifpo.methods import Method
from megatron_infifpo.reference import FusedReference
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.reference import Reference, value
from megatron_infifpo.references.sources import INITIAL, read_sources
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.study.statistics import auc
from megatron_infifpo.training.objective import loss_arguments, pair_losses

LOW, HIGH = 0.1, 0.9
"""Below the first a pair counts for little; above the second the pull can hardly grow any more."""

Found = Iterator[tuple[str, float]]


@dataclass(frozen=True)
class Case:
    """Records of a method, with all that is stored of them; B records, R responses, M sources.

    Attributes:
        method: the resolved method.
        row: the values as a row has them, in float64.
        sums: `[B, R]`, the policy's summed log-probs.
        truth: `[B]`, or of lists `[B, R]`: 1 right, -1 wrong, 0 neither.
        names: of the sources.
        progress: share of the training that is done.
    """

    method: Method
    row: Row
    sums: Tensor
    truth: Tensor
    names: tuple[str, ...]
    progress: float

    @property
    def there(self) -> Tensor:
        """Bool `[B, R, M]`, which values of sources there are."""
        there: Tensor = self.row["source_mask"][:, None] & self.row["valid"][..., None]
        return there


def explain(
    method: Method,
    data: PreferenceDataset | tuple[str | Path, str | Path],
    truth: np.ndarray,
    policy: LogprobStore | None = None,
) -> dict[str, float]:
    """Say how hard a method pushes which pairs, and what its reference is made of.

    Args:
        method: the resolved method.
        data: the records, opened for the method, or a token data set's prefix and a sources.yaml.
        truth: `[N]`, of every record: 1 where the chosen response is truly the better one, -1 where
            the rejected one is, 0 where neither is. Of lists `[N, R]`, of every response: 1 right,
            -1 wrong, 0 neither; R as many as the data set's records have.
        policy: a trained model's log-probs of the same records; None: the initial pivot's, step 0.

    Returns:
        Numbers by name; what a method has none of is left out. `_pairs`, `_lists`, `_reference` and
        `_distances` say which. Where the method weighs pairs also weight_right and weight_wrong,
        the mean weights, which alone make the auc of SFT.

    Raises:
        UserError: data or log-probs do not belong together, or there are none.
    """
    if not isinstance(data, PreferenceDataset):
        prefix, sources = data
        data = PreferenceDataset.for_method(method, prefix, read_sources(sources))
    case = _gather(method, data, truth, policy)
    found = {"records": float(len(case.sums))} | dict(_distances(case))
    if method.pair_weights is not None:
        found |= dict(_told_apart("weight", case.row["pair_weights"], case.truth))
    if method.loss is not None:
        bare = replace(method, sft_weight=None)
        leaf = case.sums.clone().requires_grad_()
        losses, compared, fused = pair_losses(bare, case.row, leaf, progress=case.progress)
        (gradient,) = torch.autograd.grad(losses.sum(), compared)
        compared = compared.detach()
        if method.responses is None:
            found |= dict(_lists(case, gradient, compared, fused))
        else:
            found |= dict(_pairs(case, _pull(gradient) / (2 * _unit(bare, case.progress))))
        found |= dict(_reference(case, fused))
    return {name: number for name, number in found.items() if math.isfinite(number)}


def _gather(
    method: Method, data: PreferenceDataset, truth: np.ndarray, policy: LogprobStore | None
) -> Case:
    """Stored values of all records that training can use and that the policy was scored on."""
    if data.references is None:
        raise UserError("there is nothing to explain without the log-probs of a sources.yaml")
    if len(truth) != len(data):
        raise UserError(f"truth is of {len(truth)} records, expected {len(data)}")
    indices = data.eligible(int(data.segment_lengths.max()))
    if policy is not None:
        policy.check_against(data.tokens, same_tokenizer=True)
        indices = indices[~policy.masked_records[indices]]
    columns = data.columns[indices]
    if not data.tokens.listed and method.loss is not None:
        columns = columns[:, : method.responses]  # the data may be opened for WRPO, too
    row: Row = dict(data.references.table(indices, columns))
    row["indices"] = torch.from_numpy(indices)
    row["domain_codes"] = torch.from_numpy(data.domain_codes[indices])
    if data.rewards is not None:
        row["rewards"] = torch.from_numpy(data.rewards[indices])
    if data.pair_weights is not None:
        row["pair_weights"] = torch.from_numpy(data.pair_weights[indices])
    sums = row["initial_sum_logps"]
    if policy is not None:
        of_policy = Reference("policy", policy, ~policy.masked_records)
        sums = torch.from_numpy(of_policy.table(indices, columns)[0])
    found = truth[indices]
    if found.ndim == 2:
        found = np.where(columns < 0, 0, np.take_along_axis(found, columns.astype(np.int64), 1))
    sign = torch.from_numpy(np.sign(found).astype(np.float64))
    return Case(method, row, sums, sign, data.source_names, 0.0 if policy is None else 1.0)


def _pull(gradient: Tensor) -> Tensor:
    """Half of what descent adds to preferred less rejected, `[B]`, of a gradient `[B, R]`."""
    preferred = gradient.sum(dim=1) - gradient[:, REJECTED]
    return (gradient[:, REJECTED] - preferred) / 2


def _unit(method: Method, progress: float) -> float:
    """The pull on a pair whose policy stands at its reference."""
    assert method.responses is not None
    at = torch.zeros(1, method.responses, dtype=torch.float64, requires_grad=True)
    options = {"beta": method.beta, **method.loss_options(progress)}
    loss = preference_loss(method.objective, at, at.detach(), **options)
    return float(_pull(torch.autograd.grad(loss.sum(), at)[0]))


def _pairs(case: Case, coefficient: Tensor) -> Found:
    """How hard which pairs are pushed.

    coefficient: mean of all, _right and _wrong of truly right and of mislabelled pairs; auc: how
    well it tells these two apart, 1/2 by chance; push: twice the coefficient, 1 for DPO at step 0;
    saturation: the share of pairs with a coefficient below 0.1, and full: of those above 0.9.
    policy_margin: chosen less rejected summed log-prob; policy_right: the share of pairs with a
    truth of which the policy prefers the right response; policy_right_wrong: of mislabelled ones.
    """
    yield "coefficient", _mean(coefficient)
    yield "push", _mean(2 * coefficient)
    yield "saturation", _mean(coefficient < LOW)
    yield "full", _mean(coefficient > HIGH)
    yield from _told_apart("coefficient", coefficient, case.truth)
    margin = case.sums[:, CHOSEN] - case.sums[:, REJECTED]
    right = _prefers_right(margin, case.truth)
    yield "policy_margin", _mean(margin)
    yield "policy_right", _mean(right, case.truth != 0)
    yield "policy_right_wrong", _mean(right, case.truth < 0)


def _lists(case: Case, gradient: Tensor, policy: Tensor, fused: FusedReference) -> Found:
    """How far lists are from where their loss is lowest.

    residual_std: the spread within a list of what is equal there. pull: what descent adds to a
    response's log-prob, by beta; _right and _wrong: of responses that are, where the truth is known
    of each; auc: how well it tells these two apart.
    """
    method, row = case.method, case.row
    assert method.loss is not None
    if method.loss.residuals is not None:
        arguments = loss_arguments(method, row, case.progress)
        residuals = method.loss.residuals(policy, fused.logps, **arguments)
        yield "residual_std", _mean(deviation(residuals, row["valid"]))
    if case.truth.shape == gradient.shape:
        yield from _told_apart("pull", -gradient / method.beta, case.truth)


def _told_apart(name: str, values: Tensor, truth: Tensor) -> Found:
    """Means of right and wrong ones; and auc, how well the values tell them apart."""
    yield f"{name}_right", _mean(values, truth > 0)
    yield f"{name}_wrong", _mean(values, truth < 0)
    known = truth != 0
    yield "auc", auc(values[known].numpy(), truth[known].numpy() > 0)


def _reference(case: Case, fused: FusedReference) -> Found:
    """What the reference says, and whose words these are.

    margin: of the reference, chosen less rejected, as the method compares log-probs; margin_rms, of
    these; margin_above_initial: less the initial pivot's own, which clipping keeps at 0 or above at
    step 0.
    Of a fused one, over responses: share/SOURCE, and share/initial, where no source takes part or
    it is a source itself; clip_rate and clip_rate/SOURCE: the share of values that clipping
    changed; clip_rate_used: the same of those in the reference, by their weight.
    right_source: the share of pairs with a truth in which the source in the reference prefers the
    right response, by its own margin; a mixture's by weight. right_source_wrong: of mislabelled
    ones. right_source/SOURCE: of this source, in the reference or not.
    """
    row, valid = case.row, case.row["valid"]
    initial, sources, mask = value(row, means=case.method.length_normalization)
    pairs = case.method.responses is not None
    if pairs:
        margin, of_initial = (x[:, CHOSEN] - x[:, REJECTED] for x in (fused.logps, initial))
        yield "margin", _mean(margin)
        yield "margin_rms", _mean(margin.square()) ** 0.5
        yield "margin_above_initial", _mean(margin - of_initial)
    if not case.method.fused:
        return
    weights = fused.weights[..., : len(case.names)]
    yield from _by_source("share", weights, valid[..., None].expand_as(weights), case.names)
    yield f"share/{INITIAL}", _mean(1 - weights.sum(dim=-1), valid)
    if fused.clipped is not None:
        changed = fused.clipped[..., : len(case.names)]
        yield "clip_rate", _mean(changed, case.there)
        yield from _by_source("clip_rate", changed, case.there, case.names)
        yield "clip_rate_used", _mean((weights * changed).sum(dim=-1), valid)
    if not pairs:
        return
    right = _prefers_right(sources[:, CHOSEN] - sources[:, REJECTED], case.truth[:, None])
    by_record = weights.mean(dim=1)  # of either response
    total, used = (by_record * right).sum(dim=-1), by_record.sum(dim=-1)
    for suffix, known in (("", case.truth != 0), ("_wrong", case.truth < 0)):
        yield f"right_source{suffix}", float(total[known].sum() / used[known].sum())
    yield from _by_source("right_source", right, mask & (case.truth != 0)[:, None], case.names)


def _distances(case: Case) -> Found:
    """How far models are apart on these texts, and how long the texts are.

    kl_initial and kl_sources/SOURCE: the mean absolute difference of a response's summed log-prob
    under policy and model, in nats: a stand-in for the KL, which needs texts of the policy's own;
    kl_sources: over all values of sources. drift: the mean difference from the initial pivot, with
    its sign. length: scored tokens of a response. drift and length also _chosen and _rejected.
    """
    row, valid = case.row, case.row["valid"]
    drift = case.sums - row["initial_sum_logps"]
    yield "kl_initial", _mean(drift.abs(), valid)
    away = (case.sums[..., None] - row["source_sum_logps"]).abs()
    yield "kl_sources", _mean(away, case.there)
    yield from _by_source("kl_sources", away, case.there, case.names)
    for name, values in (("drift", drift), ("length", row["token_counts"])):
        yield name, _mean(values, valid)
        if case.method.responses is not None:
            columns = zip(("chosen", "rejected"), values.unbind(dim=1), strict=False)
            yield from ((f"{name}_{response}", _mean(column)) for response, column in columns)


def _by_source(name: str, values: Tensor, there: Tensor, names: tuple[str, ...]) -> Found:
    """Mean of each source's values `[..., M]` that are there."""
    for source, own, known in zip(names, values.unbind(-1), there.unbind(-1), strict=True):
        yield f"{name}/{source}", _mean(own, known)


def _prefers_right(margins: Tensor, truth: Tensor) -> Tensor:
    """1 where a margin has the sign of the truth, 1/2 where it is 0."""
    return (1 + torch.sign(margins) * truth) / 2


def _mean(values: Tensor, where: Tensor | None = None) -> float:
    """Mean of some of the values; NaN where there are none."""
    return float((values if where is None else values[where]).double().mean())
