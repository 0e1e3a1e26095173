"""Run the stages of a run: each in a process of its own, after those that it waits for.

A stage is skipped where what it would make is there and of the same words and inputs. Where it is
of others, nothing is mixed and nothing overwritten: `--redo` puts the old away.
"""

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.ends import StageError, real_code, refuse
from megatron_infifpo.recipes.job import Job, split_words
from megatron_infifpo.recipes.processes import Start, begun, stoppable
from megatron_infifpo.run.board import Board
from megatron_infifpo.run.layouts import on_gpus, ranks_of, threads_of
from megatron_infifpo.run.names import Names
from megatron_infifpo.run.plan import Layouts, Plan, sources_yaml
from megatron_infifpo.run.schema import Run
from megatron_infifpo.run.stage import Stage
from megatron_infifpo.run.stamps import LOG, Known, begin, finish, know, put_away, read_stamp
from megatron_infifpo.storage.aside import make_folder, write_text
from megatron_infifpo.training.lock import RunLock


def run_stages(run: Run, stages: Sequence[Stage], *, only: str | None = None) -> None:
    """Run all stages that are not done, or one.

    Args:
        run: what it is.
        stages: of it, in an order in which they can be run.
        only: the stage to run; those before it are done.

    Raises:
        UserError: a stage was made of something else, ended with 2, or is not there.
        StageError: a stage ended otherwise; the same command goes on with it.
        StoppedError: a signal has stopped it; so it does.
    """
    names = Names(Path(run.output))
    known = know(stages, names)
    chosen = _chosen(known, only)
    for each in chosen:
        _check_same(names, each)
    write_sources(run, names)
    lock = RunLock(names.output, "output")
    if only is None:
        lock.take()
    with stoppable(_environment(run)) as start:
        _Driver(run, names, known, start).run(chosen)


def run_here(run: Run, stages: Sequence[Stage], name: str, rank: int) -> None:
    """Run a stage as one of its ranks, which srun or torchrun has started.

    The first rank checks what the stage is made of, and writes how it stands; for all others its
    stamp is enough.

    Args:
        run: what it is.
        stages: of it.
        name: of the stage.
        rank: of this process.

    Raises:
        UserError, StageError, StoppedError: as `run_stages`.
    """
    names = Names(Path(run.output))
    if rank == 0:
        known = know(stages, names)
        (chosen,) = _chosen(known, name)
        _check_same(names, chosen)
        write_sources(run, names)
        with stoppable(_environment(run)) as start:
            if not chosen.done:
                run_one(run, names, chosen, start, here=True)
        return
    stage = next((each for each in stages if each.name == name), None)
    if stage is None or Known(stage, {}, "", read_stamp(names, name)).done:
        return
    log = names.stage(name) / f"{LOG}.{rank}"
    make_folder(log.parent)
    with stoppable(_environment(run)) as start:
        words = [sys.executable, "-u", *stage.job.python_words]
        code = start(words, log)
        if code:
            refuse(
                f"rank {rank} of {name} ended with {code}, see {log}", name, code, log, begun(words)
            )


def _chosen(known: Mapping[str, Known], only: str | None) -> list[Known]:
    """The stages to run.

    Raises:
        UserError: there is no such stage, or one that it waits for is not done.
    """
    if only is None:
        return list(known.values())
    if only not in known:
        raise UserError(f"there is no stage {only!r}, expected one of {', '.join(known)}")
    if waiting := [name for name in known[only].stage.after if not known[name].done]:
        raise UserError(f"{only} waits for {', '.join(waiting)}, which is not done")
    return [known[only]]


def _check_same(names: Names, known: Known) -> None:
    """Refuse a stage that was begun, or done, otherwise.

    Raises:
        UserError: it was; says how.
    """
    if why := known.other:
        name = known.stage.name
        raise UserError(
            f"{name} in {names.output} was made of something else: {why}. With --redo {name} it "
            "and all that follow from it are made again, and the old ones put away"
        )


def redo(run: Run, stages: Sequence[Stage], asked: Sequence[str]) -> list[str]:
    """Put away what stages made, and what follows from them; return their names.

    Raises:
        UserError: there is no such stage, or the run goes on elsewhere.
    """
    by_name = {stage.name: stage for stage in stages}
    for name in asked:
        if name not in by_name:
            raise UserError(f"there is no stage {name!r}, expected one of {', '.join(by_name)}")
    again = set(asked)
    for stage in stages:  # those before come first
        if again & set(stage.after):
            again.add(stage.name)
    names = Names(Path(run.output))
    if not names.output.is_dir():
        return []
    lock = RunLock(names.output, "output")
    lock.take()
    gone = [stage for stage in stages if stage.name in again and names.stage(stage.name).exists()]
    if gone:
        folder = put_away(names, gone, [stage for stage in stages if stage.name not in again])
        print(f"put away: {', '.join(stage.name for stage in gone)}, in {folder}", flush=True)
    return [stage.name for stage in gone]


def write_sources(run: Run, names: Names) -> None:
    """Write the sources.yaml of every training (JSON is YAML, too)."""
    for training, content in sources_yaml(Plan(run, Layouts({}, {}))).items():
        _write(names.sources(training), content)


def _write(path: Path, content: object) -> None:
    make_folder(path.parent)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text, by_process=True)


def command(run: Run, job: Job, *, here: bool = False) -> list[str]:
    """Words that start a stage.

    Args:
        run: what it is.
        job: of the stage.
        here: as one rank, whose others are started already.
    """
    if here or not job.every_rank:
        return [sys.executable, "-u", *job.python_words]
    if run.cluster.launcher:
        return [*split_words(run.cluster.launcher, "cluster.launcher"), *job.python_words]
    if ranks_of(run) == 1:
        return [sys.executable, *job.python_words]
    port = _free_port()
    started = ["torchrun", "--nproc-per-node", str(ranks_of(run)), "--master-port", str(port)]
    return [*started, *job.python_words]


def shown(run: Run, job: Job) -> str:
    """A stage's command as a person would type it."""
    launcher = run.cluster.launcher
    if ranks_of(run) > 1:
        launcher = launcher or f"torchrun --nproc-per-node {ranks_of(run)}"
    return f"{launcher} {shlex.join(job.python_words)}" if launcher and job.every_rank else str(job)


def _free_port() -> int:
    """A port that nobody listens on: several torchruns may be at work."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _environment(run: Run) -> dict[str, str]:
    """Of stages: on a CPU as many threads as there are cores for them."""
    found = dict(os.environ)
    found.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not on_gpus(run):
        # What a CPU lacks every library warns about, in every process.
        found |= {"OMP_NUM_THREADS": str(threads_of(run)), "PYTHONWARNINGS": "ignore"}
    return found


class _Driver:
    """Runs stages, several at a time, in threads that wait for their processes."""

    def __init__(self, run: Run, names: Names, known: Mapping[str, Known], start: Start) -> None:
        self.settings, self.names, self.known, self.start = run, names, known, start

    def run(self, chosen: Sequence[Known]) -> None:
        """Run those that are not done; the first failure lets those that run end, no others begin.

        Raises:
            UserError, StageError: of that failure.
        """
        done = {name for name, each in self.known.items() if each.done}
        waiting = [each for each in chosen if each.stage.name not in done]
        board = Board(self.names, [each.stage for each in chosen], done)
        running: dict[Future[float], Known] = {}
        failure: Exception | None = None
        with ThreadPoolExecutor(self.settings.cluster.at_once) as pool, board:
            while waiting or running:
                free = self.settings.cluster.at_once - len(running)
                ready = [each for each in waiting if done >= set(each.stage.after)]
                for each in ready[: free if failure is None else 0]:
                    waiting.remove(each)
                    board.begin(each.stage)
                    running[pool.submit(run_one, self.settings, self.names, each, self.start)] = (
                        each
                    )
                if not running:
                    break
                for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                    stage = running.pop(future).stage
                    try:
                        board.end(stage, future.result())
                        done.add(stage.name)
                    except (UserError, StageError) as error:
                        board.fail(stage)
                        failure = failure or error
                board.show()
        if failure is not None:
            raise failure


def run_one(run: Run, names: Names, known: Known, start: Start, *, here: bool = False) -> float:
    """Run a stage; return the seconds that it took.

    Args:
        run, names: of it.
        known: of the stage.
        start: runs a command.
        here: as one rank, whose others are started already.

    Raises:
        UserError, StageError: it is not done.
    """
    stage, started = known.stage, time.monotonic()
    folder = names.stage(stage.name)
    make_folder(folder)
    lock = RunLock(folder, "the stage in")  # a queued job may be at it
    lock.take()
    begin(names, known)
    words, log = command(run, stage.job, here=here), folder / LOG
    code = real_code(start(words, log), log, begun(words))
    how = f"ended with {code}" if code else _unfinished(stage)
    if how is not None:
        refuse(f"the stage {stage.name} {how}, see {log}", stage.name, code, log, begun(words))
    seconds = time.monotonic() - started
    finish(names, known, seconds)
    return seconds


def _unfinished(stage: Stage) -> str | None:
    """How a stage that ended well is not done; None where it is."""
    if stage.made is not None and not stage.made.exists():
        return f"ended without {stage.made}"
    if stage.trains:
        assert stage.made is not None
        at = stage.made.read_text(encoding="utf-8").strip()
        total = steps_of(stage.made.parent)
        if total is not None and at != str(total):
            return f"stopped at step {at} of {total}"  # a signal that it saves at
    return None


def steps_of(save: Path) -> int | None:
    """Steps of a training in all, as it wrote them; None where it did not."""
    from megatron_infifpo.training.provenance import read_run

    found = read_run(save)
    if not found or not found["attempts"]:
        return None
    steps = found["attempts"][-1].get("schedule", {}).get("train_iters")
    return int(steps) if steps else None
