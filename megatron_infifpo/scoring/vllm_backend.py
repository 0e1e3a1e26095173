"""Score with vLLM, in this process or as a server: any model that it runs.

A text's token ids are its prompt, and it gives the log-probs of a prompt's tokens. Which ids it has
read is checked: one that was added, or another tokenizer, would shift every number.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_infifpo.engine.hf_model import check_whole
from megatron_infifpo.errors import UserError
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.logprobs import TopLogprobs
from megatron_infifpo.ranks import rank_and_size
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.layout import PLAIN
from megatron_infifpo.scoring.client import ServerAddress
from megatron_infifpo.scoring.transformers_backend import Segment, segments_of
from megatron_infifpo.scoring.vllm_answers import Answer, Asked, Found, read

# vLLM keeps the float32 logits of all tokens that it reads at once, beside what it plans for.
TOKENS_AT_ONCE = 2048
CALL_TOKENS = 2**15  # of one call: its answers are Python objects, some for each token


class Engine(Protocol):
    """A vLLM that can be asked.

    Attributes:
        facts: as those of `ScoringModel`.
    """

    facts: dict[str, Any]

    def ask(self, texts: Sequence[Asked], top: int, /) -> Iterable[Found]:
        """Return the log-probs of texts, in order.

        Args:
            texts: to be read by the model.
            top: most probable ids to find at each scored token.
        """


class VllmBackend:
    """A source model run forward by vLLM, which has all of it; one process asks."""

    layout = PLAIN
    data_parallel_rank, data_parallel_size = 0, 1
    is_writer = True

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        """Take an engine, and how many ids its model knows."""
        self.engine, self.vocab_size, self.facts = engine, vocab_size, engine.facts

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        tensor_parallel: int = 1,
        bf16: bool = False,
        trust_remote_code: bool = False,
        context_length: int,
        top_k: int | None = None,
        tokenizer: str | None = None,
        server: ServerAddress | None = None,
        server_model: str | None = None,
    ) -> "VllmBackend":
        """Load the model of a folder, or find that of a server.

        Raises:
            UserError: several ranks, no vLLM, weights that are missing, or a server that does not
                answer, has another model, or takes shorter texts.
        """
        _, ranks = rank_and_size()
        if ranks > 1:
            raise UserError(
                f"--backend vllm is one process, and there are {ranks}: run the command without "
                "torchrun; vLLM starts those of --tensor-model-parallel-size itself"
            )
        config = read_hf_config(directory)
        vocab_size = int(config.get("text_config", config)["vocab_size"])
        if server is not None:
            from megatron_infifpo.scoring.vllm_server import VllmServer

            return cls(VllmServer(server, server_model, context_length), vocab_size)
        vllm = _module()
        check_whole(directory, trust_remote_code=trust_remote_code)
        more = {} if tokenizer is None else {"tokenizer": tokenizer}
        engine = OfflineVllm(
            vllm,
            model=str(directory),
            tensor_parallel_size=tensor_parallel,
            dtype="bfloat16" if bf16 else "float32",
            trust_remote_code=trust_remote_code,
            max_model_len=context_length + 1,  # it always writes a token, too
            max_logprobs=max(20, top_k or 0),
            **more,
        )
        return cls(engine, vocab_size)

    def __call__(
        self, rows: list[Row], on_row: Callable[[Row], None] = lambda row: None
    ) -> list[Tensor | TopLogprobs]:
        """Score packed rows, as the backend of transformers does."""
        results = []
        for batch in _batches(rows):
            segments = [segments_of(row) for row in batch]
            texts = [
                Asked(segment.tokens.tolist(), segment.rows.tolist(), _record(row, segment))
                for row, its in zip(batch, segments, strict=True)
                for segment in its
            ]
            top = max(row.get("own_top", 0) for row in batch)
            found = iter(self.engine.ask(texts, top))
            for row, its in zip(batch, segments, strict=True):
                results.append(_join(row, its, found))
                on_row(row)
        return results


class OfflineVllm:
    """vLLM in this process."""

    def __init__(self, vllm: Any, **options: Any) -> None:
        """Load a model with the module."""
        self.network = vllm.LLM(
            # A prefix that is cached has no log-probs, and some versions give others' in its place.
            enable_prefix_caching=False,
            enable_chunked_prefill=True,
            max_num_batched_tokens=TOKENS_AT_ONCE,
            **options,
        )
        self.settings = vllm.SamplingParams
        self.facts = {"vllm_version": getattr(vllm, "__version__", None)}

    def ask(self, texts: Sequence[Asked], top: int) -> Iterator[Found]:
        """Yield the log-probs of texts."""
        # At temperature 1: versions before 0.8 divide a prompt's logits by it, too.
        how = self.settings(temperature=1.0, max_tokens=1, prompt_logprobs=top, detokenize=False)
        prompts = [{"prompt_token_ids": text.ids} for text in texts]
        outputs = self.network.generate(prompts, how, use_tqdm=False)
        for text, output in zip(texts, outputs, strict=True):
            positions = output.prompt_logprobs and [_plain(one) for one in output.prompt_logprobs]
            yield read(text, Answer(output.prompt_token_ids, positions), top)


def _module() -> Any:
    # CUDA has been asked for its devices here, and a fork of this process could not use it.
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    try:
        import vllm
    except ImportError:
        raise UserError(
            "--backend vllm needs vLLM: install it, or choose --backend transformers, or give "
            "--server with the address of one"
        ) from None
    return vllm


def _plain(position: Mapping[int, Any] | None) -> dict[int, float] | None:
    return None if position is None else {token: p.logprob for token, p in position.items()}


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Group rows so that an engine has enough to do and its answers fit into memory."""
    batch: list[Row] = []
    for row in rows:
        if batch and sum(one["tokens"].numel() for one in [*batch, row]) > CALL_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _record(row: Row, segment: Segment) -> str:
    """Name the record of a segment."""
    record = int(row["segment_ids"][segment.places[0]]) // row["valid"].shape[1]
    return repr(row["record_ids"][record]) if "record_ids" in row else f"number {record} of a row"


def _join(row: Row, segments: Sequence[Segment], found: Iterator[Found]) -> Tensor | TopLogprobs:
    """Put what was found of a row's texts where its scored tokens are."""
    count, top = len(row["scored_rows"]), row.get("own_top", 0)
    logprobs = torch.empty(count, 1 + top, dtype=torch.float32)
    top_ids = torch.empty(count, top, dtype=torch.int64)
    for segment in segments:
        its = next(found)
        logprobs[segment.places, 0] = its.own
        logprobs[segment.places, 1:] = its.top[:, :top]
        top_ids[segment.places] = its.top_ids[:, :top]
    return TopLogprobs(logprobs, top_ids) if top else logprobs[:, 0]
