"""Figures of a report, as PNG."""

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from megatron_infifpo.report.collect import Curve, Pairs, agreement, shares  # noqa: E402

SIZE = (9.0, 3.2)  # inches of a row of axes


def png(figure: Figure) -> bytes:
    """Render a figure and close it."""
    stream = io.BytesIO()
    figure.tight_layout()
    figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
    return stream.getvalue()


def curves(panels: Sequence[tuple[str, dict[str, Curve]]], over: str = "step") -> bytes:
    """Draw panels of curves over steps, in one row; each is a title and named curves."""
    figure, axes = plt.subplots(1, len(panels), figsize=SIZE, squeeze=False)
    for axis, (title, found) in zip(axes[0], panels, strict=True):
        for name, (steps, values, _) in found.items():
            axis.plot(steps, values, label=name, linewidth=1.3, marker="." * (len(steps) < 20))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(over)
        axis.grid(alpha=0.3)
        if len(found) > 1:
            axis.legend(fontsize=7)
    return png(figure)


def selection(pairs: Pairs, weights: np.ndarray, groups: dict[str, np.ndarray]) -> bytes:
    """Draw which source makes the reference, by group of records, for all responses."""
    names = list(pairs.dataset.source_names)
    names += ["initial pivot"] * (weights.shape[2] > len(names))
    found = shares(pairs, weights, list(groups.values()))
    figure, axis = plt.subplots(figsize=(SIZE[0], 0.8 + 0.4 * len(groups)))
    left = np.zeros(len(groups))
    for column, name in enumerate(names):
        axis.barh(list(groups), found[:, column], left=left, label=name)
        left += found[:, column]
    axis.set_xlim(0, 1)
    axis.invert_yaxis()
    axis.set_xlabel("share of the references")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)


def distributions(pairs: Pairs) -> bytes:
    """Draw each model's mean log-probs of chosen and rejected responses, or of all."""
    kinds = _kinds(pairs)
    figure, axes = plt.subplots(1, len(kinds), figsize=SIZE, sharex=True, sharey=True)
    finite = pairs.means[np.isfinite(pairs.means)]
    bins = np.linspace(np.quantile(finite, 0.005), finite.max(), 40)
    for axis, (title, inside) in zip(np.atleast_1d(axes), kinds.items(), strict=True):
        for model, name in enumerate(pairs.models):
            values = pairs.means[..., model][inside]
            axis.hist(values[np.isfinite(values)], bins, histtype="step", label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("mean log-prob of a response, nats a token")
    figure.axes[0].legend(fontsize=7)
    return png(figure)


def _kinds(pairs: Pairs) -> dict[str, np.ndarray]:
    """Kinds of responses by title, bool `[N, R]`: by their role, in lists by the judge's scores."""
    if not pairs.lists:
        places = np.broadcast_to(np.arange(pairs.valid.shape[1]), pairs.valid.shape)
        return {name: places == place for place, name in enumerate(pairs.roles)}
    if pairs.scores is None:
        return {"all responses": pairs.valid}
    counts = np.isfinite(pairs.scores).sum(axis=1, keepdims=True)
    means = np.nansum(pairs.scores, axis=1, keepdims=True) / counts.clip(1)
    return {
        "scored above the prompt's mean": pairs.scores > means,
        "not above it": pairs.scores <= means,
    }


def agreements(pairs: Pairs) -> bytes:
    """Draw on which share of two responses to a prompt two models prefer the same one."""
    found, size = agreement(pairs), len(pairs.models)
    figure, axis = plt.subplots(figsize=(1.8 + 0.9 * size, 1.2 + 0.55 * size))
    axis.imshow(found, vmin=0.5, vmax=1.0, cmap="viridis", aspect="auto")
    _write_numbers(axis, found)
    axis.set_xticks(range(size), pairs.models, rotation=25, ha="right", fontsize=8)
    axis.set_yticks(range(size), pairs.models, fontsize=8)
    return png(figure)


def _write_numbers(axis: Axes, found: np.ndarray) -> None:
    for (i, j), value in np.ndenumerate(found):
        colour = "white" if not value > 0.8 else "black"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
