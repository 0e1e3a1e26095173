"""A response that was cut, in a row: its end of turn is seen, and no part of what is scored."""

from dataclasses import replace

import pytest

from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from support.datasets import list_record, write_tokens

RECORDS = [list_record(i) for i in range(6)]
CUT = [
    replace(r, cut=tuple((i + k) % 2 == 0 for k in range(len(r.responses))))
    for i, r in enumerate(RECORDS)
]


@pytest.mark.parametrize("share", [False, True])
def test_rows_differ_in_what_is_scored_alone(tmp_path, share):
    whole, cut = (
        PreferenceDataset(write_tokens(tmp_path, records, name).prefix, responses=None)
        for records, name in ((RECORDS, "whole"), (CUT, "cut"))
    )
    layout = RowLayout(1, share_prompt=share)
    rows = [collate([d[i] for i in range(len(RECORDS))], layout) for d in (whole, cut)]
    assert rows[0]["tokens"].tolist() == rows[1]["tokens"].tolist()
    ends, kept = rows[0]["target_ids"].tolist(), rows[1]["target_ids"].tolist()
    for b, record in enumerate(CUT):
        for r in range(rows[0]["valid"].shape[1]):
            there = bool(rows[0]["valid"][b, r])
            was_cut = there and record.cut[r]
            lengths = [int(row["token_counts"][b, r]) for row in rows]
            assert lengths[1] == lengths[0] - was_cut
            assert bool(rows[1]["ended"][b, r]) == (there and not was_cut)
            ids, ends = ends[: lengths[0]], ends[lengths[0] :]
            assert kept[: lengths[1]] == ids[: lengths[1]]
            kept = kept[lengths[1] :]
    assert not ends and not kept
