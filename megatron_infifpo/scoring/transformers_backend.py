"""Score with Hugging Face transformers: any causal LM."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_infifpo.engine.batch_rule import BatchRule
from megatron_infifpo.engine.hf_model import check_folder, load_causal_lm
from megatron_infifpo.engine.parallel import WAIT
from megatron_infifpo.errors import UserError
from megatron_infifpo.logprobs import TopLogprobs, chunk_bytes_on
from megatron_infifpo.patches import cpu
from megatron_infifpo.ranks import rank_and_size
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.layout import PLAIN

LOGITS_BYTES = 2**30
# A batch's shortest segment has at least this share of the tokens of its longest.
LIKE = 0.75


class TransformersBackend:
    """A source model run forward by transformers.

    Ranks are data parallel, each with the whole model, or form one tensor-parallel group with the
    model's own plan.
    """

    layout = PLAIN
    facts: dict[str, Any] = {}

    def __init__(self, model: Any, *, rank: int = 0, ranks: int = 1, is_writer: bool = True):
        """Take a model of transformers, freshly loaded.

        Args:
            model: on this rank alone, or a part of it.
            rank, ranks: which of the data-parallel ones this is, and how many there are.
            is_writer: whether this rank has the results.
        """
        self.model, self.rule, self.device = model, BatchRule(model), model.device
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.data_parallel_rank, self.data_parallel_size = rank, ranks
        self.is_writer = is_writer

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        tensor_parallel: int = 1,
        bf16: bool = False,
        trust_remote_code: bool = False,
    ) -> "TransformersBackend":
        """Load the model of a folder.

        Raises:
            UserError: tensor parallelism over some of the ranks only, or a model that is not whole.
        """
        rank, world = rank_and_size()
        if tensor_parallel not in (1, world):
            raise UserError(
                f"--backend transformers shards a model over all ranks or none: "
                f"--tensor-model-parallel-size is {tensor_parallel}, expected 1 or {world}"
            )
        check_folder(directory)  # by each rank, before any waits for another
        sharded = tensor_parallel > 1
        cuda = torch.cuda.is_available() and not cpu.is_enabled()
        device = torch.device("cpu")
        if cuda:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if world > 1 and not dist.is_initialized():
            # Data-parallel ranks only wait for each other and exchange small objects.
            backend = "nccl" if cuda and sharded else "gloo"
            dist.init_process_group(backend, timeout=WAIT)
        placement = {"tp_plan": "auto"} if sharded else {"device_map": {"": device}}
        model = load_causal_lm(
            directory,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            trust_remote_code=trust_remote_code,
            **placement,
        )
        if sharded:
            return cls(model, is_writer=rank == 0)
        return cls(model, rank=rank, ranks=world)

    def __call__(
        self, rows: list[Row], on_row: Callable[[Row], None] = lambda row: None
    ) -> list[Any]:
        """Score packed rows: the `[K]` float32 log-probs of each row, in the row's order.

        Of a row with `own_top` n it is `TopLogprobs`, `[K, 1 + n]`. `on_row` is called with each
        row once it is done.
        """
        results = []
        for row in rows:
            results.append(self._score_row(row))
            on_row(row)
        return results

    @torch.no_grad()
    def _score_row(self, row: Row) -> Tensor | TopLogprobs:
        scored, top = row["scored_rows"], row.get("own_top", 0)
        logprobs = torch.empty(len(scored), 1 + top, dtype=torch.float32)
        top_ids = torch.empty(len(scored), top, dtype=torch.int64)
        for batch in self._batches(segments_of(row)):
            places = torch.cat([segment.places for segment in batch])
            found = self._score_batch(batch, row["target_ids"][places], top)
            logprobs[places], top_ids[places] = (part.cpu() for part in found)
        return TopLogprobs(logprobs, top_ids) if top else logprobs[:, 0]

    def _batches(self, segments: list["Segment"]) -> Iterator[list["Segment"]]:
        """Group segments of like length, so that little is padding, as their logits allow.

        Segments whose numbers would depend on each other are in different batches.
        """
        limit = max(1, LOGITS_BYTES // (4 * self.vocab_size))
        batch: list[Segment] = []
        for segment in sorted(segments, key=lambda s: -len(s.tokens)):
            if batch:
                length, longest = len(segment.tokens), len(batch[0].tokens)
                alike = length >= LIKE * longest and self.rule.key(length) == self.rule.key(longest)
                if not alike or sum(len(s.rows) for s in [*batch, segment]) > limit:
                    yield batch
                    batch = []
            batch.append(segment)
        if batch:
            yield batch

    def _score_batch(self, batch: list["Segment"], targets: Tensor, top: int) -> TopLogprobs:
        """Log-probs of the batch's scored tokens, segment after segment."""
        tokens = [segment.tokens for segment in batch]
        # Padded on the right, where a causal model cannot see it.
        ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(self.device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], True)
        places = torch.cat([segment.rows + i * ids.shape[1] for i, segment in enumerate(batch)])
        places, targets = places.to(self.device), targets.to(self.device)

        def keep_scored(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *others = inputs
            return hidden.flatten(0, 1)[places][None], *others

        # Logits of the scored rows only, with whatever the model does to its logits (soft caps,
        # scales). Before the head's own hooks, which may belong to tensor parallelism.
        self.rule.reset()
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(keep_scored, prepend=True)
        try:
            output = self.model(ids, attention_mask=mask.to(self.device), use_cache=False)
        finally:
            hook.remove()
        return gather_logprobs(output.logits[0], targets, top)


class Segment(NamedTuple):
    """One response with its prompt."""

    tokens: Tensor  # [L]
    rows: Tensor  # [k], the positions in the segment that predict a response token
    places: Tensor  # [k], the positions of their log-probs in the row's result


def segments_of(row: Row) -> list[Segment]:
    """Return the responses of a row, each with its prompt, that have scored tokens."""
    scored, found = row["scored_rows"], []
    borders = [0, *itertools.accumulate(row["segment_lengths"])]
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        places = ((scored >= start) & (scored < end)).nonzero().squeeze(1)
        if len(places):  # not the padding at the end of a row
            found.append(Segment(row["tokens"][0, start:end], scored[places] - start, places))
    return found


def gather_logprobs(logits: Tensor, targets: Tensor, top: int = 0) -> TopLogprobs:
    """Float32 log-softmax of `[k, V]` at the targets `[k]` and at the `top` most probable ids.

    With float32 copies of few rows at a time.
    """
    rows = max(1, chunk_bytes_on(logits.device) // (4 * logits.shape[1]))
    parts, ids = [], []
    for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        precise = part.float()
        picked, highest = precise.gather(1, wanted[:, None]), precise.topk(top, dim=1)
        total = precise.logsumexp(dim=-1, keepdim=True)
        parts.append(torch.cat([picked, highest.values], dim=1) - total)
        ids.append(highest.indices)
    return TopLogprobs(torch.cat(parts), torch.cat(ids))
