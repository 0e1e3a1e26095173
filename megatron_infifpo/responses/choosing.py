"""Records of judged responses: the pair of best and worst, or the list of all of them."""

from collections.abc import Sequence
from typing import Any

from megatron_infifpo.records.fields import same_reply
from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.responses.answers import CUT, Response
from megatron_infifpo.responses.labels import Responses
from megatron_infifpo.responses.prompts import Prompt

ONE = "fewer than two different responses"
NO_NUMBER = "a score is not a finite number"


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
        return ONE
    if not all(map(is_number, scores)):
        return NO_NUMBER
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
    places, answers = [best, worst_one], [responses.answers[i] for i in (best, worst_one)]
    if own_best is not None:
        places.append(own_best)
        answers.append(responses.given[own_best][str(pivot)])
    return _record(responses.prompt, answers, [scores[i] for i in places])


def choose_list(
    responses: Responses, scores: Sequence[float], longest: int, cut_penalty: float = 0.0
) -> PreferenceRecord | str:
    """Return the first responses that were sampled, with their scores, whatever these are.

    A list is a sample of its models: choosing by score, or joining equal responses, would make
    another distribution of it than the one that a policy gradient is the mean over. Of several
    models the first response of each comes first, then the second of each.

    Args:
        responses: of N different texts.
        scores: `[N]`.
        longest: responses at most.
        cut_penalty: subtracted from the score of a response that was cut.

    Returns:
        The record, or why there is none.
    """
    samples = responses.in_turn()[:longest]
    found = [scores[sample.place] for sample in samples]
    if not all(map(is_number, found)):
        return NO_NUMBER
    answers = [sample.answer for sample in samples]
    penalties = [cut_penalty * (answer.fault == CUT) for answer in answers]
    found = [float(one) - penalty for one, penalty in zip(found, penalties, strict=True)]
    record = _record(responses.prompt, answers, found, listed=True)
    # All equal, they teach nothing: the loss of a list is in how its responses differ.
    if all(same_reply(record.responses[0], other) for other in record.responses):
        return ONE
    return record


def _record(
    prompt: Prompt, answers: Sequence[Response], scores: Sequence[float], *, listed: bool = False
) -> PreferenceRecord:
    cut = tuple(answer.fault == CUT for answer in answers)
    return PreferenceRecord(
        prompt.id,
        prompt.domain,
        prompt.messages,
        tuple((answer.message(),) for answer in answers),
        scores=tuple(map(float, scores)),
        listed=listed,
        cut=cut if any(cut) else (),
        tools=prompt.tools,
        template_options=prompt.template_options,
    )


def is_number(score: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(score, int | float) and abs(score) < float("inf")
