"""Scores of responses, and the preference pairs that follow from them."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.files import iter_raw
from megatron_infifpo.records.records import BadRecordError, PreferenceRecord
from megatron_infifpo.responses.answers import BROKEN, Response
from megatron_infifpo.responses.prompts import Prompt, parse_prompt
from megatron_infifpo.responses.scorers import Scorer, UnjudgedError


@dataclass
class Responses:
    """All responses to one prompt.

    Attributes:
        prompt: the prompt.
        given: `[N]`, by model: each one's own response, with its own reasoning. None is empty, all
            of one place have one text, no two places do, but for outer white space.
    """

    prompt: Prompt
    given: list[dict[str, Response]] = field(default_factory=list)

    @property
    def answers(self) -> list[Response]:
        """Return `[N]` responses; of several models' the one of the first model by name."""
        return [own[min(own)] for own in self.given]

    @property
    def models(self) -> list[set[str]]:
        """Return who gave each, `[N]`."""
        return [set(own) for own in self.given]

    def add(self, answer: Response, model: str) -> None:
        """Add a response, or a model to those that gave it; what reasons otherwise is the same.

        Of one model's equal answers one that reasons is kept, the first by the text of its
        reasoning: which one does not depend on the order in which they are added.
        """
        judged = _judged(answer)
        for own in self.given:
            if _judged(next(iter(own.values()))) == judged:
                own[model] = min(own.get(model, answer), answer, key=_order)
                return
        if answer.text.strip() or answer.tool_calls:
            self.given.append({model: answer})


def _order(answer: Response) -> tuple[bool, str, str]:
    return not answer.reasoning, answer.reasoning or "", answer.text


def _judged(answer: Response) -> tuple[str, str]:
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
        for raw in iter_raw(Path(path)):
            try:
                if raw.error is not None:
                    raise BadRecordError(raw.error)
                answers = _answers(raw.value)
                prompt = parse_prompt(raw.value, f"{raw.stem}-{raw.index}")
                known = found.get(prompt.id, Responses(prompt))
                if _rendered(known.prompt) != _rendered(prompt):
                    raise BadRecordError(f"{prompt.id!r} is another prompt than before")
            except BadRecordError as error:
                if skipped is None:
                    raise UserError(f"{raw.where}: {error}") from None
                skipped.append(f"{raw.where}: {error}")
                continue
            found[prompt.id] = known
            for answer in answers:
                fault = answer.fault
                if fault is None or (keep_cut and answer.kept_if_cut):
                    known.add(answer, str(raw.value.get("model", raw.stem)))
                elif dropped is not None:
                    dropped[fault] += 1
    return found


def _rendered(prompt: Prompt) -> tuple[Any, ...]:
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


def choose_pair(
    responses: Responses, scores: Sequence[float], pivot: str | None
) -> PreferenceRecord | str:
    """Best and worst of all responses, and the pivot's own best; the first one wins ties.

    The worst is another than the pivot's best, as a record asks for. Where several models gave the
    best or the worst answer, its reasoning is that of the first model by name; the pivot's best
    has the pivot's own.

    Args:
        responses: N of them.
        scores: `[N]`.
        pivot: name of the pivot in the responses, for WRPO; or None.

    Returns:
        The record, or why there is none.
    """
    if len(scores) < 2:
        return "fewer than two different responses"
    if not all(map(_is_number, scores)):
        return "a score is not a finite number"
    if max(scores) == min(scores):
        return "no contrast: all scores are equal"
    own = [i for i, models in enumerate(responses.models) if pivot in models]
    if pivot is not None and not own:
        return f"no response of the pivot {pivot}"
    own_best = max(own, key=lambda i: scores[i], default=None)
    best = scores.index(max(scores))
    worst = [i for i, score in enumerate(scores) if score < scores[best] and i != own_best]
    if not worst:
        return "no response is worse than the best but the pivot's best one"
    worst_one = min(worst, key=lambda i: scores[i])
    prompt, answers = responses.prompt, responses.answers
    replies = [answers[best].message(), answers[worst_one].message()]
    if own_best is not None:
        replies.append(responses.given[own_best][str(pivot)].message())
    return PreferenceRecord(
        prompt.id,
        prompt.domain,
        prompt.messages,
        tuple((message,) for message in replies),
        tools=prompt.tools,
        template_options=prompt.template_options,
    )


def _is_number(score: Any) -> bool:
    return isinstance(score, int | float) and abs(score) < float("inf")


def label(
    all_responses: Iterable[Responses],
    scorer: Scorer,
    scorer_name: str,
    cache: Path,
    pivot: str | None,
    dropped: Counter[str],
    *,
    skip: bool = False,
) -> Iterator[PreferenceRecord]:
    """Yield the pairs; scores are kept in a file, so that an interrupted job goes on.

    Args:
        all_responses: by prompt.
        scorer: called for prompts whose scores are not there yet.
        scorer_name: what it is; scores of another one are not used.
        cache: JSON lines `{"id", "scorer", "judged_sha256", "models", "responses", "scores"}`.
        pivot: see `choose_pair`.
        dropped: counts prompts that give no pair, by reason.
        skip: count a prompt that cannot be judged, too; else it is an error.

    Raises:
        UserError: a prompt cannot be judged.
    """
    known = _read_cache(cache, scorer_name)
    with cache.open("a", encoding="utf-8") as file:
        for responses in all_responses:
            prompt, texts = responses.prompt, [answer.text for answer in responses.answers]
            seen = json.dumps([*map(_judged, responses.answers), _rendered(prompt)], default=str)
            judged = hashlib.sha256(seen.encode()).hexdigest()
            before = known.get(prompt.id)
            if before is not None and before.get("judged_sha256") == judged:
                scores = before["scores"]
            else:
                try:
                    scores = scorer(prompt, responses.answers) if texts else []
                except UnjudgedError as error:
                    if not skip:
                        raise
                    dropped[error.reason] += 1
                    continue
                entry = {
                    "id": prompt.id,
                    "scorer": scorer_name,
                    "judged_sha256": judged,
                    "models": [sorted(models) for models in responses.models],
                    "responses": texts,
                    "scores": scores,
                }
                print(json.dumps(entry), file=file, flush=True)
            found = choose_pair(responses, scores, pivot)
            if isinstance(found, str):
                dropped[found] += 1
            else:
                yield found


def _read_cache(path: Path, scorer_name: str) -> dict[str, Any]:
    """Read the scores that are there; the last line may have been cut short."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("scorer") == scorer_name:
            found[entry["id"]] = entry
    return found
