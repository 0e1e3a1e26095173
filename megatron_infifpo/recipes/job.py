"""One stage of a run as a command line, and how its words are made."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.scoring.job import BACKENDS

RUN = "runs/phi4"
PIVOT = "models/phi-4"
PROGRAM = "megatron_infifpo"
SHELL = Path(__file__).parent / "slurm"
"""Folder of what job scripts source."""
LAYOUT = (
    "tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size",
    "expert-model-parallel-size",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One stage of a run.

    Attributes:
        name: of the stage, for logs.
        arguments: what follows `infifpo` on the command line.
        every_rank: whether all ranks run it together, else one process does.
    """

    name: str
    arguments: tuple[str, ...]
    every_rank: bool = False

    def __str__(self) -> str:
        """As a shell takes it."""
        return shlex.join(("infifpo", *self.arguments))

    @property
    def python_words(self) -> tuple[str, ...]:
        """What follows `python`, to start it with.

        As a module, not by the installed script: torchrun, srun and containers start it with the
        Python that they have, whatever is on PATH, and from a checkout that is not installed.
        """
        return ("-m", PROGRAM, *self.arguments)


def split_words(text: str, name: str) -> list[str]:
    """Split what a value holds into words, as a shell does.

    Raises:
        UserError: a quote is not closed; `name` says where.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"{name}={text}: {error}, expected words as a shell reads them: quote what has spaces, "
            "and close every quote"
        ) from None


def flag_words(name: str, value: Any) -> list[str]:
    """The words of a flag on a command line: true alone, lists as several, mappings as JSON."""
    if value is False:
        return []
    if value is True:
        return [f"--{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
    # A word that begins like a flag is none after an equals sign.
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def scoring_words(usual: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Flags of scoring a model: the usual ones, but where the model has its own.

    Args:
        usual: values of flags by name, `backend` among them.
        own: the same of this model; a backend without a layout has one only here.
    """
    options = {**usual, **own}
    backend = BACKENDS.get(str(options["backend"]))
    if backend and "pipeline_parallel" not in backend.takes:
        options = {k: v for k, v in options.items() if k not in LAYOUT or k in own}
    return [word for option, value in options.items() for word in flag_words(option, value)]
