"""How a stage of a round ended: see `recipes.ends`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_infifpo.recipes.ends import real_code, refuse

if TYPE_CHECKING:
    from megatron_infifpo.rounds.stages import Stage


def check_end(folder: Path, stage: "Stage", code: int, log: Path, begun: str) -> None:
    """Refuse a stage that is not done.

    Args:
        folder: of the round.
        stage: that ended.
        code: of its end.
        log: what it printed, after that of earlier attempts.
        begun: the line that begins each attempt's.

    Raises:
        UserError: it ended with 2: a person must mend it; what it said is shown.
        StageError: it ended otherwise.
    """
    if code == 0 and stage.done:
        return
    print(flush=True)
    code = real_code(code, log, begun)
    how = f"ended with {code}" if code else f"ended without {stage.missing}"
    if stage.step is not None and not code:
        how = f"stopped at step {stage.at} of {stage.step}"
    ended = f"{folder.name}: the stage {stage.name} {how}, see {log}"
    number = re.fullmatch(r"round-(\d+)", folder.name)
    place = f"round {int(number[1])}, {stage.name}" if number else stage.name
    refuse(ended, place, code, log, begun)
