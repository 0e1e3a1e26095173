"""The command line of every stage of a round, and what it leaves.

Everything lies in one folder, and each stage finds there what others left:

    OUT/rounds.json                     settings; rounds.jsonl: the table
    OUT/pivot                           the given pivot, imported
    OUT/checkpoint                      the run, where the optimizer is carried on
    OUT/round-000/prompts.jsonl         this round's prompts
    OUT/round-000/responses.jsonl       the policy's, and .measured: its own log-probs of some
    OUT/round-000/records.jsonl         with scores, of the judge
    OUT/round-000/tokens.*, logprobs/*  of the initial pivot and of every source, sources.yaml
    OUT/round-000/checkpoint            of this round, where the optimizer is fresh
    OUT/round-000/hf                    the trained policy, which the next round samples from
    OUT/round-000/stages, logs          what ran, and what it printed
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.job import Job, scoring_words
from megatron_infifpo.references.sources import INITIAL
from megatron_infifpo.rounds.job import RoundsJob, file_name
from megatron_infifpo.storage.checkpoints import TRACKER
from megatron_infifpo.storage.yaml_files import read_yaml

POLICY = "policy"  # name of the model that responses are of


@dataclass(frozen=True)
class Stage:
    """One command of a round.

    Attributes:
        job: its words.
        made: a file or folder that is there once it is done, whole.
        step: of a training, at which its checkpoint is then; else None.
        measured: of sampling that is compared with the trainer: what it is compared by; else None.
    """

    job: Job
    made: Path
    step: int | None = None
    measured: Path | None = None

    @property
    def name(self) -> str:
        """What its log and its stamp are called."""
        return self.job.name

    @property
    def done(self) -> bool:
        """Whether what it makes is there: all commands give names to whole things only."""
        return self.missing is None and (self.step is None or self.at >= self.step)

    @property
    def missing(self) -> Path | None:
        """What it makes and is not there."""
        return next(
            (path for path in (self.made, self.measured) if path and not path.exists()), None
        )

    @property
    def at(self) -> int:
        """The step that a training has saved; 0 before its first one."""
        text = self.made.read_text(encoding="utf-8").strip() if self.made.exists() else ""
        return int(text) if text.isdecimal() else 0


class RoundFolder:
    """Paths of one round."""

    def __init__(self, job: RoundsJob, number: int) -> None:
        """Name them; nothing is read or written."""
        self.number = number
        self.path = job.output / f"round-{number:03d}"
        self.prompts = self.path / "prompts.jsonl"
        self.responses = self.path / "responses.jsonl"
        self.measured = self.path / "responses.jsonl.measured"
        self.records = self.path / "records.jsonl" if job.judged else self.responses
        self.tokens = self.path / "tokens"
        self.logprobs = self.path / "logprobs"
        self.sources = self.path / "sources.yaml"
        self.checkpoint = (job.output if job.carried else self.path) / "checkpoint"
        self.hf = self.path / "hf"
        self.row = self.path / "round.json"


def pivot(job: RoundsJob) -> Path:
    """Where the given pivot is imported to."""
    return job.output / "pivot"


def import_pivot(job: RoundsJob) -> Stage:
    """Import the given pivot, once for all rounds."""
    words = with_options(job, "import", ["--hf", job.pivot, "--save", pivot(job)])
    return Stage(Job("import", words), pivot(job) / TRACKER)


def stages_of(job: RoundsJob, number: int) -> list[Stage]:
    """List the stages of a round, each after those that it needs."""
    here = RoundFolder(job, number)
    model = job.pivot if number == 0 else str(RoundFolder(job, number - 1).hf)
    stages = [sample(job, here, model)]
    if job.judged:
        stages.append(label(job, here))
    stages.append(prepare(job, here))
    if job.kind.reads_logprobs:
        own = {"model": str(pivot(job)), **read_flags(job.words("initial"))}
        stages.append(score(job, here, own))
    for source in job.source_list:
        stages.append(score(job, here, source.score, source.name, source.domains or ()))
    return [*stages, train(job, here), export(job, here)]


def sample(job: RoundsJob, here: RoundFolder, model: str) -> Stage:
    """Sample from the policy itself: at temperature 1, of all tokens, cut responses too."""
    words: list[Any] = ["--model", model, "--name", POLICY, "--input", here.prompts]
    words += ["--output", here.responses, "--count", job.count, "--temperature", 1, "--top-p", 1]
    words += ["--seed", job.seed + here.number, "--keep-cut"]
    words += [] if job.sampler_check else ["--check", 0]
    words += on_bad_record(job, judged=True)
    measured = here.measured if job.sampler_check else None
    made = Job("sample", with_options(job, "sample", words))
    return Stage(made, here.responses, measured=measured)


def label(job: RoundsJob, here: RoundFolder) -> Stage:
    """Judge the responses; a list has those that were cut, too, else it were of another policy."""
    words: list[Any] = ["--input", here.responses, "--output", here.records]
    words += ["--list", job.count, "--keep-cut"] if job.lists else []
    words += on_bad_record(job, judged=True)
    return Stage(Job("label", with_options(job, "label", words)), here.records)


def prepare(job: RoundsJob, here: RoundFolder) -> Stage:
    """Tokenize for the pivot."""
    words: list[Any] = ["--input", here.records, "--tokenizer", job.pivot, "--output", here.tokens]
    words += on_bad_record(job, judged=job.judged)
    return Stage(Job("prepare", with_options(job, "prepare", words)), suffixed(here.tokens))


def score(
    job: RoundsJob,
    here: RoundFolder,
    own: Mapping[str, Any],
    name: str = INITIAL,
    domains: Sequence[str] = (),
) -> Stage:
    """Score the records under one model, by `--score-options` and the flags of its own."""
    file = file_name(name)
    output = here.logprobs / file
    usual = {"backend": "megatron", **read_flags(job.words("score"))}
    words: list[Any] = ["--name", name, "--input", here.records, "--output", output]
    # A training that goes through all rounds has all sources in each, though it has no such prompt.
    words += ["--domains", *domains, "--absent-domains", "mask"] if domains else []
    words += on_bad_record(job, judged=job.judged)
    for stage in ("score", INITIAL):
        check_own(stage, [*words, "--model"], job.words(stage))
    made = ("score", *scoring_words(usual, own), *map(str, words))
    return Stage(Job(f"score-{file}", made, every_rank=True), suffixed(output))


def on_bad_record(job: RoundsJob, *, judged: bool) -> list[str]:
    """Without a judge who leaves them out, prompts with one text alone are left out here."""
    return ["--on-bad-record", "skip"] if job.on_bad_record == "skip" or not judged else []


def train(job: RoundsJob, here: RoundFolder) -> Stage:
    """Train on the round's records, so many steps more."""
    number, save = here.number, here.checkpoint
    words: list[Any] = ["--method", job.method, "--preference-data", here.tokens]
    if job.kind.reads_logprobs:
        words += ["--preference-sources", here.sources]
    if job.carried:
        start, total, step = pivot(job), job.rounds * job.steps, (number + 1) * job.steps
        words += ["--stop-at", step, "--next-round"]
    else:
        before = RoundFolder(job, number - 1).checkpoint if number else pivot(job)
        start, total, step = before, job.steps, job.steps
        if number and job.kind.reference is not None:
            # The references stay those of the first pivot, and that is not what this round begins
            # with. The comparison with the sampler tells whether the weights are the right ones.
            words += ["--reference-check", "off"]
    words += ["--pretrained-checkpoint", start, "--save", save, "--train-iters", total]
    if job.sampler_check:
        words += ["--sampler-logprobs", here.measured]
    usual: list[list[Any]] = [["--lr-decay-style", "constant"], ["--save-interval", job.steps]]
    usual += [["--log-interval", 1], ["--tensorboard-log-interval", 1]]
    usual += [["--tensorboard-dir", save / "tensorboard"], ["--exit-signal-handler"]]
    made = with_options(job, "train", words, usual)
    return Stage(Job("train", made, every_rank=True), save / TRACKER, step)


def export(job: RoundsJob, here: RoundFolder) -> Stage:
    """Export what was trained, for the next round to sample from."""
    words = ["--load", here.checkpoint, "--save", here.hf]
    return Stage(Job("export", with_options(job, "export", words)), here.hf / "config.json")


def sources_yaml(job: RoundsJob, here: RoundFolder) -> str:
    """Return the round's sources.yaml (JSON is YAML, too), with the user's weights and accuracies.

    What is outside a source's domains is masked in its log-probs, and a round need not have them.
    Nor those that accuracies are of.
    """
    given_file = {"initial": INITIAL} if job.sources is None else read_yaml(Path(job.sources))
    content: dict[str, Any] = copy.deepcopy(given_file)
    initial, given = f"{here.logprobs.name}/{INITIAL}", content["initial"]
    content["initial"] = {**given, "logprobs": initial} if isinstance(given, dict) else initial
    content["sources"] = [
        {key: value for key, value in entry.items() if key not in ("score", "domains")}
        | {"logprobs": f"{here.logprobs.name}/{file_name(entry['name'])}"}
        for entry in content.get("sources") or ()
    ]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def with_options(
    job: RoundsJob, stage: str, words: Sequence[Any], usual: Sequence[Sequence[Any]] = ()
) -> tuple[str, ...]:
    """Put a stage's own words together with those of the user.

    Args:
        job: has the user's words.
        stage: one of `STAGES`.
        words: which the user may not give.
        usual: flags that the user may give otherwise.

    Raises:
        UserError: the user gives one of `words`.
    """
    given = job.words(stage)
    flags = check_own(stage, words, given)
    words = [*words, *(word for one in usual if one[0] not in flags for word in one)]
    return (stage, *map(str, words), *given)


def check_own(stage: str, words: Sequence[Any], given: Sequence[str]) -> set[str]:
    """Refuse flags that rounds give themselves; return the user's.

    Raises:
        UserError: there is one.
    """
    flags = {word.partition("=")[0] for word in given if word.startswith("--")}
    for word in words:
        if word in flags:
            raise UserError(f"--{stage}-options has {word}, which rounds give themselves")
    return flags


def read_flags(words: Sequence[str]) -> dict[str, Any]:
    """Read words as flags by name: true alone, several values as a list."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = [value] if equals else []
        elif found:
            found[next(reversed(found))].append(word)
        else:
            raise UserError(f"{word}: expected flags, such as --bf16")
    kinds = {0: lambda values: True, 1: lambda values: values[0]}
    return {name: kinds.get(len(v), lambda values: values)(v) for name, v in found.items()}


def suffixed(prefix: Path) -> Path:
    """The manifest of a data set, which is written last."""
    return prefix.with_name(prefix.name + ".json")
