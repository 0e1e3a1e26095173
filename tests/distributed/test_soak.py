"""Training that is killed at any moment, again and again, is the training that was left alone.

INFIFPO_SOAK sets how often it is killed (default: 3).
"""

import os
import random

import pytest
from safetensors.torch import load_file

from megatron_infifpo.storage.checkpoints import find_checkpoint
from support.launcher import RankError
from support.runs import BOTH, exported

KILLS = int(os.environ.get("INFIFPO_SOAK", "3"))
STEPS = 24


def losses_of(path) -> dict[int, set[str]]:
    """Every loss that was seen at a step; a line that a kill cut short is left out."""
    found: dict[int, set[str]] = {}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            step, loss = line.split()
            found.setdefault(int(step), set()).add(loss)
    return found


ASYNC = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]


@pytest.mark.parametrize("saving", [[], ASYNC], ids=["at once", "async"])
def test_killed_again_and_again(setup, ranks, tmp_path, saving):
    sources = setup.sources("both", *BOTH)
    flags = [
        "--train-iters",
        str(STEPS),
        "--save-interval",
        "3",
        "--reference-probes",
        "4",
        *saving,
    ]

    def argv(name: str) -> list[str]:
        return setup.flags(sources, *flags, "--save", str(tmp_path / name))

    # On the last stage of one layout: two ranks, each with one half of the pairs.
    whole = tmp_path / "whole.txt"
    ranks(2, "support.broken:train_until_killed", argv("whole"), str(whole), -1, "step", 1, 0.0)
    expected, dice, survived, runs = losses_of(whole), random.Random(3), 0, 0
    assert len(expected) == STEPS and all(len(losses) == 1 for losses in expected.values())
    while survived < KILLS:
        runs += 1
        folder, log, complete = tmp_path / f"run{runs}", tmp_path / f"run{runs}.txt", False
        while not complete:
            point = dice.choice(["step", "save", "save"])
            where = (dice.randrange(2), point, dice.randint(1, 3), dice.uniform(0, 0.15))
            stop = ("nobody",) if survived >= KILLS else where
            rank = -1 if stop == ("nobody",) else where[0]
            try:
                arguments = (argv(folder.name), str(log), rank, *where[1:])
                ranks(2, "support.broken:train_until_killed", *arguments)
                complete = True
            except RankError as error:
                assert -9 in error.codes and set(error.codes) <= {-9, 0, 1}, error
                survived += 1
            if (folder / "latest_checkpointed_iteration.txt").exists():
                find_checkpoint(folder)
        found = losses_of(log)
        assert found == expected, "another loss, or a step left out"
    a = exported(ranks, folder, tmp_path / "a")
    b = exported(ranks, tmp_path / "whole", tmp_path / "b")
    assert all((a[name] == b[name]).all() for name in b)
    assert load_file(tmp_path / "a" / "model.safetensors").keys() == b.keys()


def test_a_save_in_the_background_holds_what_was_there_when_it_began(ranks, tmp_path):
    (tmp_path / "saved").mkdir()
    assert ranks(1, "support.saves:saved_while_it_changes", str(tmp_path / "saved")) == [1.0]


def test_a_full_disk_leaves_the_last_checkpoint(setup, ranks, tmp_path):
    sources = setup.sources("both", *BOTH)
    save = ["--save", str(tmp_path / "run"), "--save-interval", "1"]
    argv = setup.flags(sources, *save, "--reference-probes", "4")
    ranks(1, "support.training:train", [*argv, "--exit-interval", "1"])
    with pytest.raises(RankError) as caught:
        ranks(1, "support.broken:train_on_a_full_disk", argv, 100_000)
    assert caught.value.codes == [2], caught.value
    assert "the checkpoint of step 2 could not be written" in caught.value.logs[0]
    assert "the last good one is step 1" in caught.value.logs[0]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "1"
    ranks(1, "support.training:train", argv)
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "3"
