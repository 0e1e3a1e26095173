"""Sources that are none: shuffled, without content, certain of the truth."""

from pathlib import Path

import numpy as np
import pytest

from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.logprob_writer import LogprobWriter
from megatron_infifpo.study import controls
from support.datasets import manifest_fields


@pytest.fixture
def store(tmp_path: Path) -> Path:
    manifest = manifest_fields([])
    rng = np.random.default_rng(0)
    with LogprobWriter(
        tmp_path / "source", responses=["chosen", "rejected"], manifest=manifest
    ) as writer:
        for index in range(20):
            if index == 7:
                writer.mask("7", "too long")
            else:
                writer.add(str(index), [-rng.random(int(n)) for n in rng.integers(1, 5, 2)])
    return tmp_path / "source"


def test_shuffled_within_domains(store: Path, tmp_path: Path):
    """The same values in every domain, in other records; masked ones stay where they are."""
    domains = ["a", "b"] * 10
    made = LogprobStore(controls.shuffled(store, tmp_path / "shuffled", domains, 1))
    read = LogprobStore(store)
    assert made.masked(7) and made.note(7) == "too long"
    for place in range(2):
        mine, theirs = made.all_sums[place::2], read.all_sums[place::2]
        assert sorted(map(tuple, mine)) == sorted(map(tuple, theirs))
    assert (made.all_sums != read.all_sums).any(axis=1).sum() > 10
    values = {tuple(s): tuple(c) for s, c in zip(read.all_sums, read.token_counts, strict=True)}
    for sums, counts in zip(made.all_sums, made.token_counts, strict=True):
        assert tuple(counts) == values[tuple(sums)]
    again = LogprobStore(controls.shuffled(store, tmp_path / "again", domains, 1))
    assert np.array_equal(again.all_sums, made.all_sums)


def test_uniform(store: Path, tmp_path: Path):
    made, read = LogprobStore(controls.uniform(store, tmp_path / "uniform")), LogprobStore(store)
    assert np.array_equal(made.token_counts, read.token_counts)
    assert np.allclose(made.all_sums, -np.log(256) * read.token_counts)


def test_truth(store: Path, tmp_path: Path):
    """Certain of the chosen response where it alone is right, and else of the other."""
    verdicts = np.resize([1, -1, 0], 20)
    made = LogprobStore(controls.truth(store, tmp_path / "truth", verdicts))
    margins = made.all_sums[:, 0] - made.all_sums[:, 1]
    known = np.arange(20) != 7
    assert (margins[known & (verdicts == 1)] > 19).all()
    assert (margins[known & (verdicts < 1)] < -19).all()
