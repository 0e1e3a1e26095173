"""A whole study: which runs there are, workers that share them, and the settings that are chosen.

Results are lines of a file, so that a study goes on where it stopped, and what is finished is not
computed again.
"""

import fcntl
import json
import math
import multiprocessing
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_infifpo.errors import UserError
from megatron_infifpo.study.forks import warm_up
from megatron_infifpo.study.inputs import Run, key
from megatron_infifpo.study.runs import Runner
from megatron_infifpo.study.settings import FINAL, MATCHED, TUNED, TUNING, Condition, Settings
from megatron_infifpo.study.stages import Stages

RESULTS, KEPT = "results.jsonl", "settings.json"


class Study:
    """The runs of a study and their results.

    Attributes:
        settings: of the study.
        results: the file of finished runs.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        infifpo: Callable[[list[str]], None],
        only: Sequence[str] = (),
    ) -> None:
        """Take a folder, which may hold what is done, and conditions, if not all.

        `infifpo` runs the words of a command of the program, and exits.

        Raises:
            UserError: what is done there was done with other settings.
        """
        self.settings, self.results = settings, folder / RESULTS
        self.only = only or list(settings.conditions)
        self.stages = Stages(folder, settings, infifpo)
        folder.mkdir(parents=True, exist_ok=True)
        kept, now = folder / KEPT, json.dumps(settings.of_stages)
        if kept.exists() and kept.read_text(encoding="utf-8") != now:
            raise UserError(
                f"{folder} was made with {kept.read_text(encoding='utf-8')}, and the settings say "
                f"{now}: choose another --output"
            )
        kept.write_text(now, encoding="utf-8")

    def rows(self) -> list[dict[str, Any]]:
        """Results so far."""
        if not self.results.exists():
            return []
        lines = self.results.read_text(encoding="utf-8").splitlines()
        # What does not end was being written when the study was stopped.
        return [json.loads(line) for line in lines if line.endswith("}")]

    def finished(self) -> set[tuple[Any, ...]]:
        """Keys of the runs that are finished."""
        return {key(row) for row in self.rows()}

    def conditions(self) -> list[Condition]:
        """The conditions that are asked for."""
        return [self.settings.conditions[name] for name in self.only]

    def tuning(self) -> list[Run]:
        """Runs that choose settings, and pilots with the matched ones, which tell the power."""
        return [
            self.run(condition, name, settings, TUNING, variant, seed)
            for condition in self.conditions()
            if condition.tuned
            for seed in self.settings.tuning_seeds
            for settings, names in ((TUNED, condition.tuned), (MATCHED, condition.methods))
            for name in names
            for variant in (self.settings.methods[name].variants() if settings == TUNED else [{}])
        ]

    def matched(self) -> list[Run]:
        """Runs with the settings that methods share, of those that are compared everywhere."""
        return [
            run for c in self.conditions() for run in self.shared(c, c.methods, c.reported(c.seeds))
        ]

    def tuned(self) -> list[Run]:
        """Runs with the settings that the tuning seeds have chosen, once these are finished."""
        found = []
        for condition in self.conditions():
            chosen = choose(self.rows(), self.tuning(), condition)
            found += [
                self.run(condition, name, TUNED, FINAL, chosen[name], seed)
                for seed in condition.reported(condition.seeds)
                for name in condition.tuned
                if name in chosen
            ]
        return found

    def further(self) -> list[Run]:
        """The same of the methods that are compared in one condition only."""
        return [
            run
            for c in self.conditions()
            for run in self.shared(c, c.also, c.reported(c.also_seeds))
        ]

    def shared(
        self, condition: Condition, names: Sequence[str], seeds: Sequence[int]
    ) -> Iterator[Run]:
        """Final runs with matched settings, seed by seed."""
        for seed in seeds:
            for name in names:
                yield self.run(condition, name, MATCHED, FINAL, {}, seed)

    def run(
        self,
        condition: Condition,
        name: str,
        settings: str,
        role: str,
        variant: dict[str, float],
        seed: int,
    ) -> Run:
        """Name a run; a seed has the models of one set, and tuning seeds those of one apart."""
        method, sets = self.settings.methods[name], self.settings.sets
        of_set = sets if role == TUNING else seed % sets
        return Run(condition, method, settings, role, variant, of_set, seed)

    def work(self, workers: int) -> list[str]:
        """Do all runs; return what went wrong.

        Raises:
            UserError: there is no run.
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started, too
        warm_up()
        failed: list[str] = []
        for runs in (self.tuning, self.matched, self.tuned, self.further):
            finished = self.finished()
            todo = [run for run in runs() if key(run.named) not in finished]
            if todo:
                failed += self.share(runs.__name__, todo, workers)
        return failed

    def share(self, phase: str, runs: list[Run], workers: int) -> list[str]:
        """Let workers take runs until none is left."""
        fork = multiprocessing.get_context("fork")
        queue, taken = fork.SimpleQueue(), fork.Array("b", len(runs))
        # Each begins with seeds of its own: those of one seed would wait for the same data.
        orders = [
            sorted(range(len(runs)), key=lambda i: runs[i].seed % workers != worker)
            for worker in range(workers)
        ]
        many = [
            # They end with this process, however it ends.
            fork.Process(target=self.worker, args=(runs, order, taken, queue), daemon=True)
            for order in orders
        ]
        for process in many:
            process.start()
        failed = []
        with tqdm(desc=phase, total=len(runs), unit="run", smoothing=0.02) as bar:
            for _ in runs:
                while queue.empty():
                    if not any(process.is_alive() for process in many):
                        raise UserError(f"all workers have died: see {self.stages.folder}/logs")
                    time.sleep(0.1)
                error = queue.get()
                if error:
                    failed.append(error)
                    bar.write(error)
                bar.update()
        for process in many:
            process.join()
        return failed

    def worker(self, runs: list[Run], order: Sequence[int], taken: Any, queue: Any) -> None:
        """Take the next run that no other has, until there is none; say what became of each."""
        make = Runner(self.stages)
        for index in order:
            with taken.get_lock():
                others, taken[index] = taken[index], 1
            if not others:
                queue.put(self.attempt(make, runs[index]))

    def attempt(self, make: Runner, run: Run) -> str | None:
        """Do a run and keep its row; or say what went wrong."""
        explained = run.role == FINAL and run.seed < self.settings.explained
        try:
            row = make(run, explained=explained)
        except UserError as error:
            return f"{run.name}: {error}"
        except Exception:
            return f"{run.name}: {traceback.format_exc()}"
        with open(self.results, "a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            before = self.results.read_bytes()[-1:]
            file.write(("" if before in (b"", b"\n") else "\n") + json.dumps(row) + "\n")
        self.stages.forget(run.name)
        return None


def choose(
    rows: Sequence[dict[str, Any]], runs: Sequence[Run], condition: Condition
) -> dict[str, dict[str, float]]:
    """The variant of each tuned method of a condition with the best mean accuracy.

    Args:
        rows: results.
        runs: those of tuning seeds.
        condition: whose methods are tuned.

    Returns:
        By method; the first of equals. Methods of which a run is not finished are left out.
    """
    accuracy = {key(row): row["accuracy"] for row in rows}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.condition == condition and run.settings == TUNED:
            variant = json.dumps(dict(run.variant))
            found[run.method.name][variant].append(accuracy.get(key(run.named), math.nan))
    means = {
        name: {variant: sum(each) / len(each) for variant, each in variants.items()}
        for name, variants in found.items()
    }
    return {
        name: json.loads(max(each, key=each.__getitem__))
        for name, each in means.items()
        if not any(map(math.isnan, each.values()))
    }
