"""From a run.yaml, or the flags of `infifpo fuse`, to what is run."""

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.run.layouts import choose_layouts
from megatron_infifpo.run.names import Names
from megatron_infifpo.run.plan import Plan
from megatron_infifpo.run.schema import Run
from megatron_infifpo.run.stage import Stage
from megatron_infifpo.run.stages import stages_of
from megatron_infifpo.storage.aside import make_folder, write_text


def read_source(text: str) -> dict[str, Any]:
    """Read --source [DOMAIN,...=]DIR: the source is called as its folder."""
    domains, equals, folder = text.partition("=")
    if not equals or Path(text).exists():
        return {"name": Path(text).resolve().name, "model": text}
    return {
        "name": Path(folder).resolve().name,
        "model": folder,
        "domains": [each for each in domains.split(",") if each],
    }


def run_of_flags(
    *, pivot: str, sources: Sequence[str], pairs: Sequence[str], output: str
) -> dict[str, Any]:
    """What a run.yaml of these flags holds."""
    found: dict[str, Any] = {"output": output, "pivot": {"model": pivot}}
    found["sources"] = [read_source(text) for text in sources]
    return found | {"data": {"pairs": list(pairs)}}


def plan(run: Run) -> list[Stage]:
    """The stages of a run, laid out for the GPUs that are there.

    Raises:
        UserError: nothing fits.
    """
    return stages_of(Plan(run, choose_layouts(run)), report=can_report())


def can_report() -> bool:
    """Whether pages about trainings can be drawn here."""
    return all(importlib.util.find_spec(name) for name in ("matplotlib", "tensorboard"))


def keep(run: Run, file: str | None) -> Path:
    """Keep what a run is in its folder, where queued jobs read it; return that file.

    A file that is edited meanwhile is another run from the next call on, not in the middle of one.
    """
    names = Names(Path(run.output))
    make_folder(names.output)
    if file is None:
        from megatron_infifpo.run.show import as_yaml

        write_text(names.run, as_yaml(run))
    elif not names.run.exists() or not names.run.samefile(file):
        try:
            shutil.copyfile(file, names.run)
        except OSError as error:
            raise UserError(f"cannot write {names.run}: {error.strerror}") from None
    return names.run
