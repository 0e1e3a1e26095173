"""Metrics of a row, as `[sum, count]` so that Megatron averages them exactly over a step.

A domain that has no pair in a step has count 0 there, and Megatron's average is NaN: a gap in
TensorBoard and W&B, and no entry in its log line.
"""

import torch
from torch import Tensor

from megatron_infifpo.losses import CHOSEN, REJECTED
from megatron_infifpo.losses.lists import deviation
from megatron_infifpo.losses.tokens import TokenLosses
from megatron_infifpo.methods import Method
from megatron_infifpo.records.records import RESPONSES
from megatron_infifpo.reference import FusedReference
from megatron_infifpo.references.soft_targets import SEVERAL
from megatron_infifpo.rows import Row
from megatron_infifpo.training.objective import loss_arguments

# What is also reported for each domain; every source's share is, too.
_BY_DOMAIN = (
    "loss", "rewards/accuracy", "logps/accuracy", "logps/margin", "reward", "residual/std",
    "ce", "distance", "taught", "pair-weight",
)  # fmt: skip


def preference_metrics(
    method: Method,
    row: Row,
    policy: Tensor,
    reference: FusedReference,
    losses: Tensor,
    source_names: tuple[str, ...],
    domains: tuple[str, ...],
) -> dict[str, Tensor]:
    """Metrics of one row of pairs, or of lists: see `_list_metrics`.

    Args:
        method: the resolved method.
        row: the collated row.
        policy: `[B, R]` log-probs (means or sums, as the method has them).
        reference: the references used.
        losses: `[B]`.
        source_names: names of the M sources.
        domains: names by domain code.

    Returns:
        float32 `[sum, count]` by name:
        loss; rewards/accuracy, rewards/margin, rewards/<response> with the reward
        `beta (policy - reference)`; logps/*: the same of the policy alone; and for a fused
        reference share/<source> (its weight in the reference), clip-rate and clip-rate/<source>
        (share of source values that clipping changed); pair-weight, where pairs have one.
        domain/<domain>/*: some of these for each domain, where there are several.
    """
    if method.responses is None:
        return _list_metrics(method, row, policy, reference, losses, source_names, domains)
    pairs = {"loss": losses}
    for name, scores in (("rewards", method.beta * (policy - reference.logps)), ("logps", policy)):
        if scores.shape[1] > REJECTED:
            pairs[f"{name}/accuracy"] = scores[:, CHOSEN] > scores[:, REJECTED]
            pairs[f"{name}/margin"] = scores[:, CHOSEN] - scores[:, REJECTED]
        for response, column in zip(RESPONSES, scores.unbind(dim=1), strict=False):
            pairs[f"{name}/{response}"] = column
    if "pair_weights" in row:
        pairs["pair-weight"] = row["pair_weights"]
    if method.fused:
        for index, name in enumerate(source_names):
            pairs[f"share/{name}"] = reference.weights[..., index].mean(dim=1)
    ones = torch.ones_like(losses, dtype=torch.float32)
    metrics = _averages(pairs, ones)
    if reference.clipped is not None:
        mask = row["source_mask"][:, None].expand(-1, policy.shape[1], -1)
        metrics |= _clip_rates(mask, reference.clipped, source_names)
    by_domain = {n: v for n, v in pairs.items() if _in_domains(n)}
    return metrics | _by_domain(by_domain, ones, row["domain_codes"], domains)


def _list_metrics(
    method: Method,
    row: Row,
    policy: Tensor,
    reference: FusedReference,
    losses: Tensor,
    source_names: tuple[str, ...],
    domains: tuple[str, ...],
) -> dict[str, Tensor]:
    """Metrics of one row of lists, as `preference_metrics`.

    Means over prompts: loss; residual/std, the spread of what the loss makes equal for all
    responses of a prompt. Means over responses: reward, where the loss reads it; length, in tokens;
    no-end-of-turn, the share that was cut; kl/<source> and kl/initial, the policy's summed log-prob
    less the model's, in nats: an estimate of the KL where the responses are the policy's own; and
    for a fused reference share/<source>, clip-rate and clip-rate/<source>, as for pairs.
    """
    valid, counts = row["valid"], row["token_counts"]
    mask = row["source_mask"][:, None] & valid[..., None]
    sums = policy * counts if method.length_normalization else policy
    records = {"loss": _of_records(losses)}
    if method.loss is not None and method.loss.residuals is not None:
        found = method.loss.residuals(policy, reference.logps, **loss_arguments(method, row))
        records["residual/std"] = _of_records(deviation(found, valid))
    if "rewards" in method.reads:
        records["reward"] = _of_responses(row["rewards"], valid)
    records["length"] = _of_responses(counts, valid)
    records["no-end-of-turn"] = _of_responses(~row["ended"], valid)
    records["kl/initial"] = _of_responses(sums - row["initial_sum_logps"], valid)
    away = sums[..., None] - row["source_sum_logps"]
    for name, column, there in zip(source_names, away.unbind(-1), mask.unbind(-1), strict=False):
        records[f"kl/{name}"] = _of_responses(column, there)
    if method.fused:
        for name, column in zip(source_names, reference.weights.unbind(-1), strict=True):
            records[f"share/{name}"] = _of_responses(column, valid)
    metrics = _totals(records, row["domain_codes"], domains)
    if reference.clipped is not None:
        metrics |= _clip_rates(mask, reference.clipped, source_names)
    return metrics


def _totals(
    records: dict[str, Tensor], codes: Tensor, domains: tuple[str, ...]
) -> dict[str, Tensor]:
    """`[sum, count]` of each of the values `[B, 2]`, and in every domain, where there are some."""
    stacked = torch.stack([*records.values()])
    metrics = dict(zip(records, stacked.sum(dim=1).unbind(), strict=True))
    if len(domains) > 1:
        names = [name for name in records if _in_domains(name)]
        chosen = torch.stack([records[name] for name in names])
        for code, domain in enumerate(domains):
            inside = (codes == code)[:, None]
            parts = torch.where(inside, chosen, 0.0).sum(dim=1).unbind()
            metrics |= {f"domain/{domain}/{n}": x for n, x in zip(names, parts, strict=True)}
    return metrics


def _in_domains(name: str) -> bool:
    return name in _BY_DOMAIN or name.startswith("share/")


def _of_records(values: Tensor) -> Tensor:
    """`[sum, count]` of each record's value, `[B, 2]`."""
    return torch.stack([values.float(), torch.ones_like(values, dtype=torch.float32)], dim=-1)


def _of_responses(values: Tensor, there: Tensor) -> Tensor:
    """`[sum, count]` over each record's responses that are `there`, `[B, 2]`."""
    total = torch.where(there, values.float(), 0.0).sum(dim=1)
    return torch.stack([total, there.sum(dim=1).float()], dim=-1)


def token_metrics(
    row: Row,
    found: TokenLosses,
    sum_logps: Tensor,
    source_names: tuple[str, ...],
    domains: tuple[str, ...],
) -> dict[str, Tensor]:
    """Metrics of one row of chosen responses.

    Args:
        row: the collated row.
        found: losses of its K scored tokens.
        sum_logps: `[B]` summed log-probs.
        source_names: names of the sources of soft targets.
        domains: names by domain code.

    Returns:
        float32 `[sum, count]` by name: loss and domain/<domain>/loss, means over tokens, and
        logps/chosen, the mean over responses of their mean log-prob, and pair-weight, where pairs
        have one. Where sources teach, means over the tokens that have it of each part of the loss,
        ce, distance and chunk, as they are before they are weighted; taught, the share of tokens
        with a target; and share/<source>, which source the targets are of.
    """
    counts = row["token_counts"][:, CHOSEN].float()

    def by_record(values: Tensor, count: Tensor) -> Tensor:
        both = torch.stack([values.float(), count.float()], dim=-1)
        return both.new_zeros(len(counts), 2).index_add(0, row["segment_ids"], both)

    everywhere = torch.ones_like(found.losses)
    records = {"loss": by_record(found.losses, everywhere)}
    records["logps/chosen"] = _of_records(sum_logps / counts)
    if "pair_weights" in row:
        records["pair-weight"] = _of_records(row["pair_weights"])
    records |= {name: by_record(*part) for name, part in found.parts.items()}
    if found.parts:
        taught = found.parts["distance"].counts
        records["taught"] = by_record(taught, everywhere)
    if "soft_sources" in row:
        several = row["soft_sources"] == SEVERAL
        for code, name in enumerate(source_names, 1):
            records[f"share/{name}"] = by_record(row["soft_sources"] == code, taught)
        records["share/several"] = by_record(several, taught)
    return _totals(records, row["domain_codes"], domains)


def waste_metrics(row: Row) -> dict[str, Tensor]:
    """Shares of the step that are spent on padding and on waiting for the busiest rank."""
    return {name: values for name, values in row.items() if name.startswith("waste/")}


def _averages(values: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
    """`[sum, count]` of each of the values `[B]`, in a few operations for all of them."""
    sums = torch.stack([column.float() for column in values.values()]).sum(dim=-1)
    pairs = torch.stack([sums, counts.sum().expand_as(sums)], dim=-1)
    return dict(zip(values, pairs.unbind(), strict=True))


def _clip_rates(mask: Tensor, clipped: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Share of values that clipping changed, over all sources and for each; masked ones aside."""
    # The initial pivot as a source comes last, is never clipped, and is not in the mask.
    changed = clipped.sum(dim=(0, 1)).float()[: mask.shape[-1]]
    rates = torch.stack([changed, mask.sum(dim=(0, 1)).float()], dim=-1)
    by_source = zip(names, rates.unbind(), strict=False)
    return {"clip-rate": rates.sum(dim=0), **{f"clip-rate/{name}": x for name, x in by_source}}


def _by_domain(
    values: dict[str, Tensor], counts: Tensor, codes: Tensor, domains: tuple[str, ...]
) -> dict[str, Tensor]:
    """`[sum, count]` of each of the values `[B]` in every domain, where there are several."""
    if len(domains) < 2:
        return {}
    metrics: dict[str, Tensor] = {}
    for code, domain in enumerate(domains):
        inside = (codes == code).float()
        part = {f"domain/{domain}/{name}": column * inside for name, column in values.items()}
        metrics |= _averages(part, counts * inside)
    return metrics
