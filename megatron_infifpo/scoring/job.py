"""What a scoring job is: which records, which model, run by which backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_choice, check_files, check_positive, check_types
from megatron_infifpo.records.records import ON_BAD
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.scoring.client import ServerAddress
from megatron_infifpo.tokens.options import TokenizerOptions

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_infifpo.logprobs import TopLogprobs

OVER_CONTEXT = ("mask", "cut")
ABSENT = ("error", "mask")
TOP_K_RESPONSES = ("all", "chosen")
COMPARE_RECORDS = 4


class ScoringModel(Protocol):
    """This rank's part of a model, run forward by a backend.

    Attributes:
        layout: of the rows that it takes.
        vocab_size: ids that it knows, padding included.
        data_parallel_rank, data_parallel_size: which of the shards are this rank's.
        is_writer: whether this rank has the results, once for each shard.
        facts: what plan and manifest say of it beside what the job says.
    """

    layout: RowLayout
    vocab_size: int
    data_parallel_rank: int
    data_parallel_size: int
    is_writer: bool
    facts: dict[str, Any]

    def __call__(
        self, rows: list[Row], on_row: Callable[[Row], None], /
    ) -> "Sequence[Tensor | TopLogprobs]":
        """Score collated rows, and call `on_row` with each that is done.

        Returns:
            The `[K]` float32 log-probs of each row, or `TopLogprobs` (`[K, 1 + n]`) of one with
            `own_top` n; nothing where other ranks have them.
        """


@dataclass(frozen=True)
class Backend:
    """A way to run a model.

    Attributes:
        load: called with a model's folder and the options.
        takes: names of its options.
        spare: tokens of a model's context that it needs beside a text.
    """

    load: Callable[..., ScoringModel]
    takes: tuple[str, ...]
    spare: int = 0


def _megatron(directory: str, **options: Any) -> ScoringModel:
    from megatron_infifpo.scoring.megatron_backend import MegatronBackend

    return MegatronBackend(directory, **options)


def _transformers(directory: str, **options: Any) -> ScoringModel:
    from megatron_infifpo.scoring.transformers_backend import TransformersBackend

    return TransformersBackend.load(directory, **options)


def _vllm(directory: str, **options: Any) -> ScoringModel:
    from megatron_infifpo.scoring.vllm_backend import VllmBackend

    return VllmBackend.load(directory, **options)


BACKENDS = {
    "megatron": Backend(
        _megatron,
        (
            "tensor_parallel",
            "pipeline_parallel",
            "context_parallel",
            "expert_parallel",
            "expert_tensor_parallel",
            "bf16",
        ),
    ),
    "transformers": Backend(_transformers, ("tensor_parallel", "bf16", "trust_remote_code")),
    "vllm": Backend(
        _vllm,
        (
            "tensor_parallel",
            "bf16",
            "trust_remote_code",
            "context_length",
            "top_k",
            "tokenizer",
            "server",
            "server_model",
        ),
        spare=1,
    ),
}


@dataclass(frozen=True)
class ScoringJob:
    """Preference records to score under one model; fields named as the flags of `infifpo score`.

    Attributes:
        backend: a key of `BACKENDS`.
        model: Hugging Face folder or (megatron) converted checkpoint.
        input: files of preference records, in order.
        output: prefix of the log-prob dataset to write.
        on_bad_record: "error": stop at the first malformed record; "skip": leave such ones out.
        lists: where records rate several responses take all of them, not the best and the worst.
        name: the model's name in the manifest; None: its folder's.
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size: layout; the
            other ranks are data parallel.
        expert_model_parallel_size, expert_tensor_parallel_size: of those that compute a row
            together, ranks that the experts of a layer, and each of them, are spread over.
        bf16: weights in bfloat16, else float32.
        domains: score records of these alone and mask the others; None: all.
        absent_domains: "error" where no record is of one of `domains`, or "mask" whatever is left.
        context_length: tokens of a prompt with one response; at most, and for None, the model's.
        over_context: "mask" a record with a longer response, or "cut" its responses.
        tokenizer: folder, for a model without one; None: the model's.
        tokenizer_options: how it is used, and what of a reply is scored.
        micro_batch_tokens: tokens of a packed row.
        max_row_tokens: the same, and responses of a record that has more are scored one by one; a
            text alone may have more. None: records stay whole.
        shard_records: records of a shard, the unit of work and of resuming.
        top_k: how many most probable tokens to keep of each scored one, with their log-probs; None:
            none, only the scored tokens' own log-probs.
        top_k_responses: of which responses: "all", or a pair's "chosen" alone.
        server: of vLLM, which has the model already; None: the backend loads it.
        server_model: the model's name there; None: its only one.
        compare_records: with vLLM, how many are scored by transformers, too, before all others;
            None: `COMPARE_RECORDS`.
    """

    backend: str
    model: str
    input: Sequence[str]
    output: str
    on_bad_record: str = "error"
    lists: bool = False
    name: str | None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    bf16: bool = False
    domains: Sequence[str] | None = None
    absent_domains: str = "error"
    context_length: int | None = None
    over_context: str = "mask"
    tokenizer: str | None = None
    tokenizer_options: TokenizerOptions = TokenizerOptions()
    micro_batch_tokens: int = 8192
    max_row_tokens: int | None = None
    shard_records: int = 256
    top_k: int | None = None
    top_k_responses: str = "all"
    server: ServerAddress | None = None
    server_model: str | None = None
    compare_records: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            UserError: a value out of its range, or one without effect.
        """
        check_choice("backend", self.backend, BACKENDS)
        check_files(self, "input")
        check_choice("on_bad_record", self.on_bad_record, ON_BAD)
        check_choice("over_context", self.over_context, OVER_CONTEXT)
        check_choice("absent_domains", self.absent_domains, ABSENT)
        check_choice("top_k_responses", self.top_k_responses, TOP_K_RESPONSES)
        if self.top_k_responses != TOP_K_RESPONSES[0] and self.top_k is None:
            raise UserError("--top-k-responses has no effect without --top-k")
        if self.absent_domains != ABSENT[0] and self.domains is None:
            raise UserError("--absent-domains has no effect without --domains")
        check_positive(
            self,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "context_length",
            "micro_batch_tokens",
            "max_row_tokens",
            "shard_records",
            "top_k",
        )
        check_positive(self, "compare_records", least=0)
        check_types(self)
        takes = BACKENDS[self.backend].takes
        self._check_server(takes)
        if self.tokenizer_options.trust_remote_code and "trust_remote_code" not in takes:
            raise UserError(
                f"--trust-remote-code has no effect with --backend {self.backend}, which runs its "
                "own model"
            )
        for kind, size in (
            ("pipeline", self.pipeline_model_parallel_size),
            ("context", self.context_parallel_size),
            ("expert", self.expert_model_parallel_size),
            ("expert tensor", self.expert_tensor_parallel_size),
        ):
            if size != 1 and f"{kind.replace(' ', '_')}_parallel" not in takes:
                raise UserError(f"--backend {self.backend} has no {kind} parallelism: use megatron")

    def _check_server(self, takes: Sequence[str]) -> None:
        """Refuse what has no effect without a server, or with one."""
        given = {
            "--server": self.server,
            "--server-model": self.server_model,
            "--compare-records": self.compare_records,
        }
        for flag, value in given.items():
            if value is not None and "server" not in takes:
                raise UserError(f"{flag} has no effect with --backend {self.backend}: use vllm")
        if self.server_model is not None and self.server is None:
            raise UserError("--server-model has no effect without --server")
        if self.server is not None and self.tensor_model_parallel_size != 1:
            raise UserError(
                "--tensor-model-parallel-size has no effect with --server, which has the model"
            )

    def load_model(self, context_length: int | None = None) -> ScoringModel:
        """Load this rank's part of the model.

        Args:
            context_length: tokens of the longest text; None: as the job says.

        Raises:
            UserError: an unusable model or layout.
        """
        backend = BACKENDS[self.backend]
        options = {
            "tensor_parallel": self.tensor_model_parallel_size,
            "pipeline_parallel": self.pipeline_model_parallel_size,
            "context_parallel": self.context_parallel_size,
            "expert_parallel": self.expert_model_parallel_size,
            "expert_tensor_parallel": self.expert_tensor_parallel_size,
            "bf16": self.bf16,
            "trust_remote_code": self.tokenizer_options.trust_remote_code,
            "context_length": context_length or self.context_length,
            "top_k": self.top_k,
            "tokenizer": self.tokenizer,
            "server": self.server,
            "server_model": self.server_model,
        }
        return backend.load(self.model, **{name: options[name] for name in backend.takes})

    @property
    def compared(self) -> int:
        """How many records transformers scores, too."""
        if "server" not in BACKENDS[self.backend].takes:
            return 0
        return COMPARE_RECORDS if self.compare_records is None else self.compare_records

    @property
    def model_name(self) -> str:
        """What the manifest calls the model."""
        return self.name or Path(self.model).resolve().name
