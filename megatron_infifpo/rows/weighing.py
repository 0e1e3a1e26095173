"""Constants that a method takes from all of its records: weights of pairs, scales of sources."""

import numpy as np
import torch

from megatron_infifpo import pair_weights
from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import Method
from megatron_infifpo.references.reference import References, value
from megatron_infifpo.rows.choice import Choice
from megatron_infifpo.source_values import standard_scales
from megatron_infifpo.tokens.dataset import TokenDataset


def weigh_pairs(
    method: Method, references: References, tokens: TokenDataset, pairs: Choice
) -> np.ndarray:
    """Return the weight of every record, float64 `[N]`; 1 where no source has a verdict.

    Args:
        method: with `pair_weights`.
        references: of the records.
        tokens: the records.
        pairs: chosen and rejected of each; one that lacks them has no verdict.

    Raises:
        UserError: no source of a domain has an accuracy, and the weights need one.
    """
    assert method.pair_weights is not None and method.verdict_scale is not None
    read = {}
    if "accuracy" in pair_weights.reads(method.pair_weights):
        _check_accuracies(references, tokens)
        read["accuracy"] = torch.from_numpy(references.accuracies[tokens.domain_codes])
    row = references.table(np.arange(len(tokens)), pairs.columns)
    _, sources, mask = value(row, means=method.length_normalization)
    lacking = np.logical_or.reduce([np.zeros(len(tokens), bool), *pairs.obstacles.values()])
    found = pair_weights.pair_weights(
        method.pair_weights,
        sources,
        scale=method.verdict_scale,
        source_mask=mask & ~torch.from_numpy(lacking)[:, None],
        cut=method.verdict_cut,
        **read,
    )
    return found.numpy()


def _check_accuracies(references: References, tokens: TokenDataset) -> None:
    """Refuse a domain that has sources, and no accuracy of any."""
    for code, domain in enumerate(tokens.domains):
        here = tokens.domain_codes == code
        names = [s.name for s in references.sources if s.takes_part[here].any()]
        if names and np.isnan(references.accuracies[code]).all():
            raise UserError(
                f"--pair-weights best-source needs to know which source is the best in the domain "
                f"{domain!r}, and none of {', '.join(names)} has an accuracy there: give "
                f"sources.yaml one, as in `accuracy: {{{domain}: 0.83}}`"
            )


def standardise(
    method: Method, references: References, columns: np.ndarray, usable: np.ndarray
) -> None:
    """Set the references' scales, so that all sources' margins are as wide as the initial pivot's.

    Args:
        method: says whether values are sums or means.
        references: of the records.
        columns: `[N, R]`, the responses of each record that the method compares, -1 for none.
        usable: bool `[N]`, the records that count.
    """
    indices = np.flatnonzero(usable)
    row = references.table(indices, columns[indices])
    initial, sources, mask = value(row, means=method.length_normalization)
    references.scales[:-1] = standard_scales(sources, initial, mask, row["valid"]).numpy()
