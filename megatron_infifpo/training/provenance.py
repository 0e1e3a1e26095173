"""What a run is made of: `run.json` beside its checkpoints, compared when the run is resumed.

Manifests chain from records to tokens to log-probs; this file goes on from there to checkpoints.
"""

import datetime
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo import __version__
from megatron_infifpo.convert.adapters import Adapters
from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.convert.hf_export import RUN_COPY
from megatron_infifpo.convert.hf_folder import check_weights, open_hf
from megatron_infifpo.convert.hf_import import carry_architecture
from megatron_infifpo.engine.environment import version
from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import Method
from megatron_infifpo.patches import cpu
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.storage.aside import Aside, make_folder, whole_folder
from megatron_infifpo.storage.checkpoints import HF_FOLDER, RUN_FILE
from megatron_infifpo.storage.manifests import Format
from megatron_infifpo.training.experts import LAYOUT as EXPERT_LAYOUT
from megatron_infifpo.training.identity import SCHEDULE_KEY, changed_identity, data_identity
from megatron_infifpo.training.lock import RunLock
from megatron_infifpo.training.rounds import CHANGED, Round, began, continued, read_rounds
from megatron_infifpo.training.settings import Run
from megatron_infifpo.training.start import Start

FORMAT = Format(
    name="megatron_infifpo run",
    version=1,
    made_by="a training run",
    schema={
        "identity": {"method": dict, "seed": int, "seq_length": int, "data": dict},
        "started_from": {"checkpoint": str},
        "attempts": [{"iteration": str, "files": dict, "command": [str]}],
    },
)
_LAYOUT = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)
_FILES = ("preference_data", "preference_sources", "soft_targets")
_PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "apex")


def round_began(start: Start, train: PreferenceDataset, method: Method) -> int:
    """Return the step after which the round of these pairs begins; every rank reads it.

    Args:
        start: the checkpoint that the run begins with.
        train: what it is trained on.
        method: by which one.

    Raises:
        UserError: run.json is broken.
    """
    before = read_run(start.folder) if start.resumed else None
    if before is None:
        return 0
    data = data_identity(train, scores=method.uses_scores(listed=train.tokens.listed))
    return began(read_rounds(before), data, start.step)


def describe_run(
    run: Run, found: dict[str, Any], start: Start, *, finished: bool = False
) -> dict[str, Any]:
    """Compare a resumed run with what it was, and say what it is; the first rank calls it.

    Args:
        run: that is about to start.
        found: its `identity`.
        start: the checkpoint that it begins with.
        finished: whether no step is left to be done.

    Returns:
        What `record_run` writes.

    Raises:
        UserError: a resumed run is not what it was, without `--allow-changed-run`; its data are
            others, without `--next-round`, or are no data of a next round.
    """
    before = read_run(start.folder, RUN_COPY if start.is_hf else RUN_FILE)
    attempt = _attempt(run, start.tracker if start.resumed else "0")
    content: dict[str, Any] = FORMAT.fields | {"identity": found, "attempts": []}
    rounds = [Round(0, found["data"], attempt["files"])]
    if start.resumed and before is not None:
        _check_same(run, before, found, start)
        rounds = continued(
            read_rounds(before),
            rounds[0]._replace(iteration=start.step),
            next_round=run.config.next_round,
            changed=run.config.allow_changed_run,
            finished=finished,
        )
        content |= {name: before[name] for name in ("started_from", "attempts")}
    else:
        origin = {"checkpoint": str(start.folder.resolve()), "iteration": start.tracker}
        content["started_from"] = origin | ({"run": before["identity"]} if before else {})
    content["attempts"].append(attempt | {SCHEDULE_KEY: found[SCHEDULE_KEY]})
    return content | {"rounds": [each._asdict() for each in rounds]}


def _check_same(run: Run, before: dict[str, Any], found: dict[str, Any], start: Start) -> None:
    """Refuse a resumed run that is not what it was, but for its data."""
    changes = changed_identity(before["identity"], found)
    changes += _other_pivot(run.folders.pretrained, before["started_from"]["checkpoint"])
    if changes and not run.config.allow_changed_run:
        raise UserError(
            f"the run in {start.folder} cannot go on as it is started now: {'; '.join(changes)}. "
            f"{CHANGED}"
        )


def _other_pivot(given: str | None, started_from: str) -> list[str]:
    """Say so if a run is resumed that began with another pivot than the command line names."""
    # A pivot that is not where it was may have been moved.
    if (
        given is None
        or not Path(started_from).is_dir()
        or Path(given).resolve() == Path(started_from)
    ):
        return []
    kinds = [(Path(folder) / "config.json").is_file() for folder in (given, started_from)]
    if kinds[0] != kinds[1] and Path(given).is_dir():  # a folder, and what was imported from it?
        if weights_fingerprint(given) == weights_fingerprint(started_from):
            return []
    return [f"--pretrained-checkpoint is {given}, but the run started from {started_from}"]


def record_run(run: Run, content: dict[str, Any], start: Start, lock: RunLock) -> None:
    """Write what a run is, and its pivot's architecture, beside its checkpoints.

    Args:
        run: that has passed its checks; it saves.
        content: from `describe_run`.
        start: what it begins with.
        lock: of the folder of its checkpoints; it is taken.

    Raises:
        UserError: another run writes there, or nobody can.
    """
    assert run.folders.save is not None
    save = Path(run.folders.save)
    make_folder(save)
    lock.take()
    with Aside() as files:
        FORMAT.write(save / RUN_FILE.removesuffix(".json"), content, files)
    if run.lora is not None:
        assert start.own is not None
        Adapters(run.lora, start.own.resolve(), start.own_weights.sha256).write(save)
    if not (save / HF_FOLDER).exists():
        with whole_folder(save / HF_FOLDER) as folder:
            _carry(start, folder, run.arguments["params_dtype"])


def _carry(start: Start, folder: Path, dtype: torch.dtype) -> None:
    """Copy the pivot's Hugging Face configuration and tokenizer: as import does, if it has not."""
    if start.is_hf:
        weights, mapping, config = open_hf(start.folder)
        dtypes = check_weights(weights, mapping)
        carry_architecture(start.folder, folder, config, dtypes, dtype)
    else:
        shutil.copytree(start.folder / HF_FOLDER, folder, dirs_exist_ok=True)


def read_run(directory: Path, name: str = RUN_FILE) -> dict[str, Any] | None:
    """Return what `record_run` wrote there, or None.

    Args:
        directory: of a run; or an exported folder, which has another name for the file.
        name: of the file.

    Raises:
        UserError: the file is broken.
    """
    if not (directory / name).is_file():
        return None
    return FORMAT.read(directory / name.removesuffix(".json"))


def _attempt(run: Run, iteration: str) -> dict[str, Any]:
    packages = {name: version(name) for name in _PACKAGES}
    device = "cpu" if cpu.is_enabled() else torch.cuda.get_device_name()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "iteration": iteration,
        "command": [*sys.argv],
        "flags": run.config.given(),  # those of a file, and of a caller in Python, too
        "files": {name: _absolute(getattr(run.config, name)) for name in _FILES},
        "layout": _layout(run.arguments),
        "dtype": run.precision.dtype,
        "device": device,
        "versions": {"megatron_infifpo": __version__, **packages},
        "git_revision": git_revision(),
    }


def _layout(arguments: Mapping[str, Any]) -> dict[str, int]:
    experts = EXPERT_LAYOUT if arguments["num_experts"] else ()
    return {name: arguments[name] for name in (*_LAYOUT, *experts)}


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def git_revision() -> str | None:
    """Return this program's revision, with `-dirty` after changes; None where it is not known."""
    here = str(Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
