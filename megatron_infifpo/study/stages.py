"""What is made of what, each once: models, prompts, samples, pairs, scores; all by commands.

A stage is a file that says that it is done, and a lock, so that several workers share a folder and
an interrupted study goes on. Stages that nothing but names and seeds decide are shared by all runs
that need them.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_infifpo.storage.aside import whole_file
from megatron_infifpo.study import models, world
from megatron_infifpo.study.forks import in_fork
from megatron_infifpo.study.settings import Condition, Settings
from megatron_infifpo.study.world import Question

PIVOT_SAMPLES, SOURCE_SAMPLES = 8, 4
POOL = ("generalist", "neighbour")  # whose responses are paired, beside the pivot's
TRAIN = """--lr-decay-style cosine --lr-warmup-fraction 0.1 --min-lr 0 --clip-grad 1.0
--weight-decay 0.0 --seq-length 64 --log-interval 10 --save-interval 1000000
--no-save-optim""".split()
JUDGE = Path(world.__file__).resolve()
DONE = ".done"


class Stages:
    """The stages of a study in a folder.

    Attributes:
        folder: of everything.
        settings: of the study.
        infifpo: runs `infifpo WORDS`, and exits.
    """

    def __init__(
        self, folder: Path, settings: Settings, infifpo: Callable[[list[str]], None]
    ) -> None:
        """Take a folder, which may hold what is done, and what runs the words of a command."""
        self.folder, self.settings, self.infifpo = folder.resolve(), settings, infifpo

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Keep other processes out of a stage."""
        path = self.folder / "locks" / name.replace("/", "+")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            # Not flock: forks would hold it, and outlive this process.
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """Make `folder/name` unless it is done; return it."""
        done, path = self.folder / "done" / name / DONE, self.folder / name
        if not done.exists():
            with self.lock(name):
                if not done.exists():
                    remove(path)  # of a study that was stopped before it said that this is done
                    path.parent.mkdir(parents=True, exist_ok=True)
                    make(path)
                    done.parent.mkdir(parents=True, exist_ok=True)
                    done.touch()
        return path

    def forget(self, name: str) -> None:
        """Remove a folder of stages that nothing needs any more."""
        for path in (self.folder / "done" / name, self.folder / name):
            remove(path)

    def command(self, name: str, *words: object) -> Path:
        """Make `folder/name` by a command of `infifpo`, with a log beside it."""
        log = self.folder / "logs" / f"{name}.log"
        return self.once(name, lambda path: in_fork(self.infifpo, words, log))

    # Models.

    def untrained(self, model: str, of_set: int) -> Path:
        """A random model with its tokenizer."""
        return self.once(
            f"models/{of_set}/{model}/hf",
            lambda path: models.save_untrained(model, of_set, path),
        )

    def pretrained(self, model: str, of_set: int) -> Path:
        """A model after pretraining, for Megatron."""
        here, how = f"models/{of_set}/{model}", self.settings.pretraining
        hf, pivot = self.untrained(model, of_set), model.endswith("pivot")
        steps = how["pivot_steps" if pivot else "steps"]  # its tokens are shorter

        def text(path: Path) -> None:
            rows = models.pretraining_text(model, of_set, how["texts"])
            write_pairs(path, ((q, chosen, rejected) for q, chosen, rejected in rows))

        start = self.folder / here / "start"
        self.command(f"{here}/start", "import", "--hf", hf, "--save", start)
        data = self.prepared(f"{here}/text", self.once(f"{here}/text.jsonl", text), hf)
        return self.train(
            f"{here}/pretrained", start, data, "--method", "sft", "--train-iters", steps,
            "--global-batch-size", how["batch"], "--micro-batch-size", how["batch"],
            "--lr", how["lr"], "--seed", of_set + 1,
        )  # fmt: skip

    def train(self, name: str, start: Path, data: Path, *flags: object) -> Path:
        """A run from a checkpoint."""
        return self.command(
            name, "train", "--preference-data", data, "--pretrained-checkpoint", start,
            "--save", self.folder / name, *TRAIN, *flags,
        )  # fmt: skip

    def exported(self, name: str, run: Path) -> Path:
        """A run's model as a Hugging Face folder."""
        words = ("export", "--load", run, "--save", self.folder / name)
        return self.command(name, *words)

    def pretrained_hf(self, model: str, of_set: int) -> Path:
        """A pretrained model as a Hugging Face folder."""
        name = f"models/{of_set}/{model}/pretrained-hf"
        return self.exported(name, self.pretrained(model, of_set))

    def tuned(self, condition: Condition, of_set: int, seed: int) -> Path:
        """The pivot after SFT on the first half of the pairs: where preference training starts."""
        how, pivot = self.settings.sft, condition.pivot
        name = f"{self.place(of_set, seed)}/{pivot}-{condition.judge}/sft"
        data = self.pairs(condition, of_set, seed, "sft")
        return self.train(
            name, self.pretrained(pivot, of_set), data, "--method", "sft",
            "--preference-epochs", how["epochs"], "--global-batch-size", how["batch"],
            "--micro-batch-size", how["batch"], "--lr", how["lr"], "--seed", seed + 1,
        )  # fmt: skip

    # Data.

    @staticmethod
    def place(of_set: int, seed: int) -> str:
        """The folder of a seed."""
        return f"seeds/{of_set}-{seed}"

    def questions(self, part: str, seed: int) -> list[Question]:
        """The questions of a part: a seed has its own ones to train on, others are for all."""
        count = self.settings.prompts["heldout" if part == "tuning" else part]
        return world.draw(part, count, seed if part in ("sft", "preference") else "all")

    def prompts(self, folder: str, part: str, seed: int = 0) -> Path:
        """The questions as a file of prompts."""

        def write(path: Path) -> None:
            write_lines(path, (question.record() for question in self.questions(part, seed)))

        return self.once(f"{folder}/{part}-prompts.jsonl", write)

    def samples(self, name: str, model: Path, prompts: Path, *flags: object, seed: int) -> Path:
        """A model's responses to prompts."""
        return self.command(
            name, "sample", "--model", model, "--name", Path(name).stem, "--input", prompts,
            "--output", self.folder / name, "--max-tokens", 12, "--batch", 2000,
            "--shard-prompts", 1000000, "--check", 0, "--retries", 0, "--seed", seed + 1, *flags,
        )  # fmt: skip

    def pool(self, condition: Condition, of_set: int, seed: int, part: str) -> list[Path]:
        """Files of the responses that are paired: the pivot's and the pool's, or the policy's."""
        place, pivot = self.place(of_set, seed), condition.pivot
        prompts = self.prompts(place, part, seed)
        many = ("--as", "pivot", "--count", PIVOT_SAMPLES)
        if condition.on_policy and part == "preference":
            here = f"{place}/{pivot}-{condition.judge}"
            policy = self.exported(f"{here}/sft-hf", self.tuned(condition, of_set, seed))
            name = f"{here}/{part}-samples/policy.jsonl"
            return [self.samples(name, policy, prompts, *many, seed=seed)]
        here, few = f"{place}/{part}-samples", ("--as", "source", "--count", SOURCE_SAMPLES)
        files = [
            self.samples(
                f"{here}/{pivot}.jsonl",
                self.pretrained_hf(pivot, of_set),
                prompts,
                *many,
                seed=seed,
            )
        ]
        files += [
            self.samples(
                f"{here}/{name}.jsonl", self.pretrained_hf(name, of_set), prompts, *few, seed=seed
            )
            for name in POOL
        ]
        return files

    def records(self, condition: Condition, of_set: int, seed: int, part: str) -> Path:
        """What a judge, who errs, makes of the responses.

        Args:
            condition, of_set, seed: of the run.
            part: sft or preference, pairs; own, pairs with the pivot's own best beside them; lists,
                of the pivot's own responses with scores.
        """
        files = self.pool(condition, of_set, seed, "sft" if part == "sft" else "preference")
        more: list[object] = []
        if part == "own":
            more = ["--pivot", files[0].stem]
        elif part == "lists":
            files, more = files[:1], ["--list", 4]
        name = f"{self.home(condition, of_set, seed, part)}.jsonl"
        words = ("label", "--input", *files, "--program", f"{JUDGE}:{condition.judge}")
        return self.command(name, *words, *more, "--output", self.folder / name)

    def home(self, condition: Condition, of_set: int, seed: int, part: str) -> str:
        """Where the records of a part, and what belongs to them, lie."""
        kind = f"{condition.pivot}-{condition.judge}"
        policy = "-policy" if condition.on_policy and part != "sft" else ""
        return f"{self.place(of_set, seed)}/{kind}/{part}{policy}"

    def pairs(self, condition: Condition, of_set: int, seed: int, part: str) -> Path:
        """The token data of a part's records."""
        records = self.records(condition, of_set, seed, part)
        hf = self.untrained(condition.pivot, of_set)
        return self.prepared(self.home(condition, of_set, seed, part), records, hf)

    def prepared(self, name: str, records: Path, tokenizer: Path) -> Path:
        """Token data; the prefix."""
        prefix = self.folder / f"{name}-data"
        words = ("prepare", "--input", records, "--tokenizer", tokenizer, "--output", prefix)
        return self.command(f"{name}-data", *words)

    def answers(self, part: str) -> Path:
        """Right and other answers of the first questions of a part, as pairs."""

        def write(path: Path) -> None:
            some = self.questions(part, 0)[: self.settings.prompts["log_odds"]]
            write_pairs(path, ((q, q.right, q.other) for q in some))

        return self.once(f"parts/{part}-pairs.jsonl", write)

    def scored(self, name: str, model: Path, records: Path, *flags: object) -> Path:
        """A model's log-probs of records; the prefix."""
        return self.command(
            name, "score", "--backend", "megatron", "--model", model, "--input", records,
            "--output", self.folder / name, "--name", Path(name).name,
            "--micro-batch-tokens", 8192, *flags,
        )  # fmt: skip


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines."""
    with whole_file(path) as aside, aside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read such a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_pairs(path: Path, pairs: Iterable[tuple[Question, str, str]]) -> None:
    """Write preference records: questions with a chosen and a rejected answer."""
    write_lines(
        path,
        (
            {"id": q.id, "domain": q.domain, "prompt": q.text, "chosen": c, "rejected": r}
            for q, c, r in pairs
        ),
    )
