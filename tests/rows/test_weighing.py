"""Constants of all records: weights of pairs, scales of sources."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_infifpo.checks.step_zero import reference_table
from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import resolve
from megatron_infifpo.references.reference import References
from megatron_infifpo.references.sources import Source, SourcesConfig
from megatron_infifpo.report.collect import read_pairs
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.training.data import describe_sources, open_datasets
from megatron_infifpo.training.objective import pair_losses
from support.datasets import list_record, record, write_scores, write_tokens

RECORDS = [record(i, domain=("math", "code")[i % 2]) for i in range(8)]


@pytest.fixture
def folder(tmp_path):
    """Tokens, and log-probs of an initial pivot, of `all` without record 2, and of `code`."""
    tokens = write_tokens(tmp_path, RECORDS)
    lengths = tokens.response_lengths
    write_scores(tmp_path / "pivot", RECORDS, lengths, masked=[5])
    write_scores(tmp_path / "all", RECORDS, lengths + 2, masked=[2], seed=1)
    write_scores(tmp_path / "code", RECORDS, lengths + 1, seed=2)
    return tmp_path


def opened(folder, name="dpo", accuracies=(None, None), **options) -> PreferenceDataset:
    sources = (
        Source("all", str(folder / "all"), accuracy=accuracies[0]),
        Source("code", str(folder / "code"), ("code",), accuracy=accuracies[1]),
    )
    config = SourcesConfig(str(folder / "pivot"), sources)
    return PreferenceDataset.for_method(resolve(name, **options), folder / "tokens", config)


def weights(dataset: PreferenceDataset) -> np.ndarray:
    assert dataset.pair_weights is not None
    return dataset.pair_weights


def references(dataset: PreferenceDataset) -> References:
    assert dataset.references is not None
    return dataset.references


def verdict(dataset, source: int, index: int, scale: float, means: bool) -> float:
    store = references(dataset).sources[source].store
    counts = store.counts(index) if means else np.ones(2)
    chosen, rejected = (store.sums(index) / counts).tolist()
    return 1 / (1 + math.exp(-scale * (chosen - rejected)))


@pytest.mark.parametrize("name, scale, means", [("dpo", 1, False), ("sft", 25, True)])
def test_agreement(folder, name, scale, means):
    """Record 2 has no source; the others have one of math, or two of code."""
    dataset = opened(folder, name, pair_weights="agreement")
    for i in range(8):
        sources = () if i == 2 else (0, 1) if i % 2 else (0,)
        verdicts = [verdict(dataset, m, i, scale, means) for m in sources]
        mean = np.mean(verdicts) if verdicts else 1.0
        assert weights(dataset)[i] == pytest.approx(mean, rel=1e-6)
        assert dataset[i].weight == weights(dataset)[i]
    row = collate([dataset[i] for i in (1, 2)])
    expected = torch.from_numpy(weights(dataset)[[1, 2]]).float()
    assert torch.equal(row["pair_weights"], expected)


def test_best_source(folder):
    dataset = opened(folder, accuracies=({"math": 0.1, "code": 0.6}, 0.7),
                     pair_weights="best-source")  # fmt: skip
    for i in range(8):
        expected = 1.0 if i == 2 else verdict(dataset, i % 2, i, 1, False)
        assert weights(dataset)[i] == pytest.approx(expected, rel=1e-6)
    first = opened(folder, accuracies=(0.7, 0.7), pair_weights="best-source")
    assert weights(first)[1] == pytest.approx(verdict(first, 0, 1, 1, False), rel=1e-6)
    with pytest.raises(UserError, match="domain 'math', and none of all has an accuracy there"):
        opened(folder, accuracies=(None, 0.7), pair_weights="best-source")


def test_without_weights_there_are_none(folder):
    dataset = opened(folder)
    assert dataset.pair_weights is None and dataset[0].weight is None
    assert "pair_weights" not in collate([dataset[0]])


def test_a_list_has_the_verdict_on_its_best_and_worst(tmp_path):
    """One without two scores, or with equal ones, has none: SFT takes it as it is."""
    records = [list_record(i) for i in range(9)]
    tokens = write_tokens(tmp_path, records)
    write_scores(tmp_path / "pivot", records, tokens.scored_lengths)
    write_scores(tmp_path / "one", records, 2 * tokens.scored_lengths, seed=1)
    config = SourcesConfig(str(tmp_path / "pivot"), (Source("one", str(tmp_path / "one")),))
    method = resolve("sft", pair_weights="agreement")
    dataset = PreferenceDataset.for_method(method, tmp_path / "tokens", config)
    store, seen = references(dataset).sources[0].store, 0
    for i in range(9):
        assert tokens.scores is not None
        scores = tokens.scores[i]
        known = np.isfinite(scores) & (tokens.response_lengths[i] > 0)
        if known.sum() < 2 or np.ptp(scores[known]) == 0:
            assert weights(dataset)[i] == 1.0
            continue
        best = np.where(known, scores, -np.inf).argmax()
        worst = np.where(known, scores, np.inf).argmin()
        means = store.sums(i) / np.maximum(store.counts(i), 1)
        expected = 1 / (1 + math.exp(-25 * (means[best] - means[worst])))
        assert weights(dataset)[i] == pytest.approx(expected, rel=1e-6)
        seen += 1
    assert seen > 4


@pytest.mark.parametrize("name, means", [("infifpo", True), ("fpo", False)])
def test_standardised_margins_are_as_wide_as_the_initial_pivots(folder, name, means):
    """Over the records that training may use and the source takes part in."""
    dataset = opened(folder, name, source_values="standardised")
    initial, sums = references(dataset).initial.store, references(dataset).scales
    for m, source in enumerate(references(dataset).sources):
        here = [i for i in range(8) if source.takes_part[i] and i != 5]
        stores = (source.store, initial)
        values = [
            np.array([s.sums(i) / (s.counts(i) if means else 1) for i in here]) for s in stores
        ]
        own, pivots = (np.square(v[:, 0] - v[:, 1]).sum() for v in values)
        assert sums[m] == pytest.approx(math.sqrt(pivots / own), rel=1e-6)
    assert sums[-1] == 1.0
    row = collate([dataset[i] for i in (0, 1, 3)])
    assert row["source_scales"].tolist() == [pytest.approx(sums.tolist())] * 3
    method = resolve(name, source_values="standardised", initial_as_source=True)
    losses, _, fused = pair_losses(method, row, row["initial_sum_logps"])
    assert torch.isfinite(losses).all() and fused.weights.shape == (3, 2, 3)


def test_held_out_values_have_the_scales_of_training(folder, tmp_path_factory):
    """Their own are others: their log-probs are."""
    other = tmp_path_factory.mktemp("valid")
    tokens = write_tokens(other, RECORDS)
    for name, seed in (("pivot", 7), ("all", 8)):
        write_scores(other / name, RECORDS, tokens.response_lengths, seed=seed)
    for each in (folder, other):
        (each / "sources.yaml").write_text("initial: pivot\nsources: [{name: all, logprobs: all}]")
    config: Any = SimpleNamespace(
        method=resolve("infifpo", source_values="standardised"),
        preference_data=str(folder / "tokens"),
        preference_sources=str(folder / "sources.yaml"),
        preference_valid_data=str(other / "tokens"),
        preference_valid_sources=str(other / "sources.yaml"),
        soft_targets=None,
        valid_soft_targets=None,
    )
    found = open_datasets(config)
    assert found.valid is not None
    config.preference_valid_data = None
    alone = open_datasets(config)
    expected = references(alone.train).scales
    assert np.array_equal(references(found.valid).scales, expected)
    (line,) = describe_sources(config.method, found.train)
    assert line == f"sources' values are scaled: all {expected[0]:.4g}"


def test_inspecting_a_record_shows_its_weight(folder):
    method = resolve("dpo", pair_weights="agreement")
    dataset = opened(folder, pair_weights="agreement")
    lines = "\n".join(reference_table(dataset, dataset[1], method))
    weight = weights(dataset)[1]
    assert f"\nweight by agreement: {weight:.4f}\n" in lines
    assert lines.endswith(f"loss {weight * math.log(2):.4f}")


def test_a_report_has_the_same_losses(folder):
    """It reads all records as one table, and training row by row."""
    yaml = "initial: pivot\nsources: [{name: all, logprobs: all, accuracy: 0.8}]\n"
    (folder / "sources.yaml").write_text(yaml)
    method = resolve("infifpo", pair_weights="best-source", source_values="standardised")
    pairs = read_pairs(str(folder / "tokens"), str(folder / "sources.yaml"), method, 10**6, None)
    row = collate([pairs.dataset[i] for i in pairs.indices.tolist()])
    losses, _, _ = pair_losses(method, row, row["initial_sum_logps"], progress=0.0)
    np.testing.assert_allclose(pairs.losses, losses.numpy(), rtol=1e-5)
