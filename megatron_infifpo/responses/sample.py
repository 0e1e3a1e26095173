"""Sample responses of a model to prompts, once its log-probs are seen to be those of scoring."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from megatron_infifpo.convert.fingerprint import Weights, read_weights
from megatron_infifpo.engine.hf_model import check_folder
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import (
    check_choice,
    check_files,
    check_number,
    check_positive,
    check_types,
)
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.records.records import ON_BAD
from megatron_infifpo.responses.completing import Wanted
from megatron_infifpo.responses.engines import (
    Engine,
    EngineOptions,
    NotMeasuredError,
    Sampling,
    TransformersEngine,
)
from megatron_infifpo.responses.logprob_check import (
    MAX_TOKENS,
    compare_with,
    keep,
    open_scorer,
)
from megatron_infifpo.responses.prompts import Prompt, read_prompts
from megatron_infifpo.responses.sampling import run_job
from megatron_infifpo.responses.server import ServerEngine, ServerOptions
from megatron_infifpo.responses.vllm_engine import VllmEngine
from megatron_infifpo.scoring.agreement import TOLERANCE
from megatron_infifpo.tokens.options import TokenizerOptions, open_tokenizer
from megatron_infifpo.tokens.tokenization import ChatTokenizer

LOCAL: dict[str, Callable[..., Engine]] = {"transformers": TransformersEngine, "vllm": VllmEngine}


@dataclass(frozen=True)
class SamplingJob:
    """What is sampled from what.

    Attributes:
        input: files with prompts, each FILE or FILE=COUNT.
        model: Hugging Face folder, or the name that a server knows.
        output: .jsonl; None only where nothing is sampled.
        name: of the model in the output; None: the folder's.
        domain: of prompts that do not say theirs.
        domains: sample only for these; empty: for all.
        on_bad_record: "error" or "skip", for malformed prompts and for those that the chat template
            or the server refuses.
        how: each response is sampled; at temperature 0 a prompt has one, all would be the same.
        retries: how often a prompt is asked again in vain; not at temperature 0.
        keep_cut: keep responses that are cut, too.
        engine: one of `LOCAL`, or "server".
        options: of an engine on this machine; see `engine_options` for those that follow.
        server: of a server; see `server_options`.
        tokenizer: how it is used; its trust_remote_code is the model's, too.
        check: prompts for which the engine's log-probs are compared with the scorer's, and kept in
            OUTPUT.measured; 0: none.
        check_model: folder to compare a server with; None: the model's, where that is one.
        check_tolerance: nats, of a token; None: what the engine's precision asks for.
        check_only: sample nothing, and fail where they differ.
        shard_prompts: prompts of a shard.
        part: (i, n): this process does every n-th shard from the i-th on.
    """

    input: Sequence[str]
    model: str
    output: Path | None
    name: str | None = None
    domain: str | None = None
    domains: Sequence[str] = ()
    on_bad_record: str = "error"
    how: Sampling = field(default_factory=Sampling)
    retries: int = Wanted.retries
    keep_cut: bool = False
    engine: str = "transformers"
    options: EngineOptions = field(default_factory=EngineOptions)
    server: ServerOptions | None = None
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    check: int = 4
    check_model: str | None = None
    check_tolerance: float | None = None
    check_only: bool = False
    shard_prompts: int = 64
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        """Refuse what cannot go together.

        Raises:
            UserError: it cannot.
        """
        if self.output is None and not self.check_only:
            raise UserError("--output is missing: expected the file to write")
        check_files(self, "input")
        check_types(self)
        check_choice("on_bad_record", self.on_bad_record, ON_BAD)
        check_choice("engine", self.engine, (*LOCAL, "server"))
        check_positive(self, "shard_prompts")
        check_positive(self, "retries", "check", least=0)
        if not (len(self.part) == 2 and 0 <= self.part[0] < self.part[1]):
            said = "/".join(map(str, self.part))
            raise UserError(f"--part is {said}, expected I/N with I from 0 to N - 1")
        check_number(self, "check_tolerance")
        if self.check_only and not self.check:
            raise UserError("--check-only and --check 0 exclude each other")
        if (self.engine == "server") != (self.server is not None):
            raise UserError("--engine server and --server URL go together: give both or none")
        if self.engine != "server" and self.check_model:
            raise UserError("--check-model is for --engine server: others have the model itself")

    @property
    def model_name(self) -> str:
        """The model's name in the output."""
        return self.name or Path(self.model).resolve().name

    @property
    def sampling(self) -> Sampling:
        """How each response is sampled, and how many are."""
        return self.how if self.how.temperature else replace(self.how, count=1)

    @property
    def wanted(self) -> Wanted:
        """How many responses of which kind."""
        retries = self.retries if self.how.temperature else 0
        return Wanted(self.sampling.count, retries, self.keep_cut)

    @property
    def engine_options(self) -> EngineOptions:
        """Options of an engine on this machine, with what other fields say."""
        skip, remote = self.on_bad_record == "skip", self.tokenizer.trust_remote_code
        return replace(self.options, skip_refused=skip, trust_remote_code=remote)

    @property
    def server_options(self) -> ServerOptions | None:
        """Options of a server, with what other fields say."""
        if self.server is None:
            return None
        skip, templates = self.on_bad_record == "skip", self.tokenizer.chat_template_options
        return replace(self.server, skip_refused=skip, template_options=templates)


def sample(job: SamplingJob) -> bool:
    """Sample what is missing; return whether the output is complete.

    Raises:
        UserError: a bad prompt, an engine that is not there or (with `check_only`) whose log-probs
            differ, or an output that is there already, of a job without parts.
    """
    if job.output is not None and job.output.exists():
        if job.part[1] > 1:  # another part joined it
            return True
        raise UserError(f"{job.output} exists: delete it or choose another name")
    prompts = read(job)
    engine, chat = open_engine(job)
    known = job.engine != "server" and job.output is not None
    weights = read_weights(job.model) if known else None
    compare(job, engine, chat, prompts, weights)
    if job.check_only:
        return False
    assert job.output is not None
    options = job.options
    plan = {
        "model": job.model_name,
        "engine": job.engine,
        "bf16": options.bf16,
        "batch": options.batch,
    }
    plan["chat_template"] = job.tokenizer.chat_template
    plan["template_options"] = dict(job.tokenizer.chat_template_options)
    if chat is not None and job.engine != "server":
        plan |= {"folder": str(Path(job.model).resolve()), **chat.fingerprint()}
        plan["weights_sha256"] = None if weights is None else weights.sha256
    return run_job(
        prompts,
        engine,
        job.output,
        plan | asdict(job.sampling),
        job.wanted,
        shard_prompts=job.shard_prompts,
        part=job.part,
    )


def read(job: SamplingJob) -> list[Prompt]:
    """Read the prompts of the wanted domains, and say how many there are of each.

    Raises:
        UserError: a bad one, or there are none.
    """
    report = ReadReport()
    prompts = read_prompts(job.input, domain=job.domain, on_bad=job.on_bad_record, report=report)
    report.show()
    domains = Counter(prompt.domain for prompt in prompts)
    print(f"{len(prompts)} prompts: {', '.join(f'{n} {name}' for name, n in domains.items())}")
    if job.domains:
        prompts = [prompt for prompt in prompts if prompt.domain in job.domains]
    if not prompts:
        raise UserError(f"no prompt of {' '.join(job.input)} is left to sample for")
    return prompts


def open_engine(job: SamplingJob) -> tuple[Engine, ChatTokenizer | None]:
    """Load the model and its tokenizer, or take a server's address.

    Returns:
        The engine, and the tokenizer; None where only a server knows it.

    Raises:
        UserError: an engine that is not there, or options that have no effect.
    """
    server = job.server_options
    if server is None:
        check_folder(job.model)
        chat = open_tokenizer(job.model, job.tokenizer)
        return LOCAL[job.engine](job.model, chat, job.sampling, job.engine_options), chat
    folder = job.check_model or job.model
    if job.check_model:
        check_folder(folder)
    known = job.check_model or (Path(folder) / "config.json").is_file()
    if job.tokenizer.chat_template and not known:
        raise UserError("--chat-template has no effect: the server has the template")
    engine = ServerEngine(job.model, job.sampling, server)
    return engine, open_tokenizer(folder, job.tokenizer) if known else None


def compare(
    job: SamplingJob,
    engine: Engine,
    chat: ChatTokenizer | None,
    prompts: list[Prompt],
    weights: Weights | None = None,
) -> None:
    """Compare the engine's log-probs with the scorer's, say what came of it, and keep the former.

    Args:
        job: to be done.
        engine: of it.
        chat: its model's tokenizer, where there is one.
        prompts: some are answered.
        weights: of the model, where they are known.

    Raises:
        UserError: with `check_only`, they differ or cannot be compared.
    """
    if not job.check:
        return
    options = job.engine_options
    coarse = options.bf16 or job.engine != "transformers"  # servers have bfloat16, mostly
    tolerance = job.check_tolerance or TOLERANCE[coarse]
    try:
        if chat is None:
            raise NotMeasuredError("no model's folder to score them with: give --check-model")
        measured = engine.measure(prompts[: job.check], MAX_TOKENS, job.how.seed)
        if job.output is not None:
            keep(job.output, measured, job.model_name, weights)
        try:
            scorer = open_scorer(
                job.check_model or job.model,
                engine,
                bf16=options.bf16,
                trust_remote_code=options.trust_remote_code,
            )
        except (UserError, torch.OutOfMemoryError) as error:
            raise NotMeasuredError(str(error)) from None
        found = compare_with(measured, chat, scorer)
        fine, said = found.agrees(tolerance), found.sentence(tolerance, chat.path)
    except NotMeasuredError as error:
        fine, said = False, f"the engine's log-probs are not checked: {error}"
    if job.check_only and not fine:
        raise UserError(said)
    print(said if fine else f"warning: {said}", file=sys.stdout if fine else sys.stderr)
