"""How stages end: what is shown of their logs, and who must mend them."""

from pathlib import Path

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.ends import StageError
from megatron_infifpo.rounds import run
from megatron_infifpo.rounds.run import run_rounds
from support.round_stages import StandIn

RANK = """
import os, sys, time
rank, code = os.environ["RANK"], int(sys.argv[1])
said = f"error: no model in hf{code}\\n       nor here\\n end"
print(said, file=sys.stderr) if rank == "0" else time.sleep(60)
sys.exit(code)
"""


def test_ranks_of_torchrun(make_job, monkeypatch, capsys):
    """It ends with 1 whatever its workers ended with, and with a report about itself."""
    Path("rank.py").write_text(RANK)
    words = ["torchrun", "--nproc-per-node", "2", "rank.py"]
    for code, error in ((2, UserError), (3, StageError)):
        # The log still has what the attempt before it said.
        monkeypatch.setattr(run, "command", lambda job, stage, code=code: [*words, str(code)])
        ended = 2 if code == 2 else 1
        with pytest.raises(error, match=f"out: the stage import ended with {ended}, see out/logs"):
            run_rounds(make_job())
        assert capsys.readouterr().err.splitlines() == [
            f"    error: no model in hf{code}", "           nor here",
        ]  # fmt: skip


def test_the_tail_of_a_log(make_job, capsys):
    """Where nothing says what is wrong."""

    class Fails(StandIn):
        def __call__(self, words, log):
            log.write_text("".join(f"line {i}\n" for i in range(40)))
            return -9

    with pytest.raises(StageError, match="ended with -9, .*; the same command goes on with it"):
        run_rounds(make_job(), Fails())
    assert capsys.readouterr().err.split() == [
        word for i in range(25, 40) for word in ("line", str(i))
    ]


def test_responses_that_nobody_measured(make_job):
    """Training would refuse them, after all that comes before it."""

    class Silent(StandIn):
        def sample(self, given):
            super().sample(given | {"check": "0"})

    with pytest.raises(StageError, match="sample ended without out/round-000/responses.jsonl.meas"):
        run_rounds(make_job(), Silent())
    run_rounds(make_job(output=Path("unchecked"), sampler_check=False), Silent())
