"""Where in run.yaml a stage's words come from, for messages."""

from megatron_infifpo.run.checks import PIVOT, name_of
from megatron_infifpo.run.reading import Place, nearest, written
from megatron_infifpo.run.schema import Run
from megatron_infifpo.storage.yaml_files import lines_of

_OF_COMMAND = {
    "sample": ("sampling", "flags"),
    "label": ("labels", "flags"),
    "split": ("data",),
    "prepare": (PIVOT, "prepare_flags"),
    "evaluate": ("evaluation", "flags"),
}


def place_of(run: Run, stage: str) -> Place:
    """The part of run.yaml that a user can say flags of a stage in."""
    command, _, rest = stage.partition("-")
    trainings = [name_of(one) for one in run.train]
    if stage in trainings:
        return "train", trainings.index(stage), "flags"
    if command == "score":
        name = rest.removeprefix("heldout-").removeprefix("tokens-")
        sources = [source.name for source in run.sources]
        return ("sources", sources.index(name), "flags") if name in sources else (PIVOT, "flags")
    return _OF_COMMAND.get(command, ())


def where(place: Place, file: str | None) -> str:
    """A place in a file, as an editor finds it; without a file the place alone."""
    if file is None:
        return written(place) or "these flags"
    line = nearest(place, lines_of(file))
    return f"{file}:{line}: {written(place)}" if place else f"{file}:{line}"
