"""Stored values go one way: files, records, rows, and what a loss reads."""

import numpy as np
import torch

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

    assert references.known_accuracies() == {"all": {"math": 0.9}, "code": {"code": 0.8}}

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
