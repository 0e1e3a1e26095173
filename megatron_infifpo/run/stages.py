"""The stages of a run: what run.yaml means as command lines, each with what it waits for.

Nothing is read or written here. Commands and their flags are those that a person would type.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.recipes.commands import training_words
from megatron_infifpo.recipes.job import LAYOUT, Job, flag_words, scoring_words
from megatron_infifpo.run.checks import name_of
from megatron_infifpo.run.names import PIVOT, Names, manifest
from megatron_infifpo.run.schema import Flags, Layout, Model, Pivot, Run, Source, Training
from megatron_infifpo.storage.checkpoints import TRACKER

TOP_K = 16
CHECK, REPORT = "verify", "report"


@dataclass(frozen=True)
class Stage:
    """One command of a run.

    Attributes:
        job: its words; its name is the stage's.
        after: names of the stages whose output it reads.
        made: a file that is there once it is done.
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


@dataclass(frozen=True)
class Layouts:
    """Layouts that were chosen for the GPUs that are there.

    Attributes:
        training: flags of `infifpo train`, by the training's name.
        scoring: layouts by the model's name; `pivot` is that of the pivot and all that it becomes.
    """

    training: Mapping[str, tuple[str, ...]]
    scoring: Mapping[str, Layout]


def stages_of(run: Run, layouts: Layouts, *, report: bool = True) -> list[Stage]:
    """List the stages of a run, each after those that it waits for.

    Args:
        run: what it is.
        layouts: of what it trains and scores.
        report: write pages about trainings, which needs matplotlib.
    """
    return list(_Builder(run, layouts, report).stages())


class _Builder:
    """Knows what every stage needs: the run, its folder, and the files that others leave."""

    def __init__(self, run: Run, layouts: Layouts, report: bool) -> None:
        from megatron_infifpo.methods import METHODS  # here: it imports torch

        self.run, self.layouts, self.report = run, layouts, report
        self.names = Names(Path(run.output))
        self.methods = {name_of(one): METHODS[one.method] for one in run.train}
        sft = next((name_of(one) for one in run.train if self._split(one) == "sft"), None)
        self.splits = [*(["sft"] if sft else []), *(["preference"] if self._preferences() else [])]

    def stages(self) -> Iterator[Stage]:
        """Yield all of them."""
        yield from self._records()
        for split in self.splits:
            yield self._prepare(split)
        if "preference" in self.splits and self._read_sources():
            for source in self.run.sources:
                yield self._score(source.name, source, "preference")
        if self._learns_tokens():
            yield self._score(PIVOT, self.run.pivot, "sft")
            for source in self.run.sources:
                yield self._score(source.name, source, "sft")
        for training in self.run.train:
            yield from self._train(training)
        yield from self._evaluate()

    def starts(self) -> dict[str, str]:
        """What every training starts from, by name: an earlier training, or the pivot."""
        found: dict[str, str] = {}
        first_sft: str | None = None
        for one in self.run.train:
            name = name_of(one)
            found[name] = one.start or first_sft or PIVOT
            if self.methods[name].reference is None and first_sft is None and one.start is None:
                first_sft = name
        return found

    def _split(self, one: Training) -> str:
        trained_on = "sft" if self.methods[name_of(one)].reference is None else "preference"
        return one.data or trained_on

    def _preferences(self) -> bool:
        return any(self._split(one) == "preference" for one in self.run.train)

    def _read_sources(self) -> bool:
        return any(
            self.methods[name_of(one)].reads_sources or one.flags.get("pair-weights")
            for one in self.run.train
            if self._split(one) == "preference"
        )

    def _learns_tokens(self) -> bool:
        return any(self.methods[name_of(one)].soft_targets for one in self.run.train)

    # Records

    def _records(self) -> Iterator[Stage]:
        data = self.run.data
        if data.prompts:
            yield from self._sample()
        if self._splitting():
            files, after = self._all_records()
            made = [self.names.records(split) for split in ("sft", "preference")]
            words: list[Any] = ["--input", *files, "--sft", made[0], "--preference", made[1]]
            words += ["--share", data.sft_share, "--seed", data.seed, *self._reading()]
            yield self._stage("split", words, after, made[1], self._given(files), made)

    def _splitting(self) -> bool:
        return not self.run.data.sft and self.splits == ["sft", "preference"]

    def _all_records(self) -> tuple[list[str], tuple[str, ...]]:
        """Files of all records, and the stage that makes them."""
        if self.run.data.prompts:
            return [str(self.names.responses("records"))], ("label",)
        return list(self.run.data.pairs), ()

    def _files(self, split: str) -> tuple[list[str], tuple[str, ...]]:
        """Files of a split's records, and the stages that make them."""
        if split == "heldout":
            return list(self.run.data.heldout), ()
        if split == "sft" and self.run.data.sft:
            return list(self.run.data.sft), ()
        if self._splitting():
            return [str(self.names.records(split))], ("split",)
        return self._all_records()

    def _given(self, files: list[str]) -> tuple[str, ...]:
        """Those of the files that no stage makes."""
        return tuple(file for file in files if Path(self.run.output) not in Path(file).parents)

    def _reading(self) -> list[str]:
        lists = ["--lists"] if self.run.data.lists else []
        skip = self.run.data.on_bad_record
        return [*lists, *(["--on-bad-record", skip] if skip != "stop" else [])]

    def _sample(self) -> Iterator[Stage]:
        run, sampled = self.run, []
        models: dict[str, Model] = {PIVOT: run.pivot} | {each.name: each for each in run.sources}
        for name in run.sampling.models or models:
            model, output = models[name], self.names.responses(name)
            count = run.sampling.pivot_count if name == PIVOT else run.sampling.source_count
            words: list[Any] = ["--model", model.model, "--name", name, "--engine"]
            words += [run.sampling.engine, "--count", count, "--output", output]
            words += ["--input", *run.data.prompts, *self._templates(model)]
            words += ["--bf16"] if run.precision == "bf16" else []
            if isinstance(model, Source) and model.domains:
                words += ["--domains", *model.domains]
            words += _words(run.sampling.flags)
            prompts = tuple(
                file if Path(file).exists() else file.rpartition("=")[0]
                for file in run.data.prompts
            )
            sampled.append(f"sample-{name}")
            given = (model.model, *prompts)
            yield self._stage("sample", words, (), output, given, (output,), name=sampled[-1])
        assert run.labels is not None
        output, labels = self.names.responses("records"), run.labels
        words = ["--input", *(self.names.responses(name) for name in run.sampling.models or models)]
        words += ["--output", output, "--pivot", PIVOT]
        words += ["--list", labels.list] if labels.list else []
        judge = labels.reward_model or str(labels.program)
        words += ["--reward-model" if labels.reward_model else "--program", judge]
        judged = (labels.reward_model or judge.rpartition(":")[0],)
        words += _words(labels.flags)
        yield self._stage("label", words, tuple(sampled), output, judged, (output,))

    # What training reads

    def _prepare(self, split: str) -> Stage:
        files, after = self._files(split)
        prefix, pivot = self.names.tokens(split), self.run.pivot
        words: list[Any] = ["--input", *files, "--tokenizer", pivot.model, "--output", prefix]
        words += [*self._reading(), *self._templates(pivot), *_words(pivot.prepare_flags)]
        given = (*self._given(files), pivot.model)
        # Records of a split have the same prefix, and are another stage's.
        outputs = tuple(prefix.with_name(f"{split}.{end}") for end in ("json", "bin", "idx", "npz"))
        name = f"prepare-{split}"
        return self._stage("prepare", words, after, manifest(prefix), given, outputs, name=name)

    def _score(
        self, name: str, model: Model, split: str, checkpoint: str | None = None
    ) -> Stage:
        """Score a split under a model, or under what a training made of the pivot."""
        files, after = self._files(split)
        output = self.names.logprobs(split, name)
        own = self._scoring(name, model, split)
        own["model"] = str(self.names.checkpoint(checkpoint)) if checkpoint else model.model
        words = scoring_words({}, own | model.flags)
        words += ["--name", name, "--input", *files, "--output", str(output), *self._reading()]
        if isinstance(model, Source) and model.domains:
            words += ["--domains", *model.domains, "--absent-domains", "mask"]
        after += (checkpoint,) if checkpoint else ()
        # A checkpoint carries its tokenizer; the folder of the pivot is no input of its own then.
        given = self._given(files) + (() if checkpoint else (model.model,))
        which = {"preference": "", "heldout": "heldout-", "sft": "tokens-"}[split]
        title = f"score-{which}{name}"
        made, every = manifest(output), own["backend"] == "megatron"
        return self._stage("score", words, after, made, given, (output,), name=title, every=every)

    def _scoring(self, name: str, model: Model, split: str) -> dict[str, Any]:
        """Flags of scoring a model."""
        backend = model.backend if isinstance(model, Source) else "megatron"
        found: dict[str, Any] = {"backend": backend}
        layout = model.layout or self.layouts.scoring.get(name, self.layouts.scoring[PIVOT])
        if backend == "megatron" or model.layout:
            sizes = (layout.tensor, layout.pipeline, layout.context)
            found |= {f: n for f, n in zip(LAYOUT, sizes, strict=True) if n > 1}
        if self.run.precision == "bf16":
            found["bf16"] = True
        if split == "sft":
            found |= {"top-k": TOP_K, "top-k-responses": "chosen"}
        if model.chat_template_options:
            found["chat-template-options"] = model.chat_template_options
        return found

    # Training

    def _train(self, training: Training) -> Iterator[Stage]:
        run, names, name = self.run, self.names, name_of(training)
        method, split = self.methods[name], self._split(training)
        start = self.starts()[name]
        after, given = [f"prepare-{split}"], [run.pivot.model] * (start == PIVOT)
        after += [start] * (start != PIVOT)
        data = ["--preference-data", str(names.tokens(split))]
        if method.soft_targets:
            yield self._fuse(name)
            after.append(f"fuse-{name}")
            data += ["--soft-targets", str(names.targets(name))]
        elif split == "preference" and (method.reads_logprobs or "pair-weights" in training.flags):
            if start not in self._scored():
                checkpoint = None if start == PIVOT else start
                yield self._score(start, run.pivot, "preference", checkpoint)
                self._scored().add(start)
            after += [f"score-{start}"]
            if method.reads_sources or "pair-weights" in training.flags:
                after += [f"score-{source.name}" for source in run.sources]
            data += ["--preference-sources", str(names.sources(start))]
        start_from = run.pivot.model if start == PIVOT else str(names.checkpoint(start))
        words = training_words(
            training.method, data, start_from, str(names.checkpoint(name)),
            beta=training.beta, bf16=run.precision == "bf16", epochs=training.epochs,
            lr=training.lr, global_batch_size=training.global_batch_size,
            seq_length=training.seq_length, save_interval=training.save_interval,
            layout=self.layouts.training[name],
        )  # fmt: skip
        words = _without(words, training.flags) + _words(training.flags)
        save = names.checkpoint(name)
        job = Job(name, ("train", *words), every_rank=True)
        yield Stage(job, tuple(after), save / TRACKER, tuple(given), (save,), trains=True)
        if self._exports(training):
            yield from self._export(name)
        if self.report and split == "preference":
            page = save / "report.html"
            yield self._stage(REPORT, [save], (name,), page, (), (page,), name=f"{REPORT}-{name}")

    def _scored(self) -> set[str]:
        """Checkpoints that are scored as initial pivots already."""
        if not hasattr(self, "_initial"):
            self._initial = set[str]()
        return self._initial

    def _fuse(self, name: str) -> Stage:
        method, output = self.methods[name], self.names.targets(name)
        words: list[Any] = ["--data", self.names.tokens("sft")]
        words += ["--sources", self.names.sources("tokens"), "--output", output]
        spread = "top_values" in method.reads
        words += ["--fusion", "none"] if spread else ["--fusion", "mince", "--include-initial"]
        models = [PIVOT, *(source.name for source in self.run.sources)]
        after = ("prepare-sft", *(f"score-tokens-{each}" for each in models))
        made = manifest(output)
        return self._stage("fuse-targets", words, after, made, (), (output,), name=f"fuse-{name}")

    def _exports(self, training: Training) -> bool:
        name = name_of(training)
        begun = name in self.starts().values()
        return not begun if training.export is None else training.export

    def _export(self, name: str) -> Iterator[Stage]:
        load, save = self.names.checkpoint(name), self.names.exported(name)
        words: list[Any] = ["--load", load, "--save", save]
        made, title = save / "config.json", f"export-{name}"
        yield self._stage("export", words, (name,), made, (), (save,), name=title)
        words = ["--hf", save, "--load", load]
        layout = self.layouts.scoring[PIVOT]
        for flag, size in zip(LAYOUT[:2], (layout.tensor, layout.pipeline), strict=True):
            words += [f"--{flag}", size] if size > 1 else []
        words += ["--bf16"] if self.run.precision == "bf16" else []
        named = f"{CHECK}-{name}"
        yield self._stage(CHECK, words, (name, title), None, (), (), name=named, every=True)

    # What came of it

    def _evaluate(self) -> Iterator[Stage]:
        run = self.run
        exported = [name_of(each) for each in run.train if self._exports(each)]
        if run.data.heldout:
            yield self._prepare("heldout")
            yield self._score(PIVOT, run.pivot, "heldout")
            for training in run.train:
                yield self._score(name_of(training), run.pivot, "heldout", name_of(training))
            for source in run.sources if run.evaluation.sources else ():
                yield self._score(source.name, source, "heldout")
        if run.evaluation.benchmarks:
            output = self.names.output / "evaluation"
            words: list[Any] = ["--output", output, "--benchmarks", *run.evaluation.benchmarks]
            words += ["--model", f"{PIVOT}={run.pivot.model}"]
            for name in exported:
                words += ["--model", f"{name}={self.names.exported(name)}"]
            words += _words(run.evaluation.flags)
            after = tuple(f"export-{name}" for name in exported)
            made = output / "table.md"
            yield self._stage("evaluate", words, after, made, (run.pivot.model,), (output,))

    def _templates(self, model: Model) -> list[str]:
        options = model.chat_template_options
        return flag_words("chat-template-options", options) if options else []

    def _stage(
        self,
        command: str,
        words: list[Any],
        after: tuple[str, ...],
        made: Path | None,
        inputs: tuple[str, ...],
        outputs: Any,
        *,
        name: str = "",
        every: bool = False,
    ) -> Stage:
        """Make a stage of a command and its words."""
        job = Job(name or command, (command, *map(str, words)), every_rank=every)
        return Stage(job, after, made, inputs, tuple(outputs))


def _words(flags: Flags) -> list[str]:
    """Words of flags by name, with dashes or underscores."""
    return [
        word
        for name, value in flags.items()
        for word in flag_words(name.lstrip("-").replace("_", "-"), value)
    ]


def _without(words: list[str], flags: Flags) -> list[str]:
    """Leave out the words of flags that are given otherwise."""
    given = {f"--{name.lstrip('-').replace('_', '-')}" for name in flags}
    found: list[str] = []
    keep = True
    for word in words:
        if word.startswith("--"):
            keep = word not in given
        if keep:
            found.append(word)
    return found


def sources_yaml(run: Run, start: str, *, split: str = "preference") -> dict[str, Any]:
    """What the sources.yaml of trainings from one checkpoint holds; prefixes are beside it.

    Args:
        run: what it is.
        start: the initial pivot's name.
        split: `preference`; `sft` for soft targets.
    """
    folder = "../logprobs" if split == "preference" else "../tokens"
    initial: Any = f"{folder}/{start}"
    if isinstance(run.pivot, Pivot) and run.pivot.weight is not None:
        initial = {"logprobs": initial, "weight": run.pivot.weight}
    found = []
    for source in run.sources:
        entry: dict[str, Any] = {"name": source.name, "logprobs": f"{folder}/{source.name}"}
        for field in ("domains", "weight", "accuracy"):
            if (value := getattr(source, field)) is not None:
                entry[field] = value
        found.append(entry)
    return {"initial": initial, "sources": found}
