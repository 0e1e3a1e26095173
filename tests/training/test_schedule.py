"""What each pipeline stage receives in a step, against messages that stages really pass."""

import itertools

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_infifpo.engine.schedule import transfers

SHAPES = [
    (stages, chunks, rows, group)
    for stages, chunks, rows in itertools.product((2, 3, 4), (1, 2, 3), (4, 8, 12))
    for group in {stages, 4}
    if group >= stages and rows % stages == 0 and rows % group == 0
]


def sent(lengths, stages, chunks, group):
    """(sender, receiver) -> what is sent forward, and backward, in the sender's order of work."""
    table = get_schedule_table(len(lengths), chunks, group)
    messages: dict[bool, dict] = {True: {}, False: {}}
    for stage in range(stages):
        for row, turn in table:
            for forward in (True, False):
                chunk = turn if forward else chunks - 1 - turn
                place = chunk * stages + stage + (1 if forward else -1)
                if 0 <= place < chunks * stages:
                    route = (stage, place % stages)
                    messages[forward].setdefault(route, []).append(lengths[row])
    return messages


@pytest.mark.parametrize("stages, chunks, rows, group", SHAPES)
def test_receivers_expect_what_is_sent(stages, chunks, rows, group):
    lengths = list(range(100, 100 + rows))
    messages = sent(lengths, stages, chunks, group)
    for stage in range(stages):
        before, after = transfers(lengths, stage=stage, stages=stages, chunks=chunks, group=group)
        assert before == messages[True].get(((stage - 1) % stages, stage), [])
        assert after == messages[False].get(((stage + 1) % stages, stage), [])
