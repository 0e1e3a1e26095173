"""Compare an engine's own log-probs of a few responses with those that scoring gives them.

They differ where the engine renders prompts with another template, or has other weights, than the
model that is scored: then the responses are not of the policy that training takes them for.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_infifpo.convert.fingerprint import Weights
from megatron_infifpo.engine.hf_model import load_causal_lm
from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.responses.engines import Engine, Measured, TransformersEngine
from megatron_infifpo.responses.turns import Turns
from megatron_infifpo.scoring.agreement import MEAN, device_beside
from megatron_infifpo.storage.aside import make_folder
from megatron_infifpo.tokens.measured import MeasuredResponse, write_measured
from megatron_infifpo.tokens.tokenization import ChatTokenizer

MAX_TOKENS = 64  # of a response
LONG = (
    "; and this model's rope depends on how long a text is: one that crosses its limit while it is "
    "written has begun with other angles than it is scored with"
)


class Scorer:
    """Scores one response at a time.

    Attributes:
        by_length: whether the model's rope depends on how long a text is.
    """

    def __init__(self, network: Any) -> None:
        """Take a model of transformers, freshly loaded."""
        # Here: it imports Megatron, which takes seconds.
        from megatron_infifpo.scoring.transformers_backend import TransformersBackend

        self._backend = TransformersBackend(network)
        self.by_length = self._backend.rule.by_length

    def __call__(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Tensor:
        """Return the float32 log-probs `[L]` of a response's tokens `[L]`."""
        from megatron_infifpo.rows.packing import collate_text

        prompt, response = (np.asarray(ids, np.int32) for ids in (prompt_ids, response_ids))
        return self._backend([collate_text(prompt, response)])[0]


@dataclass
class Comparison:
    """What came of the comparison.

    Attributes:
        differences: of every token that was compared, in nats.
        responses: how many there were.
        otherwise: how many of them are not scored as they were sampled, by reason.
        by_length: whether the model's rope depends on how long a text is.
    """

    differences: list[float] = field(default_factory=list)
    responses: int = 0
    otherwise: Counter[str] = field(default_factory=Counter)
    by_length: bool = False

    @property
    def largest(self) -> float:
        """The largest difference of a token."""
        return max(self.differences, default=0.0)

    @property
    def mean(self) -> float:
        """The mean difference of the tokens."""
        return sum(self.differences) / max(1, len(self.differences))

    def agrees(self, tolerance: float) -> bool:
        """Whether all that was compared agrees, and something was."""
        close = self.largest <= tolerance and self.mean <= tolerance * MEAN
        return close and bool(self.differences)

    def sentence(self, tolerance: float, model: str) -> str:
        """Say what came of it."""
        said = (
            f"log-probs of the engine and of the scorer: {len(self.differences)} tokens of "
            f"{self.responses} responses differ by {self.largest:.2g} at most, {self.mean:.2g} in "
            f"the mean (accepted: {tolerance:g} and {tolerance * MEAN:g})"
        )
        for reason, count in self.otherwise.items():
            said += f"; {count} of the responses {reason}"
        if self.agrees(tolerance):
            return said
        return (
            f"{said}. What the engine samples from is not what is scored with {model}: expected "
            "the same chat template with the same options, and the same weights (stale or "
            "quantized ones differ)"
        ) + (LONG if self.by_length else "")


def compare_with(measured: Sequence[Measured], chat: ChatTokenizer, scorer: Scorer) -> Comparison:
    """Compare what an engine has measured with what scoring gives the same tokens."""
    found = Comparison(by_length=scorer.by_length)
    for one in measured:
        _compare(one, chat, scorer, found)
    return found


def keep(
    output: Path, measured: Sequence[Measured], model: str, weights: Weights | None = None
) -> None:
    """Write what was measured to OUTPUT.measured; not that of a server, which gives no ids.

    A run that trains on the responses tells by it whether it starts from the model that gave them.
    All parts of a job measure the same: whose file stays is no matter.

    Args:
        output: of the job.
        measured: a few responses.
        model: its name.
        weights: its own, where they are known.
    """
    found = [
        MeasuredResponse(
            one.prompt.id,
            np.array(one.prompt_ids, np.int32),
            np.array(one.tokens, np.int32),
            np.array(one.logprobs, np.float32),
            model,
            *(weights or (None, None)),
        )
        for one in measured
        if one.prompt_ids and one.tokens
    ]
    if found:
        make_folder(output.parent)
        write_measured(f"{output}.measured", found)


def _compare(one: Measured, chat: ChatTokenizer, scorer: Scorer, found: Comparison) -> None:
    found.responses += 1
    opened = Turns(chat).open(one.prompt)
    ours = _scored_ids(one, chat, opened.ids)
    if isinstance(ours, str):
        found.otherwise[ours] += 1
    ids = [token for token in one.tokens if isinstance(token, int)]
    if not ids:  # a server's texts: as many ids as have the same
        texts = [str(token) for token in one.tokens]
        known = chat.tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
        known = known if isinstance(ours, str) else ours
        pairs = zip(texts, map(chat.tokenizer.decode, known), strict=False)
        ids = known[: _same((_plain(a), _plain(b)) for a, b in pairs)]
    if not isinstance(ours, str) and (ours[: len(ids)] != ids or len(ids) < len(one.tokens)):
        found.otherwise["are tokenized otherwise when they are scored"] += 1
    if ids:
        expected = scorer(opened.ids, ids)
        found.differences += (torch.tensor(one.logprobs[: len(ids)]) - expected).abs().tolist()


def _same(pairs: Iterable[tuple[str, str]]) -> int:
    """Return how many pairs there are before one that differs."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _scored_ids(one: Measured, chat: ChatTokenizer, prompt_ids: list[int]) -> list[int] | str:
    """Return the ids that scoring gives a response, or how it is scored otherwise."""
    message = one.response.message()
    if not message["content"]:
        message["content"] = "."  # cut within its reasoning: what comes after is not compared
    record = PreferenceRecord(
        one.prompt.id, one.prompt.domain, one.prompt.messages, ((message,), (message,)),
        tools=one.prompt.tools, template_options=one.prompt.template_options,
    )  # fmt: skip
    try:
        tokens = chat.encode_batch([record])[0]
    except UserError as error:
        return f"cannot be scored ({error})"
    whole = [*tokens.prompt_ids.tolist(), *tokens.response_ids[0].tolist()]
    if whole[: len(prompt_ids)] != prompt_ids:
        why = f" ({'; '.join(tokens.notes)})" if tokens.notes else ""
        return f"are scored behind another prompt than they are sampled from{why}"
    return whole[len(prompt_ids) :]


def _plain(token: str) -> str:
    """Return a token's text without what servers write differently: the blank before a word."""
    return token.replace("\u2581", " ").replace("\u0120", " ").strip(" ")


def open_scorer(
    model: str | Path, engine: Engine, *, bf16: bool, trust_remote_code: bool
) -> Scorer:
    """Load a model as scoring does; what the engine has loaded itself is not loaded again.

    Raises:
        UserError: it cannot be loaded.
    """
    if isinstance(engine, TransformersEngine):
        network = engine.network
    else:
        network = load_causal_lm(
            model,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            trust_remote_code=trust_remote_code,
            device_map={"": device_beside(model)},
        )
    return Scorer(network)
