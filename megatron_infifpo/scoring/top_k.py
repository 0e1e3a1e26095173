"""What `--top-k` adds to scoring: the most probable tokens, and the bytes of what was scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from megatron_infifpo.errors import UserError
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.logprobs import TopLogprobs
from megatron_infifpo.records.records import RESPONSES, PreferenceRecord
from megatron_infifpo.references.top_k import Packed, pack_logps, text_identity
from megatron_infifpo.rows import Row
from megatron_infifpo.scoring.job import ScoringJob
from megatron_infifpo.tokens.encoding import scored_marks
from megatron_infifpo.tokens.token_bytes import without_blank
from megatron_infifpo.tokens.tokenization import ChatTokenizer, TokenizedRecord

Text = tuple[np.ndarray, tuple[int, int, int, int]]
"""Bytes of each scored token of a response, uint16 `[L]`, and `text_identity` of them joined."""


@dataclass(frozen=True)
class TopKeeper:
    """Keeps the most probable tokens of what is scored.

    Attributes:
        k: how many.
        responses: "all", or "chosen": of the first response alone.
        tokenizer: the model's.
    """

    k: int
    responses: str
    tokenizer: ChatTokenizer

    @classmethod
    def of(cls, job: ScoringJob, tokenizer: ChatTokenizer) -> "TopKeeper | None":
        """Return a job's, None for one without `--top-k`."""
        return None if job.top_k is None else cls(job.top_k, job.top_k_responses, tokenizer)

    def keeps(self, response: int) -> bool:
        """Whether the distributions of a response are kept."""
        return self.responses == "all" or response == 0

    def ask(self, rows: Sequence[Row]) -> None:
        """Have a backend look for the most probable tokens of rows."""
        for row in rows:
            row["own_top"] = self.k

    def texts(self, record: PreferenceRecord, tokens: TokenizedRecord) -> list[Text]:
        """Return the text of each response, as much of it as is scored."""
        known, found = self.tokenizer.token_bytes, []
        marks = scored_marks(tokens.response_ids, tokens.scored)
        for number, (ids, mark) in enumerate(zip(tokens.response_ids, marks, strict=True)):
            scored = ids[mark]
            lengths, joined = known.lengths[scored], known.join(scored.tolist())
            # Only these can begin with a blank that is not in the text, which is rendered again.
            if joined[:1] == b" ":
                text = without_blank(joined, self._text(record, number))
                lengths[np.flatnonzero(lengths)[0]] -= len(joined) - len(text)
                joined = text
            found.append((lengths, text_identity(joined)))
        return found

    def _text(self, record: PreferenceRecord, number: int) -> bytes:
        """The scored text of a response, with what the template writes behind it."""
        reply = self.tokenizer.render(record).replies[number]
        return "".join(reply.text[start:end] for start, end in reply.scored).encode()

    def pack(self, response: int, ids: np.ndarray, logps: np.ndarray, text: Text) -> Packed:
        """Return a response as it is stored, from ids and float32 log-probs `[L, k]`."""
        count = len(ids) if self.keeps(response) else 0
        return Packed(ids[:count].astype(np.int32), pack_logps(logps[:count]), *text)


def observed(output: Tensor | TopLogprobs) -> Tensor:
    """Return the `[K]` log-probs of a row's scored tokens."""
    return output if isinstance(output, Tensor) else output.logprobs[:, 0]


def top_k_fields(job: ScoringJob, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Return what plan and manifest say of `--top-k`: nothing without it."""
    if job.top_k is None:
        return {}
    fields = {
        "k": job.top_k,
        "responses": job.top_k_responses,
        "temperature": 1.0,
        "vocab_size": _vocab_size(job),
        "end_of_turn_ids": list(tokenizer.end_of_turn_ids),
    }
    return {"top_k": fields}


def _vocab_size(job: ScoringJob) -> int:
    config = read_hf_config(job.model)
    return int(config.get("text_config", config)["vocab_size"])


def check_top_k(job: ScoringJob, tokenizer: ChatTokenizer, names: Sequence[str]) -> None:
    """Refuse what a model, a tokenizer or records cannot give, before a model is loaded.

    Args:
        job: one with `--top-k`.
        tokenizer: the model's.
        names: of the records' responses.

    Raises:
        UserError: the vocabulary is smaller, tokens are no bytes, or no response is the chosen one.
    """
    assert job.top_k is not None
    if job.top_k > _vocab_size(job):
        raise UserError(
            f"--top-k is {job.top_k}, but {job.model} has {_vocab_size(job)} tokens (vocab_size)"
        )
    if job.top_k_responses == "chosen" and names[0] not in RESPONSES:
        raise UserError(
            "--top-k-responses chosen has no meaning for lists, whose responses are all equal: "
            "leave it out"
        )
    tokenizer.token_bytes  # noqa: B018  (raises)
