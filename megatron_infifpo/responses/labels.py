"""Files of sampled responses, joined by prompt: what is judged, and every sample of it."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.fields import has_answer, is_reply
from megatron_infifpo.records.files import iter_raw
from megatron_infifpo.records.records import BadRecordError
from megatron_infifpo.responses.answers import BROKEN, CUT, EMPTY, Response
from megatron_infifpo.responses.prompts import Prompt, parse_prompt


class Sample(NamedTuple):
    """One response as it was sampled.

    Attributes:
        answer: the response.
        model: that gave it.
        place: of what is judged of it in `Responses.given`.
    """

    answer: Response
    model: str
    place: int


MARKED = "with marks of a chat template"


@dataclass
class Responses:
    """All responses to one prompt.

    Attributes:
        prompt: the prompt.
        given: `[N]` what is judged, by model: each one's own response, with its own reasoning. All
            of one place have one text, no two places do, but for outer white space.
        samples: all responses in the order in which they were read, equal ones too.
    """

    prompt: Prompt
    given: list[dict[str, Response]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def answers(self) -> list[Response]:
        """Return `[N]` responses; of several models' the one of the first model by name."""
        return [own[min(own)] for own in self.given]

    @property
    def models(self) -> list[set[str]]:
        """Return who gave each, `[N]`."""
        return [set(own) for own in self.given]

    def add(self, answer: Response, model: str) -> None:
        """Add a response; what reasons otherwise is judged as the same.

        Of one model's equal answers `given` has one that is not cut and reasons, the first by the
        text of its reasoning: which one does not depend on the order in which they are added.
        """
        seen = judged(answer)
        known = (i for i, own in enumerate(self.given) if judged(next(iter(own.values()))) == seen)
        place = next(known, len(self.given))
        if place == len(self.given):
            self.given.append({})
        own = self.given[place]
        own[model] = min(own.get(model, answer), answer, key=_order)
        self.samples.append(Sample(answer, model, place))

    def in_turn(self) -> list[Sample]:
        """Return the samples: every model's first, every model's second, ..., as they were read."""
        count: Counter[str] = Counter()
        turns = []
        for sample in self.samples:
            turns.append(count[sample.model])
            count[sample.model] += 1
        return [self.samples[i] for i in sorted(range(len(turns)), key=turns.__getitem__)]


def _order(answer: Response) -> tuple[bool, bool, str, str]:
    return answer.fault == CUT, not answer.reasoning, answer.reasoning or "", answer.text


def judged(answer: Response) -> tuple[str, str]:
    """Return what of a response is judged."""
    return answer.text.strip(), json.dumps(answer.tool_calls, sort_keys=True)


def read_responses(
    paths: Sequence[str | Path],
    *,
    keep_cut: bool = False,
    skipped: list[str] | None = None,
    dropped: Counter[str] | None = None,
) -> dict[str, Responses]:
    """Join the files that `infifpo sample` wrote, by the prompts' ids.

    Args:
        paths: the files.
        keep_cut: take responses that were cut at the most tokens, too.
        skipped: receives a message for every bad line; without it the first one is an error.
        dropped: counts responses that are left out, by reason.

    Raises:
        UserError: not such a file, or two prompts have one id.
    """
    found: dict[str, Responses] = {}
    for path in paths:
        for raw in iter_raw(Path(path), wanted="responses that infifpo sample wrote"):
            try:
                if raw.error is not None:
                    raise BadRecordError(raw.error)
                answers = _answers(raw.value)
                prompt = parse_prompt(raw.value, f"{raw.stem}-{raw.index}")
                known = found.get(prompt.id, Responses(prompt))
                if rendered(known.prompt) != rendered(prompt):
                    raise BadRecordError(f"{prompt.id!r} is another prompt than before")
            except BadRecordError as error:
                if skipped is None:
                    raise UserError(f"{raw.where}: {error}") from None
                skipped.append(f"{raw.where}: {error}")
                continue
            found[prompt.id] = known
            for answer in answers:
                fault, flaw = answer.fault, _flaw(answer)
                if flaw is None and (fault is None or (keep_cut and answer.kept_if_cut)):
                    known.add(answer, str(raw.value.get("model", raw.stem)))
                elif dropped is not None:
                    dropped[fault or flaw or EMPTY] += 1
    return found


def _flaw(answer: Response) -> str | None:
    """Why no record may have it, or None: reasoning is all that it says, or a template's mark."""
    message = answer.message()
    if not has_answer(message):
        return EMPTY
    return None if is_reply(message) else MARKED


def rendered(prompt: Prompt) -> tuple[Any, ...]:
    """Return what of a prompt a template renders."""
    return prompt.messages, prompt.tools, prompt.template_options


def _answers(value: Any) -> list[Response]:
    """Read the responses of a line.

    Raises:
        BadRecordError: there are none, or their fields are not aligned.
    """
    texts = value.get("responses") if isinstance(value, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRecordError("no list of responses, expected a line written by infifpo sample")
    columns = []
    for name, kind, default in (
        ("finish_reasons", str, "stop"),
        ("reasoning", str | None, None),
        ("tool_calls", list | None, None),
    ):
        column = value.get(name)
        column = [default] * len(texts) if column is None else column
        right = isinstance(column, list) and len(column) == len(texts)
        if not right or not all(isinstance(one, kind) for one in column):
            raise BadRecordError(f"field {name!r} is not a list with one entry a response")
        columns.append(column)
    found = [
        Response(text, finish, reasoning, tuple(calls or ()))
        for text, finish, reasoning, calls in zip(texts, *columns, strict=True)
    ]
    if any(one.fault == BROKEN for one in found):
        raise BadRecordError("a response holds half a surrogate pair, expected valid Unicode text")
    return found
