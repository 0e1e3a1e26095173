"""Data of a training run: open it, and derive from it how long the run is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import Method
from megatron_infifpo.reference import FUSIONS
from megatron_infifpo.references.reference import References
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.plan import evaluation_steps, fitting_micro_batch_size
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.storage.notes import counted
from megatron_infifpo.training.config import RunConfig
from megatron_infifpo.training.settings import Run

NOT_SAVED = "NOTHING IS SAVED, since there is no --save"


@dataclass(frozen=True)
class Datasets:
    """What a run trains and validates on.

    Attributes:
        train: the training pairs.
        valid: the held-out ones, if there are any.
        since: steps that were done before the first one on these pairs: where their round began.
    """

    train: PreferenceDataset
    valid: PreferenceDataset | None
    since: int = 0


def open_datasets(config: RunConfig) -> Datasets:
    """Open what a run trains and validates on.

    Raises:
        UserError: a dataset cannot be read, or does not fit.
    """
    train = _open(
        config.preference_data, config.preference_sources, config.soft_targets, config.method
    )
    if config.preference_valid_data is None:
        return Datasets(train, None)
    valid = _open(
        config.preference_valid_data,
        config.preference_valid_sources,
        config.valid_soft_targets,
        config.method,
    )
    if valid.source_names != train.source_names:
        found, expected = (", ".join(data.source_names) for data in (valid, train))
        raise UserError(
            f"{config.preference_valid_sources} lists the sources {found}; expected those of "
            f"{config.preference_sources}, in the same order: {expected}"
        )
    names = [() if data.targets is None else data.targets.sources for data in (valid, train)]
    if valid.targets is not None and names[0] != names[1]:
        raise UserError(
            f"{config.valid_soft_targets} is of the sources {', '.join(names[0])}; expected those "
            f"of {config.soft_targets}, in the same order: {', '.join(names[1])}"
        )
    if train.references is not None and valid.references is not None:
        valid.references.scales = train.references.scales  # held-out margins change no scale
    # One list of names for the metrics of both.
    train.align_domains(valid.domains)
    valid.align_domains(train.domains)
    return Datasets(train, valid)


def _open(
    prefix: str, sources: str | None, soft_targets: str | None, method: Method
) -> PreferenceDataset:
    config = None if sources is None else read_sources(sources)
    return PreferenceDataset.for_method(method, prefix, config, soft_targets=soft_targets)


def lengths(
    config: RunConfig, given: Mapping[str, Any], datasets: Datasets, rows: RowLayout
) -> dict[str, Any]:
    """Lengths of training, of validation, of rows and of micro-batches, where no flag has them.

    Args:
        config: the run as it was asked for.
        given: Megatron's arguments by name, with the model's architecture.
        datasets: what the run trains and validates on.
        rows: how its pairs lie in rows.

    Returns:
        Megatron arguments by name.

    Raises:
        UserError: a batch that cannot be laid out, or no pair that fits.
    """
    train, pairs = datasets.train, given["global_batch_size"]
    found = {"seq_length": _longest(given), "train_iters": given["train_iters"]}
    usable = train.require_eligible(found["seq_length"])
    if given["train_iters"] is None and given["train_samples"] is None:
        own = max(1, len(usable) * (config.preference_epochs or 1) // pairs)
        found["train_iters"] = datasets.since + own
    steps = found["train_iters"] or given["train_samples"] // pairs
    if given["eval_interval"] is None:
        found["eval_interval"] = steps + 1  # at the end, where Megatron evaluates in any case
    if given["save"] is not None and given["save_interval"] is None:
        found["save_interval"] = max(1, steps)  # at the end
    ranks = _data_parallel_size(given)
    size = given["micro_batch_size"]
    if pairs % ((size or 1) * ranks):
        what = f"--micro-batch-size {size} x " if size else ""
        raise UserError(
            f"--global-batch-size is {pairs}, expected a multiple of {(size or 1) * ranks}: "
            f"{what}{ranks} data-parallel ranks"
        )
    if size is None:
        assert config.micro_batch_tokens is not None
        end = found["train_iters"] or -(-given["train_samples"] // pairs)
        found["micro_batch_size"] = size = fitting_micro_batch_size(
            train.pair_lengths(rows)[usable],
            config.micro_batch_tokens,
            seed=given["seed"],
            steps=max(1, _last_step(config, end) - datasets.since),
            global_batch_size=pairs,
            data_parallel_size=ranks,
        )
    if config.method.several_pairs and size < 2:
        raise UserError(
            f"--objective {config.method.objective} compares the pairs of a row: with "
            "--micro-batch-size 1 there is nothing to compare; give a larger one"
        )
    found["eval_iters"] = 0
    if datasets.valid is not None:
        held_out = len(datasets.valid.eligible(found["seq_length"]))
        found["eval_iters"] = evaluation_steps(held_out, pairs, pairs // size)
    return found


def _longest(given: Mapping[str, Any]) -> int:
    """Return how many tokens the longest text may have.

    Raises:
        UserError: the model is made for shorter ones.
    """
    context: int = given["max_position_embeddings"]
    asked: int = given["seq_length"] or min(4096, context)
    if asked > context:
        raise UserError(
            f"--seq-length is {asked}, but the model is made for texts of {context} tokens "
            "(max_position_embeddings)"
        )
    return asked


def _data_parallel_size(given: Mapping[str, Any]) -> int:
    """Return how many ranks share a step.

    Raises:
        UserError: what a model takes does not divide the ranks.
    """
    tensor, pipeline = (given[f"{k}_model_parallel_size"] for k in ("tensor", "pipeline"))
    context, ranks = given["context_parallel_size"], given["world_size"]
    size: int = tensor * pipeline * context
    if ranks % size:
        split, sizes = "tensor x pipeline", f"{tensor} x {pipeline}"
        if context > 1:
            split, sizes = f"{split} x context", f"{sizes} x {context}"
        raise UserError(f"{ranks} ranks cannot be split into {split} parallel groups of {sizes}")
    return int(ranks // size)


def describe_sources(method: Method, train: PreferenceDataset) -> Iterator[str]:
    """Say what the sources' stored values are used for, beside their log-probs."""
    if train.references is None:
        return
    if weights := _describe_weights(method, train, train.references):
        yield weights
    if method.standardised:
        scales = zip(train.source_names, train.references.scales.tolist(), strict=False)
        yield "sources' values are scaled: " + ", ".join(f"{name} {k:.4g}" for name, k in scales)
    if train.pair_weights is not None:
        yield _describe_pair_weights(method, train, train.pair_weights)


def _describe_pair_weights(method: Method, train: PreferenceDataset, weights: np.ndarray) -> str:
    """Say what pairs weigh, in all and by domain."""
    cut = "" if method.verdict_cut is None else f", cut at {method.verdict_cut:g}"
    groups = [(name, weights[train.domain_codes == c]) for c, name in enumerate(train.domains)]
    said = [f"{name} {part.mean():.3f}" for name, part in groups if len(part)]
    return (
        f"pairs are weighted by {method.pair_weights}, verdicts with a scale of "
        f"{method.verdict_scale:g}{cut}: mean {weights.mean():.3f} ({', '.join(said)})"
    )


def _describe_weights(
    method: Method, train: PreferenceDataset, references: References
) -> str | None:
    """Say with what weights sources are fused, or that those of sources.yaml have no effect."""
    names = (*train.source_names, "initial")
    weights = dict(zip(names, references.weights.tolist(), strict=True))
    said = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    if method.fused and "source_weights" in FUSIONS[method.fusion].reads:
        equal = "; all are equal" if len(set(weights.values())) == 1 else ""
        out = (
            ""
            if method.initial_as_source
            else "; the initial pivot is no source, its has no effect"
        )
        return f"weights of the fusion: {said}{equal}{out}"
    if set(weights.values()) == {1.0}:
        return None
    reads = f"--fusion is {method.fusion}" if method.fused else "the reference is the initial pivot"
    return f"the weights in sources.yaml ({said}) have no effect: {reads}"


def _last_step(config: RunConfig, end: int) -> int:
    """Return the last step on these pairs: where a round stops, or the end of the run.

    A stop within a run without rounds changes nothing, the rows neither.
    """
    stops = config.next_round and config.stop_at is not None
    return min(config.stop_at or end, end) if stops else end


def _kind(method: Method, train: PreferenceDataset) -> str:
    """Say what the records are, and what of them the method takes."""
    if not train.tokens.listed:
        return "pairs"
    taken = {1: "the best of each by score", 2: "the best and the worst of each by score"}
    most = f"up to {train.responses} responses of each"
    return f"lists, {most if method.responses is None else taken[method.responses]}"


def describe(run: Run, datasets: Datasets, done: int) -> str:
    """Say how much is about to be trained on, what of it is too long, and what is saved.

    Args:
        run: that is about to start.
        datasets: what it trains and validates on.
        done: steps that are behind.
    """
    train, since = datasets.train, datasets.since
    usable = len(train.eligible(run.batch.max_tokens))
    reasons = counted(train.left_out(run.batch.max_tokens))
    left_out = f" ({reasons})" if reasons else ""
    steps, pairs = _last_step(run.config, run.schedule.steps) - since, run.batch.pairs
    saved = NOT_SAVED
    if run.folders.save is not None:
        saved = f"saved every {run.save_interval} steps and at the end"
    kind, left = _kind(run.config.method, train), len(train) - usable
    behind = f"; {done - since} steps are done" if done > since else ""
    lines = [
        f"{kind}: {usable} used, {left} left out{left_out}; {steps} steps of {pairs} are "
        f"{steps * pairs / usable:.2f} epochs, in micro-batches of {run.batch.micro}{behind}; "
        f"{saved}"
    ]
    if too_long := train.too_long(run.batch.max_tokens):
        lines.append(too_long)
    valid = datasets.valid
    if valid is not None and (too_long := valid.too_long(run.batch.max_tokens)):
        lines.append(f"validation: {too_long}")
    return "\n".join(lines)
