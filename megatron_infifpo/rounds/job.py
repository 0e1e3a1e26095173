"""What rounds are: one frozen job, checked once."""

import argparse
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_choice, check_files, check_positive, check_types
from megatron_infifpo.methods import METHODS, Method, add_method_flags, method_from_options
from megatron_infifpo.recipes.job import split_words
from megatron_infifpo.records.records import ON_BAD
from megatron_infifpo.references.sources import INITIAL, Source, read_sources
from megatron_infifpo.storage.yaml_files import read_yaml

if TYPE_CHECKING:
    from megatron_infifpo.responses.scorers import Judge

STAGES = ("import", "sample", "label", "prepare", "score", "initial", "train", "export")
"""What has options of its own: commands that rounds run, and scoring the initial pivot."""
OPTIMIZERS = ("carry", "fresh")


@dataclass(frozen=True)
class RoundsJob:
    """Rounds of sampling from the policy and training on what it said.

    Attributes:
        output: folder of everything.
        pivot: Hugging Face folder that the first round samples from; the references' initial pivot
            for good.
        prompts: files of the pool, each FILE or FILE=COUNT.
        method: a key of `METHODS`.
        rounds: how many there are in all.
        steps: of training, a round.
        round_prompts: prompts of a round.
        count: responses to a prompt.
        sources: sources.yaml, each source with its `score`; None for methods without sources.
        on_bad_record: "error" or "skip", for prompts that are malformed or that a stage refuses.
        optimizer: "carry": one training run goes through all rounds; "fresh": a run a round.
        seed: of the plan of prompts and, with the round's number, of sampling.
        sampler_check: compare the sampler's own log-probs with the trainer's.
        options: further words of each of `STAGES`, as a shell takes them.
        keep_rounds: rounds whose weights are kept; None: all.
        until: the round that this call ends after; None: the last.
        launcher: what starts the stages that all ranks run, up to `-m megatron_infifpo`; empty: as
            `python`.
        python: what starts every other stage; empty: this Python.
        allow_changed_settings: go on although settings are not what they were.
    """

    output: Path
    pivot: str
    prompts: Sequence[str]
    method: str
    rounds: int
    steps: int
    round_prompts: int
    count: int = 8
    sources: str | None = None
    on_bad_record: str = "error"
    optimizer: str = "carry"
    seed: int = 1234
    sampler_check: bool = True
    options: Mapping[str, str] = field(default_factory=dict)
    keep_rounds: int | None = None
    until: int | None = None
    launcher: str = ""
    python: str = ""
    allow_changed_settings: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be done.

        Raises:
            UserError: a method that rounds have no data for, sources without effect or missing, an
                option of a stage that is none, or a number out of range.
        """
        check_files(self, "prompts")
        check_types(self)
        check_choice("method", self.method, METHODS)
        check_choice("on_bad_record", self.on_bad_record, ON_BAD)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_positive(self, "rounds", "steps", "round_prompts", "keep_rounds")
        check_positive(self, "count", least=2)
        check_positive(self, "seed", "until", least=0)
        if self.until is not None and self.until >= self.rounds:
            raise UserError(f"--until is {self.until}, expected one of 0 to {self.rounds - 1}")
        if self.kind.responses == 3:
            raise UserError(
                f"--method {self.method} compares the pivot's own best with the best of others, "
                "and rounds sample from the pivot alone: choose a method of pairs or of lists"
            )
        if self.kind.soft_targets:
            raise UserError(
                f"--method {self.method} learns from sources' distributions over recorded tokens, "
                "and rounds sample new ones: choose a method of pairs or of lists"
            )
        if self.kind.reads_sources != (self.sources is not None):
            reads = "reads sources" if self.kind.reads_sources else "reads no sources"
            raise UserError(
                f"--method {self.method} {reads}: "
                + ("give --sources FILE" if self.kind.reads_sources else "--sources has no effect")
            )
        self._check_options()
        self._check_sources()

    def _check_options(self) -> None:
        """Refuse words of stages that are none, and what starts no Python."""
        for name in self.options:
            check_choice("options", name, STAGES)
            self.words(name)
        useless = [name for name in ("score", INITIAL) if self.words(name)]
        if not self.kind.reads_logprobs and useless:
            raise UserError(
                f"--{useless[0]}-options has no effect: --method {self.method} has no reference"
            )
        judges = ("--reward-model", "--program")
        if self.judged and not any(word.startswith(judges) for word in self.words("label")):
            raise UserError(
                f"--method {self.method} needs scores: give --label-options '--program "
                "FILE.py:FUNCTION', or '--reward-model DIR'"
            )
        if not self.judged and self.words("label"):
            raise UserError(f"--label-options has no effect: --method {self.method} has no judge")
        for name, what in (("launcher", self.launcher), ("python", self.python)):
            words = split_words(what, f"--{name}")
            if words and not any(re.match("python|torchrun", Path(w).name) for w in words):
                raise UserError(
                    f"--{name} is {what!r}, expected what runs Python, up to its -m: such as "
                    "'torchrun --nproc-per-node 8' or 'srun python'"
                )

    @functools.cached_property
    def kind(self) -> Method:
        """The method, with what the options of training change of it.

        Raises:
            UserError: an option of the method has no effect, or a value that cannot be.
        """
        parser = _StageFlags("train")
        add_method_flags(parser)
        return method_from_options(
            self.method, vars(parser.parse_known_args(self.words("train"))[0])
        )

    @property
    def lists(self) -> bool:
        """Whether the method sees all responses of a prompt, else the best and the worst."""
        return self.kind.responses is None

    @property
    def judged(self) -> bool:
        """Whether responses get scores of a judge."""
        return not self.lists or "rewards" in self.kind.reads

    @property
    def judge(self) -> "Judge":
        """Who gives the scores.

        Raises:
            UserError: two do.
        """
        from megatron_infifpo.responses.scorers import Judge

        parser = _StageFlags("label")
        for flag in ("--program", "--reward-model"):
            parser.add_argument(flag)
        parser.add_argument("--bf16", action="store_true")
        return Judge(**vars(parser.parse_known_args(self.words("label"))[0]))

    @property
    def carried(self) -> bool:
        """Whether one optimizer goes through all rounds."""
        return self.optimizer == "carry"

    def words(self, stage: str) -> list[str]:
        """Further words of a stage.

        Raises:
            UserError: a quote that is not closed.
        """
        return split_words(self.options.get(stage, ""), f"--{stage}-options")

    @property
    def source_list(self) -> tuple[Source, ...]:
        """The sources, and how each is scored."""
        return () if self.sources is None else read_sources(self.sources).sources

    def _check_sources(self) -> None:
        """Refuse sources whose files would have one name, or that do not say what model they are.

        Raises:
            UserError: one does not.
        """
        files = [INITIAL]
        for source in self.source_list:
            files.append(file_name(source.name))
            if files[-1] in files[:-1]:
                raise UserError(f"{self.sources}: a file called {files[-1]} would be of two models")
            if "model" not in source.score:
                raise UserError(
                    f"{self.sources}: source {source.name!r} does not say which model it is, "
                    "expected for example: score: {model: models/qwen}"
                )

    def settings(self, pool: str) -> dict[str, Any]:
        """Return what the numbers of all rounds depend on, as JSON has it.

        Args:
            pool: what tells the pool of prompts from others.
        """
        names = ("method", "steps", "round_prompts", "count", "optimizer", "seed", "sampler_check")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        found |= {"pivot": str(Path(self.pivot).resolve()), "prompts_sha256": pool}
        found["sources"] = read_yaml(Path(self.sources)) if self.sources else None
        found["judge"] = self.judge.identity if self.judged else None
        return found | {"options": {stage: self.words(stage) for stage in STAGES}}


class _StageFlags(argparse.ArgumentParser):
    """Reads some flags of a stage among others."""

    def __init__(self, stage: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.stage = stage

    def error(self, message: str) -> NoReturn:
        """Raise UserError, where a command would print its usage."""
        raise UserError(f"--{self.stage}-options: {message}")


def file_name(source: str) -> str:
    """What files about a source are called."""
    return re.sub(r"[^\w.-]+", "-", source)
