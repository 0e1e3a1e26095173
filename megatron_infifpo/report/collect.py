"""What a report is made of: curves from TensorBoard, and the records as the run fuses them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.losses import CHOSEN, REJECTED
from megatron_infifpo.methods import Method
from megatron_infifpo.records.records import RESPONSES
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
    """The N usable records of a run, M sources, and what the method makes of them.

    Of pairs R is 2, chosen and rejected, or a list's best and worst; for a loss of lists there are
    up to R responses.

    Attributes:
        dataset: the records.
        method: the run's.
        indices: of the records, `[N]`.
        models: names: initial pivot, sources, and the trained pivot if it was scored.
        valid: bool `[N, R]`, the responses that are there.
        means: mean log-prob of each model, float64 `[N, R, models]`, NaN where masked or absent.
        reference: float64 `[N, R]`, of step 0 as the method compares it, NaN where absent; None
            without fusion.
        scores: a judge's, float64 `[N, R]`, NaN where there is none; None without any.
        selected: weight of each source in the reference of step 0, `[N, R, M]`, 0 where absent;
            None without fusion.
        selected_after: the same under the trained pivot, if it was scored.
        losses: at step 0, `[N]`.
    """

    dataset: PreferenceDataset
    method: Method
    indices: np.ndarray
    models: tuple[str, ...]
    valid: np.ndarray
    means: np.ndarray
    reference: np.ndarray | None
    scores: np.ndarray | None
    selected: np.ndarray | None
    selected_after: np.ndarray | None
    losses: np.ndarray

    @property
    def lists(self) -> bool:
        """Whether the loss compares lists, of which no response is chosen or rejected."""
        return self.method.responses is None

    @property
    def roles(self) -> tuple[str, ...]:
        """What the two responses of a pair are."""
        return ("best", "worst") if self.dataset.tokens.listed else RESPONSES[:2]

    def margins(self, model: int) -> np.ndarray:
        """Mean log-prob of chosen minus that of rejected under one of `models`, `[N]`."""
        return self.means[:, CHOSEN, model] - self.means[:, REJECTED, model]


def read_pairs(
    data: str, sources: str, method: Method, max_tokens: int, trained: str | None
) -> Pairs:
    """Open the records of a run and fuse their references.

    Args:
        data, sources: prefix of the token dataset, and sources.yaml.
        method: the run's.
        max_tokens: --seq-length of the run.
        trained: prefix of the trained pivot's log-probs, if it was scored.

    Raises:
        UserError: the data sets do not belong together, or the trained pivot lacks some records.
    """
    dataset = PreferenceDataset.for_method(method, data, read_sources(sources))
    assert dataset.references is not None
    indices = dataset.require_eligible(max_tokens)
    columns = dataset.columns[indices]
    row = dataset.references.table(indices, columns)
    if dataset.rewards is not None:
        row["rewards"] = torch.from_numpy(dataset.rewards[indices])
    if dataset.pair_weights is not None:
        row["pair_weights"] = torch.from_numpy(dataset.pair_weights[indices])
    losses, _, fused = pair_losses(method, row, row["initial_sum_logps"], progress=0.0)
    values = value(row, means=True)
    source_means = np.where(values.mask[:, None], values.sources, np.nan)
    means = [values.initial[..., None].numpy(), source_means]
    names, after = ("initial pivot", *dataset.source_names), None
    if trained is not None:
        after_training = Reference.open("trained pivot", trained, dataset.tokens, pivot=True)
        if missing := int((~after_training.takes_part[indices]).sum()):
            raise UserError(
                f"{trained} has no log-probs of {missing} of the {len(indices)} "
                f"{'lists' if dataset.tokens.listed else 'pairs'} of this run, expected all of "
                "them: score the trained pivot as the initial one was scored"
            )
        sums, counts = after_training.table(indices, columns)
        means.append((sums / counts.clip(1))[..., None])
        names = (*names, after_training.name)
        after = pair_losses(method, row, torch.from_numpy(sums))[2].weights.numpy()
    shown = slice(None if method.responses is None else 2)
    valid = (columns >= 0)[:, shown]
    return Pairs(
        dataset,
        method,
        indices,
        names,
        valid,
        np.where(valid[..., None], np.concatenate(means, axis=2)[:, shown], np.nan),
        np.where(valid, fused.logps[:, shown], np.nan) if method.fused else None,
        _scores(dataset, indices, columns[:, shown]),
        fused.weights.numpy()[:, shown] if method.fused else None,
        after[:, shown] if method.fused and after is not None else None,
        losses.numpy(),
    )


def _scores(
    dataset: PreferenceDataset, indices: np.ndarray, columns: np.ndarray
) -> np.ndarray | None:
    if dataset.tokens.scores is None:
        return None
    return np.where(columns < 0, np.nan, dataset.tokens.scores[indices[:, None], columns])


def shares(pairs: Pairs, weights: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Mean weight of every source over the responses of each group of records, `[groups, M]`."""
    return np.array(
        [weights[group].sum(axis=(0, 1)) / pairs.valid[group].sum() for group in groups]
    )


def gaps_between(values: np.ndarray) -> Iterator[np.ndarray]:
    """Differences `[N, some, ...]` of values `[N, R, ...]`, of each two responses once."""
    for first in range(values.shape[1] - 1):
        yield values[:, first, None] - values[:, first + 1 :]


def agreement(pairs: Pairs) -> np.ndarray:
    """Share of two responses to a prompt that two models rank alike, `[models, models]`."""
    same = np.zeros((len(pairs.models),) * 2)
    known = same.copy()
    for gaps in gaps_between(pairs.means):
        flat = gaps.reshape(-1, len(pairs.models))
        there = np.isfinite(flat)
        up, down = ((there & side).astype(float) for side in (flat > 0, ~(flat > 0)))
        same += up.T @ up + down.T @ down
        known += there.T.astype(float) @ there
    return np.divide(same, known, out=np.full_like(same, np.nan), where=known > 0)
