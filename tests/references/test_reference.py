"""Stored values go one way: files, records, rows, and what a loss reads."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.references.reference import References, collate, value
from megatron_infifpo.references.sources import Source, SourcesConfig
from support.datasets import record, write_scores, write_tokens


def test_a_table_is_the_row_of_all_its_records(tmp_path):
    records = [record(i, domain=("math", "code")[i % 2]) for i in range(9)]
    tokens = write_tokens(tmp_path, records)
    write_scores(tmp_path / "pivot", records, tokens.scored_lengths)
    write_scores(tmp_path / "all", records, tokens.scored_lengths + 2, masked=[2, 5], seed=1)
    write_scores(tmp_path / "code", records, tokens.scored_lengths + 1, seed=2)
    sources = (
        Source("all", str(tmp_path / "all"), weight=0.1, accuracy={"math": 0.9}),
        Source("code", str(tmp_path / "code"), ("code",), weight=0.7, accuracy=0.8),
    )
    config = SourcesConfig(str(tmp_path / "pivot"), sources, initial_weight=0.2)
    references = References(config, tokens)
    assert references.names == ("all", "code") and references.initial.name == "initial"
    assert references.sources[0].takes_part.tolist() == [i not in (2, 5) for i in range(9)]
    code = [tokens.domain(i) == "code" for i in range(9)]
    assert references.sources[1].takes_part.tolist() == code and 0 < sum(code) < 9

    assert references.given_accuracies == {"all": {"math": 0.9}, "code": 0.8}
    nan = math.nan
    by_domain = {"math": [0.9, nan], "code": [nan, 0.8]}
    expected = [by_domain[domain] for domain in tokens.domains]
    assert np.array_equal(references.accuracies, expected, equal_nan=True)

    references.scales[:-1] = 0.5, 3.0
    indices = np.array([7, 2, 5, 0])
    columns = np.tile(np.arange(2), (4, 1))
    table = references.table(indices, columns)
    row = collate([references.take(i, columns[0]) for i in indices.tolist()])
    assert table.keys() == row.keys() | {"token_counts", "valid"}
    for name, column in row.items():
        assert torch.equal(column, table[name].to(column.dtype)), name
    assert table["source_weights"].tolist() == [[0.1, 0.7, 0.2]] * 4  # float64, as it is given
    assert table["source_scales"].tolist() == [[0.5, 3.0, 1.0]] * 4
    assert row["source_weights"].dtype == row["source_sum_logps"].dtype == torch.float32
    assert torch.equal(table["token_counts"], torch.from_numpy(tokens.scored_lengths[indices]))

    sums, means = value(table, means=False), value(table, means=True)
    assert torch.equal(sums.initial, table["initial_sum_logps"])
    assert torch.equal(means.initial * table["token_counts"], sums.initial)
    assert torch.equal(means.sources, sums.sources / table["source_token_counts"])
    assert torch.isfinite(means.sources).all()  # of a masked source it is 0
    assert torch.equal(means.mask, table["source_mask"])


def test_rounds_need_not_have_the_domains_that_accuracies_are_of(tmp_path):
    """The same sources in all rounds; a specialist's other domains are masked in its log-probs."""
    accuracies: dict[str, Any] = {
        "all": {"math-1": 0.9, "math-2": 0.8, "code": 0.7},
        "special": {"math-2": 0.9},
        "one": 0.5,
    }
    first: dict | None = None
    for number, domains in enumerate((("math-1", "code"), ("math-2",), ("code",))):
        folder = tmp_path / str(number)
        folder.mkdir()
        records = [record(i, domain=domains[i % len(domains)]) for i in range(4)]
        tokens = write_tokens(folder, records)
        for name in ("pivot", *accuracies):
            outside = [i for i in range(4) if tokens.domain(i) != "math-2"]
            masked = outside if name == "special" else []
            write_scores(folder / name, records, tokens.scored_lengths, masked=masked)
        sources = [Source(n, str(folder / n), accuracy=a) for n, a in accuracies.items()]
        config = SourcesConfig(str(folder / "pivot"), tuple(sources))
        given = References(config, tokens).given_accuracies
        first = first or given
        assert given == first == accuracies
    misspelt = dataclasses.replace(sources[0], accuracy={"cod": 0.7})
    with pytest.raises(UserError, match="did you mean 'code'"):
        References(SourcesConfig(config.initial, (misspelt,)), tokens)
