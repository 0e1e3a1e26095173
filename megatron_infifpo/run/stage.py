"""A stage of a run: one command, what it waits for, what it reads and what it makes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.recipes.job import Job, flag_words
from megatron_infifpo.run.schema import Flags, Model


@dataclass(frozen=True)
class Stage:
    """One command of a run.

    Attributes:
        job: its words; its name is the stage's.
        after: names of the stages whose output it reads.
        made: a file that is there once it is done; None for a check.
        inputs: files and folders that it reads and no stage makes.
        outputs: what it writes: folders, and prefixes of files.
        trains: whether it is a training, which has steps.
    """

    job: Job
    after: tuple[str, ...]
    made: Path | None
    inputs: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    trains: bool = False

    @property
    def name(self) -> str:
        """What it is called."""
        return self.job.name


def stage(
    command: str,
    words: Iterable[Any],
    *,
    made: Path | None,
    after: Sequence[str] = (),
    inputs: Sequence[str] = (),
    outputs: Sequence[Path] | None = None,
    name: str = "",
    every_rank: bool = False,
) -> Stage:
    """Make a stage.

    Args:
        command: of `infifpo`.
        words: after it.
        made, after, inputs, every_rank: see `Stage` and `Job`.
        outputs: None: what it makes.
        name: of the stage; without it the command's.
    """
    job = Job(name or command, (command, *map(str, words)), every_rank=every_rank)
    written = ((made,) if made else ()) if outputs is None else tuple(outputs)
    return Stage(job, tuple(after), made, tuple(inputs), written)


def words_of(flags: Flags) -> list[str]:
    """Words of flags by name, with dashes or underscores."""
    return [word for name, value in flags.items() for word in flag_words(_flag(name)[2:], value)]


def without(words: Sequence[str], flags: Flags) -> list[str]:
    """Leave out the words of flags that are given otherwise."""
    given = {_flag(name) for name in flags}
    found: list[str] = []
    keep = True
    for word in words:
        if word.startswith("--"):
            keep = word not in given
        if keep:
            found.append(word)
    return found


def _flag(name: str) -> str:
    return f"--{name.lstrip('-').replace('_', '-')}"


def template_words(model: Model) -> list[str]:
    """Words of the options of a model's chat template."""
    options = model.chat_template_options
    return flag_words("chat-template-options", options) if options else []
