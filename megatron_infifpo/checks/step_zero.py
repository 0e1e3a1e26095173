"""What a method makes of one record at step 0, when the policy is the initial pivot."""

from collections.abc import Iterator

from torch import Tensor

from megatron_infifpo.losses.lists import deviation
from megatron_infifpo.methods import Method
from megatron_infifpo.references.reference import value
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferenceDataset, PreferencePair
from megatron_infifpo.training.objective import loss_arguments, pair_losses


def reference_table(
    dataset: PreferenceDataset, pair: PreferencePair, method: Method
) -> Iterator[str]:
    """The pair's weight, each source's clipped value and share, the reference, the first loss."""
    assert dataset.initial is not None
    if dataset.initial.masked(pair.index):
        yield "\nno reference: the initial pivot has no log-probs; training leaves this record out"
        return
    if pair.weight is not None:
        yield f"\nweight by {method.pair_weights}: {pair.weight:.4f}"
    if method.reference is None:
        learns = "SFT, which learns from --soft-targets too" if method.soft_targets else "SFT"
        yield f"\nno reference: {learns}"
        return
    row = collate([pair])
    losses, initial, fused = pair_losses(method, row, row["initial_sum_logps"], progress=0.0)
    compared = "means" if method.length_normalization else "sums"
    yield f"\nreference at step 0: {method.reference}, {compared}, {method.objective}'s loss"
    yield f"{'response':<14}{'source':<24}{'value':>12}{'clipped to':>12}{'share':>8}"
    sources = value(row, means=method.length_normalization).sources
    sources_used = dataset.source_names if method.fused else ()
    names = dataset.names(pair.index)
    for r, response in enumerate(names):
        own = initial[0, r].item()
        for m, name in enumerate(sources_used):
            if not row["source_mask"][0, m]:
                yield f"{response:<14}{name:<24}{'masked':>12}"
                continue
            changed = fused.clipped is not None and bool(fused.clipped[0, r, m])
            clipped = f"{own:.4f}" if changed else "-"
            share = fused.weights[0, r, m].item()
            yield f"{response:<14}{name:<24}{sources[0, r, m]:>12.4f}{clipped:>12}{share:>8.3f}"
        if method.initial_as_source:
            share = fused.weights[0, r, -1].item()
            yield f"{response:<14}{'initial pivot':<24}{own:>12.4f}{'-':>12}{share:>8.3f}"
        yield f"{response:<14}{'reference':<24}= {fused.logps[0, r]:.4f} (initial pivot {own:.4f})"
    if method.loss is not None and method.loss.residuals is not None:
        arguments = loss_arguments(method, row, 0.0)
        found = method.loss.residuals(initial, fused.logps, **arguments)
        yield from _residuals(row, names, found, rewarded="rewards" in method.reads)
    yield f"loss {losses.item():.4f}"


def _residuals(
    row: Row, names: tuple[str, ...], residuals: Tensor, *, rewarded: bool
) -> Iterator[str]:
    """What a loss of lists makes equal for all responses: residuals `[1, R]`, with the rewards."""
    yield "\nresidual: the same number for all responses where the loss is lowest"
    yield f"{'response':<14}{'reward':>12}{'residual':>12}"
    for r, response in enumerate(names):
        reward = f"{row['rewards'][0, r]:.4f}" if rewarded else "-"
        yield f"{response:<14}{reward:>12}{residuals[0, r]:>12.4f}"
    spread = deviation(residuals, row["valid"]).item()
    yield f"{'spread':<14}{'':>12}{spread:>12.4f}"
