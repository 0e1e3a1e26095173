"""What is known of every stage: what it was made of, whether it is done, how far it is.

OUT/stages/STAGE/stamp.json     made: what it is made of; key; seconds, once it is done
OUT/stages/STAGE/log            what its attempts printed
"""

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.run.fingerprints import Contents, Made, difference, key_of, made_of
from megatron_infifpo.run.names import Names
from megatron_infifpo.run.stage import Stage
from megatron_infifpo.storage.aside import make_folder, write_text

STAMP, LOG, OLD = "stamp.json", "log", "old"
_STEP = re.compile(r" iteration +(\d+)/ *(\d+) ")
_BAR = re.compile(r"(\d+)%\|")
_TAIL = 2**14  # bytes of a log in which progress is looked for


@dataclass(frozen=True)
class Known:
    """What is known of a stage.

    Attributes:
        stage: which one.
        made: what it is made of now.
        key: what it is known by.
        stamp: what was written when it was begun, and when it was done; empty before.
    """

    stage: Stage
    made: Made
    key: str
    stamp: dict[str, Any]

    @property
    def done(self) -> bool:
        """Whether it was done, and what it makes is there."""
        made = self.stage.made
        return "seconds" in self.stamp and (made is None or made.exists())

    @property
    def other(self) -> str | None:
        """How it was made, or begun, otherwise than it would be now; None where it was not.

        What was begun and has left nothing may be begun anew.
        """
        if not self.stamp or not (self.done or self.left):
            return None
        return difference(self.stamp["made"], self.made)

    @property
    def left(self) -> bool:
        """Whether something of what it makes is there."""
        paths = self.stage.outputs
        return any(any(path.parent.glob(f"{path.name}*")) for path in paths)


def know(stages: Sequence[Stage], names: Names) -> dict[str, Known]:
    """Find out how every stage stands, by name.

    Raises:
        UserError: an input is not there, or a stamp is none.
    """
    contents, found = Contents(), dict[str, Known]()
    for stage in stages:
        before = {name: found[name].key for name in stage.after}
        made = made_of(stage, names.output, contents, before)
        found[stage.name] = Known(stage, made, key_of(made), read_stamp(names, stage.name))
    return found


def read_stamp(names: Names, name: str) -> dict[str, Any]:
    """Read what is known of a stage; empty where it was not begun.

    Raises:
        UserError: the file is none of ours.
    """
    path = names.stage(name) / STAMP
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {"made", "key"} <= found.keys():
            return dict(found)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(f"{path} is no stamp of a stage: delete it, and the stage is done again")


def begin(names: Names, known: Known) -> None:
    """Write that a stage is begun."""
    folder = names.stage(known.stage.name)
    make_folder(folder)
    content = {"key": known.key, "made": known.made, "begun": time.time()}
    write_text(folder / STAMP, json.dumps(content, indent=1))


def finish(names: Names, known: Known, seconds: float) -> None:
    """Write that a stage is done."""
    content = {"key": known.key, "made": known.made, "seconds": round(seconds, 1)}
    write_text(names.stage(known.stage.name) / STAMP, json.dumps(content, indent=1))


def progress(log: Path) -> float | None:
    """How much of a stage is done, 0 to 1, by what it printed last; None where nobody knows."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    text = text[text.rfind("\n$ ") + 1 :]  # of this attempt
    if steps := _STEP.findall(text):
        return int(steps[-1][0]) / max(1, int(steps[-1][1]))
    bars = _BAR.findall(text)
    return int(bars[-1]) / 100 if bars else None


def put_away(names: Names, stages: Sequence[Stage], others: Sequence[Stage]) -> Path:
    """Move what stages made, and what is known of them, to OUT/old/N; return that folder.

    Nothing is deleted: a trained model may be weeks of work.

    Args:
        names: of the run.
        stages: to put away.
        others: all other stages, whose files stay where they are.
    """
    number = 1 + sum(1 for _ in (names.output / OLD).glob("*"))
    folder = names.output / OLD / f"{number:03d}"
    prefixes = {path: stage for stage in (*others, *stages) for path in stage.outputs}
    prefixes |= {names.stage(stage.name): stage for stage in (*others, *stages)}
    for stage in stages:
        for path in (*stage.outputs, names.stage(stage.name)):
            # Of a prefix all files, but those of a longer one: qwen2.5 is none of qwen2.
            for found in list(path.parent.glob(f"{path.name}*")):
                if _owner(found, prefixes) is stage:
                    target = folder / found.relative_to(names.output)
                    make_folder(target.parent)
                    shutil.move(found, target)
    return folder


def _owner(path: Path, prefixes: Mapping[Path, Stage]) -> Stage | None:
    """The stage whose prefix is the longest one that a path begins with; else nobody's."""
    found = [
        prefix
        for prefix in prefixes
        if prefix.parent == path.parent
        and path.name.startswith(prefix.name)
        and path.name[len(prefix.name) :][:1] in ("", ".", "_")
    ]
    return prefixes[max(found, key=lambda prefix: len(prefix.name))] if found else None
