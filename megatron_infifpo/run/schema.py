"""run.yaml, typed: every field with its default; what a field means stands below it.

Checked by pydantic, whose messages `reading` turns into sentences with file and line.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=80)]
"""Of a model or of a training: it becomes the name of files."""
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Some = Annotated[list[str], Field(min_length=1)]
Flag = str | bool | int | float | list[str | int | float] | dict[str, Any]
Flags = dict[str, Flag]


class Part(BaseModel):
    """A part of run.yaml: unknown names are refused, and nothing changes once it is read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )


class Layout(Part):
    """How ranks share a model; what remains of them is data-parallel."""

    tensor: PositiveInt = 1
    """Tensor-parallel size, in training with sequence parallelism above 1."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size."""
    context: PositiveInt = 1
    """Context-parallel size, for long texts: ranks that share a row."""
    expert: PositiveInt = 1
    """Expert-parallel size, of a model with experts; in scoring it divides tensor times context."""

    @property
    def ranks(self) -> int:
        """Ranks that hold one model together."""
        return self.tensor * self.pipeline * self.context


class Model(Part):
    """A model, and how it is scored."""

    model: str
    """Hugging Face folder."""
    chat_template_options: dict[str, Any] = {}
    """For its chat template, such as {enable_thinking: false}."""
    layout: Layout | None = None
    """Of scoring; without it chosen for the GPUs that are there."""
    flags: Flags = {}
    """Further ones of `infifpo score` (of the pivot: for scoring the initial pivot)."""


class Pivot(Model):
    """The model that is trained."""

    prepare_flags: Flags = {}
    """Further ones of `infifpo prepare`."""
    weight: Positive | None = None
    """In a weighted fusion, where every source has one, too."""


class Source(Model):
    """A model that the pivot learns from."""

    name: Name
    """Unique, for files, metrics and reports."""
    domains: Some | None = None
    """Of the records that it takes part in; without them all."""
    backend: Literal["megatron", "transformers", "vllm"] = "megatron"
    """What scores it."""
    weight: Positive | None = None
    """In a weighted fusion, where every model has one."""
    accuracy: float | dict[str, float] | None = None
    """Verified share of its answers that are right, also by domain, for weights of pairs."""


class Data(Part):
    """What is trained on: pairs, lists, or prompts from which the run makes them."""

    pairs: list[str] = []
    """Files of preference records; with `lists` of records that rate several responses."""
    lists: bool = False
    """Read every rated response of a record, as a list."""
    prompts: list[str] = []
    """In place of pairs: files of prompts, each FILE or FILE=COUNT, to sample responses to."""
    sft: list[str] = []
    """Files of records for SFT; without them `sft_share` of the prompts of all others."""
    sft_share: Share = 0.5
    """Of the prompts that SFT is trained on."""
    seed: int = 0
    """Of that split."""
    heldout: list[str] = []
    """Files of preference records that nothing is trained on: every model is compared on them."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """Stop at the first malformed record, or leave such records out, in every command."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.pairs) == bool(self.prompts):
            raise ValueError("expected pairs or prompts, and not both")
        return self


class Sampling(Part):
    """Responses to prompts, where data has some; see `infifpo sample`."""

    models: list[str] = []
    """Which ones answer: `pivot` and names of sources; without them all."""
    pivot_count: PositiveInt = 8
    """Responses of the pivot to a prompt."""
    source_count: PositiveInt = 4
    """Responses of each source."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates them."""
    flags: Flags = {}
    """Further ones of `infifpo sample`."""


class Labels(Part):
    """The judge of sampled responses; see `infifpo label`."""

    reward_model: str | None = None
    """Hugging Face folder of a sequence classifier."""
    program: str | None = None
    """Or a function of yours: FILE.py:FUNCTION."""
    list: PositiveInt | None = None
    """Write lists of so many responses at most; without it pairs of the best and the worst."""
    flags: Flags = {}
    """Further ones of `infifpo label`."""

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if (self.reward_model is None) == (self.program is None):
            raise ValueError("expected reward_model or program, and not both")
        return self


class Training(Part):
    """One training of the pivot."""

    name: Name | None = None
    """Of its folder; without it the method's."""
    method: str
    """A value of `infifpo train --method`: sft, infifpo, dpo, ..."""
    start: str | None = None
    """`pivot`, or the name of an earlier training; without it the first SFT before it."""
    data: Literal["sft", "preference"] | None = None
    """Which records; without it those that the method is meant for."""
    sources: Some | None = None
    """Names of those that it learns from; without it all."""
    epochs: PositiveInt = 1
    """Passes over the records."""
    lr: Positive = 1e-7
    """Highest learning rate; cosine, after 10 % of warm-up."""
    beta: Positive | None = None
    """Of the loss; without it the method's published one."""
    global_batch_size: PositiveInt = 128
    """Records of a step."""
    micro_batch_tokens: PositiveInt = 8192
    """Of a packed row, at most."""
    seq_length: PositiveInt = 4096
    """Of a prompt with one response, at most; longer records are left out."""
    save_interval: PositiveInt = 100
    """Steps from one checkpoint to the next."""
    lora_rank: PositiveInt | None = None
    """Train low-rank adapters of this rank alone; without it the whole model."""
    layout: Layout | None = None
    """Of its ranks; without it chosen for the GPUs that are there."""
    export: bool | None = None
    """To Hugging Face; without it where no other training starts from this one."""
    flags: Flags = {}
    """Further ones of `infifpo train`, Megatron's included."""


class Merge(Part):
    """Trainings merged into one model; see `infifpo merge`. The base is what all start from."""

    name: Name
    """Of the merged model: OUT/NAME-hf."""
    models: Annotated[list[str], Field(min_length=2)]
    """Names of trainings."""
    method: str = "sce"
    """A value of `infifpo merge --method`."""
    flags: Flags = {}
    """Further ones of `infifpo merge`."""


class Evaluation(Part):
    """What is measured of the models that come out."""

    benchmarks: list[str] = []
    """Of `infifpo evaluate --list`, or tasks of `--tasks`."""
    sources: bool = False
    """Compare the sources on held-out records, too."""
    flags: Flags = {}
    """Further ones of `infifpo evaluate`."""


class Cluster(Part):
    """Where it runs."""

    executor: Literal["local", "slurm"] = "local"
    """On this machine, or a chain of SLURM jobs."""
    nodes: PositiveInt = 1
    """Of a training."""
    ranks: PositiveInt | None = None
    """Of a node, one a GPU; without it the GPUs that are there, on a CPU 1."""
    gpu_memory: Positive = 80
    """GiB of a GPU, for layouts that are chosen."""
    at_once: PositiveInt = 1
    """Stages of the local executor at the same time, each with `ranks`."""
    launcher: str | None = None
    """What starts the ranks of a stage, up to `-m megatron_infifpo`; without it torchrun."""
    sbatch: Flags = {}
    """Flags of every job: {account: research, partition: h100, time: "04:00:00"}."""
    setup: str = ""
    """Shell lines before a job's command, such as `source .venv/bin/activate`."""
    container: str | None = None
    """An image for pyxis."""
    mounts: str | None = None
    """Of the container, separated by commas; without it the working folder."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a job that died is queued again."""


TRAININGS = [
    Training(method="sft", lr=1e-6, epochs=3),
    Training(method="infifpo"),
]
"""The paper's run."""


class Run(Part):
    """Everything that a run is."""

    output: str
    """Folder of everything that the run makes."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights and products, in scoring and in training."""
    pivot: Pivot
    sources: list[Source] = []
    data: Data
    sampling: Sampling = Sampling()
    labels: Labels | None = None
    train: Annotated[list[Training], Field(min_length=1)] = TRAININGS
    """Trainings, in order; the usual ones are the paper's: SFT, then InfiFPO from its result."""
    merge: list[Merge] = []
    evaluation: Evaluation = Evaluation()
    cluster: Cluster = Cluster()
