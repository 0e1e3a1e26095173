"""Refuse data that were made with other weights than a run, or a round of it, starts from.

Log-probs that were scored as the initial pivot's, and responses of the policy, name the weights
that they are of. Bytes tell what log-probs cannot: a policy that has moved by less than two right
programs differ.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron.training import print_rank_0

from megatron_infifpo.convert.fingerprint import Weights
from megatron_infifpo.errors import UserError
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.measured import MeasuredResponse
from megatron_infifpo.training.reference_check import complain
from megatron_infifpo.training.settings import Run
from megatron_infifpo.training.start import Start


def begin_weights_check(
    run: Run,
    start: Start,
    dataset: PreferenceDataset,
    samples: Sequence[MeasuredResponse] = (),
    *,
    begins: bool = False,
) -> Callable[[], None]:
    """Compare the weights that a run starts from with those that its data are of.

    Rank 0 reads the checkpoint once, in a thread: the other ranks wait for it to join them.

    Args:
        run: that is about to start.
        start: the checkpoint that the run begins with.
        dataset: the training pairs with their log-probs.
        samples: from `read_samples`.
        begins: whether a round begins here: later the policy has moved.

    Returns:
        What waits for the result, and raises UserError if the weights are others.
    """
    if run.layout.rank != 0:
        return lambda: None
    comparisons: list[Callable[[], None]] = []
    if run.lora is not None:
        comparisons.append(lambda: _compare_base(start))
    if _knows_pivot(run, start, dataset):
        comparisons.append(lambda: _compare_pivot(run, start, dataset, start.weights))
    if samples and begins:
        if samples[0].weights_sha256 is None:
            print(
                f"sampler check: {run.config.sampler_logprobs} does not name the weights that were "
                "sampled; log-probs alone are compared"
            )
        else:
            comparisons.append(lambda: compare_sampled(run, start, samples, start.weights))
    if not comparisons:
        return lambda: None
    # What the thread reads, the start keeps.
    needed = [lambda: start.own_weights] if run.lora is not None else []
    if len(comparisons) > len(needed):
        needed.append(lambda: start.weights)
    reading = ThreadPoolExecutor(1).submit(lambda: [read() for read in needed])

    def check() -> None:
        reading.result()
        for compare in comparisons:
            compare()

    return check


def _compare_base(start: Start) -> None:
    """Refuse to go on with adapters on another base than they were trained on.

    Raises:
        UserError: it has other weights.
    """
    assert start.own is not None
    if start.resumed and start.adapters is not None:
        start.adapters.check_base(start.own, start.own_weights.sha256)


def _knows_pivot(run: Run, start: Start, dataset: PreferenceDataset) -> bool:
    """Whether the initial pivot's log-probs name weights that the run must start from.

    A resumed run has moved away from them. Of imported log-probs they are not known: the pivot
    itself must tell, on the probe records.
    """
    initial = dataset.initial
    if initial is None or start.resumed or not run.config.checks_reference:
        return False
    return initial.manifest["weights_sha256"] is not None


def _compare_pivot(run: Run, start: Start, dataset: PreferenceDataset, found: Weights) -> None:
    """Complain where other weights have scored as the initial pivot."""
    initial, pivot = dataset.initial, start.folder
    assert initial is not None
    expected = initial.manifest["weights_sha256"]
    if found.sha256 != expected:
        complain(
            run,
            f"the log-probs in {initial.prefix} are of other weights ({expected[:12]}) than "
            f"{pivot} ({found.sha256[:12]}), so they are not the initial pivot's: score the pairs "
            f"with --model {pivot}, or pass --reference-check off if you want another reference",
        )


def compare_sampled(
    run: Run, start: Start, samples: Sequence[MeasuredResponse], found: Weights
) -> None:
    """Refuse responses of other weights; those of another data type have other bytes anyway.

    Raises:
        UserError: they are stale.
    """
    path, folder = run.config.sampler_logprobs, start.folder
    for one in samples:
        if one.weights_dtype != found.dtype:
            print_rank_0(
                f"sampler check: {one.model} was sampled from weights in {one.weights_dtype}, and "
                f"{folder} is in {found.dtype}; log-probs alone are compared",
                rank=run.layout.rank,
            )
            return
        if one.weights_sha256 != found.sha256:
            raise UserError(
                f"{path} is of other weights ({str(one.weights_sha256)[:12]}, {one.model}) than "
                f"the policy that this round starts from, {folder} ({found.sha256[:12]}): the "
                f"samples are stale: {start.how_to_sample} again; to train on them nevertheless, "
                "leave --sampler-logprobs out"
            )
    print_rank_0(
        f"sampler check: {path} is of the weights in {folder} ({found.sha256[:12]})",
        rank=run.layout.rank,
    )
