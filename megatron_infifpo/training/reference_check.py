"""Refuse references that are not of the pivot that training starts from."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from megatron.training import print_rank_0

from megatron_infifpo.engine.adapters import adapters_off
from megatron_infifpo.errors import UserError
from megatron_infifpo.losses import CHOSEN, REJECTED
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.encoding import scored_marks
from megatron_infifpo.training.probe import Difference, compare
from megatron_infifpo.training.settings import Run
from megatron_infifpo.training.start import Start

# Mean absolute difference of a response's log-probs, in nats a token, that precision explains.
# Products in float8 move SmolLM2's by 0.2 on average and 0.3 at most (docs/lab-log.md).
TOLERANCES = {"float32": 0.002, "float16": 0.04, "bfloat16": 0.25, "float8": 1.0}
# Of models with experts so many times as much, but in float32: rounding changes which ones a token
# goes to. Tiny ones differ by 0.2 in the worst response, dense ones of their size by 0.05.
OF_EXPERTS = 2.0
SHOWN = 3  # worst responses of a failed check
AROUND = 4  # tokens shown at each end of a response


def check_initial_logprobs(
    run: Run, start: Start, dataset: PreferenceDataset, models: Sequence[torch.nn.Module]
) -> None:
    """Run the pivot on the probe records; all ranks call it, once the checkpoint is loaded.

    At step 0 its log-probs must be the initial pivot's; equal files do not show that, since layers,
    flags and layouts lie between weights and log-probs. Later it says how far training has moved.
    A run of adapters still has the initial pivot in memory, so that it is checked at every start.

    Args:
        run: that is about to start.
        start: the checkpoint that it begins with.
        dataset: the training pairs with their log-probs.
        models: this rank's chunks of the model.

    Raises:
        UserError: they differ, unless `--reference-check` is warn or off.
    """
    initial = dataset.initial
    if initial is None or not run.config.checks_reference:
        return
    if start.step > 0:
        found = compare(run, models, dataset)
        records = len({difference.index for difference in found})
        print_rank_0(
            f"reference check: on {records} records the pivot has moved by {moved(found, dataset)} "
            "responses since step 0"
        )
        if run.lora is None:
            return
    with adapters_off(models):
        found = compare(run, models, dataset)
    records = len({difference.index for difference in found})
    tolerance, dtype = run.config.reference_tolerance, run.precision.dtype
    if tolerance is None:  # the coarser type decides; of imported log-probs it is not known
        types = [initial.manifest["dtype"], dtype]
        types += ["float8"] if run.precision.fp8 else []
        tolerance = max(TOLERANCES.get(name, TOLERANCES["bfloat16"]) for name in types)
        if run.arguments["num_experts"] and set(types) != {"float32"}:
            tolerance *= OF_EXPERTS
    worst = max(found, key=lambda difference: difference.size)
    if worst.size <= tolerance:
        print_rank_0(
            f"reference check: on {records} records the pivot agrees with {initial.prefix} within "
            f"{worst.size:.2g} nats a token (tolerance {tolerance})"
        )
        return
    complain(run, failure(found, tolerance, dataset, dtype))


def moved(found: Sequence[Difference], dataset: PreferenceDataset) -> str:
    """Say by how much the mean of a response has moved: of chosen and rejected, or of a list's."""
    if dataset.tokens.listed:
        return f"{np.mean([one.mean for one in found]):+.4f} nats a token of all"
    of = [np.mean([d.mean for d in found if d.response == r]) for r in (CHOSEN, REJECTED)]
    return f"{of[0]:+.4f} nats a token of chosen and {of[1]:+.4f} of rejected"


def complain(run: Run, message: str) -> None:
    """Stop, or warn: once, on rank 0."""
    first = run.layout.rank == 0
    if run.config.reference_check != "warn":
        raise UserError(message if first else "the reference check failed: see rank 0")
    if first:
        warnings.warn(message, stacklevel=3)


def failure(
    found: Sequence[Difference],
    tolerance: float,
    dataset: PreferenceDataset,
    dtype: str,
) -> str:
    """Say how many records differ, why probably, and show the worst, token by token."""
    initial = dataset.initial
    assert initial is not None
    bad = sorted((d for d in found if d.size > tolerance), key=lambda d: -d.size)
    made = initial.manifest
    lines = [
        f"at step 0 the pivot disagrees with the initial pivot's log-probs in {initial.prefix} on "
        f"{len({d.index for d in bad})} of {len({d.index for d in found})} records, by up to "
        f"{bad[0].size:.3g} nats a token (tolerance {tolerance}, --reference-tolerance)",
        f"  likely: {likely_cause(bad, tolerance)}",
        f"  scored from {made['model']} by {made['backend']} in {made['dtype']}; training in "
        f"{dtype}",
    ]
    for difference in bad[:SHOWN]:
        record = dataset.tokens.ids(difference.index)
        pair = dataset[difference.index]
        marks = scored_marks(pair.response_ids, pair.scored)[difference.response]
        ids = pair.response_ids[difference.response][marks]
        name = dataset.names(difference.index)[difference.response]
        lines.append(f"  record {record!r}, {name}, {difference.size:.3g} nats a token")
        lines += shown_tokens(difference, ids)
    lines.append(
        "score the pairs again with this checkpoint as --model, or pass --reference-check off if "
        "you want another reference; infifpo inspect --tokens shows a record's texts"
    )
    return "\n".join(lines)


def shown_tokens(difference: Difference, ids: np.ndarray) -> list[str]:
    """Show both ends of a response `[L]`, a line a token; its mean where no more is known."""
    if len(difference.initial) != len(ids):
        return [f"    mean {difference.now.mean():.3f}, was {difference.initial[0]:.3f}"]
    ends = sorted({*range(len(ids))[:AROUND], *range(len(ids))[-AROUND:]})
    values = zip(ids.tolist(), difference.now, difference.initial, strict=True)
    lines = [f"    token {i} (id {n}): {a:.3f}, was {b:.3f}" for i, (n, a, b) in enumerate(values)]
    return [lines[i] for i in ends]


def likely_cause(bad: Sequence[Difference], tolerance: float) -> str:
    """Guess from where in the responses the differences lie; B responses that differ."""
    if not all(np.isfinite(d.now).all() for d in bad):
        return "the pivot's weights or its precision: it gives NaN or infinite log-probs"
    sizes = [np.abs(d.by_token) for d in bad if len(d.by_token) >= 8]
    if not sizes:
        return "too little to tell: responses are short, or only their sums are known"

    def ratio(here: slice, there: slice) -> float:
        near, far = (np.mean([size[part].mean() for size in sizes]) for part in (here, there))
        return float(near / max(far, 1e-9))

    if ratio(slice(-1, None), slice(None, -1)) > 10:
        return "the end of the turn: the last token alone differs"
    if ratio(slice(None, 2), slice(2, None)) > 4:
        return (
            "the prompt: responses differ at their start most, as they do after another chat "
            "template, system message or cut"
        )
    halves = [len(size) // 2 for size in sizes]
    late = np.mean([s[h:].mean() for s, h in zip(sizes, halves, strict=True)])
    early = np.mean([s[:h].mean() for s, h in zip(sizes, halves, strict=True)])
    if late > 4 * early:
        return "positions: differences grow along a response (rotary scaling, window, context)"
    if bad[0].size < 5 * tolerance:
        return "precision: differences are small and everywhere; score and train in one data type"
    return "other weights, or layers that are set up otherwise: everything differs"
