"""What a report is made of: curves from TensorBoard files, and the pairs as the run fuses them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.losses import CHOSEN, REJECTED
from megatron_infifpo.methods import Method
from megatron_infifpo.references.reference import Reference, value
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.training.objective import pair_losses

Curve = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Steps, values and seconds since the epoch, each `[S]`."""


def read_curves(folder: Path) -> dict[str, Curve]:
    """Read every scalar of a TensorBoard folder; the last attempt at a step counts.

    Raises:
        UserError: there is none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, Curve] = {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    for tag in events.Reload().Tags()["scalars"] if folder.is_dir() else ():
        if tag.endswith(" vs samples"):  # Megatron writes everything twice
            continue
        by_step = {event.step: event for event in events.Scalars(tag)}
        last = [by_step[step] for step in sorted(by_step)]
        curves[tag] = (
            np.array([event.step for event in last]),
            np.array([event.value for event in last]),
            np.array([event.wall_time for event in last]),
        )
    if not curves:
        raise UserError(
            f"{folder} has no TensorBoard scalars: train with --tensorboard-dir, and give that "
            "folder to --tensorboard-dir here"
        )
    return curves


def method_of(run: dict[str, Any]) -> Method:
    """Return the method that run.json describes.

    Raises:
        UserError: another version of this program wrote it, with other fields.
    """
    try:
        return Method.from_description(run["identity"]["method"])
    except TypeError as error:
        raise UserError(
            f"run.json describes a method that this version does not have ({error}): make the "
            "report with the version that trained"
        ) from None


@dataclass(frozen=True)
class Pairs:
    """The N usable pairs of a run, M sources, and what the method makes of them.

    Attributes:
        dataset: the pairs.
        method: the run's.
        indices: of the records, `[N]`.
        models: names: initial pivot, sources, and the trained pivot if it was scored.
        means: mean log-prob of each model, float64 `[N, 2, models]`, NaN where masked.
        selected: weight of each source in the reference of step 0, `[N, 2, M]`; None without
            fusion.
        selected_after: the same under the trained pivot, if it was scored.
        losses: at step 0, `[N]`.
    """

    dataset: PreferenceDataset
    method: Method
    indices: np.ndarray
    models: tuple[str, ...]
    means: np.ndarray
    selected: np.ndarray | None
    selected_after: np.ndarray | None
    losses: np.ndarray

    def margins(self, model: int) -> np.ndarray:
        """Mean log-prob of chosen minus that of rejected under one of `models`, `[N]`."""
        return self.means[:, CHOSEN, model] - self.means[:, REJECTED, model]


def read_pairs(
    data: str, sources: str, method: Method, max_tokens: int, trained: str | None
) -> Pairs:
    """Open the pairs of a run and fuse their references.

    Args:
        data, sources: prefix of the token dataset, and sources.yaml.
        method: the run's.
        max_tokens: --seq-length of the run.
        trained: prefix of the trained pivot's log-probs, if it was scored.

    Raises:
        UserError: the data sets do not belong together, or the trained pivot lacks some pairs.
    """
    dataset = PreferenceDataset.for_method(method, data, read_sources(sources))
    assert dataset.references is not None
    indices = dataset.require_eligible(max_tokens)
    row = dataset.references.table(indices, dataset.columns[indices])
    losses, _, fused = pair_losses(method, row, row["initial_sum_logps"], progress=0.0)
    values = value(row, means=True)
    source_means = np.where(values.mask[:, None], values.sources, np.nan)
    means = [values.initial[..., None].numpy(), source_means]
    names, after = ("initial pivot", *dataset.source_names), None
    if trained is not None:
        after_training = Reference.open("trained pivot", trained, dataset.tokens, pivot=True)
        if missing := int((~after_training.takes_part[indices]).sum()):
            raise UserError(
                f"{trained} has no log-probs of {missing} of the {len(indices)} pairs of this run, "
                "expected all of them: score the trained pivot as the initial one was scored"
            )
        sums, counts = after_training.table(indices, dataset.columns[indices])
        means.append((sums / counts)[..., None])
        names = (*names, after_training.name)
        after = pair_losses(method, row, torch.from_numpy(sums))[2].weights.numpy()
    return Pairs(
        dataset,
        method,
        indices,
        names,
        np.concatenate(means, axis=2)[:, :2],
        fused.weights.numpy()[:, :2] if method.fused else None,
        after[:, :2] if method.fused and after is not None else None,
        losses.numpy(),
    )


def shares(weights: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Mean weight of every source in each group of pairs, `[groups, M]`."""
    return np.array([weights[group].mean(axis=(0, 1)) for group in groups])


def agreement(pairs: Pairs) -> np.ndarray:
    """Share of pairs on which two models prefer the same response, `[models, models]`."""
    margins = np.stack([pairs.margins(i) for i in range(len(pairs.models))])
    found = np.full((len(margins), len(margins)), np.nan)
    for i, a in enumerate(margins):
        for j, b in enumerate(margins):
            both = np.isfinite(a) & np.isfinite(b)
            if both.any():
                found[i, j] = ((a > 0) == (b > 0))[both].mean()
    return found
