"""Ask an engine until every prompt has its responses, and count what was left out."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_infifpo.flag_types import check_positive, check_types
from megatron_infifpo.responses.answers import REFUSED, UNSENT, Response
from megatron_infifpo.responses.engines import Engine
from megatron_infifpo.responses.prompts import Prompt


@dataclass(frozen=True)
class Wanted:
    """What is asked of an engine.

    Attributes:
        count: whole responses of a prompt.
        retries: how often a prompt is asked again in vain.
        keep_cut: take responses that are cut, too.
    """

    count: int
    retries: int = 2
    keep_cut: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that are none.

        Raises:
            UserError: one is not.
        """
        check_types(self)
        check_positive(self, "count")
        check_positive(self, "retries", least=0)

    def takes(self, response: Response) -> bool:
        """Whether a response is one of those that are wanted."""
        return response.fault is None or (self.keep_cut and response.kept_if_cut)


@dataclass
class Answers:
    """What came of one prompt.

    Attributes:
        kept: responses, at most as many as were asked.
        missing: why the others are not there: faults of the last time that it was asked.
        left_out: all responses that were left out, by fault.
    """

    kept: list[Response] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, responses: Sequence[Response], wanted: Wanted) -> int:
        """Take what came; return how much of it is kept."""
        asked = wanted.count - len(self.kept)
        responses = responses[:asked]
        taken = [response for response in responses if wanted.takes(response)]
        faults = Counter(r.fault or "" for r in responses if not wanted.takes(r))
        self.kept += taken
        self.left_out += faults
        refused = faults[REFUSED]
        self.missing = faults + Counter({UNSENT: asked - len(responses)})
        if refused:  # said once for all of them
            self.missing = Counter({REFUSED: asked})
        return len(taken)


def complete(
    engine: Engine, prompts: Sequence[Prompt], wanted: Wanted, seed: tuple[int, int]
) -> list[Answers]:
    """Ask until there are as many responses as wanted.

    What is missing (because it is cut, empty, or was not sent: some servers know no `n`) is asked
    for again, with another seed. Only an answer without a single response to keep counts as a
    retry.

    Args:
        engine: samples.
        prompts: of one shard.
        wanted: how many of which.
        seed: of the job, and the number of the shard.
    """
    answers = [Answers() for _ in prompts]
    pending = {i: wanted.retries for i in range(len(prompts))}
    turn = 0
    while pending:
        indices = list(pending)
        found = engine.sample(
            [prompts[i] for i in indices],
            [wanted.count - len(answers[i].kept) for i in indices],
            _derive(*seed, turn),
        )
        for i, responses in zip(indices, found, strict=True):
            kept = answers[i].add(responses, wanted)
            pending[i] -= not kept
            if not answers[i].missing.total() or pending[i] < 0 or answers[i].missing[REFUSED]:
                del pending[i]
        turn += 1
    return answers


def _derive(*numbers: int) -> int:
    """Return a seed that any engine takes: 31 bits."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4]) >> 1


def to_line(prompt: Prompt, answers: Answers, wanted: Wanted, model: str) -> dict[str, Any]:
    """Return the line of a prompt in the output; docs/from-prompts.md describes it."""
    line: dict[str, Any] = {"id": prompt.id, "domain": prompt.domain}
    line["prompt"] = list(prompt.messages)
    if prompt.tools:
        line["tools"] = list(prompt.tools)
    if prompt.template_options:
        line["chat_template_kwargs"] = prompt.template_options
    kept = answers.kept
    line |= {"model": model, "responses": [response.text for response in kept]}
    if any(response.reasoning for response in kept):
        line["reasoning"] = [response.reasoning for response in kept]
    if any(response.tool_calls for response in kept):
        line["tool_calls"] = [list(response.tool_calls) for response in kept]
    line |= {"finish_reasons": [response.finish for response in kept], "asked": wanted.count}
    if answers.missing.total():
        line["missing"] = dict(answers.missing)
    if answers.left_out:
        line["left_out"] = dict(answers.left_out)
    return line | {"extra": prompt.extra}
