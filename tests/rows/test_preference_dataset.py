import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import resolve
from megatron_infifpo.references.sources import Source, SourcesConfig
from megatron_infifpo.report.collect import read_pairs
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.dataset import TokenDataset
from support.datasets import record, write_scores, write_tokens

RECORDS = [record(i, domain=("math", "code")[i % 2]) for i in range(8)]


@pytest.fixture
def joined(tmp_path):
    """Initial pivot without record 5; a source for all, without record 2; one for code only."""
    tokens = write_tokens(tmp_path, RECORDS)
    lengths = tokens.response_lengths
    write_scores(tmp_path / "pivot", RECORDS, lengths, masked=[5])
    write_scores(tmp_path / "all", RECORDS, lengths + 2, masked=[2], seed=1)
    write_scores(tmp_path / "code", RECORDS, lengths + 1, seed=2)
    sources = (
        Source("all", str(tmp_path / "all")),
        Source("code", str(tmp_path / "code"), ("code",)),
    )
    return tokens.prefix, SourcesConfig(str(tmp_path / "pivot"), sources)


def scores(pair):
    """The pair's log-prob fields, all of them there."""
    names = ("initial_sum_logps", "source_sum_logps", "source_token_counts", "source_mask")
    return [getattr(pair.values, name) for name in names]


def test_pairs_join_tokens_and_scores(joined):
    dataset = PreferenceDataset(*joined)
    assert len(dataset) == 8 and dataset.source_names == ("all", "code")
    assert dataset.domains == ("math", "code")
    for i in range(8):
        pair = dataset[i]
        assert pair.index == i and pair.domain_code == i % 2
        assert np.array_equal(pair.prompt_ids, dataset.tokens.prompt_ids(i))
        assert [len(ids) for ids in pair.response_ids] == dataset.tokens.response_lengths[
            i
        ].tolist()
        initial, sums, counts, mask = scores(pair)
        assert dataset.initial is not None and initial.dtype == np.float32
        np.testing.assert_allclose(initial, dataset.initial.sums(i), rtol=1e-6)
        assert mask.tolist() == [i != 2, i % 2 == 1]
        assert sums.shape == counts.shape == (2, 2)
        assert dataset.references is not None
        for m, source in enumerate(dataset.references.sources):
            assert source.takes_part[i] == mask[m]
            if mask[m]:
                np.testing.assert_allclose(sums[:, m], source.store.sums(i), rtol=1e-6)
                assert np.array_equal(counts[:, m], source.store.counts(i))
            else:  # a mean of a masked source is 0 and not a NaN
                assert not sums[:, m].any()
                assert (counts[:, m] == 1).all()


def test_lengths_and_eligible_pairs(joined):
    dataset = PreferenceDataset(*joined)
    for i in range(8):
        pair = dataset[i]
        segments = [len(pair.prompt_ids) + len(ids) for ids in pair.response_ids]
        assert dataset.pair_lengths()[i] == sum(segments)
        assert dataset.segment_lengths[i] == max(segments)
    limit = int(np.sort(dataset.segment_lengths)[4])
    expected = [i for i in range(8) if i != 5 and dataset.segment_lengths[i] <= limit]
    assert dataset.eligible(limit).tolist() == expected
    assert dataset.eligible(10**6).tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert dataset.eligible(1).size == 0


def test_domains_numbered_as_in_another_dataset(joined, tmp_path):
    dataset = PreferenceDataset(*joined)
    before = [dataset.domains[dataset[i].domain_code] for i in range(8)]
    dataset.align_domains(("law", "code"))
    assert dataset.domains == ("law", "code", "math")
    assert [dataset.domains[dataset[i].domain_code] for i in range(8)] == before


def test_without_sources(joined):
    dataset = PreferenceDataset(joined[0])
    assert dataset[0].values is None and dataset.eligible(10**6).size == 8
    only_initial = PreferenceDataset(joined[0], SourcesConfig(joined[1].initial))
    shapes = [values.shape for values in scores(only_initial[0])]
    assert shapes == [(2,), (2, 0), (2, 0), (0,)]


def test_what_does_not_fit_is_refused(joined, tmp_path):
    prefix, config = joined
    with pytest.raises(UserError, match="names the domain 'cod'"):
        PreferenceDataset(prefix, SourcesConfig(config.initial, (Source("x", "x", ("cod",)),)))
    with pytest.raises(UserError, match="lists no source"):
        PreferenceDataset(prefix, SourcesConfig(config.initial), require_sources=True)
    with pytest.raises(UserError, match="lengths of the responses"):
        PreferenceDataset(prefix, SourcesConfig(str(tmp_path / "all"), config.sources))
    other = write_tokens(tmp_path, RECORDS[::-1], "other")
    with pytest.raises(UserError, match="fingerprint"):
        PreferenceDataset(other.prefix, config)


def test_a_report_needs_the_trained_pivot_on_all_pairs(joined, tmp_path):
    """Or the sums of what it has not scored would be zeros in the figures."""
    prefix, config = joined
    lengths = TokenDataset(prefix).scored_lengths
    (tmp_path / "s.yaml").write_text("initial: pivot\nsources: [{name: all, logprobs: all}]\n")
    write_scores(tmp_path / "whole", RECORDS, lengths, masked=[5], seed=3)
    write_scores(tmp_path / "part", RECORDS, lengths, masked=[1, 3], seed=3)
    options = (prefix, str(tmp_path / "s.yaml"), resolve("infifpo"), 10**6)
    pairs = read_pairs(*options, str(tmp_path / "whole"))
    assert np.isfinite(pairs.means[:, :, -1]).all() and len(pairs.indices) == 7
    with pytest.raises(UserError, match="no log-probs of 2 of the 7 pairs"):
        read_pairs(*options, str(tmp_path / "part"))
