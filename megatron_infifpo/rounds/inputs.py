"""Is everything there that later stages read: the judge, the pivot, the sources.

    python -m megatron_infifpo.rounds.inputs JSON

It is asked in a process of its own, started as the stages are: there may be a container around
them, and what a judge's file does when it is imported is not to stay with the driver for days.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_infifpo.errors import UserError, user_errors
from megatron_infifpo.recipes.ends import TAIL, StageError
from megatron_infifpo.recipes.job import split_words
from megatron_infifpo.recipes.processes import found

if TYPE_CHECKING:
    from megatron_infifpo.rounds.job import RoundsJob


def check_inputs(job: "RoundsJob", environment: Mapping[str, str]) -> None:
    """Check what all rounds read, before the first stage has run for hours.

    Args:
        job: the rounds.
        environment: of their stages.

    Raises:
        UserError: something is not there, or cannot be used.
        StageError: the question could not be asked.
    """
    given: dict[str, Any] = {"pivot": job.pivot, "file": job.sources}
    given["sources"] = {source.name: source.score["model"] for source in job.source_list}
    if job.judged:
        given |= {"program": job.judge.program, "reward_model": job.judge.reward_model}
    python = split_words(job.python, "--python") or [sys.executable]
    words = found([*python, "-m", __name__, json.dumps(given)], environment)
    try:
        ended = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=dict(environment)
        )
    except OSError as error:
        raise UserError(f"cannot start {words[0]}: {error.strerror}") from None
    if ended.returncode == 2 and "error: " in ended.stderr:
        raise UserError(ended.stderr.rpartition("error: ")[2].strip())
    if ended.returncode:
        said = f"what the stages read could not be checked: ended with {ended.returncode}"
        failed = StageError(said, "the check", ended.stderr.splitlines()[-TAIL:])
        failed.show()
        raise failed


def check(given: Mapping[str, Any]) -> None:
    """Check what `check_inputs` names.

    Raises:
        UserError: something is not there, or cannot be used.
    """
    check_folder(f"--pivot {given['pivot']}", given["pivot"], "config.json")
    for name, model in given["sources"].items():
        from megatron_infifpo.storage.checkpoints import TRACKER  # imports of seconds, as below

        said = f"{given['file']}: source {name!r}: {model}"
        check_folder(said, model, "config.json", TRACKER)
    if given.get("program"):
        from megatron_infifpo.responses.programs import load_program

        load_program(given["program"])
    if given.get("reward_model"):
        from megatron_infifpo.engine import hf_model

        hf_model.check_folder(given["reward_model"])


def check_folder(said: str, path: str, *files: str) -> None:
    """Refuse a folder that has none of some files.

    Raises:
        UserError: it has none.
    """
    if not Path(path).is_dir():
        raise UserError(f"{said}: no such folder, expected a model")
    if not any((Path(path) / name).is_file() for name in files):
        raise UserError(f"{said} has no {' or '.join(files)}, expected a model")


if __name__ == "__main__":
    with user_errors():
        check(json.loads(sys.argv[1]))
